"""Every method, one paper a file. Importing this package registers them."""

from trimtab.methods.language import bapo as bapo
from trimtab.methods.language import bases as bases
from trimtab.methods.language import bnpo as bnpo
