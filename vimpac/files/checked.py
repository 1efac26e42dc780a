"""Reading files without trusting them: regular files only, JSON with a checksum of itself, and dataclasses from JSON.

The checksum is the CRC-32 of the whole file with zeros in place of the checksum. It detects every change within 32 consecutive
bits. It does not protect against forgery.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import stat
import types
import typing
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vimpac.errors import InputError
from vimpac.files.atomic import write_text

CHECKSUM = "checksum"
JSON_BYTES = 1 << 30
"""Limit for JSON files. A list of a million failed videos takes a fifth of it."""

_PLACE = re.compile(rb'"checksum": "([0-9a-f]{8})"')  # inside a JSON string the quotes would be escaped


def check_regular(path: Path) -> None:
    """Raises InputError unless `path` is a regular file. The message is the reason, without the file's name."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(getattr(error, "strerror", None) or str(error)) from None
    if not stat.S_ISREG(mode):
        raise InputError(f"it is a {'folder' if stat.S_ISDIR(mode) else 'pipe, a socket or a device'}")


def write_json(path: Path, fields: Mapping[str, Any], indent: int | None = None) -> None:
    """Writes `fields` and a checksum as one JSON object, complete or not at all."""
    text = json.dumps({**fields, CHECKSUM: "0" * 8}, indent=indent) + "\n"
    begin = text.rindex("0" * 8)
    write_text(path, text[:begin] + f"{zlib.crc32(text.encode()):08x}" + text[begin + 8 :])


def load_json(path: Path) -> tuple[dict[str, Any], bytes]:
    """The unchecked object in a JSON file, and the file's bytes. Pass both to `unsealed` once the version is known.

    Raises InputError with the reason, without the file's name.
    """
    check_regular(path)
    if path.stat().st_size > JSON_BYTES:
        raise InputError(f"it has {path.stat().st_size} bytes, expected at most {JSON_BYTES}")
    data = path.read_bytes()
    try:
        fields = json.loads(data.decode())
    except (ValueError, RecursionError) as error:  # RecursionError: deeply nested brackets
        raise InputError(f"it is not JSON ({type(error).__name__}: {error})") from None
    if not isinstance(fields, dict):
        raise InputError(f"it holds a {type(fields).__name__}, expected an object")
    return fields, data


def unsealed(fields: dict[str, Any], data: bytes, names: set[str]) -> dict[str, Any]:
    """The object from `load_json` without its checksum. Raises InputError if the checksum or the field names are wrong."""
    contents = {name: value for name, value in fields.items() if name != CHECKSUM}
    if CHECKSUM in fields:
        recorded, begin = find_checksum(_PLACE, data)
        crc = zlib.crc32(data[begin + 8 :], zlib.crc32(b"0" * 8, zlib.crc32(data[:begin])))
        if f"{crc:08x}" != recorded:
            raise InputError(
                f"its checksum is {crc:08x}, {recorded} was recorded when it was written (after editing it on purpose, remove "
                f'its "{CHECKSUM}")'
            )
    check_names(contents, names)
    return contents


def find_checksum(place: re.Pattern[bytes], data: bytes) -> tuple[str, int]:
    """The eight digits of the checksum in a file, and their offset. Raises InputError unless there is exactly one."""
    found = list(place.finditer(data))
    if len(found) != 1:
        raise InputError(f"it holds {len(found)} checksums, expected one of eight digits")
    return found[0][1].decode(), found[0].start(1)


def check_names(found: Iterable[str], names: set[str]) -> None:
    """Raises InputError unless the names found, without that of the checksum, are `names`.

    A file without a checksum is of an earlier version and passes. If damage had changed the name of its checksum, that would be
    an unknown name.
    """
    if missing := sorted(names - set(found)):
        raise InputError(f"it lacks {', '.join(missing)}")
    if unknown := sorted(set(found) - names):
        raise InputError(f"it holds {', '.join(unknown)[:200]}, which no version of this file has")


def typed(kind: Any, value: Any, name: str = "") -> Any:
    """Converts a value from JSON or a checkpoint to `kind`: constructs dataclasses and checks all types.

    Raises InputError that names the first field that is missing, unknown or of the wrong type. Dataclasses check their ranges.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, name)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        right = isinstance(value, str) and value in arguments
    elif origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return typed(next(x for x in arguments if x is not type(None)), value, name)
    elif origin is tuple:
        return _tuple(arguments, value, name)
    elif kind is float:
        right = type(value) in (int, float)
    else:
        right = type(value) is kind
    if not right:
        expected = " or ".join(map(repr, arguments)) if arguments else _WORDS[kind]
        raise InputError(f"{name} is {repr(value)[:60]}, expected {expected}")
    return value


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _dataclass(kind: type, value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise InputError(f"{name or kind.__name__} is {repr(value)[:60]}, expected the fields of {kind.__name__}")
    hints, within = _hints(kind), f"{name}." if name else ""
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := sorted(required - value.keys()):
        raise InputError(f"{within}{missing[0]} is missing")
    if unknown := [key for key in value if key not in hints]:
        raise InputError(f"{name or kind.__name__} has no field {repr(unknown[0])[:60]}")
    return kind(**{key: typed(hints[key], x, f"{within}{key}") for key, x in value.items()})


def _tuple(kinds: tuple, value: Any, name: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise InputError(f"{name} is {repr(value)[:60]}, expected a list")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise InputError(f"{name} has {len(value)} entries, expected {len(kinds)}")
    return tuple(typed(kind, x, f"{name}[{i}]") for i, (kind, x) in enumerate(zip(kinds, value, strict=True)))


_hints = functools.cache(typing.get_type_hints)
