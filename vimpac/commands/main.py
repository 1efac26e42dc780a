"""The `vimpac` command: the table of its subcommands, and running one.

A subcommand is a function. Its docstring is the help, its arguments are the options; it imports torch and numpy when it runs.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from vimpac import __version__
from vimpac.commands import figures, labels, train
from vimpac.commands.convert_dalle import convert_dalle
from vimpac.commands.evaluate import evaluate
from vimpac.commands.features import features
from vimpac.commands.import_checkpoint import import_checkpoint
from vimpac.commands.options import Commands, Group, OwnParser, command_name, read_command
from vimpac.commands.predict import predict
from vimpac.commands.probe import probe
from vimpac.commands.similar import similar
from vimpac.commands.synthesize import synthesize
from vimpac.commands.tokenize import tokenize
from vimpac.commands.verify import verify
from vimpac.console import command_errors, say
from vimpac.errors import InputError

DESCRIPTION = (
    "Video pre-training on discrete tokens. `vimpac COMMAND --help` shows a command's options, `vimpac --version` the versions "
    "of vimpac and torch."
)
TRAIN = """Pre-train a model: `vimpac train --help` lists the presets, `vimpac train PRESET --help` every field.

Example: vimpac train small --data store/ --output runs/mine"""


def doctor() -> None:
    """Print versions, devices, how the extension was built, and for each op which backend runs here and why not another.

    Example: vimpac doctor
    """
    from vimpac.commands.doctor import report

    for line in report().splitlines():
        say(line)


COMMANDS: Commands = {
    "tokenize": tokenize,
    "synthesize": synthesize,
    "verify": verify,
    "convert-dalle": convert_dalle,
    "import-checkpoint": import_checkpoint,
    "train": OwnParser(TRAIN, train.main),
    "features": features,
    "probe": probe,
    "similar": similar,
    "evaluate": evaluate,
    "predict": predict,
    "figures": Group(figures.DESCRIPTION, figures.FIGURES),
    "labels": Group(labels.DESCRIPTION, labels.LABELS),
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: that of `command_errors`."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's: a file name may not be text in the output's encoding
    command = COMMANDS.get(words[0]) if words else None
    if isinstance(command, OwnParser):
        return command.main(words[1:], f"vimpac {words[0]}")
    with command_errors(command_name(COMMANDS, words, "vimpac")) as status:
        _run(words)
    return status.code


def _run(words: list[str]) -> None:
    if words == ["--version"]:
        say(f"vimpac {__version__}, torch {importlib.metadata.version('torch')}")  # importing torch takes a second
        return
    if any(not word or (word.startswith("--") and word.endswith("=")) for word in words):
        raise InputError("an argument is empty, expected a path or a value; is a shell variable unset?")
    read_command(COMMANDS, words, "vimpac", DESCRIPTION)()


if __name__ == "__main__":
    sys.exit(main())
