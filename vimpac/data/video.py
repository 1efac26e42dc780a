"""Video file → square frames: PyAV decoding, frames chosen by timestamp, resize and crop views."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from vimpac.errors import InputError

if TYPE_CHECKING:
    import av

EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".mpe", ".m2v"),
    *(".ts", ".mts", ".m2ts", ".vob", ".flv", ".wmv", ".asf", ".ogv"),
)
CORRUPT_SHARE = 0.1
"""A video with a larger share of frames that the decoder marks corrupt is rejected."""
END_FRAMES = 8
"""Damage among the last so many frames or packets means the file was cut short."""
LONGEST_STEP = Fraction(60)
"""Seconds. A larger gap between two frames is a jump of the clock, not a frame shown that long."""

# Only real containers: FFmpeg would also follow playlists to other files and render text as video.
_FORMATS = "3gp,asf,avi,flv,h264,hevc,m4v,matroska,mov,mp4,mpeg,mpegts,mpegvideo,ogg,webm"
# swscale's bicubic | accurate rounding | full chroma interpolation | bit-exact. Plain bicubic darkens by up to two
# levels and gives other bytes on other machines; this takes 0.9 instead of 0.65 ms a frame (1280×720 to 228×128).
_SCALING = 0x4 | 0x40000 | 0x2000 | 0x80000
CROPS = ("center", "top-left", "bottom-right")


class CorruptVideo(Exception):
    """A video file that cannot be used; its only argument is the reason, without the file's name."""


@dataclass(frozen=True)
class View:
    """One way to see a video: shorter side resized to `resize` × frame size, a square crop, maybe mirrored."""

    resize: float = 1.0
    crop: Literal["center", "top-left", "bottom-right"] = "center"
    flip: bool = False


def view_set(name: Literal["center", "train", "test"], flip: bool = True) -> tuple[View, ...]:
    """The views of Table 4. train: 2 sizes × 3 crops × 2 flips (6 views without `flip`), test: 3 crops, center: one."""
    if name == "center":
        return (View(),)
    if name == "test":
        return tuple(View(crop=crop) for crop in CROPS)
    flips = (False, True) if flip else (False,)
    return tuple(View(resize, crop, mirrored) for resize in (1.0, 1.25) for crop in CROPS for mirrored in flips)


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
    import av

    try:
        with _open(path) as container:
            yield from _chunks(_pick(_frames(container, os.path.getsize(path)), fps), size, views, chunk)
    except (av.FFmpegError, OSError) as error:
        raise CorruptVideo(f"cannot be decoded: {error.strerror or error}") from error


def _open(path: str | Path) -> av.container.InputContainer:
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    # A tag need not be UTF-8: PyAV takes any from 19 on, and has to be told before.
    tags = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}
    try:
        # file: keeps a colon in a name from being read as a protocol.
        return av.open(f"file:{os.path.abspath(path)}", options=options, **tags)
    except (av.FFmpegError, OSError) as error:
        if os.path.exists(path) and not os.path.getsize(path):
            raise CorruptVideo("is an empty file") from error
        raise CorruptVideo(f"is not a video, or cut short: {error.strerror or error}") from error


def _frames(container: av.container.InputContainer, file_size: int) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """(seconds since the first frame, frame) of the whole file, or CorruptVideo at its end."""
    stream = container.streams.best("video")
    if stream is None:
        raise CorruptVideo("has no video stream")
    _check_whole(container, stream, file_size)
    context = stream.codec_context
    if context is None:
        raise CorruptVideo("has a video stream in a codec that this FFmpeg cannot decode")
    context.thread_type, context.thread_count = "NONE", 1
    clock = _Clock(stream.time_base, stream.average_rate)
    total, corrupt, damaged_end = 0, 0, deque(maxlen=END_FRAMES)
    for packet in container.demux(stream):
        if packet.size:
            damaged_end.append(packet.is_corrupt)
        for frame in packet.decode():
            total += 1
            corrupt += frame.is_corrupt
            damaged_end.append(frame.is_corrupt)
            yield clock.seconds(frame.pts), frame
    if not total:
        raise CorruptVideo("no frame could be decoded")
    if any(damaged_end):
        raise CorruptVideo("is truncated: its last frames are incomplete")
    if corrupt > CORRUPT_SHARE * total:
        raise CorruptVideo(f"{corrupt} of its {total} frames are corrupt")


