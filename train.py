"""Pre-train a model.

    torchrun train.py PRESET --data STORE --output DIR [--field value …]
    python train.py PRESET …          the same in one process

Presets are the configurations of vimpac/config.py; `train.py PRESET --help` lists every field with its value there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO

import tyro

from vimpac.config import PRESETS, TrainConfig
from vimpac.errors import FIXABLE, InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 after a mistake that the user can fix, 128 + the signal's number after a signal."""
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one process a machine reports what stopped all of them
    try:
        config = parse(arguments)
        from vimpac.training.pretrain import pretrain  # torch and all: not needed for --help
        from vimpac.training.trainer import Stopped

        try:
            pretrain(config)
        except Stopped as stopped:
            if speaks:
                print(f"train.py: {stopped}", file=sys.stderr)
            return 128 + stopped.signal
    except InputError as error:
        if speaks:
            print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in FIXABLE:
            raise
        if speaks:
            print(f"train.py: error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The preset's configuration with the overrides of the command line. Raises InputError for bad values."""
    read = partial(tyro.extras.overridable_config_cli, PRESETS, prog="train.py", description=__doc__, args=arguments)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return read()
    except SystemExit as end:
        cause = end.__context__
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__context__
        if cause is not None:  # the configuration's own message, without tyro's frame around it
            raise cause from None
    return read()  # --help or a misspelt option: tyro explains and exits


if __name__ == "__main__":
    sys.exit(main())
