"""`python -m vimpac` is the command `vimpac`, where that is not on PATH."""

import sys

from vimpac.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
