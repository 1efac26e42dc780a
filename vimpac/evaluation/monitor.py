"""What a run can watch while it trains: k-NN accuracy and effective rank of the features of labelled videos."""

from __future__ import annotations

import numpy as np
import torch

from vimpac.errors import InputError
from vimpac.evaluation.features import Look, chunk_vectors
from vimpac.evaluation.neighbors import knn_leave_one_out, resolve_neighbors
from vimpac.model import ClassificationModel, PretrainModel

VECTOR = "cls"
"""What the monitor looks at: training raises the rank of [CLS], that of mean-pooled states falls (docs/probes.md)."""
MONITOR_VIDEOS = 512
"""Videos that are enough to monitor a run: one clip each costs as much as the forward passes of 256 videos of training."""


def effective_rank(features: np.ndarray) -> float:
    """RankMe (Garrido et al., 2023, Eq. 1): exp of the entropy of the singular values of features [n, D], divided by their sum.

    Between 1 (all rows are multiples of one) and min(n, D). 0 for features that are all 0.
    """
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    total = values.sum()
    if total == 0:
        return 0.0
    p = values[values > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))


def monitor(
    model: PretrainModel | ClassificationModel,
    clips: np.ndarray,
    labels: np.ndarray,
    batch: int = 64,
    padded: bool = True,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Features of labelled videos: {"knn_accuracy", "effective_rank"}.

    clips: int64 [n, clips, views, T, H, W], as `TestClips.read(0, n)` gives; n up to MONITOR_VIDEOS. labels: int64 [n].
    knn_accuracy: share of videos whose label the nearest of the others vote for (leave-one-out, see `neighbors`).
    effective_rank: RankMe of the features as they are. Without what all videos share, it would not see a collapse: the rank of
    the noise around one point is high.
    Leaves the model as it was, in its mode, and torch's generator untouched. Raises InputError for one class or one video.
    """
    check_labels(labels)
    training = model.training
    model.eval()
    try:
        x = chunk_vectors(model, clips, Look(None, batch, padded, autocast))[VECTOR].numpy()
    finally:
        model.train(training)
    guesses = knn_leave_one_out(x, labels, resolve_neighbors(None, len(x) - 1))
    return {"knn_accuracy": float((guesses == labels).mean()), "effective_rank": effective_rank(x)}


def check_labels(labels: np.ndarray) -> None:
    """Raises InputError if labels [n] are of fewer than two videos or classes."""
    if len(labels) < 2 or len(np.unique(labels)) < 2:
        raise InputError(
            f"{len(labels)} labelled videos of {len(np.unique(labels))} class show nothing, expected at least two classes"
        )
