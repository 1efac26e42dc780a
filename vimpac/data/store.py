"""Token ids on disk: flat little-endian uint16 shards, a JSON list beside each, and one `store.json`.

store.json              format, version, settings, shards, failed videos; written last: a folder that has it is complete
tokenizer.safetensors   the tokenizer, so that the ids can be decoded
shard-RRRRR-KKKKK.bin   number K of rank R: per video the ids [views, frames, h, w], nothing between videos
shard-RRRRR-KKKKK.json  settings, byte size, crc32, videos (name, offset in ids, frames, bytes of the video's file if
                        known); renamed after its .bin, so its presence means the shard is whole and a killed run
                        resumes behind it
"""

from __future__ import annotations

import errno
import os
import resource
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

from vimpac.data.format import FORMAT, INDEX, VERSION, StoreSettings, read_index, read_shard
from vimpac.data.format import TOKENIZER as TOKENIZER  # for those who import what a store is from here
from vimpac.data.format import TokenizerInfo as TokenizerInfo
from vimpac.errors import InputError
from vimpac.files.atomic import TEMPORARY, create, naming, publish, temporary_of
from vimpac.files.checked import write_json

SHARD_BYTES = 64 << 20
SHARD_SECONDS = 60.0
VERIFY_ON_OPEN_BYTES = 1 << 30
OPEN_SHARDS = 512  # and at most a quarter of the descriptors that the process may have

_ID = np.dtype("<u2")


