"""Pre-train a model: `torchrun train.py PRESET --data STORE --output DIR [--field value …]`, or python for one process.

`train.py PRESET --help` lists every field. Where the package is installed without this file, `vimpac train` is the same.
"""

import sys
from collections.abc import Sequence

from vimpac.commands import train as command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return command.main(sys.argv[1:] if arguments is None else arguments, "train.py")


if __name__ == "__main__":
    sys.exit(main())
