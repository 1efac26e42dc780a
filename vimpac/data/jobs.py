"""The jobs that worker processes run when a store is built: one video per call, `heartbeat()` after each chunk of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from vimpac.data.format import View
from vimpac.data.patch_vq import to_patches
from vimpac.data.tokenizer_file import Tokenizer
from vimpac.data.tokenizers import load_tokenizer
from vimpac.data.video import decode, path_of
from vimpac.data.workers import Heartbeat


def sample_patches(videos: Path, fps: float, size: int, count: int, name: str, heartbeat: Heartbeat) -> np.ndarray:
    """uint8 [≤ count, 192] from the first frames of a video, a random choice that depends on its name alone."""
    frames = next(decode(path_of(name, videos), fps, size))[0]
    patches = to_patches(frames)
    generator = np.random.default_rng(list(name.encode("utf-8", "surrogateescape")))  # a name may hold bytes that are not UTF-8
    return patches[generator.permutation(len(patches))[:count]]


def decode_video(videos: Path, fps: float, size: int, views: tuple[View, ...], name: str, heartbeat: Heartbeat) -> np.ndarray:
    """uint8 [views, frames, 3, size, size]."""
    return np.concatenate(list(_with_heartbeat(decode(path_of(name, videos), fps, size, views), heartbeat)), axis=1)


def encode_video(
    store: Path, videos: Path, fps: float, size: int, views: tuple[View, ...], name: str, heartbeat: Heartbeat
) -> np.ndarray:
    """uint16 [views, frames, h, w], encoded chunk by chunk, so that the pixels of a long video need not fit into memory."""
    tokenizer = _cached_tokenizer(store)
    chunks = _with_heartbeat(decode(path_of(name, videos), fps, size, views), heartbeat)
    return np.concatenate([encode_views(tokenizer, chunk) for chunk in chunks], axis=1)


def encode_views(tokenizer: Tokenizer, frames: np.ndarray) -> np.ndarray:
    """uint8 [views, frames, 3, S, S] → uint16 [views, frames, h, w]."""
    return np.stack([tokenizer.encode(view) for view in frames])


def _with_heartbeat(chunks: Iterator[np.ndarray], heartbeat: Heartbeat) -> Iterator[np.ndarray]:
    for chunk in chunks:
        heartbeat()
        yield chunk


_cached_tokenizer = cache(load_tokenizer)
