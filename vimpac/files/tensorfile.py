"""safetensors files with a checksum of themselves, and with the same bytes whenever they hold the same.

The format: 8 bytes n, little-endian; n bytes of JSON, {"__metadata__": {str: str}, name: {dtype, shape, offsets}}; the tensors.
The checksum is that of files/checked.py, in the metadata as "crc32". One core computes it at 1.7 GB/s (SHA-256: 0.9), which is
half a second for 800 MB.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from vimpac.errors import InputError
from vimpac.files.checked import check_regular, find_checksum

CRC = "crc32"
UNSEALED = {CRC: "0" * 8}
"""Metadata to save a file with before calling `seal` on it."""

_PLACE = re.compile(rb'"crc32":"([0-9a-f]{8})"')  # inside a JSON string the quotes would be escaped
_HEADER_BYTES = 100 << 20  # safetensors' own limit


def seal(path: Path) -> None:
    """Sorts the metadata of a file that was saved with UNSEALED, and writes the checksum into it.

    safetensors writes metadata in a random order.
    """
    with open(path, "r+b") as file:
        _sort_metadata(file)
        _, place, crc = _checksum(file)
        file.seek(place)
        file.write(crc.encode())


def read_tensors(path: Path, framework: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Metadata without the checksum, and tensors ("pt" or "numpy") of a safetensors file whose checksum is right.

    Call `checked.check_names` on the metadata as well: files of earlier versions have no checksum and pass.
    Raises InputError with the reason, without the file's name.
    """
    from safetensors import safe_open

    check_regular(path)
    try:
        with safe_open(path, framework=framework) as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except Exception as error:  # a damaged header makes safetensors or the framework raise nearly anything
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"it is no safetensors file, or was cut short ({said}); copy it again") from None
    if CRC in metadata:
        with open(path, "rb") as file:
            recorded, _, crc = _checksum(file)
        if crc != recorded:
            raise InputError(f"it is damaged, its checksum is {crc}, {recorded} was recorded when it was written")
        del metadata[CRC]
    return metadata, tensors


def _sort_metadata(file: BinaryIO) -> None:
    """Rewrites the header with sorted metadata. safetensors already sorts the tensors."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(text) <= size, "Python escapes JSON as safetensors does"
    file.seek(8)
    file.write(text.ljust(size))
    file.seek(0)


def _checksum(file: BinaryIO) -> tuple[str, int, str]:
    """The recorded checksum, its offset in the file, and the actual checksum. Reads from the start of the file."""
    size = file.read(8)
    header = file.read(min(int.from_bytes(size, "little"), _HEADER_BYTES))
    recorded, begin = find_checksum(_PLACE, header)
    crc = zlib.crc32(header[:begin] + b"0" * 8 + header[begin + 8 :], zlib.crc32(size))
    while chunk := file.read(1 << 22):
        crc = zlib.crc32(chunk, crc)
    return recorded, len(size) + begin, f"{crc:08x}"
