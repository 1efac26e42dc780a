"""The clips that an evaluation averages over: k temporal clips × the store's test views of each video."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vimpac.data.clips import check_clip_fits
from vimpac.data.rates import last_start
from vimpac.data.store import TokenStore
from vimpac.errors import InputError


class TestClips:
    """Clips of some of a store's videos.

    videos: int [n], indices into the store. clips: k; their starts are spread evenly from the first to the last possible one,
    and one clip is the middle one. views: indices of the store's views. clip_frames: T. pad_id: id for frames past a video's
    end. every: a clip takes every so many frames.

    Raises InputError without videos, and if the store has no video as long as a clip.
    """

    __test__ = False  # to pytest

    def __init__(
        self,
        store: TokenStore,
        videos: np.ndarray,
        clips: int,
        views: Sequence[int],
        clip_frames: int,
        pad_id: int,
        every: int = 1,
    ):
        if not len(videos):
            raise InputError(f"{store.folder} has no video to evaluate on")
        check_clip_fits(store, clip_frames, every)
        self.store, self.videos, self.clips, self.views = store, np.asarray(videos, np.int64), clips, tuple(views)
        self.clip_frames, self.pad_id, self.every = clip_frames, pad_id, every
        self.padded = bool(store.frames[self.videos].min() <= (clip_frames - 1) * every)

    def __len__(self) -> int:
        """The number of videos."""
        return len(self.videos)

    def starts(self, video: int) -> np.ndarray:
        """The first frame of each clip of a video of the store: int64 [k]."""
        return clip_starts(int(self.store.frames[video]), self.clips, self.clip_frames, self.every)

    def read(self, first: int, count: int) -> np.ndarray:
        """Videos first … first + count - 1: int64 [count, k, views, T, H, W]. Each video is read once."""
        views, clips = np.array(self.views), []
        for video in self.videos[first : first + count].tolist():
            whole = self.store.read_clips(np.full_like(views, video), 0 * views, int(self.store.frames[video]), views)
            clips.append(cut_clips(whole, self.starts(video), self.clip_frames, self.pad_id, self.every))
        return np.stack(clips)


def clip_starts(frames: int, clips: int, clip_frames: int, every: int = 1) -> np.ndarray:
    """The first frame of each clip of a video of so many frames, spread evenly; of one clip in the middle: int64 [k]."""
    last = int(last_start(np.array([frames]), clip_frames, every)[0])
    return np.array([last // 2]) if clips == 1 else np.round(np.linspace(0, last, clips)).astype(np.int64)


def cut_clips(whole: np.ndarray, starts: np.ndarray, clip_frames: int, pad_id: int, every: int = 1) -> np.ndarray:
    """Clips of a video's ids [views, frames, H, W] that begin at starts [k]: int64 [k, views, T, H, W], PAD past its end."""
    views, frames, *size = whole.shape
    out = np.full((len(starts), views, clip_frames, *size), pad_id, np.int64)
    places = np.arange(clip_frames) * every
    for clip, start in zip(out, starts.tolist(), strict=True):
        kept = start + places[start + places < frames]
        clip[:, : len(kept)] = whole[:, kept]
    return out
