"""`python -m trimtab.cli`."""

import sys

from trimtab.cli import main

if __name__ == "__main__":
    sys.exit(main())
