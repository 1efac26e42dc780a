"""The command that trains: `train.py PRESET …` in a checkout, `vimpac train PRESET …` wherever the package is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import tyro

from vimpac.commands.options import read_options
from vimpac.config import PRESETS, TrainConfig
from vimpac.console import command_errors
from vimpac.errors import InputError
from vimpac.processes.ranks import begin_rank, read_place

DESCRIPTION = """Pre-train a model.

Presets are the configurations of the paper, and demo; `PRESET --help` lists every field with its value there.

Example: vimpac train small --data store/ --output runs/mine

On several GPUs: torchrun train.py PRESET …, or torchrun -m vimpac train PRESET …"""


def main(arguments: Sequence[str], prog: str) -> int:
    """Trains as the words of the command line `prog` say.

    Returns the exit status: 0, 1 after a mistake that the user can fix, 128 + the signal's number after a signal.
    """
    begin_rank()
    with command_errors(prog) as status:
        _train(arguments, prog)
    return status.code


def _train(arguments: Sequence[str], prog: str) -> None:
    config = parse(arguments, prog)
    read_place()  # a mistake there is said before torch is loaded
    from vimpac.training.pretrain import pretrain  # torch and all: not needed for --help

    pretrain(config)


def parse(words: Sequence[str], prog: str) -> TrainConfig:
    """The preset's configuration with the overrides of the command line. Raises InputError for bad values."""
    read = partial(tyro.extras.overridable_config_cli, PRESETS, prog=prog, description=DESCRIPTION, args=words)
    preset = next((f" {word}" for word in words if word in PRESETS), "")
    return holding_to(read_options(read, words, f"{prog}{preset}"), words)


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
