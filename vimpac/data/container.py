"""Video file → timed frames: opening it, detecting a file that was cut short, and how much damage is too much."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimpac.data.clock import LONGEST_STEP, Clock, TimedFrame
from vimpac.errors import CorruptVideo

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

CORRUPT_SHARE = 0.1
"""A video is rejected if a larger share of its frames is damaged or cannot be decoded."""
END_FRAMES = 8
"""Damage among this many last frames or packets means that the file was cut short."""

# Only real containers: FFmpeg would also follow playlists to other files and render text as video.
_FORMATS = "3gp,asf,avi,flv,h264,hevc,m4v,matroska,mov,mp4,mpeg,mpegts,mpegvideo,ogg,webm"
_STEADY = ("mp4", "matroska", "avi")
"""Parts of the names of formats that count time from the start of the file, so their clocks do not jump."""
_UNPRESENTED = ("avi", "asf")
"""Formats with decoding times only. FFmpeg guesses presentation times from them, wrongly with B-frames."""
_OGG_PAGE = 65_307
"""Bytes of the largest possible page."""
_AVI_CHUNKS = 10_000
"""Chunks to search for the frames of an AVI file: some programs write a few other chunks first."""
SHORTEST_STEP = Fraction(1, 1000)
"""Seconds. No AVI is meant to be played at more than a thousand frames per second."""
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))


def open_video(path: str | Path) -> InputContainer:
    """Opens a regular file as a video. Raises CorruptVideo if it is something else."""
    import av
    from av.error import FFmpegError

    size = _regular_size(path)
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    # Tags need not be UTF-8. PyAV accepts any bytes from version 19 on, earlier versions only with this option.
    tags: dict[str, Any] = {"metadata_errors": "ignore"} if int(av.__version__.partition(".")[0]) < 19 else {}
    try:
        # With file:, a colon in the name is not taken for a protocol.
        return av.open(f"file:{os.path.abspath(path)}", options=options, **tags)
    except (FFmpegError, OSError) as error:
        if not size:
            raise CorruptVideo("is an empty file") from error
        raise CorruptVideo(f"is not a video, or cut short: {error.strerror or error}") from error


def _regular_size(path: str | Path) -> int:
    """Raises CorruptVideo unless the file is regular: opening a pipe waits for a writer, and a device has no end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(status.st_mode)), "a device")
        raise CorruptVideo(f"is {kind}, expected a regular file")
    return status.st_size


def timed_frames(container: InputContainer, stream: av.VideoStream) -> Iterator[TimedFrame]:
    """All frames of the stream in display order. Raises CorruptVideo, possibly only at the end.

    Damage is handled alike in all containers: frames that cannot be decoded are left out, and the frame before them stays on
    screen. The video is rejected if these and the frames that the decoder marks as corrupt are more than CORRUPT_SHARE of all,
    or are among the last END_FRAMES.
    """
    _check_whole(container, stream)
    _check_rate(container, stream)
    context = stream.codec_context
    context.thread_type, context.thread_count = "NONE", 1
    steady = any(part in container.format.name for part in _STEADY)
    presented = container.format.name not in _UNPRESENTED
    clock, damage, frame = Clock(time_base_of(stream), stream.average_rate, jumps=not steady), _Damage(), None
    for packet in _packets(container, stream):
        if packet is not None and not packet.size:  # repeats the frame before it
            if frame is not None and not context.has_b_frames:
                yield TimedFrame(clock.read(packet.pts if presented else None, packet.dts), packet.duration or 0, frame)
            continue
        for frame in damage.decoded(context, packet):
            yield TimedFrame(clock.read(frame.pts if presented else None, frame.dts), frame.duration, frame)
    damage.check()


def best_stream(container: InputContainer) -> av.VideoStream:
    """The video stream that FFmpeg would choose, but never a song's cover or a film's thumbnails."""
    from av.stream import Disposition

    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    best = container.streams.best("video")
    if not moving:
        raise CorruptVideo("has no video stream" + ", only a cover picture" * (best is not None))
    stream = next((stream for stream in moving if stream == best), moving[0])
    if stream.codec_context is None:
        raise CorruptVideo("has a video stream in a codec that this FFmpeg cannot decode")
    if not stream.time_base:
        raise CorruptVideo("has a video stream without a time base")
    return stream


def time_base_of(stream: av.VideoStream) -> Fraction:
    """Seconds per tick of a stream from `best_stream`."""
    assert stream.time_base is not None
    return stream.time_base


def _packets(container: InputContainer, stream: av.VideoStream) -> Iterator[av.Packet | None]:
    """The stream's packets, then None, with which the decoder returns the frames that it still holds.

    PyAV ends with an empty packet for each stream. This stops at that of this stream: PyAV raises IndexError after it if
    another stream has appeared since the file was opened.
    """
    for packet in container.demux(stream):
        if not packet.buffer_ptr and packet.dts is None:
            break
        yield packet
    yield None


