"""Folder → video files, and video file → square frames at a fixed rate."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vimpac.data.clock import pick
from vimpac.data.container import best_stream, open_video, timed_pictures
from vimpac.data.corrupt import CorruptVideo
from vimpac.data.picture import CROPS, View, Viewer, view_set
from vimpac.errors import InputError

if TYPE_CHECKING:
    import av

__all__ = ["CROPS", "EXTENSIONS", "CorruptVideo", "Found", "View", "count_extensions", "decode", "find_videos", "view_set"]

EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mpe", ".m2v"),
    *(".ts", ".mts", ".m2ts", ".vob", ".flv", ".wmv", ".asf", ".ogv"),
)


class Found(NamedTuple):
    """What lies below a folder of videos."""

    names: list[str]
    """Paths of all video files, relative to the folder with forward slashes, sorted."""
    others: Counter[str]
    """How many other files there are, by extension in lower case, "" where there is none."""
    unlisted: dict[str, str]
    """Why a folder could not be looked into, by its path as in `names`."""


def find_videos(folder: str | Path) -> Found:
    """All video files below `folder`, by their extension; links to folders are followed.

    Raises InputError if the folder is missing, not a folder, cannot be listed or holds no video.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"video folder {folder} does not exist; give a folder that holds video files")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, expected a folder of videos; give the folder it lies in")
    names, others, failed = [], Counter(), []
    for file in _files(folder, failed.append):
        if (extension := file.suffix.lower()) in EXTENSIONS:
            names.append(file.relative_to(folder).as_posix())
        else:
            others[extension] += 1
    unlisted = {Path(error.filename).relative_to(folder).as_posix(): error.strerror for error in failed}
    if not names:
        known = " ".join(EXTENSIONS)
        but = f"{count_extensions(others)}, but " * bool(others)
        closed = "".join(f"; {folder / name} cannot be listed: {reason}" for name, reason in sorted(unlisted.items())[:3])
        raise InputError(f"{folder} holds {but}no video file; expected files that end in one of: {known}{closed}")
    return Found(sorted(names), others, unlisted)


def count_extensions(files: Counter[str], limit: int = 5) -> str:
    """`12 .txt, 3 .gif, 1 without an extension`, the most frequent first."""
    shown = [f"{count} {extension or 'without an extension'}" for extension, count in files.most_common(limit)]
    more = sum(files.values()) - sum(count for _, count in files.most_common(limit))
    return ", ".join(shown) + f" and {more} more" * bool(more)


def _files(folder: Path, failed: Callable[[OSError], None]) -> Iterator[Path]:
    """All files below `folder`, each folder once, however many links lead to it: under its own path if that lies below.

    failed: is told of each folder that cannot be listed.
    """
    seen, waiting = set(), deque([folder])
    while waiting:
        for parent, folders, files in os.walk(waiting.popleft(), onerror=failed):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders.sort()  # which of two links is followed must not depend on the file system's order
            waiting += (Path(parent) / name for name in folders if os.path.islink(os.path.join(parent, name)))
            yield from (Path(parent) / file for file in files)


def decode(path: str | Path, fps: float, size: int, views: Sequence[View] = (View(),), chunk: int = 64) -> Iterator[np.ndarray]:
    """Yields uint8 sRGB [views, frames ≤ chunk, 3, size, size]: the frames on screen at 0, 1/fps, 2/fps … seconds.

    Time counts from the first frame; a source slower than `fps` repeats frames. Frame counts and durations of the
    header are never used. Raises CorruptVideo, possibly after some chunks: only a finished iteration is a good video.
    """
    try:
        with open_video(path) as container:
            stream = best_stream(container)
            viewer = Viewer(size, views, float(stream.sample_aspect_ratio or 1))
            yield from _chunks(pick(timed_pictures(container, stream), fps, stream.time_base), viewer, chunk)
    except (CorruptVideo, MemoryError, ImportError):
        raise
    except Exception as error:
        # Damaged data brings PyAV to raise nearly anything: IndexError, OverflowError, UnicodeDecodeError, TypeError for a
        # time base that is missing … Our own mistakes would hide here, so the message names what was raised.
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise CorruptVideo(f"cannot be decoded: {reason}") from error


def _chunks(frames: Iterator[av.VideoFrame], viewer: Viewer, chunk: int) -> Iterator[np.ndarray]:
    out, filled, previous = None, 0, None
    for frame in frames:
        if frame is not previous:
            seen, previous = viewer.see(frame), frame
        if out is None:
            out = np.empty((len(seen), chunk, *seen.shape[1:]), np.uint8)
        out[:, filled] = seen
        filled += 1
        if filled == chunk:
            yield out
            out, filled = None, 0
    if filled:
        yield out[:, :filled]
