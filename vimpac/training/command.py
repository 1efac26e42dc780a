"""The command that trains: `train.py PRESET …` in a checkout, `vimpac train PRESET …` wherever the package is installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO

import tyro

from vimpac.config import PRESETS, TrainConfig
from vimpac.errors import FIXABLE, InputError, Stopped, reader_left

DESCRIPTION = """Pre-train a model.

Presets are the configurations of the paper, and demo; `PRESET --help` lists every field with its value there.

Example: vimpac train small --data store/ --output runs/mine

On several GPUs: torchrun train.py PRESET …, or torchrun -m vimpac train PRESET …"""


def main(arguments: Sequence[str], prog: str) -> int:
    """Trains as the words of the command line `prog` say.

    Returns the exit status: 0, 1 after a mistake that the user can fix, 128 + the signal's number after a signal.
    """
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one process a machine reports what stopped all of them
    try:
        config = parse(arguments, prog)
        from vimpac.training.pretrain import pretrain  # torch and all: not needed for --help

        try:
            pretrain(config)
            sys.stdout.flush()
        except Stopped as stopped:
            if speaks:
                print(f"{prog}: {stopped}", file=sys.stderr)
            return 128 + stopped.signal
    except BrokenPipeError:
        return reader_left()
    except InputError as error:
        if speaks:
            print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in FIXABLE:
            raise
        if speaks:
            print(f"{prog}: error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse(words: Sequence[str], prog: str) -> TrainConfig:
    """The preset's configuration with the overrides of the command line. Raises InputError for bad values."""
    read = partial(tyro.extras.overridable_config_cli, PRESETS, prog=prog, description=DESCRIPTION, args=words)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            config = read()
        return holding_to(config, words)
    except SystemExit as end:
        cause = end.__context__
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__context__
        if cause is not None:  # the configuration's own message, without tyro's frame around it
            raise cause from None
    return read()  # --help or a misspelt option: tyro explains and exits


def holding_to(config: TrainConfig, words: Sequence[str]) -> TrainConfig:
    """The configuration with nothing that would replace what the command line gave. Raises InputError where the store must."""
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    if "--model.vocab-size" in given:
        raise InputError(
            f"--model.vocab-size {config.model.vocab_size} cannot be chosen here, the vocabulary is the store's: leave it out, "
            f"or make a store with `vimpac tokenize VIDEOS STORE --codes {config.model.vocab_size}` and give --data STORE"
        )
    if config.fit_frame_size and "--model.grid" in given and "--fit-frame-size" not in given:
        return replace(config, fit_frame_size=False)  # the preset's: a store of another frame size is refused instead
    return config
