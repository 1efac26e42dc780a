"""How good the features are while pre-training: k-NN accuracy and effective rank on held-out labelled videos."""

from __future__ import annotations

import numpy as np
import torch

from vimpac.data.labelled import LabelledVideos, LabelSource, label_store
from vimpac.data.test_clips import TestClips
from vimpac.errors import InputError
from vimpac.evaluation.monitor import MONITOR_VIDEOS, check_labels, monitor
from vimpac.model import PretrainModel


class FeatureMonitor:
    """One clip of each video, looked at every `every` updates. labels: int64 [n], one a video of the clips.

    batch: clips of a forward pass. Raises InputError for fewer than two videos or classes.
    """

    def __init__(self, clips: TestClips, labels: np.ndarray, every: int, batch: int):
        check_labels(labels)
        self.labels, self.every, self.batch, self.padded = labels, every, batch, clips.padded
        self.tokens = clips.read(0, len(clips))  # [n, 1, 1, T, H, W]

    def is_due(self, step: int) -> bool:
        return step % self.every == 0

    def measure(self, model: PretrainModel, autocast: torch.dtype | None) -> dict[str, float]:
        """{"knn_accuracy", "effective_rank"}"""
        return monitor(model, self.tokens, self.labels, self.batch, self.padded, autocast)


def monitored(clips: TestClips, source: LabelSource) -> tuple[TestClips, np.ndarray]:
    """Those of the clips' videos that have a label, at most MONITOR_VIDEOS, and their labels. Raises InputError without any."""
    store = clips.store
    found = [x for x in label_store(store, source).splits.values() if len(x.videos)]
    label_of = {int(video): int(label) for x in found for video, label in zip(*x, strict=True)}
    videos = np.array([video for video in clips.videos if int(video) in label_of][:MONITOR_VIDEOS], np.int64)
    if not len(videos):
        raise InputError(
            f"none of the {len(clips)} held-out videos of {store.folder} has a label in {source.path}: label some of them, or "
            "leave out --probe-every"
        )
    labelled = LabelledVideos(videos, np.array([label_of[int(video)] for video in videos], np.int64))
    options = clips.clips, clips.views, clips.clip_frames, clips.pad_id, clips.every
    return TestClips(store, labelled.videos, *options), labelled.labels
