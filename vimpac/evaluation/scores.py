"""What the scores of an evaluation say: accuracies, the confusion matrix, an order of its classes, the worst mistakes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

CLIP_COUNTS = (1, 2, 5, 10)
"""The numbers of clips whose accuracy an evaluation reports, besides all of them."""
MOST_ORDERED = 1000
"""Classes up to which the best order of a tree's leaves is searched for; it takes seconds for so many."""


def accuracies(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Shares of right answers: {"top1", "top5", "mean_class_accuracy"}.

    scores: float [n, K], the higher the likelier. labels: int [n], below K. Of equal scores the lower class comes first.
    top5: the right class is among the five likeliest. mean_class_accuracy: the mean over classes of the share of their videos
    that are right; classes without a video do not count. Raises ValueError without videos, or for scores that are NaN.
    """
    if not len(labels):
        raise ValueError("scores of 0 videos, expected at least one")
    places = ranks(scores, labels)
    right = places == 0
    videos = np.bincount(labels)
    by_class = np.bincount(labels, right)[videos > 0] / videos[videos > 0]
    return {"top1": float(right.mean()), "top5": float((places < 5).mean()), "mean_class_accuracy": float(by_class.mean())}


def ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the right one, int [n]; 0 = the answer is right. Raises ValueError for NaN."""
    if np.isnan(scores).any():
        raise ValueError(f"the scores of row {int(np.isnan(scores).any(1).argmax())} are NaN, expected numbers")
    truth = np.take_along_axis(scores, labels[:, None], 1)
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    return ((scores > truth) | ((scores == truth) & earlier)).sum(1)


def average(scores: np.ndarray, clips: int | None = None) -> np.ndarray:
    """A video's scores: the mean over its clips, or over `clips` of them. float32 [n, k, K] → float32 [n, K]."""
    chosen = scores if clips is None else scores[:, spread_of(scores.shape[1], clips)]
    return chosen.mean(1, dtype=np.float64).astype(np.float32)


def accuracies_by_clips(scores: np.ndarray, labels: np.ndarray) -> dict[int, dict[str, float]]:
    """`accuracies` for each number of clips in CLIP_COUNTS and for all k, from scores [n, k, K] of one pass."""
    k = scores.shape[1]
    return {clips: accuracies(average(scores, clips), labels) for clips in sorted({*CLIP_COUNTS, k}) if clips <= k}


def spread_of(k: int, clips: int) -> list[int]:
    """Which of k evenly spread clips are nearest to `clips` evenly spread ones, from the first to the last; 1: the middle one.

    Halfway between two clips the later one is taken, for one clip the earlier.
    """
    if not 1 <= clips <= k:
        raise ValueError(f"{clips} of {k} clips, expected 1 to {k}")
    if clips == 1:
        return [(k - 1) // 2]
    gaps = clips - 1
    return [(2 * i * (k - 1) + gaps) // (2 * gaps) for i in range(clips)]


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """int64 [classes, classes]: how many videos of the class of each row were taken for the class of each column."""
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def confusion_order(confusion: np.ndarray) -> np.ndarray:
    """The classes in an order in which those that are confused with each other are neighbours, int [K].

    Average-linkage clustering by the mean of the two rates of confusion, with the best order of its leaves (Bar-Joseph et al.,
    2001). Classes that take no part in a confusion come last, in their own order.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    rates = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    np.fill_diagonal(rates, 0)
    mutual = (rates + rates.T) / 2
    confused = np.flatnonzero(mutual.any(0))
    others = np.flatnonzero(~mutual.any(0))
    if len(confused) < 3:
        return np.concatenate([confused, others])
    distances = 1 - mutual[np.ix_(confused, confused)]
    np.fill_diagonal(distances, 0)
    tree = linkage(squareform(distances), "average", optimal_ordering=len(confused) <= MOST_ORDERED)
    leaves = leaves_list(tree)
    if leaves[0] > leaves[-1]:  # the mirrored order is as good
        leaves = leaves[::-1]
    return np.concatenate([confused[leaves], others])


class Confusion(NamedTuple):
    """How many of a class's videos were taken for another class."""

    label: int
    prediction: int
    videos: int
    of: int
    """Videos of the class."""


def worst_confusions(confusion: np.ndarray, count: int) -> list[Confusion]:
    """The most frequent confusions, at most `count`."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [divmod(int(i), len(wrong)) for i in order if wrong.flat[i]]
    return [Confusion(i, j, int(wrong[i, j]), int(confusion[i].sum())) for i, j in pairs]


def confident_mistakes(scores: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """The rows with a wrong answer, the highest score of a wrong class first, at most `count`: int [≤ count]."""
    wrong = np.flatnonzero(ranks(scores, labels) > 0)
    return wrong[np.argsort(-scores[wrong].max(1), kind="stable")][:count]
