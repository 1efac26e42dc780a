"""Writing and reading a token store. `vimpac.data.format` describes its files."""

from __future__ import annotations

import errno
import os
import resource
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from vimpac.data.format import FORMAT, INDEX, VERSION, StoreSettings, read_index, read_shard
from vimpac.data.shards import (
    ID,
    check_contents,
    check_distinct,
    check_index_settings,
    check_layout,
    check_settings,
    finished_shards,
    is_verified_on_open,
    remove_leftovers,
)
from vimpac.errors import InputError
from vimpac.files.atomic import create, naming, publish, temporary_of
from vimpac.files.checked import write_json

SHARD_BYTES = 64 << 20
SHARD_SECONDS = 60.0
OPEN_SHARDS = 512  # but at most a quarter of the files that the process may open


class StoreWriter:
    """Appends videos to one rank's shards. Any number of ranks may write into one folder at the same time.

    A shard is finished when it has `shard_bytes`, or after `shard_seconds`, so that a killed run loses little.
    done: names of the videos in finished shards of any rank; file_bytes: sizes of their files, where known.
    Raises InputError if the folder's shards were written with other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: StoreSettings,
        rank: int = 0,
        shard_bytes: int = SHARD_BYTES,
        shard_seconds: float = SHARD_SECONDS,
    ):
        self.folder, self.settings, self.rank = Path(folder), settings, rank
        self.shard_bytes, self.shard_seconds = shard_bytes, shard_seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = finished_shards(self.folder)
        for path, shard in shards.items():
            check_settings(path, shard, settings)
        self.done = {video["name"] for shard in shards.values() for video in shard["videos"]}
        self.file_bytes = {v["name"]: v["file_bytes"] for s in shards.values() for v in s["videos"] if "file_bytes" in v}
        numbers = [int(path.stem.split("-")[2]) for path in shards if path.stem.startswith(f"shard-{rank:05d}-")]
        self._number = max(numbers, default=-1) + 1
        self._shard: _OpenShard | None = None

    def add(self, name: str, ids: np.ndarray, file_bytes: int | None = None) -> None:
        """Writes one video. ids: [views, frames, h, w] integers below the vocabulary size, frames ≥ 1."""
        expected = (len(self.settings.views), *self.settings.grid)
        if ids.ndim != 4 or (len(ids), *ids.shape[2:]) != expected or not ids.shape[1]:
            raise ValueError(f"ids of {name} have shape {ids.shape}, expected [views, frames, h, w] with {expected}")
        if ids.min() < 0 or ids.max() >= self.settings.tokenizer.vocab_size:
            raise ValueError(f"ids of {name} lie outside 0..{self.settings.tokenizer.vocab_size - 1}")
        if name in self.done:
            raise ValueError(f"{name} is already in {self.folder}")
        if self._shard is None:
            path = self.folder / f"shard-{self.rank:05d}-{self._number:05d}.bin"
            self._shard, self._number = _OpenShard(path), self._number + 1
        video = {"name": name, "offset": self._shard.bytes // ID.itemsize, "frames": ids.shape[1]}
        if file_bytes is not None:
            video["file_bytes"] = file_bytes
        self._shard.append(_bytes_of(np.ascontiguousarray(ids, ID)), video)
        self.done.add(name)
        if self._shard.bytes >= self.shard_bytes:
            self.close()
        self.close_if_due()

    def close_if_due(self) -> None:
        """Finishes the open shard if it is older than `shard_seconds`."""
        if self._shard is not None and time.monotonic() - self._shard.opened >= self.shard_seconds:
            self.close()

    def close(self) -> None:
        """Finishes the open shard, if any. The folder becomes a store with `finish_store`."""
        shard, self._shard = self._shard, None  # if interrupted, the next run removes the shard
        if shard is not None:
            shard.publish(self.settings)


class _OpenShard:
    """A shard under its temporary name. A video counts once it is completely written; only such videos are published."""

    def __init__(self, path: Path):
        self.path, self.opened = path, time.monotonic()
        self._descriptor = create(temporary_of(path))
        self._videos: list[dict] = []
        self._written = 0, 0, 0  # videos, bytes, crc32 of the bytes: one tuple, so that a signal cannot separate them

    @property
    def bytes(self) -> int:
        return self._written[1]

    def append(self, data: memoryview, video: dict) -> None:
        count, begin, crc = self._written
        with naming(self.path):
            written = 0
            while written < len(data):  # at the end of the last complete video, whatever a failed write left there
                written += os.pwrite(self._descriptor, data[written:], begin + written)
        self._videos[count:] = [video]
        self._written = count + 1, begin + len(data), zlib.crc32(data, crc)

    def publish(self, settings: StoreSettings) -> None:
        """Gives the shard its final name, then writes its JSON. Removes a shard without a video."""
        count, length, crc = self._written
        temporary = temporary_of(self.path)
        with naming(self.path):
            try:
                os.ftruncate(self._descriptor, length)
            finally:
                os.close(self._descriptor)
            if not count:
                return temporary.unlink()
            if (found := temporary.stat().st_size) != length:
                raise OSError(errno.EIO, f"has {found} bytes after {length} were written", str(temporary))
            publish(temporary, self.path)
        shard = {"settings": settings.to_json(), "bytes": length, "crc32": crc, "videos": self._videos[:count]}
        write_json(self.path.with_suffix(".json"), shard)


def finish_store(folder: str | Path, failed: Mapping[str, str] | None = None) -> None:
    """Writes `store.json`, which makes a store of the finished shards of all ranks. failed: reason by video name.

    Videos that an earlier `store.json` lists as failed stay listed unless a shard holds them now, since this run may have
    been given other videos. Call it once, after every rank has closed its writer. Raises InputError if there is no shard.
    """
    folder = Path(folder)
    before = read_index(folder)["failed"] if os.path.lexists(folder / INDEX) else []
    failed = {entry["name"]: entry["reason"] for entry in before} | dict(failed or {})
    shards = finished_shards(folder)
    if not shards:
        raise InputError(f"{folder} has no finished shard, so there is nothing to make a store of")
    settings = StoreSettings.from_json(next(iter(shards.values()))["settings"])
    for path, shard in shards.items():
        check_settings(path, shard, settings)
    stored = {video["name"] for shard in shards.values() for video in shard["videos"]}
    index = {
        "format": FORMAT,
        "version": VERSION,
        **settings.to_json(),
        "shards": sorted(path.stem for path in shards),
        "videos": sum(len(shard["videos"]) for shard in shards.values()),
        "failed": [{"name": name, "reason": reason} for name, reason in sorted(failed.items()) if name not in stored],
    }
    write_json(folder / INDEX, index, indent=1)
    remove_leftovers(folder)


class TokenStore:
    """Random access to the ids of a finished store. Videos are sorted by name, whichever shards hold them.

    Safe to fork, to pickle and to share between threads: every read states its position, and nothing is memory-mapped.

    tokenizer  TokenizerInfo        names   list of paths relative to the videos folder
    fps        frames per second    frames  int32 [n], frames of each video
    grid       (h, w) tokens        views   tuple of View
    failed     {name: reason} of the videos that could not be tokenized
    """

    def __init__(self, folder: str | Path, verify: bool | None = None):
        """verify: check every checksum now (None: if the store has at most 1 GiB).

        Raises InputError if the folder is missing, unfinished or of another format version, or if a shard is missing,
        truncated or damaged.
        """
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.settings = StoreSettings.from_json(index)
        self.tokenizer, self.fps = self.settings.tokenizer, self.settings.fps
        self.frame_size, self.grid, self.views = self.settings.frame_size, self.settings.grid, self.settings.views
        self.failed = {entry["name"]: entry["reason"] for entry in index["failed"]}
        self._paths = [str(self.folder / f"{name}.bin") for name in index["shards"]]
        self._open: dict[int, _Descriptor] = {}
        self._load(index)
        if verify or (verify is None and is_verified_on_open(self.nbytes)):
            self.verify()

    def _load(self, index: dict) -> None:
        """One shard at a time: the parsed JSON of all shards would take several times the memory of the tables."""
        names, tables, self._sizes, self._crcs = [], [np.empty((0, 3), np.int64)], [], []
        for number, path in enumerate(self._paths):
            shard = read_shard(Path(path))
            check_layout(path, shard, self.settings)
            check_index_settings(path, shard, self.settings)
            names += (video["name"] for video in shard["videos"])
            rows = [(number, video["offset"], video["frames"]) for video in shard["videos"]]
            tables.append(np.array(rows, np.int64).reshape(-1, 3))
            self._sizes.append(shard["bytes"])
            self._crcs.append(shard["crc32"])
        if len(names) != index["videos"]:
            raise InputError(
                f"{self.folder / INDEX} counts {index['videos']} videos, but its shards hold {len(names)}; "
                "tokenize again into a new folder"
            )
        order = sorted(range(len(names)), key=names.__getitem__)
        self.names = [names[i] for i in order]
        check_distinct(self.folder, self.names)
        table = np.concatenate(tables)[order]
        self._shard, self.frames = (table[:, column].astype(np.int32) for column in (0, 2))
        self._offset = table[:, 1].copy()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def nbytes(self) -> int:
        """Size of all shards."""
        return sum(self._sizes)

    def verify(self) -> None:
        """Reads every shard. Raises InputError that names the first with a wrong checksum or an id outside the vocabulary.

        `vimpac.data.tokenizers.check_tokenizer_file` checks the tokenizer's file.
        """
        for path, expected in zip(self._paths, self._crcs, strict=True):
            check_contents(path, expected, self.tokenizer.vocab_size)

    def read(self, video: int, start: int = 0, length: int | None = None, view: int = 0) -> np.ndarray:
        """uint16 [length, h, w] of one video, to its end if length is None. IndexError outside the video."""
        length = int(self.frames[video]) - start if length is None else length
        return self.read_clips(np.array([video]), np.array([start]), length, view)[0]

    def read_clips(
        self,
        videos: np.ndarray,
        starts: np.ndarray,
        length: int,
        view: int | np.ndarray = 0,
        out: np.ndarray | None = None,
        fill: int | None = None,
        every: int = 1,
    ) -> np.ndarray:
        """uint16 [n, length, h, w]: clip i is `length` frames of videos[i], seen in view[i]: starts[i], starts[i] + every, …

        videos, starts: int [n]; view: int or int [n]; out: contiguous uint16 [n, length, h, w] to read into.
        Frames past a video's end become `fill`; without fill they are an IndexError, as is a start outside the video.
        """
        if every > 1:  # frames in between are read as well, which costs less than a system call for each frame
            span = self.read_clips(videos, starts, (length - 1) * every + 1, view, None, fill)[:, ::every]
            if out is None:
                return np.ascontiguousarray(span)
            self._output(out, len(span), length)[...] = span
            return out
        videos, starts = np.asarray(videos, np.int64), np.asarray(starts, np.int64)
        out = self._output(out, len(videos), length)
        self._check_bounds(videos, starts, length, view, fill)
        frame = self.grid[0] * self.grid[1]
        frames = self.frames[videos]
        kept = np.minimum(frames - starts, length)
        if fill is not None and (kept < length).any():
            out[np.arange(length) >= kept[:, None]] = fill
        positions = (self._offset[videos] + (np.asarray(view) * frames + starts) * frame) * ID.itemsize
        ends = np.arange(len(videos)) * length + kept
        self._read_rows(out, self._shard[videos], positions, length * frame * ID.itemsize, ends * frame * ID.itemsize)
        return out

    def _read_rows(self, out, shards, positions, row_bytes: int, ends) -> None:
        """The loop of read_clips. It runs once for each clip, so it holds little more than the system call."""
        data, opened, preadv = _bytes_of(out), self._open, os.preadv
        begin = 0
        for shard, position, end in zip(shards.tolist(), positions.tolist(), ends.tolist(), strict=True):
            descriptor = opened.get(shard) or self._open_shard(shard)
            if preadv(descriptor.number, (data[begin:end],), position) != end - begin:
                raise InputError(f"{self._paths[shard]} was cut short since it was opened; tokenize again")
            begin += row_bytes

    def _output(self, out: np.ndarray | None, n: int, length: int) -> np.ndarray:
        shape = (n, length, *self.grid)
        if out is None:
            return np.empty(shape, ID)
        if out.shape != shape or out.dtype != ID or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}, expected a contiguous uint16 {shape}")
        return out

    def _check_bounds(self, videos, starts, length: int, view, fill) -> None:
        if length < 1:
            raise IndexError(f"clip length {length}, expected at least 1 frame")
        _check_range("video", videos, len(self))
        _check_range("view", np.atleast_1d(view), len(self.views))
        _check_range("start frame", starts, self.frames[videos])
        if fill is None:
            _check_range("end frame", starts + length - 1, self.frames[videos])

    def _open_shard(self, shard: int) -> _Descriptor:
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = OPEN_SHARDS if allowed == resource.RLIM_INFINITY else min(OPEN_SHARDS, allowed // 4)
        while len(self._open) >= max(1, most):
            self._close_oldest()
        while True:
            try:
                descriptor = self._open[shard] = _Descriptor(self._paths[shard])
                return descriptor
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                if not self._open:
                    raise InputError(
                        f"cannot open {self._paths[shard]}: {error.strerror}; allow this process more than {allowed} open "
                        "files (`ulimit -n`)"
                    ) from error
                self._close_oldest()

    def _close_oldest(self) -> None:
        """The file stays open as long as a thread that reads from it refers to its descriptor."""
        with suppress(StopIteration, RuntimeError):  # another thread has emptied the dictionary, or is changing it
            self._open.pop(next(iter(self._open)), None)

    def close(self) -> None:
        """Closes the shards' files; a later read opens them again."""
        self._open.clear()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}


class _Descriptor:
    """An open file, closed when the last reference to it disappears. Positioned reads make it safe to share and to fork."""

    __slots__ = ("number",)

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):
        if hasattr(self, "number"):
            close(self.number)


def _check_range(what: str, values: np.ndarray, end) -> None:
    bad = (values < 0) | (values >= end)
    if bad.any():
        first = int(bad.argmax())
        limit = int(np.broadcast_to(end, values.shape)[first])
        raise IndexError(f"{what} {int(values[first])} of clip {first} is outside 0..{limit - 1}")


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
