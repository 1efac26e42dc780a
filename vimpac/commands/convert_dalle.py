"""`vimpac convert-dalle`: OpenAI's pickles → one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from vimpac.console import say


def convert_dalle(
    encoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ENCODER")],
    decoder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DECODER")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
) -> None:
    """Convert OpenAI's pickled DALL-E tokenizer, the paper's, to one safetensors file.

    Needs `pip install --no-deps dall-e attrs`.

    Example: vimpac convert-dalle encoder.pkl decoder.pkl dalle.safetensors

    Args:
        encoder: OpenAI's encoder.pkl.
        decoder: OpenAI's decoder.pkl.
        out: The .safetensors file to write, for `vimpac tokenize --tokenizer dalle --tokenizer-path`.
    """
    from vimpac.data.dalle import DalleVAE

    DalleVAE.convert(encoder, decoder, out)
    say(f"wrote {out}")
