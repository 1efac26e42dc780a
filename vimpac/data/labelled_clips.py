"""The clips that fine-tuning trains on: of sample number k, which video, which frames, which view.

Samples are numbered as those of pre-training in `vimpac.data.clips`, so the sampler's state is one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vimpac.data.clips import check_clip_fits
from vimpac.data.labelled import LabelledVideos
from vimpac.data.rates import last_start
from vimpac.data.store import TokenStore
from vimpac.errors import InputError


@dataclass(frozen=True)
class LabelledBatch:
    """Clips of n videos and their labels."""

    tokens: np.ndarray  # [n, T, H, W] int64, PAD where a video is shorter than the clip
    labels: np.ndarray  # [n] int64
    videos: np.ndarray  # [n] int64, indices into the store


class LabelledClips:
    """Draws clips of labelled videos: each epoch every video once, a uniform start, a uniform view (Table 4).

    views: indices of the store's views to draw from. clip_frames: T. pad_id: id for frames past a video's end. every: a clip
    takes every so many frames. Raises InputError without videos, and if the store has no video as long as a clip.
    """

    def __init__(
        self,
        store: TokenStore,
        found: LabelledVideos,
        views: Sequence[int],
        clip_frames: int,
        pad_id: int,
        seed: int,
        every: int = 1,
    ):
        if not len(found.videos):
            raise InputError(f"{store.folder} has no labelled video to train on")
        check_clip_fits(store, clip_frames, every)
        self.store, self.found, self.views = store, found, np.asarray(views, np.int64)
        self.clip_frames, self.pad_id, self.seed, self.every = clip_frames, pad_id, seed, every
        self.padded = bool(store.frames[found.videos].min() <= (clip_frames - 1) * every)
        self._epoch = (-1, np.empty(0), np.empty(0), np.empty(0))

    def batch(self, first: int, count: int) -> LabelledBatch:
        """Samples first, first + 1, …, first + count - 1."""
        epochs, places = np.divmod(np.arange(first, first + count, dtype=np.int64), len(self.found.videos))
        chosen, views, uniform = np.empty_like(places), np.empty_like(places), np.empty(count)
        for epoch in np.unique(epochs):
            order, numbers, seen = self._load_epoch(int(epoch))
            here = epochs == epoch
            at = places[here]
            chosen[here], uniform[here], views[here] = order[at], numbers[at], self.views[seen[at]]
        videos = self.found.videos[chosen]
        last = last_start(self.store.frames[videos], self.clip_frames, self.every)
        starts = (uniform * (last + 1)).astype(np.int64)
        tokens = self.store.read_clips(videos, starts, self.clip_frames, views, fill=self.pad_id, every=self.every)
        return LabelledBatch(tokens.astype(np.int64), self.found.labels[chosen], videos)

    def _load_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An epoch's order of the videos; a uniform number and the place of the view for each of its samples."""
        if self._epoch[0] != epoch:
            rng, n = np.random.Generator(np.random.Philox(key=[self.seed, epoch])), len(self.found.videos)
            self._epoch = (epoch, rng.permutation(n), rng.random(n), rng.integers(len(self.views), size=n))
        return self._epoch[1:]
