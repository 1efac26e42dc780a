"""`vimpac tokenize`: a folder of videos → a token store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vimpac.config import TokenizeConfig
from vimpac.console import count, say
from vimpac.processes.ranks import begin_rank, read_place

if TYPE_CHECKING:
    from vimpac.data.build import TokenizeSummary


def tokenize(
    videos: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEOS")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    config: Annotated[TokenizeConfig, tyro.conf.arg(name="")],
) -> None:
    """Turn a folder of videos into a store of discrete tokens.

    Run it again after an interruption or with more videos, and it adds what is missing. At the end it lists, with the reason,
    files that cannot be decoded, folders that cannot be listed, and files whose size has changed since they were tokenized.
    Under torchrun the ranks share the videos. A second run on the same OUT is refused until the first has ended. A store that
    exists is checked first: sizes, and checksums up to 1 GiB; `vimpac verify OUT` reads every checksum.

    Example: vimpac tokenize videos/ store/ --frame-size 128 --fps 2

    Args:
        videos: Folder to search for video files, with its subfolders. Other files are only counted.
        out: Folder of the token store to write.
    """
    begin_rank()
    place = read_place()
    from vimpac.data.build import tokenize_videos

    summary = tokenize_videos(videos, out, config, place.rank, place.size)
    if not place.rank:
        _report(videos, out, summary)


def _report(videos: Path, out: Path, summary: TokenizeSummary) -> None:
    from vimpac.data.video import count_extensions

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


def _list_names(reasons: dict[str, str], title: str) -> None:
    """A title, then a line for each name with its reason if there is one. Prints nothing without names."""
    if reasons:
        say(title)
    for name, reason in sorted(reasons.items()):
        say(f"  {name}: {reason}" if reason else f"  {name}")
