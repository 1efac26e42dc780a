"""Folder → the names of its video files, and video file → square frames at a fixed rate."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vimpac.data.clock import at_rate
from vimpac.data.container import best_stream, open_video, time_base_of, timed_frames
from vimpac.data.format import View
from vimpac.data.picture import Viewer
from vimpac.errors import CorruptVideo, InputError

if TYPE_CHECKING:
    import av

EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mpe", ".m2v"),
    *(".ts", ".mts", ".m2ts", ".vob", ".flv", ".wmv", ".asf", ".ogv"),
)


class FolderContents(NamedTuple):
    """The files below a folder of videos."""

    names: list[str]
    """Names of all video files (see `name_of`), sorted."""
    others: Counter[str]
    """Number of other files by extension in lower case, "" for those without one."""
    unlisted: dict[str, str]
    """Subfolders that could not be listed, by name, with the reason."""


def name_of(path: Path, folder: Path) -> str:
    """The name of a video in a store: its path below `folder`, with forward slashes.

    File names are bytes, read here as UTF-8 in every locale. Bytes that are not UTF-8 become surrogates, as in Python's paths.
    """
    return os.fsencode(path.relative_to(folder).as_posix()).decode("utf-8", "surrogateescape")


def path_of(name: str, folder: Path) -> Path:
    """The file of the video `name`: the inverse of `name_of`."""
    return folder / os.fsdecode(name.encode("utf-8", "surrogateescape"))


def find_videos(folder: str | Path) -> FolderContents:
    """Finds all video files below `folder` by their extension. Follows links to folders.

    Raises InputError if the folder does not exist, is not a folder, cannot be listed or holds no video.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"video folder {folder} does not exist; give a folder that holds video files")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, expected a folder of videos; give the folder it lies in")
    names, others, failed = [], Counter(), []
    for file in _files(folder, failed.append):
        if (extension := file.suffix.lower()) in EXTENSIONS:
            names.append(name_of(file, folder))
        else:
            others[extension] += 1
    unlisted = {name_of(Path(error.filename), folder): error.strerror or str(error) for error in failed}
    if not names:
        known = " ".join(EXTENSIONS)
        but = f"{count_extensions(others)}, but " * bool(others)
        closed = "".join(f"; {folder / name} cannot be listed: {reason}" for name, reason in sorted(unlisted.items())[:3])
        raise InputError(f"{folder} holds {but}no video file; expected files that end in one of: {known}{closed}")
    return FolderContents(sorted(names), others, unlisted)


def count_extensions(files: Counter[str], limit: int = 5) -> str:
    """`12 .txt, 3 .gif, 1 without an extension`, the most frequent first."""
    shown = [f"{count} {extension or 'without an extension'}" for extension, count in files.most_common(limit)]
    more = sum(files.values()) - sum(count for _, count in files.most_common(limit))
    return ", ".join(shown) + f" and {more} more" * bool(more)


def _files(folder: Path, failed: Callable[[OSError], None]) -> Iterator[Path]:
    """All files below `folder`. Lists each folder once, however many links lead to it; under its own path if that is below.

    failed: called with the error of each folder that cannot be listed.
    """
    seen, waiting = set(), deque([folder])
    while waiting:
        for parent, folders, files in os.walk(waiting.popleft(), onerror=failed):
            status = os.stat(parent)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders.sort()  # so that which of two links is followed does not depend on the file system
            waiting += (Path(parent) / name for name in folders if os.path.islink(os.path.join(parent, name)))
            yield from (Path(parent) / file for file in files)


def decode(path: str | Path, fps: float, size: int, views: Sequence[View] = (View(),), chunk: int = 64) -> Iterator[np.ndarray]:
    """Yields uint8 sRGB [views, frames ≤ chunk, 3, size, size]: the frames on screen at 0, 1/fps, 2/fps … seconds.

    Time starts at the first frame. A source slower than `fps` repeats frames. Frame counts and durations in the header are
    never used. Raises CorruptVideo, possibly after some chunks: a video is good only if the iteration reaches its end.
    """
    try:
        with open_video(path) as container:
            stream = best_stream(container)
            viewer = Viewer(size, views, float(stream.sample_aspect_ratio or 1))
            frames = at_rate(timed_frames(container, stream), fps, time_base_of(stream))
            yield from _chunks(frames, viewer, chunk)
    except (CorruptVideo, MemoryError, ImportError):
        raise
    except Exception as error:
        # Damaged data makes PyAV raise nearly anything: IndexError, OverflowError, UnicodeDecodeError, TypeError for a
        # missing time base … A bug of ours would be caught as well, so the message names the exception.
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise CorruptVideo(f"cannot be decoded: {reason}") from error


def _chunks(frames: Iterator[av.VideoFrame], viewer: Viewer, chunk: int) -> Iterator[np.ndarray]:
    out, filled, views, rendered = None, 0, None, None
    for frame in frames:
        if views is None or frame is not rendered:
            views, rendered = viewer.render(frame), frame
        if out is None:
            out = np.empty((len(views), chunk, *views.shape[1:]), np.uint8)
        out[:, filled] = views
        filled += 1
        if filled == chunk:
            yield out
            out, filled = None, 0
    if out is not None:
        yield out[:, :filled]
