"""`vimpac verify`: is a token store intact?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from vimpac.console import count, say


def verify(store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")]) -> None:
    """Check every checksum, id and the tokenizer of a token store, that its parts fit each other, and print what it holds.

    Example: vimpac verify store/

    Args:
        store: Folder that `vimpac tokenize` wrote.
    """
    from vimpac.data.shards import check_listed, unfinished_shards
    from vimpac.data.store import TokenStore
    from vimpac.data.tokenizers import check_tokenizer_file

    tokens = TokenStore(store, verify=True)
    check_listed(store)
    check_tokenizer_file(store, tokens.tokenizer)
    tokenizer, (height, width) = tokens.tokenizer, tokens.grid
    frames = int(tokens.frames.sum())
    say(f"{store}: every checksum and the tokenizer are right")
    say(f"  videos     {len(tokens)}, {count(frames, 'frame')} at {tokens.fps:g} a second, {tokens.nbytes / 1e6:.1f} MB")
    say(f"  tokenizer  {tokenizer.name}, {count(tokenizer.vocab_size, 'code')}, digest {tokenizer.digest[:16]}")
    say(f"  frame      {tokens.frame_size} pixels, {height} × {width} tokens, {count(len(tokens.views), 'view')}")
    if tokens.failed:
        say(f"  failed     {count(len(tokens.failed), 'video')} could not be decoded")
    for name, reason in tokens.failed.items():
        say(f"    {name}: {reason}")
    if unfinished := unfinished_shards(store):
        say(
            f"  note       {count(len(unfinished), 'shard')} without a .json, from a run that was killed; not part of the "
            "store, the next `vimpac tokenize` removes it:"
        )
    for path in unfinished:
        say(f"    {path.name}")
