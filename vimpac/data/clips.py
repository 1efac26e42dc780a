"""Store → pairs of clips (section 3.2): which video, which frames, for sample number k of a run.

A run's samples are numbered 0, 1, 2, …, whatever the batch size, accumulation or number of processes. What sample k is
depends on (seed, k) alone, given the videos and `distinct`, so the sampler's whole state is one number.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vimpac.data.rates import last_start
from vimpac.data.store import TokenStore
from vimpac.errors import InputError

MOST_HELD_OUT = 2048
"""Videos that a share holds out at most: as many as 16 batches of the evaluation's 128 look at."""


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
    views: indices of views; each sample draws one of them for both clips. every: k, a clip takes every k-th frame.

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
        views: Sequence[int] = (0,),
        every: int = 1,
    ):
        self.views, self.every = np.asarray(views, np.int64), every
        self.store, self.videos, self.clip_frames, self.pad_id, self.seed = store, videos, clip_frames, pad_id, seed
        self.d_max = None if d_max is None else math.floor(d_max * store.fps + 1e-6)  # in frames
        n, frames = len(videos), store.frames[videos]
        if not n:
            raise InputError(f"{store.folder} has no video to draw clips from")
        check_clip_fits(store, clip_frames, every)
        self.padded = bool(frames.min() <= (clip_frames - 1) * every)
        self.epoch_samples = n // distinct * distinct or n
        self._epoch = (-1, np.empty(0), np.empty(0), np.empty(0))

    def batch(self, first: int, count: int) -> ClipBatch:
        """Samples first, first + 1, …, first + count - 1."""
        k = np.arange(first, first + count, dtype=np.int64)
        videos, starts, views = self._draw(k)
        clips = np.tile(videos, 2), starts.T.reshape(-1), self.clip_frames, np.tile(views, 2)
        tokens = self.store.read_clips(*clips, fill=self.pad_id, every=self.every)
        return ClipBatch(tokens.astype(np.int64), np.concatenate([2 * k, 2 * k + 1]), videos)

    def _draw(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Video [n], first frame of its two clips [n, 2] and view [n] of each sample."""
        epochs, places = np.divmod(k, self.epoch_samples)
        videos, views, uniform = np.empty_like(k), np.empty_like(k), np.empty((len(k), 2))
        for epoch in np.unique(epochs):
            order, numbers, seen = self._load_epoch(int(epoch))
            here = epochs == epoch
            at = places[here]
            videos[here], uniform[here], views[here] = self.videos[order[at]], numbers[at], self.views[seen[at]]
        last = last_start(self.store.frames[videos], self.clip_frames, self.every)
        first = _uniform(uniform[:, 0], 0, last)
        if self.d_max is None:
            return videos, np.stack([first, _uniform(uniform[:, 1], 0, last)], 1), views
        low, high = np.maximum(first - self.d_max, 0), np.minimum(first + self.d_max, last)
        return videos, np.stack([first, _uniform(uniform[:, 1], low, high)], 1), views

    def _load_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An epoch's order of the videos; two uniform numbers and the place of the view for each of its samples."""
        if self._epoch[0] != epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            order, numbers = rng.permutation(len(self.videos)), rng.random((self.epoch_samples, 2))
            self._epoch = (epoch, order, numbers, rng.integers(len(self.views), size=self.epoch_samples))
        return self._epoch[1:]


def split_videos(store: TokenStore, held_out: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the held-out videos, int [n] each, a function of the videos' names alone.

    held_out: share of the videos to hold out (below 1; at most MOST_HELD_OUT videos), or their number (1 or more). A share
    holds out at least two videos (one of two or three), so that a clip's partner has a competitor.
    Raises InputError for a store of fewer than two videos, or where nothing would be left to train on.
    """
    if len(store) < 2:
        raise InputError(
            f"{store.folder} holds {len(store)} video, expected at least 2: one to train on and one to evaluate on"
        )
    order = sorted(
        range(len(store)), key=lambda i: (zlib.crc32(store.names[i].encode("utf-8", "surrogateescape")), store.names[i])
    )
    if held_out >= 1:
        count = round(held_out)
        if count >= len(store):
            raise InputError(
                f"held_out={count} videos leave nothing to train on: {store.folder} holds {len(store)}; hold out fewer, or a "
                "share such as 0.0625"
            )
    else:
        few = min(2, len(store) // 2)
        count = min(max(few, min(round(held_out * len(store)), MOST_HELD_OUT)), len(store) - 1)
    return np.sort(order[count:]), np.sort(order[:count])


def check_clip_fits(store: TokenStore, clip_frames: int, every: int) -> None:
    """Raises InputError if no video of the store is as long as a clip."""
    longest = math.ceil(store.frames.max() / every)
    if longest < clip_frames:
        raise InputError(
            f"a clip of {clip_frames} frames is longer than every video in {store.folder}: the longest has "
            f"{longest} frames, {store.fps / every:g} a second; use a shorter clip, or {'a' if every > 1 else 'tokenize at a'} "
            "higher --fps"
        )


def _uniform(u: np.ndarray, low: np.ndarray | int, high: np.ndarray) -> np.ndarray:
    """Uniform integers low … high from uniform numbers in [0, 1)."""
    return low + (u * (high - low + 1)).astype(np.int64)
