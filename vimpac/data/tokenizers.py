"""The tokenizers by name, and loading one from its file. A new tokenizer is a file beside patch_vq.py, and a row here."""

from __future__ import annotations

import os
from pathlib import Path

from vimpac.data.dalle import DalleVAE
from vimpac.data.format import TOKENIZER, TokenizerInfo
from vimpac.data.patch_vq import PatchVQ
from vimpac.data.tokenizer_file import STRIDE, Tensors, Tokenizer, digest_of, read_tokenizer
from vimpac.errors import InputError
from vimpac.files.checked import check_regular

TOKENIZERS: dict[str, type[PatchVQ] | type[DalleVAE]] = {PatchVQ.name: PatchVQ, DalleVAE.name: DalleVAE}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from its .safetensors file, or from a store. Raises InputError if `path` is neither."""
    path = Path(path)
    if path.is_dir():
        path = path / TOKENIZER
    try:
        check_regular(path)
    except InputError as error:
        why = f"cannot be read: {error}" if os.path.lexists(path) else "does not exist"
        raise InputError(f"{path} {why}; expected a tokenizer's .safetensors file, or a token store") from None
    name, tensors, config = _read(path)
    return TOKENIZERS[name].from_file(path, tensors, config)


def check_tokenizer_file(store: str | Path, expected: TokenizerInfo) -> None:
    """Raises InputError unless the tokenizer's file in the folder `store` is there and is the `expected` tokenizer.

    Reads the file only: the modules of DALL-E need not be installed.
    """
    path = Path(store) / TOKENIZER
    if not path.is_file():
        raise InputError(f"{path} is missing, without it the ids cannot be decoded; copy the whole store again")
    name, tensors, config = _read(path)
    digest = digest_of(name, tensors)
    if digest != expected.digest:
        raise InputError(
            f"{path} is damaged or another store's: its digest is {digest[:16]}, the ids were made with "
            f"{expected.digest[:16]}; copy the whole store again"
        )
    codes = TOKENIZERS[name].codes_in(tensors, config)
    if (name, codes, STRIDE) != (expected.name, expected.vocab_size, expected.stride):
        raise InputError(
            f"{path} is a {name} tokenizer of {codes} codes, {STRIDE} pixels a token, but the store says {expected.name}, "
            f"{expected.vocab_size} and {expected.stride}: its JSON files are damaged; copy the whole store again"
        )


def _read(path: Path) -> tuple[str, Tensors, dict]:
    return read_tokenizer(path, {name: kind.check for name, kind in TOKENIZERS.items()})