class StoreWriter:
    """Appends videos to one rank's shards. Any number of ranks may write into one folder at the same time.

    A shard closes at `shard_bytes`, or after `shard_seconds` so that a killed run loses little; what is in finished
    shards (of any rank) is in `done`, and the size of its file, where that is known, in `file_bytes`. Raises InputError if
    the folder's shards were written with other settings.
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
        shards = _finished_shards(self.folder)
        for path, shard in shards.items():
            _check_settings(path, shard, settings)
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
        video = {"name": name, "offset": self._shard.bytes // _ID.itemsize, "frames": ids.shape[1]}
        if file_bytes is not None:
            video["file_bytes"] = file_bytes
        self._shard.append(_bytes_of(np.ascontiguousarray(ids, _ID)), video)
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
        shard, self._shard = self._shard, None  # what interrupts this leaves a shard that the next run removes
        if shard is not None:
            shard.publish(self.settings)


class _OpenShard:
    """A shard under its temporary name. A video is booked when it is written; only what is booked is published."""

    def __init__(self, path: Path):
        self.path, self.opened = path, time.monotonic()
        self._descriptor = create(temporary_of(path))
        self._videos: list[dict] = []
        self._booked = 0, 0, 0  # videos, bytes, their crc32: one assignment, so that nothing comes between

    @property
    def bytes(self) -> int:
        return self._booked[1]

    def append(self, data: memoryview, video: dict) -> None:
        count, begin, crc = self._booked
        with naming(self.path):
            written = 0
            while written < len(data):  # behind what is booked, wherever a write that failed has left the end
                written += os.pwrite(self._descriptor, data[written:], begin + written)
        self._videos[count:] = [video]
        self._booked = count + 1, begin + len(data), zlib.crc32(data, crc)

    def publish(self, settings: StoreSettings) -> None:
        """Moves the shard to its place, then writes its JSON. A shard without a booked video is removed."""
        count, length, crc = self._booked
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
    """Turns the finished shards of all ranks into a store by writing `store.json`; failed: reason by video name.

    What an earlier `store.json` lists as failed stays so, unless it is in a shard by now: this run may have seen other
    videos. Call it once, after every rank has closed its writer. Raises InputError if there is no shard.
    """
    folder = Path(folder)
    before = read_index(folder)["failed"] if os.path.lexists(folder / INDEX) else []
    failed = {entry["name"]: entry["reason"] for entry in before} | dict(failed or {})
    shards = _finished_shards(folder)
    if not shards:
        raise InputError(f"{folder} has no finished shard, so there is nothing to make a store of")
    settings = StoreSettings.from_json(next(iter(shards.values()))["settings"])
    for path, shard in shards.items():
        _check_settings(path, shard, settings)
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
    _remove_leftovers(folder)


class TokenStore:
    """Random access to the ids of a finished store. Videos are ordered by name, however they were sharded.

    Safe to fork, to pickle and to share between threads: reads name their position, and nothing is memory-mapped.

    tokenizer  TokenizerInfo        names   list of paths relative to the videos folder
    fps        frames a second      frames  int32 [n], frames of each video
    grid       (h, w) tokens        views   tuple of View
    failed     {name: reason} of the videos that could not be tokenized
    """

    def __init__(self, folder: str | Path, verify: bool | None = None):
        """verify: check every checksum now (None: if the store is at most 1 GiB). Raises InputError for a folder
        that is missing, unfinished, of another format version, or that has a missing, truncated or damaged shard."""
        self.folder = Path(folder)
        index = read_index(self.folder)
        self.settings = StoreSettings.from_json(index)
        self.tokenizer, self.fps = self.settings.tokenizer, self.settings.fps
        self.frame_size, self.grid, self.views = self.settings.frame_size, self.settings.grid, self.settings.views
        self.failed = {entry["name"]: entry["reason"] for entry in index["failed"]}
        self._paths = [str(self.folder / f"{name}.bin") for name in index["shards"]]
        self._open: dict[int, _Descriptor] = {}
        self._load(index)
        if verify or (verify is None and self.nbytes <= VERIFY_ON_OPEN_BYTES):
            self.verify()

    def _load(self, index: dict) -> None:
        """Shard by shard: what JSON makes of all of them would take several times the memory of what is kept."""
        names, tables, self._sizes, self._crcs = [], [np.empty((0, 3), np.int64)], [], []
        for number, path in enumerate(self._paths):
            shard = read_shard(Path(path))
            _check_layout(path, shard, self.settings)
            _check_index_settings(path, shard, self.settings)
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
        _check_distinct(self.folder, self.names)
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
        """Reads every shard; raises InputError that names the first with another checksum, or an id outside the vocabulary.

        The tokenizer's file is `vimpac.data.tokenizers.check_tokenizer_file`'s to check.
        """
        for path, expected in zip(self._paths, self._crcs, strict=True):
            _check_contents(path, expected, self.tokenizer.vocab_size)

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
    ) -> np.ndarray:
        """uint16 [n, length, h, w]: clip i is frames starts[i] … starts[i] + length - 1 of videos[i], seen in view[i].

        videos, starts: int [n]; view: int or int [n]; out: contiguous uint16 [n, length, h, w] to read into.
        Frames past a video's end become `fill`; without fill they are an IndexError, as is a start outside the video.
        """
        videos, starts = np.asarray(videos, np.int64), np.asarray(starts, np.int64)
        out = self._output(out, len(videos), length)
        self._check_bounds(videos, starts, length, view, fill)
        frame = self.grid[0] * self.grid[1]
        frames = self.frames[videos]
        kept = np.minimum(frames - starts, length)
        if fill is not None and (kept < length).any():
            out[np.arange(length) >= kept[:, None]] = fill
        positions = (self._offset[videos] + (np.asarray(view) * frames + starts) * frame) * _ID.itemsize
        ends = np.arange(len(videos)) * length + kept
        self._read_rows(out, self._shard[videos], positions, length * frame * _ID.itemsize, ends * frame * _ID.itemsize)
        return out

    def _read_rows(self, out, shards, positions, row_bytes: int, ends) -> None:
        """The loop of read_clips: one system call a clip, so what is in it is what a clip costs."""
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
            return np.empty(shape, _ID)
        if out.shape != shape or out.dtype != _ID or not out.flags.c_contiguous:
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
        """A thread that still reads from the descriptor holds a reference to it, so it stays open that long."""
        with suppress(StopIteration, RuntimeError):  # of a dictionary that another thread has emptied, or changes
            self._open.pop(next(iter(self._open)), None)

    def close(self) -> None:
        """Closes the shards' files; a later read opens them again."""
        self._open.clear()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}


class _Descriptor:
    """An open file, closed when nobody refers to it any more. Positioned reads make it safe to share and to fork."""

    __slots__ = ("number",)

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self, close=os.close):
        if hasattr(self, "number"):
            close(self.number)


def read_settings(folder: str | Path) -> StoreSettings:
    """The settings of a finished store, without opening its shards. Raises InputError if it is not one."""
    return StoreSettings.from_json(read_index(Path(folder)))


def finished_settings(folder: str | Path) -> StoreSettings | None:
    """The settings that a finished or partly written store's shards share; None when there is no finished shard."""
    for shard in _finished_shards(Path(folder)).values():
        return StoreSettings.from_json(shard["settings"])
    return None


def check_shards(folder: str | Path) -> None:
    """Checks the finished shards of a store that need not be finished: sizes, and checksums where they hold at most 1 GiB.

    Raises InputError that names the first shard that is truncated, damaged or without its .bin.
    """
    shards = _finished_shards(Path(folder))
    for path, shard in shards.items():
        _check_layout(path, shard, StoreSettings.from_json(shard["settings"]))
    if sum(shard["bytes"] for shard in shards.values()) <= VERIFY_ON_OPEN_BYTES:
        for path, shard in shards.items():
            _check_contents(path, shard["crc32"], shard["settings"]["tokenizer"]["vocab_size"])


