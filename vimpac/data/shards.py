"""The shards in a store's folder: which of them are finished, and whether they are intact and belong together."""

from __future__ import annotations

import os
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np

from vimpac.data.format import INDEX, StoreSettings, read_index, read_shard
from vimpac.errors import InputError
from vimpac.files.atomic import TEMPORARY

VERIFY_ON_OPEN_BYTES = 1 << 30
ID = np.dtype("<u2")
"""How an id is stored."""


def finished_shards(folder: Path) -> dict[Path, dict]:
    """The JSON of every finished shard by the path of its .bin, sorted.

    Raises InputError if a shard that `store.json` lists is missing, since its videos would silently be lost.
    """
    paths = {path.with_suffix(".bin") for path in folder.glob("shard-?????-?????.json")}
    if os.path.lexists(folder / INDEX):
        paths |= {folder / f"{name}.bin" for name in read_index(folder)["shards"]}
    return {path: read_shard(path) for path in sorted(paths)}


def finished_settings(folder: str | Path) -> StoreSettings | None:
    """The settings that all shards of a folder share; None if no shard is finished. The store may be unfinished."""
    for shard in finished_shards(Path(folder)).values():
        return StoreSettings.from_json(shard["settings"])
    return None


def check_shards(folder: str | Path) -> None:
    """Checks the finished shards of a store, finished or not: sizes, and checksums if they hold at most 1 GiB in all.

    Raises InputError that names the first shard that is truncated, damaged or lacks its .bin.
    """
    shards = finished_shards(Path(folder))
    for path, shard in shards.items():
        check_layout(path, shard, StoreSettings.from_json(shard["settings"]))
    if is_verified_on_open(sum(shard["bytes"] for shard in shards.values())):
        for path, shard in shards.items():
            check_contents(path, shard["crc32"], shard["settings"]["tokenizer"]["vocab_size"])


def is_verified_on_open(size: int) -> bool:
    """Whether a store of this many bytes is small enough to read all of it each time that it is opened."""
    return size <= VERIFY_ON_OPEN_BYTES


def check_listed(folder: str | Path) -> None:
    """Raises InputError if `store.json` does not list a finished shard, whose videos could not be read."""
    listed = set(read_index(Path(folder))["shards"])
    if unlisted := [path.stem for path in finished_shards(Path(folder)) if path.stem not in listed]:
        raise InputError(
            f"{folder} has {', '.join(unlisted[:3])} ({len(unlisted)} in all), which {INDEX} does not list: a run was stopped "
            f"before its end, or {INDEX} is another store's; run the same `vimpac tokenize` again to list them"
        )


def check_contents(path: str | Path, expected: int, vocab_size: int) -> None:
    """Reads a shard. Raises InputError unless its crc32 is the `expected` one and all ids are below vocab_size."""
    crc, largest = 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
            largest = max(largest, int(np.frombuffer(chunk, ID, len(chunk) // ID.itemsize).max(initial=0)))
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


def check_layout(path: str | Path, shard: dict, settings: StoreSettings) -> None:
    """Raises InputError unless the listed videos follow each other without gaps and fill the shard."""
    height, width = settings.grid
    frame = len(settings.views) * height * width
    frames = np.array([v["frames"] for v in shard["videos"]], np.int64)
    fits = int(frames.max(initial=0)) * frame * ID.itemsize <= shard["bytes"]  # else the products may overflow int64
    if fits:
        ends = np.cumsum(frames * frame)
        offsets = np.array([v["offset"] for v in shard["videos"]], np.int64)
        fits = np.array_equal(offsets, ends - frames * frame) and int(ends[-1:].sum()) * ID.itemsize == shard["bytes"]
    if not fits:
        raise InputError(f"{path}: the video list beside it does not fit it; tokenize again into a new folder")


def check_settings(path: Path, shard: dict, settings: StoreSettings) -> None:
    """Raises InputError if videos with these settings must not be added to the shard's folder."""
    if difference := StoreSettings.from_json(shard["settings"]).difference(settings):
        raise InputError(f"{path} was written with {difference}; use the same settings, or another output folder")


def check_index_settings(path: str | Path, shard: dict, settings: StoreSettings) -> None:
    """Raises InputError if a shard's settings are not those of `store.json`."""
    if StoreSettings.from_json(shard["settings"]) != settings:
        difference = settings.difference(StoreSettings.from_json(shard["settings"])) or "other settings"
        raise InputError(
            f"{path} does not fit {INDEX}, which says {difference}: one of the two is damaged or another store's; copy the "
            "whole store again, or tokenize into a new folder"
        )


def check_distinct(folder: Path, names: list[str]) -> None:
    """Raises InputError if a name occurs twice. names: sorted."""
    twice = next((a for a, b in pairwise(names) if a == b), None)
    if twice is not None:
        raise InputError(
            f"{folder} holds the video {twice!r} twice: its shards are damaged or of several stores; copy the whole store "
            "again, or tokenize into a new folder"
        )


def remove_leftovers(folder: Path) -> None:
    """Removes what killed runs left: temporary files and unfinished shards."""
    for path in (*folder.glob(f"*{TEMPORARY}"), *unfinished_shards(folder)):
        path.unlink()


def unfinished_shards(folder: Path) -> list[Path]:
    """The .bin files without a .json, sorted: a run was killed between the two. Nothing reads them."""
    return sorted(path for path in folder.glob("shard-?????-?????.bin") if not path.with_suffix(".json").exists())
