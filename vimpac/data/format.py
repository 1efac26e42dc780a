"""The format of a token store: views, settings, and reading its JSON files, every field of which is checked.

store.json              format, version, settings, shards, failed videos; written last, so a folder with it is complete
tokenizer.safetensors   the tokenizer, to decode the ids with
shard-RRRRR-KKKKK.bin   shard K of rank R: per video the ids [views, frames, h, w], little-endian uint16, without gaps
shard-RRRRR-KKKKK.json  settings, byte size, crc32, videos (name, offset in ids, frames, bytes of the video's file if
                        known); written after its .bin, so a shard with it is complete, and a killed run resumes there
The JSON files hold a checksum of themselves. Those of earlier versions have none and can still be read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vimpac.errors import InputError
from vimpac.files.checked import load_json, typed, unsealed

FORMAT = "vimpac-tokens"
VERSION = 1
INDEX = "store.json"
TOKENIZER = "tokenizer.safetensors"
MAX_VOCABULARY = 65_530
"""Ids are stored in 16 bits, and the model adds five special ids after the codes."""
CROPS = ("center", "top-left", "bottom-right")

_INDEX = {"format", "version", "tokenizer", "fps", "frame_size", "views", "shards", "videos", "failed"}
_SHARD = {"settings", "bytes", "crc32", "videos"}
_SHARD_NAME = re.compile(r"shard-[0-9]{5}-[0-9]{5}")
_WAY_OUT = "copy the whole store again, or tokenize into a new folder"


@dataclass(frozen=True)
class View:
    """One way to look at a video: shorter side resized to `resize` × frame size, then a square crop, mirrored if `flip`."""

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


@dataclass(frozen=True)
class TokenizerInfo:
    """Identifies the tokenizer that made the ids. stride: pixels that a token covers along each side."""

    name: str
    vocab_size: int
    stride: int
    digest: str

    def __post_init__(self):
        if not 1 <= self.vocab_size <= MAX_VOCABULARY:
            raise InputError(
                f"a tokenizer has {self.vocab_size} codes, expected 1 to {MAX_VOCABULARY}: ids are stored in 16 bits, and five "
                "special ids follow the codes"
            )
        if not 1 <= self.stride < 2**31:
            raise InputError(f"a tokenizer's stride is {self.stride}, expected 1 or more pixels a token")


@dataclass(frozen=True)
class StoreSettings:
    """What all videos of a store have in common. fps: frames kept per second; frame_size: pixels per side."""

    tokenizer: TokenizerInfo
    fps: float
    frame_size: int
    views: tuple[View, ...] = (View(),)

    def __post_init__(self):
        if not 0 < self.fps < math.inf:
            raise InputError(f"fps is {self.fps}, expected a positive number of frames a second")
        if not self.tokenizer.stride <= self.frame_size < 2**31:
            raise InputError(f"frame_size is {self.frame_size}, expected at least a token's {self.tokenizer.stride} pixels")
        if not self.views or not all(0 < view.resize < math.inf for view in self.views):
            raise InputError(f"views are {self.views}, expected one or more, each with a positive resize")

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per frame: (h, w)."""
        side = self.frame_size // self.tokenizer.stride
        return side, side

    def to_json(self) -> dict:
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, fields: Mapping) -> StoreSettings:
        """Raises InputError that names a field if it is missing, of the wrong type or out of range."""
        names = ("tokenizer", "fps", "frame_size", "views")
        if missing := [name for name in names if name not in fields]:
            raise InputError(f"{missing[0]} is missing")
        return typed(cls, {name: fields[name] for name in names})

    def difference(self, other: StoreSettings) -> str:
        """The fields in which self differs from other, such as `fps 2.0, not 4.0`; empty if they are equal."""
        mine, theirs = (_flat(settings.to_json()) for settings in (self, other))
        return ", ".join(f"{key} {mine[key]}, not {theirs[key]}" for key in mine if mine[key] != theirs[key])


def _flat(settings: dict) -> dict:
    tokenizer = {f"tokenizer {key}": value for key, value in settings["tokenizer"].items()}
    views = " ".join(f"×{v['resize']:g} {v['crop']}{' flipped' * v['flip']};" for v in settings["views"])
    return tokenizer | {"fps": settings["fps"], "frame size": settings["frame_size"], "views": views.rstrip(";")}


