"""The `vimpac` command. A subcommand is a function below: its docstring is the help, its arguments are the options."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import tyro

from vimpac import __version__
from vimpac.config import SynthesizeConfig, TokenizeConfig
from vimpac.errors import FIXABLE, InputError, Stopped, reader_left

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
    from vimpac.data.tokenize import tokenize_videos
    from vimpac.data.video import count_extensions

    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    summary = tokenize_videos(videos, out, config, rank, world)
    if rank:
        return
    rate = summary.frames / max(summary.seconds, 1e-9)
    print(
        f"{out}: {summary.videos} videos, {summary.frames} frames, {summary.tokens} tokens "
        f"in {summary.seconds:.1f} s ({rate:.0f} frames/s)"
    )
    if summary.present:
        print(f"{summary.present} videos were in the store already" + (", it is complete" * (not summary.videos)))
    if others := summary.passed_over:
        print(f"{sum(others.values())} files were passed over for their extension: {count_extensions(others)}")
    if summary.changed:
        print(f"{len(summary.changed)} files changed since, the store keeps their old contents; a new OUT would hold the new:")
    for name in summary.changed:
        print(f"  {name}")
    if deleted := summary.deleted:
        named = ", ".join(deleted[:3]) + f" and {len(deleted) - 3} more" * (len(deleted) > 3)
        print(f"the store keeps {len(deleted)} of its videos that {videos} does not hold any more: {named}")
    if summary.unlisted:
        print(f"{len(summary.unlisted)} folders could not be looked into, the store lacks what they hold:")
    for name, reason in sorted(summary.unlisted.items()):
        print(f"  {name}: {reason}")
    if summary.failed:
        print(f"{len(summary.failed)} videos failed:")
    for name, reason in sorted(summary.failed.items()):
        print(f"  {name}: {reason}")
    if summary.present:
        print(f"`vimpac verify {out}` checks every checksum, those of a store above 1 GiB too")


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
    print(f"{out}: {config.videos} videos of {config.seconds:g} s and labels.csv")


def verify(store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]) -> None:
    """Check every checksum, id and the tokenizer of a token store, that its parts fit each other, and print what it holds.

    Example: vimpac verify store/

    Args:
        store: Folder that `vimpac tokenize` wrote.
    """
    from vimpac.data.store import TokenStore, check_listed
    from vimpac.data.tokenizer import check_tokenizer_file

    tokens = TokenStore(store, verify=True)
    check_listed(store)
    check_tokenizer_file(store, tokens.tokenizer)
    tokenizer, (height, width) = tokens.tokenizer, tokens.grid
    frames = int(tokens.frames.sum())
    print(f"{store}: every checksum and the tokenizer are right")
    print(f"  videos     {len(tokens)}, {frames} frames at {tokens.fps:g} a second, {tokens.nbytes / 1e6:.1f} MB")
    print(f"  tokenizer  {tokenizer.name}, {tokenizer.vocab_size} codes, digest {tokenizer.digest[:16]}")
    print(f"  frame      {tokens.frame_size} pixels, {height} × {width} tokens, {len(tokens.views)} views")
    if tokens.failed:
        print(f"  failed     {len(tokens.failed)} videos could not be decoded")
    for name, reason in tokens.failed.items():
        print(f"    {name}: {reason}")


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
    from vimpac.data.tokenizer import DalleVAE

    DalleVAE.convert(encoder, decoder, out)
    print(f"wrote {out}")


def train() -> None:
    """Pre-train a model: `vimpac train --help` lists the presets, `vimpac train PRESET --help` every field.

    Example: vimpac train small --data store/ --output runs/mine
    """


def doctor() -> None:
    """Print versions, devices, how the extension was built, and for each op which backend runs here and why not another.

    Example: vimpac doctor
    """
    from vimpac.doctor import report

    print(report())


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
        print(f"vimpac {__version__}, torch {importlib.metadata.version('torch')}")  # torch's import takes a second
        return
    if any(not word or (word.startswith("--") and word.endswith("=")) for word in arguments):
        raise InputError("an argument is empty, expected a path or a value; is a variable of the shell unset?")
    description = (
        "Video pre-training on discrete tokens. `vimpac COMMAND --help` shows a command's options, "
        "`vimpac --version` the versions of vimpac and torch."
    )
    tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="vimpac", description=description, args=arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0; 1 after a mistake that the user can fix; 128 + n after signal n; 141 where what reads the output has ended.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's: a file's name may be no text in its encoding
    if arguments[:1] == ["train"]:
        from vimpac.training import command as training

        return training.main(arguments[1:], "vimpac train")
    command = f"vimpac {arguments[0]}" if arguments and arguments[0] in COMMANDS else "vimpac"
    try:
        try:
            _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        return reader_left()
    except InputError as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in FIXABLE:
            raise
        print(f"{command}: error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"{command}: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