class _Damage:
    """Counts the frames that could not be decoded, or only with errors."""

    def __init__(self):
        self._frames, self._corrupt = 0, 0
        self._end: deque[bool] = deque(maxlen=END_FRAMES)
        self._reason = ""

    def decoded(self, context: av.VideoCodecContext, packet: av.Packet | None) -> list[av.VideoFrame]:
        """The frames that the packet completes. packet None: those that the decoder still holds."""
        from av.error import FFmpegError

        if packet is not None:
            self._end.append(packet.is_corrupt)
        try:
            frames = context.decode(packet)
        except MemoryError:  # FFmpeg's is an FFmpegError as well, but says nothing about the video
            raise
        except FFmpegError as error:
            self._reason = self._reason or f": {error.strerror or error}"
            self._count(True)
            return []
        for frame in frames:
            self._count(frame.is_corrupt)
        return frames

    def _count(self, corrupt: bool) -> None:
        self._frames += 1
        self._corrupt += corrupt
        self._end.append(corrupt)

    def check(self) -> None:
        if self._corrupt == self._frames:
            raise CorruptVideo(f"no frame could be decoded{self._reason}")
        if any(self._end):
            raise CorruptVideo("is truncated: its last frames are incomplete")
        if self._corrupt > CORRUPT_SHARE * self._frames:
            raise CorruptVideo(f"{self._corrupt} of its {self._frames} frames are corrupt")


def _check_rate(container: InputContainer, stream: av.VideoStream) -> None:
    """An AVI file counts frames, and only its header says how long each lasts."""
    step = time_base_of(stream)
    if container.format.name == "avi" and not SHORTEST_STEP <= step <= LONGEST_STEP:
        raise CorruptVideo(
            f"has a damaged frame rate: {float(step):.3g} seconds a frame, expected {float(SHORTEST_STEP)} to {LONGEST_STEP}"
        )


def _check_whole(container: InputContainer, stream: av.VideoStream) -> None:
    """A file cut between two packets decodes without an error, so this compares the sizes that the container states."""
    name, path = container.format.name, container.name.removeprefix("file:")
    if "mp4" in name:
        with open(path, "rb") as file:
            promised = _fragments_end(file) or max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    elif ends := {"avi": _riff_end, "matroska,webm": _segment_end, "ogg": _last_page_end}.get(name):
        with open(path, "rb") as file:
            promised = ends(file)
    else:
        return
    if promised > (file_size := os.path.getsize(path)):
        raise CorruptVideo(f"is truncated: it has {file_size} bytes, its index reaches to byte {promised}")


def _fragments_end(file) -> int:
    """Where the boxes of a fragmented MP4 end, 0 for another MP4. FFmpeg mistakes a damaged box for the end of the file."""
    end, fragmented = 0, False
    while len(header := file.read(16)) >= 8:
        size, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if size == 1:
            size = int.from_bytes(header[8:], "big")
        if size < 8 or not kind.isascii() or not kind.decode().isprintable():
            if fragmented and any(header):  # zeros may pad the end
                raise CorruptVideo(f"is damaged: at byte {end}, expected its next fragment")
            break
        fragmented = fragmented or kind == b"moof"
        end += size
        file.seek(end)
    return end if fragmented else 0


def _riff_end(file) -> int:
    """Where the frame data of an AVI file must end: at the end of its first `movi` list. 0 if that is not recorded."""
    file.seek(12)
    for _ in range(_AVI_CHUNKS):
        header = file.read(12)
        if len(header) < 12:
            break
        length = int.from_bytes(header[4:8], "little")
        if header[:4] == b"LIST" and header[8:] == b"movi":
            return 0 if length in (0, 0xFFFFFFFF) else file.tell() - 4 + length
        file.seek(length + length % 2 - 4, os.SEEK_CUR)
    return 0


def _segment_end(file) -> int:
    """Where the Segment of a Matroska file must end, 0 if that is not recorded (live recordings)."""
    file.seek(4)  # the EBML header's id
    file.seek(_vint(file) or 0, os.SEEK_CUR)
    file.seek(4, os.SEEK_CUR)  # the Segment's id
    length = _vint(file)
    return file.tell() + length if length is not None else 0


def _last_page_end(file) -> int:
    """Where the last page of an Ogg file must end, 0 if none is found."""
    size = file.seek(0, os.SEEK_END)
    start = file.seek(max(0, size - _OGG_PAGE))
    tail = file.read()
    page = tail.rfind(b"OggS\0")
    if page < 0:
        return 0
    lengths = tail[page + 27 : page + 27 + tail[page + 26]] if page + 26 < len(tail) else b""
    return start + page + 27 + len(lengths) + sum(lengths)


def _vint(file) -> int | None:
    """EBML's integer: the leading zeros of its first byte count the bytes that follow; None if all ones, "unknown"."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    extra = 8 - first[0].bit_length()
    bits = 7 * (extra + 1)
    value = int.from_bytes(first + file.read(extra), "big") & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value