def read_index(folder: Path) -> dict:
    """The checked contents of `store.json`. Raises InputError if the folder is not a store of this version."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder, expected a token store; make one with `vimpac tokenize VIDEOS {folder}`")
    if not os.path.lexists(folder / INDEX):
        if any(folder.glob("shard-*")):
            raise InputError(f"{folder} is an unfinished store (no {INDEX}); run the same `vimpac tokenize` again to finish it")
        raise InputError(f"{folder} is not a token store (no {INDEX}); make one with `vimpac tokenize VIDEOS OUT`")
    path = folder / INDEX
    index, data = _load(path)
    if index.get("format") != FORMAT:
        raise InputError(f"{path} has format {index.get('format')!r}, expected {FORMAT!r}")
    if type(index.get("version")) is not int or index["version"] != VERSION:
        raise InputError(
            f"{folder} is a store of version {index.get('version')}, this program reads version {VERSION}; "
            "tokenize the videos again, or use the program that wrote it"
        )
    return _checked(path, index, data, _INDEX, _check_index)


def read_settings(folder: str | Path) -> StoreSettings:
    """The settings of a finished store, without opening its shards. Raises InputError if the folder is not one."""
    return StoreSettings.from_json(read_index(Path(folder)))


def read_shard(path: Path) -> dict:
    """The checked JSON of the shard `path` (its .bin). Both files must exist and the .bin must have the recorded size."""
    sidecar = path.with_suffix(".json")
    for file in (sidecar, path):
        if not file.is_file():
            raise InputError(f"{file} is missing from the store, or no regular file; {_WAY_OUT}")
    shard = _checked(sidecar, *_load(sidecar), _SHARD, _check_shard)
    if path.stat().st_size != shard["bytes"]:
        raise InputError(
            f"{path} is truncated or overwritten: it has {path.stat().st_size} bytes, {shard['bytes']} were "
            "written; copy it again, or tokenize into a new folder"
        )
    return shard


def _load(path: Path) -> tuple[dict, bytes]:
    with _damage_named(path):
        return load_json(path)


def _checked(path: Path, fields: dict, data: bytes, names: set[str], check: Callable[[dict], None]) -> dict:
    with _damage_named(path):
        fields = unsealed(fields, data, names)
        try:
            check(fields)
        except InputError as error:
            raise InputError(f"its settings or its videos lack a field or hold something else: {error}") from None
    return fields


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Adds the file's name and the way out to an InputError raised in the body."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path} is damaged, {error}; {_WAY_OUT}") from None


def _check_index(index: dict) -> None:
    StoreSettings.from_json(index)
    names = index["shards"]
    if not isinstance(names, list) or not all(isinstance(name, str) and _SHARD_NAME.fullmatch(name) for name in names):
        raise InputError(f"shards are {_short(names)}, expected names such as shard-00000-00000, without a folder")
    if len(set(names)) < len(names):
        raise InputError("shards name one shard twice")
    if not _is_count(index["videos"]):
        raise InputError(f"videos is {_short(index['videos'])}, expected a number of videos")
    if not isinstance(index["failed"], list) or not all(_is_failure(entry) for entry in index["failed"]):
        raise InputError(f"failed is {_short(index['failed'])}, expected a list of name and reason")


def _check_shard(shard: dict) -> None:
    if not isinstance(shard["settings"], dict):
        raise InputError(f"settings are {_short(shard['settings'])}, expected an object")
    StoreSettings.from_json(shard["settings"])
    for name in ("bytes", "crc32"):
        if not _is_count(shard[name]):
            raise InputError(f"{name} is {_short(shard[name])}, expected a number")
    if not isinstance(shard["videos"], list):
        raise InputError(f"videos are {_short(shard['videos'])}, expected a list")
    for video in shard["videos"]:
        if not _is_video(video, shard["bytes"]):
            raise InputError(f"videos hold {_short(video)}, expected name, offset and frames of a video within the shard")


def _is_video(video: Any, size: int) -> bool:
    """Whether an entry of a shard's list is valid in a shard of `size` bytes."""
    if not isinstance(video, dict):
        return False
    name, offset, frames, file_bytes = (video.get(key) for key in ("name", "offset", "frames", "file_bytes"))
    return (
        type(name) is str
        and type(offset) is int
        and 0 <= offset <= size
        and type(frames) is int
        and 0 < frames <= min(size, 2**31 - 1)
        and ("file_bytes" not in video or _is_count(file_bytes))
    )


def _is_failure(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.keys() == {"name", "reason"} and all(isinstance(x, str) for x in entry.values())


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _short(value: Any) -> str:
    return repr(value)[:80]
