"""The command that trains: `train.py PRESET …` in a checkout, `vimpac train PRESET …` wherever the package is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import tyro

from vimpac.commands.options import read_options
from vimpac.config import FROM_SCRATCH, PRESETS, FinetuneConfig, PretrainConfig
from vimpac.console import command_errors
from vimpac.errors import InputError
from vimpac.processes.ranks import begin_rank, read_place

DESCRIPTION = """Pre-train or fine-tune a model.

Presets are the configurations of the paper, and two demos; `PRESET --help` lists every field with its value there.

Example: vimpac train small --data store/ --output runs/mine
         vimpac train finetune-ucf101 --data store/ --labels ucfTrainTestlist/ --from runs/mine --output runs/ucf101

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
    if isinstance(config, FinetuneConfig):  # imported here: torch and all are not needed for --help
        from vimpac.training.finetune import finetune

        finetune(config)
    else:
        from vimpac.training.pretrain import pretrain

        pretrain(config)


def parse(words: Sequence[str], prog: str) -> PretrainConfig | FinetuneConfig:
    """The preset's configuration with the overrides of the command line. Raises InputError for bad values."""
    read = partial(tyro.extras.overridable_config_cli, PRESETS, prog=prog, description=DESCRIPTION, args=words)
    preset = next((f" {word}" for word in words if word in PRESETS), "")
    return holding_to(read_options(read, words, f"{prog}{preset}"), words)


def holding_to(config: PretrainConfig | FinetuneConfig, words: Sequence[str]) -> PretrainConfig | FinetuneConfig:
    """The configuration with nothing that would replace what the command line gave. Raises InputError where the store must."""
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    if "--model.vocab-size" in given:
        raise InputError(
            f"--model.vocab-size {config.model.vocab_size} cannot be chosen here, the vocabulary is the store's: leave it out, "
            f"or make a store with `vimpac tokenize VIDEOS STORE --codes {config.model.vocab_size}` and give --data STORE"
        )
    if isinstance(config, FinetuneConfig):
        shape = sorted(word for word in given if word.startswith("--model.") and word != "--model.dropout")
        if shape and config.start not in (None, FROM_SCRATCH):
            raise InputError(
                f"{shape[0]} cannot be chosen here, the model's shape is that of --from {config.start}: leave it out, or train "
                f"a new model with --from {FROM_SCRATCH}"
            )
        return config
    if config.fit_frame_size and "--model.grid" in given and "--fit-frame-size" not in given:
        return replace(config, fit_frame_size=False)  # the preset's: a store of another frame size is refused instead
    return config