class _Clock:
    """Presentation times that always increase, though a file's may be missing, repeated or jump."""

    def __init__(self, time_base: Fraction, rate: Fraction | None):
        self._base = time_base
        self._step = 1 / Fraction(rate) if rate else Fraction(1, 25)
        self._pts: Fraction | None = None
        self._now = Fraction(0)

    def seconds(self, pts: int | None) -> Fraction:
        if self._pts is None:
            self._pts = Fraction(pts or 0) * self._base
            return self._now
        at = self._pts + self._step if pts is None else pts * self._base
        if 0 < at - self._pts <= LONGEST_STEP:
            self._step = at - self._pts
        self._pts = at
        self._now += self._step
        return self._now


def _pick(frames: Iterator[tuple[Fraction, av.VideoFrame]], fps: float) -> Iterator[av.VideoFrame]:
    """The frame on screen at k / fps for each k; the last one is taken to last as long as the one before it."""
    period = 1 / Fraction(fps).limit_denominator(100_000)
    due, shown_at, step, shown = Fraction(0), Fraction(0), period, None
    for at, frame in frames:
        while shown is not None and due < at:
            yield shown
            due += period
        if shown is not None:
            step = at - shown_at
        shown_at, shown = at, frame
    while due < shown_at + step:
        yield shown
        due += period


def _chunks(frames: Iterator[av.VideoFrame], size: int, views: Sequence[View], chunk: int) -> Iterator[np.ndarray]:
    from av.video.reformatter import VideoReformatter

    reformatters = {view.resize: VideoReformatter() for view in views}
    out, filled, previous = None, 0, None
    for frame in frames:
        if out is None:
            out = np.empty((len(views), chunk, 3, size, size), np.uint8)
        if frame is not previous:
            seen = _see(frame, size, views, reformatters)
        out[:, filled], previous = seen, frame
        filled += 1
        if filled == chunk:
            yield out
            out, filled = None, 0
    if filled:
        yield out[:, :filled]


def _see(frame: av.VideoFrame, size: int, views: Sequence[View], reformatters: dict) -> np.ndarray:
    """uint8 [views, 3, size, size] of one decoded frame."""
    quarter_turns = frame.rotation // 90  # counterclockwise, from the display matrix that phones write
    pictures = {}
    for resize, reformatter in reformatters.items():
        side = round(resize * size)
        width, height = _shorter_side(frame.width, frame.height, side)
        rgb = reformatter.reformat(frame, width, height, "rgb24", interpolation=_SCALING).to_ndarray()
        pictures[resize] = np.rot90(rgb, quarter_turns).transpose(2, 0, 1)
    return np.stack([_crop(pictures[view.resize], size, view) for view in views])


def _shorter_side(width: int, height: int, side: int) -> tuple[int, int]:
    scale = side / min(width, height)
    return max(side, round(width * scale)), max(side, round(height * scale))


def _crop(picture: np.ndarray, size: int, view: View) -> np.ndarray:
    _, height, width = picture.shape
    share = {"top-left": 0.0, "center": 0.5, "bottom-right": 1.0}[view.crop]
    top, left = int(share * (height - size)), int(share * (width - size))
    square = picture[:, top : top + size, left : left + size]
    return square[:, :, ::-1] if view.flip else square


def _check_whole(container: av.container.InputContainer, stream: av.VideoStream, file_size: int) -> None:
    """A file cut between two packets decodes without complaint, so compare the sizes that the container promises."""
    name = container.format.name
    if "mp4" in name:
        promised = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    elif "matroska" in name or name == "avi":
        with open(container.name.removeprefix("file:"), "rb") as file:
            promised = _riff_end(file) if name == "avi" else _segment_end(file)
    else:
        return
    if promised > file_size:
        raise CorruptVideo(f"is truncated: it has {file_size} bytes, its index reaches to byte {promised}")


def _riff_end(file) -> int:
    """Where the frame data of an AVI file must end: the end of its first `movi` list, 0 if that is not recorded."""
    file.seek(12)
    while len(header := file.read(12)) == 12:
        length = int.from_bytes(header[4:8], "little")
        if header[:4] == b"LIST" and header[8:] == b"movi":
            return 0 if length in (0, 0xFFFFFFFF) else file.tell() - 4 + length
        file.seek(length + length % 2 - 4, os.SEEK_CUR)
    return 0


def _segment_end(file) -> int:
    """Where a Matroska file's Segment must end, 0 if that is not recorded (live recordings)."""
    file.seek(4)  # the EBML header's id
    file.seek(_vint(file) or 0, os.SEEK_CUR)
    file.seek(4, os.SEEK_CUR)  # the Segment's id
    length = _vint(file)
    return file.tell() + length if length is not None else 0


def _vint(file) -> int | None:
    """EBML's integer: the leading zeros of its first byte count the bytes that follow; None if all ones, "unknown"."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    extra = 8 - first[0].bit_length()
    bits = 7 * (extra + 1)
    value = int.from_bytes(first + file.read(extra), "big") & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value
