"""The `vimpac` command. A subcommand is a function below: its docstring is the help, its arguments are the options."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import tyro

from vimpac import __version__
from vimpac.commands.options import read_options
from vimpac.config import SynthesizeConfig, TokenizeConfig
from vimpac.console import count, run_command, say
from vimpac.errors import InputError
from vimpac.processes.ranks import begin_rank, read_place

Flat = tyro.conf.arg(name="")


def tokenize(
    videos: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEOS")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    config: Annotated[TokenizeConfig, Flat],
) -> None:
    """Turn a folder of videos into a store of discrete tokens.

    Run again after an interruption or with more videos, it adds what is missing. Files that cannot be decoded and folders
    that cannot be listed are named at the end with the reason, as are files of another size than when they were
    tokenized. Under torchrun the ranks share the videos; a second run on the same OUT is refused until the first ends.
    What is in the store already is checked first: sizes, and checksums up to 1 GiB; `vimpac verify OUT` reads every
    checksum.

    Example: vimpac tokenize videos/ store/ --frame-size 128 --fps 2

    Args:
        videos: Folder that is searched, with its subfolders, for video files; what else is there is counted.
        out: Folder of the token store to write.
    """
    begin_rank()
    place = read_place()
    from vimpac.data.build import tokenize_videos
    from vimpac.data.video import count_extensions

    summary = tokenize_videos(videos, out, config, place.rank, place.size)
    if place.rank:
        return
    rate = summary.frames / max(summary.seconds, 1e-9)
    say(
        f"{out}: {count(summary.videos, 'video')}, {count(summary.frames, 'frame')}, {count(summary.tokens, 'token')} "
        f"in {summary.seconds:.1f} s ({rate:.0f} frames/s)"
    )
    if present := summary.present:
        whole = ", nothing was missing" * (not summary.videos and not summary.failed)
        say(f"{count(present, 'video was', 'videos were')} in the store already{whole}")
    if others := summary.passed_over:
        say(f"{count(sum(others.values()), 'file')} passed over for the extension: {count_extensions(others)}")
    _list_names(
        dict.fromkeys(summary.changed, ""),
        f"{count(len(summary.changed), 'file has', 'files have')} another size than when tokenized; the store keeps the old "
        "contents, a new OUT would hold the new:",
    )
    _list_names(
        dict.fromkeys(summary.deleted, ""),
        f"{count(len(summary.deleted), 'video')} of the store, not in {videos} any more; the store keeps what it has of them:",
    )
    _list_names(
        summary.unlisted,
        f"{count(len(summary.unlisted), 'folder')} could not be looked into; the store lacks what is in there:",
    )
    _list_names(summary.failed, f"{count(len(summary.failed), 'video')} failed:")
    if summary.present:
        say(f"`vimpac verify {out}` checks every checksum, those of a store above 1 GiB too")


def _list_names(names: dict[str, str], title: str) -> None:
    """A line a name with what is said of it, under a title; nothing where there are none."""
    if names:
        say(title)
    for name, words in sorted(names.items()):
        say(f"  {name}: {words}" if words else f"  {name}")


def synthesize(
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")], config: Annotated[SynthesizeConfig, Flat]
) -> None:
    """Write labelled videos of textured shapes in motion, to try everything without a data set.

    Example: vimpac synthesize videos/ --videos 256

    Args:
        out: Folder to write the videos and their labels to.
    """
    from rich.console import Console
    from rich.progress import Progress

    from vimpac.data.synthetic import synthesize as write

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("drawing videos", total=config.videos)
        write(out, config, lambda done, _: progress.update(bar, completed=done))
    say(f"{out}: {count(config.videos, 'video')} of {config.seconds:g} s and labels.csv")


def verify(store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]) -> None:
    """Check every checksum, id and the tokenizer of a token store, that its parts fit each other, and print what it holds.

    Example: vimpac verify store/

    Args:
        store: Folder that `vimpac tokenize` wrote.
    """
    from vimpac.data.store import TokenStore, check_listed
    from vimpac.data.tokenizers import check_tokenizer_file

    tokens = TokenStore(store, verify=True)
    check_listed(store)
    check_tokenizer_file(store, tokens.tokenizer)
    tokenizer, (height, width) = tokens.tokenizer, tokens.grid
    frames = int(tokens.frames.sum())
    say(f"{store}: every checksum and the tokenizer are right")
    say(f"  videos     {len(tokens)}, {count(frames, 'frame')} at {tokens.fps:g} a second, {tokens.nbytes / 1e6:.1f} MB")
    say(f"  tokenizer  {tokenizer.name}, {count(tokenizer.vocab_size, 'code')}, digest {tokenizer.digest[:16]}")
    say(f"  frame      {tokens.frame_size} pixels, {height} × {width} tokens, {count(len(tokens.views), 'view')}")
    if tokens.failed:
        say(f"  failed     {count(len(tokens.failed), 'video')} could not be decoded")
    for name, reason in tokens.failed.items():
        say(f"    {name}: {reason}")


def convert_dalle(
    encoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER")],
    decoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DECODER")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
) -> None:
    """Convert OpenAI's pickled DALL-E tokenizer, the paper's, to one safetensors file.

    Needs `pip install --no-deps dall-e attrs`.

    Example: vimpac convert-dalle encoder.pkl decoder.pkl dalle.safetensors

    Args:
        encoder: OpenAI's encoder.pkl.
        decoder: OpenAI's decoder.pkl.
        out: The .safetensors file to write, for `vimpac tokenize --tokenizer dalle --tokenizer-path`.
    """
    from vimpac.data.tokenizers import DalleVAE

    DalleVAE.convert(encoder, decoder, out)
    say(f"wrote {out}")


def train() -> None:
    """Pre-train a model: `vimpac train --help` lists the presets, `vimpac train PRESET --help` every field.

    Example: vimpac train small --data store/ --output runs/mine
    """


def doctor() -> None:
    """Print versions, devices, how the extension was built, and for each op which backend runs here and why not another.

    Example: vimpac doctor
    """
    from vimpac.commands.doctor import report

    for line in report().splitlines():
        say(line)


COMMANDS = {
    "tokenize": tokenize,
    "synthesize": synthesize,
    "verify": verify,
    "convert-dalle": convert_dalle,
    "train": train,  # for the list of commands: `main` gives its words to the parser of train.py
    "doctor": doctor,
}


def _run(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        say(f"vimpac {__version__}, torch {importlib.metadata.version('torch')}")  # torch's import takes a second
        return
    if any(not word or (word.startswith("--") and word.endswith("=")) for word in arguments):
        raise InputError("an argument is empty, expected a path or a value; is a variable of the shell unset?")
    description = (
        "Video pre-training on discrete tokens. `vimpac COMMAND --help` shows a command's options, "
        "`vimpac --version` the versions of vimpac and torch."
    )
    commands = {name: _later(command) for name, command in COMMANDS.items()}
    read = partial(tyro.extras.subcommand_cli_from_dict, commands, prog="vimpac", description=description, args=arguments)
    read_options(read, arguments, f"vimpac {arguments[0]}" if arguments else "vimpac")()


def _later(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The command for the parser, which calls what it has parsed: to run afterwards."""

    @wraps(command)
    def bound(*arguments, **options) -> Callable[[], None]:
        return partial(command, *arguments, **options)

    return bound


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0; 1 after a mistake that the user can fix; 128 + n after signal n; 141 where what reads the output has ended.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's: a file's name may be no text in its encoding
    if arguments[:1] == ["train"]:
        from vimpac.commands import train as training

        return training.main(arguments[1:], "vimpac train")
    command = f"vimpac {arguments[0]}" if arguments and arguments[0] in COMMANDS else "vimpac"
    return run_command(partial(_run, arguments), command)


if __name__ == "__main__":
    sys.exit(main())
