"""Every method, one paper a file. Importing this package registers them."""

from trimtab.methods.language import bases as bases
