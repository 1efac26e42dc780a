"""One store serves several frame rates: a clip takes every k-th frame."""

from __future__ import annotations

import math

import numpy as np

from vimpac.data.store import TokenStore
from vimpac.errors import InputError

SLACK = 1e-6  # relative: rates such as 29.97 are rounded


def frame_step(store: TokenStore, fps: float | None) -> int:
    """k for clips of every k-th frame at `fps` frames a second; 1 for None, the store's own rate.

    Raises InputError unless the store's rate is a multiple of fps.
    """
    if fps is None:
        return 1
    k = round(store.fps / fps)
    if k < 1 or not math.isclose(k * fps, store.fps, rel_tol=SLACK):
        below = [store.fps / n for n in range(1, 65)]
        near = sorted(dict.fromkeys(sorted(below, key=lambda rate: abs(math.log(rate / fps)))[:2]))
        raise InputError(
            f"fps={fps:g} does not divide the {store.fps:g} frames a second of store {store.folder}: give --fps "
            f"{' or '.join(f'{rate:g}' for rate in near)}, or tokenize the videos again with --fps {fps:g}"
        )
    return k


def last_start(frames: np.ndarray, clip_frames: int, every: int) -> np.ndarray:
    """The last frame at which a whole clip can start, 0 for a video that is shorter: int64 [n] for `frames` [n]."""
    return np.maximum(frames.astype(np.int64) - ((clip_frames - 1) * every + 1), 0)
