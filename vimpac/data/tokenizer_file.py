"""What all tokenizers have in common: their interface, and the safetensors file that holds one.

The file's metadata: format, version, name (of the tokenizer, such as patch-vq), config (JSON, one object) and a checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from vimpac.data.format import TokenizerInfo
from vimpac.errors import InputError
from vimpac.files.atomic import replacing
from vimpac.files.checked import check_names
from vimpac.files.tensorfile import UNSEALED, read_tensors, seal

STRIDE = 8
_FORMAT = "vimpac-tokenizer"

Tensors = dict[str, np.ndarray]
Check = Callable[[Tensors, dict], None]


class Tokenizer(Protocol):
    """Turns frames into ids and back. A frame gets the same ids whatever it is batched with."""

    name: str
    vocab_size: int
    stride: int
    digest: str
    """Hex SHA-256 of the name and the weights."""

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """uint8 [T, 3, S, S] → uint16 [T, S / stride, S / stride]; S must be a multiple of the stride."""
        ...

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Integers [T, h, w] → uint8 [T, 3, h * stride, w * stride]; InputError for ids outside 0..vocab_size - 1."""
        ...

    def save(self, path: str | Path) -> None:
        """Writes a .safetensors file that `load_tokenizer` reads."""
        ...


def describe(tokenizer: Tokenizer) -> TokenizerInfo:
    """What a store records of its tokenizer."""
    return TokenizerInfo(tokenizer.name, tokenizer.vocab_size, tokenizer.stride, tokenizer.digest)


def digest_of(name: str, tensors: Tensors) -> str:
    """Hex SHA-256 of a tokenizer's name and weights."""
    sha = hashlib.sha256(name.encode())
    for key, value in sorted(tensors.items()):
        sha.update(f"{key} {value.dtype} {value.shape}".encode())
        sha.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    return sha.hexdigest()


def write_tokenizer(path: Path, name: str, tensors: Tensors, config: Mapping) -> None:
    """Writes a tokenizer's file, whole or not at all."""
    from safetensors.numpy import save

    metadata = {"format": _FORMAT, "version": "1", "name": name, "config": json.dumps(config)}
    data = save(tensors, metadata=metadata | UNSEALED)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
        seal(temporary)


def read_tokenizer(path: Path, checks: Mapping[str, Check]) -> tuple[str, Tensors, dict]:
    """(name, tensors, config) of a tokenizer's file, checked.

    checks: by the names of the known tokenizers, functions that raise InputError for tensors or a config that do not fit.
    """
    try:
        metadata, tensors = read_tensors(path, "numpy")
    except InputError as error:
        raise InputError(f"{path} is not a tokenizer: {error}; expected a .safetensors file or a token store") from None
    name = metadata.get("name")
    if metadata.get("format") != _FORMAT or metadata.get("version") != "1" or name is None or name not in checks:
        raise InputError(
            f"{path} is a safetensors file but not a tokenizer of this program (format {metadata.get('format')!r}, "
            f"version {metadata.get('version')!r}, name {name!r}); fit one with `vimpac tokenize`"
        )
    with damage_named(path):
        check_names(metadata, {"format", "version", "name", "config"})
        config = _parsed(metadata["config"])
        checks[name](tensors, config)
    return name, tensors, config


def _parsed(config: str) -> dict:
    try:
        return json.loads(config)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its configuration is not JSON ({error})") from None


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Adds the file's name and the way out to an InputError raised in the body."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path} is damaged or was not written by this program: {error}; copy it again") from None


def check_frames(frames: np.ndarray) -> None:
    """Raises ValueError unless frames are what `Tokenizer.encode` takes."""
    _, C, H, W = frames.shape
    if frames.dtype != np.uint8 or C != 3 or H != W or H % STRIDE:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, expected uint8 [T, 3, S, S], S a multiple of {STRIDE}")


def check_ids(ids: np.ndarray, tokenizer: Tokenizer) -> None:
    """Raises InputError that names the first id outside the tokenizer's vocabulary."""
    outside = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if len(outside):
        raise InputError(
            f"id {outside[0]} is outside the vocabulary of this {tokenizer.name} tokenizer, expected "
            f"0..{tokenizer.vocab_size - 1}; decode ids with the tokenizer of their store, without padding"
        )
