"""Store → pairs of clips (section 3.2): which video, which frames, for sample number k of a run.

A run's samples are numbered 0, 1, 2, …, whatever the batch size, accumulation or number of processes. What sample k is
depends on (seed, k) alone, given the videos and `distinct`, so the sampler's whole state is one number.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from vimpac.data.store import TokenStore
from vimpac.errors import InputError


@dataclass(frozen=True)
class ClipBatch:
    """Two clips of n videos: all first clips, then all second clips."""

    tokens: np.ndarray  # [2n, T, H, W] int64, PAD where a video is shorter than the clip
    sample_ids: np.ndarray  # [2n] int64, 2k + 0 or 1 for the clips of sample k: what their masks are drawn from
    videos: np.ndarray  # [n] int64, indices into the store


class ClipPairs:
    """Draws pairs of clips from some of a store's videos.

    store: a TokenStore. videos: int [n], indices into it. clip_frames: T. pad_id: id for frames past a video's end.
    distinct: each aligned run of this many samples has no video twice (where the store has that many).
    d_max: largest distance of the two clips' starts in seconds, None = the starts are independent (Table 10).

    Raises InputError when there is no video, or when the store has none as long as a clip.
    """

    def __init__(
        self,
        store: TokenStore,
        videos: np.ndarray,
        clip_frames: int,
        pad_id: int,
        seed: int,
        distinct: int = 1,
        d_max: float | None = None,
    ):
        self.store, self.videos, self.clip_frames, self.pad_id, self.seed = store, videos, clip_frames, pad_id, seed
        self.d_max = None if d_max is None else math.floor(d_max * store.fps + 1e-6)  # in frames
        n, frames = len(videos), store.frames[videos]
        if not n:
            raise InputError(f"{store.folder} has no video to draw clips from")
        if store.frames.max() < clip_frames:
            raise InputError(
                f"a clip of {clip_frames} frames is longer than every video in {store.folder}: the longest has "
                f"{store.frames.max()} frames, {store.fps:g} a second; use a shorter clip, or tokenize at a higher --fps"
            )
        self.padded = bool(frames.min() < clip_frames)
        self.epoch_samples = n // distinct * distinct or n
        self._epoch = (-1, np.empty(0), np.empty(0))

    def batch(self, first: int, count: int) -> ClipBatch:
        """Samples first, first + 1, …, first + count - 1."""
        k = np.arange(first, first + count, dtype=np.int64)
        videos, starts = self._draw(k)
        tokens = self.store.read_clips(np.tile(videos, 2), starts.T.reshape(-1), self.clip_frames, fill=self.pad_id)
        return ClipBatch(tokens.astype(np.int64), np.concatenate([2 * k, 2 * k + 1]), videos)

    def _draw(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Video [n] and the first frame of its two clips [n, 2] of each sample."""
        epochs, places = np.divmod(k, self.epoch_samples)
        videos, uniform = np.empty_like(k), np.empty((len(k), 2))
        for epoch in np.unique(epochs):
            order, numbers = self._load_epoch(int(epoch))
            here = epochs == epoch
            videos[here], uniform[here] = self.videos[order[places[here]]], numbers[places[here]]
        last = np.maximum(self.store.frames[videos].astype(np.int64) - self.clip_frames, 0)
        first = _uniform(uniform[:, 0], 0, last)
        if self.d_max is None:
            return videos, np.stack([first, _uniform(uniform[:, 1], 0, last)], 1)
        low, high = np.maximum(first - self.d_max, 0), np.minimum(first + self.d_max, last)
        return videos, np.stack([first, _uniform(uniform[:, 1], low, high)], 1)

    def _load_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """An epoch's order of the videos and two uniform numbers for each of its samples."""
        if self._epoch[0] != epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epoch = (epoch, rng.permutation(len(self.videos)), rng.random((self.epoch_samples, 2)))
        return self._epoch[1:]


def split_videos(store: TokenStore, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the held-out videos, int [n] each, a function of the videos' names alone.

    held_out: share of the videos to hold out, at least two (of two or three videos one), so that a clip's partner can be told
    from another video's clips. Raises InputError for a store of fewer than two videos.
    """
    if len(store) < 2:
        raise InputError(
            f"{store.folder} holds {len(store)} video, expected at least 2: one to train on and one to evaluate on"
        )
    order = sorted(
        range(len(store)), key=lambda i: (zlib.crc32(store.names[i].encode("utf-8", "surrogateescape")), store.names[i])
    )
    count = min(max(min(2, len(store) // 2), round(held_out * len(store))), len(store) - 1)
    return np.sort(order[count:]), np.sort(order[:count])


def _uniform(u: np.ndarray, low: np.ndarray | int, high: np.ndarray) -> np.ndarray:
    """Uniform integers low … high from uniform numbers in [0, 1)."""
    return low + (u * (high - low + 1)).astype(np.int64)