def _finished_shards(folder: Path) -> dict[Path, dict]:
    """Shard contents by the path of the .bin, for every shard that was written to its end, sorted.

    Raises InputError for one that `store.json` lists and that is not there: its videos would be lost without a word.
    """
    paths = {path.with_suffix(".bin") for path in folder.glob("shard-?????-?????.json")}
    if os.path.lexists(folder / INDEX):
        paths |= {folder / f"{name}.bin" for name in read_index(folder)["shards"]}
    return {path: read_shard(path) for path in sorted(paths)}


def _check_contents(path: str | Path, expected: int, vocab_size: int) -> None:
    crc, largest = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
            largest = max(largest, int(np.frombuffer(chunk, _ID, len(chunk) // _ID.itemsize).max(initial=0)))
    if crc != expected:
        raise InputError(
            f"{path} is damaged: its crc32 is {crc:08x}, {expected:08x} was recorded when it was "
            "written; tokenize again into a new folder"
        )
    if largest >= vocab_size:
        raise InputError(
            f"{path} holds the id {largest}, expected ids below the tokenizer's vocabulary size {vocab_size}: the shard is "
            "another store's, or was not written by this program; tokenize again into a new folder"
        )


def _check_layout(path: str | Path, shard: dict, settings: StoreSettings) -> None:
    """Videos must lie one behind the other and fill the shard, or the list does not belong to these bytes."""
    height, width = settings.grid
    frame = len(settings.views) * height * width
    frames = np.array([v["frames"] for v in shard["videos"]], np.int64)
    fits = int(frames.max(initial=0)) * frame * _ID.itemsize <= shard["bytes"]  # or the products may leave 64 bits
    if fits:
        ends = np.cumsum(frames * frame)
        offsets = np.array([v["offset"] for v in shard["videos"]], np.int64)
        fits = np.array_equal(offsets, ends - frames * frame) and int(ends[-1:].sum()) * _ID.itemsize == shard["bytes"]
    if not fits:
        raise InputError(f"{path}: the video list beside it does not fit it; tokenize again into a new folder")


def _check_settings(path: Path, shard: dict, settings: StoreSettings) -> None:
    if difference := StoreSettings.from_json(shard["settings"]).difference(settings):
        raise InputError(f"{path} was written with {difference}; use the same settings, or another output folder")


def _check_index_settings(path: str | Path, shard: dict, settings: StoreSettings) -> None:
    """The list beside the shard and `store.json` say the same, or one of them is damaged, or another store's."""
    if StoreSettings.from_json(shard["settings"]) != settings:
        difference = settings.difference(StoreSettings.from_json(shard["settings"])) or "other settings"
        raise InputError(
            f"{path} does not fit {INDEX}, which says {difference}: one of the two is damaged or another store's; copy the "
            "whole store again, or tokenize into a new folder"
        )


def _check_distinct(folder: Path, names: list[str]) -> None:
    """names: sorted."""
    twice = next((a for a, b in pairwise(names) if a == b), None)
    if twice is not None:
        raise InputError(
            f"{folder} holds the video {twice!r} twice: its shards are damaged or of several stores; copy the whole store "
            "again, or tokenize into a new folder"
        )


def check_listed(folder: str | Path) -> None:
    """Raises InputError for a finished shard that `store.json` does not list, so that nobody can read its videos."""
    listed = set(read_index(Path(folder))["shards"])
    if unlisted := [path.stem for path in _finished_shards(Path(folder)) if path.stem not in listed]:
        raise InputError(
            f"{folder} has {', '.join(unlisted[:3])} ({len(unlisted)} in all), which {INDEX} does not list: a run was stopped "
            f"before its end, or {INDEX} is another store's; run the same `vimpac tokenize` again to list them"
        )


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed runs left: temporary files, and shards whose JSON was never written."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink()
    for path in folder.glob("shard-?????-?????.bin"):
        if not path.with_suffix(".json").exists():
            path.unlink()


def _check_range(what: str, values: np.ndarray, end) -> None:
    bad = (values < 0) | (values >= end)
    if bad.any():
        first = int(bad.argmax())
        limit = int(np.broadcast_to(end, values.shape)[first])
        raise IndexError(f"{what} {int(values[first])} of clip {first} is outside 0..{limit - 1}")


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
