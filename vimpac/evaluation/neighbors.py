"""Nearest neighbours by cosine: the k-NN classifier, and the videos most similar to one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vimpac.errors import InputError
from vimpac.evaluation.normalise import fit_normaliser, unit_length

if TYPE_CHECKING:
    from sklearn.neighbors import KNeighborsClassifier

NEIGHBORS = 20
TEMPERATURE = 0.07
"""A neighbour's vote weighs exp(cosine / TEMPERATURE), as in Wu et al. (2018) and DINO (Caron et al., 2021)."""


def resolve_neighbors(neighbors: int | None, videos: int) -> int:
    """k: NEIGHBORS, or all videos where there are fewer. Raises InputError if more are asked for than there are videos."""
    if neighbors is None:
        return min(NEIGHBORS, videos)
    if not 1 <= neighbors <= videos:
        raise InputError(f"neighbors is {neighbors}, expected 1 to {videos}, the number of training videos")
    return neighbors


def knn_predict(train: np.ndarray, labels: np.ndarray, test: np.ndarray, neighbors: int) -> np.ndarray:
    """Labels [m] of test [m, D] by the k nearest of train [n, D], both minus the mean of train."""
    center = fit_normaliser(train, "center")
    return _classifier(neighbors).fit(unit_length(center(train)), labels).predict(unit_length(center(test)))


def knn_leave_one_out(x: np.ndarray, labels: np.ndarray, neighbors: int) -> np.ndarray:
    """Labels [n] of x [n, D], minus its mean: each by the k nearest of the others."""
    center = fit_normaliser(x, "center")
    return _classifier(neighbors).fit(unit_length(center(x)), labels).predict(None)


def _classifier(neighbors: int) -> KNeighborsClassifier:
    from sklearn.neighbors import KNeighborsClassifier

    votes: Any = _votes  # sklearn's signature says str
    return KNeighborsClassifier(neighbors, weights=votes, algorithm="brute", metric="cosine")


def _votes(distances: np.ndarray) -> np.ndarray:
    return np.exp(-np.asarray(distances) / TEMPERATURE)  # 1 - cosine: a common factor, which no vote notices


def most_similar(x: np.ndarray, query: np.ndarray, count: int, left_out: int | None = None) -> list[tuple[int, float]]:
    """The `count` rows of x [n, D] with the largest cosine to query [D], and the cosines, the largest first. Exact.

    left_out: a row that does not count, such as the query's own. Of equal cosines the first row comes first.
    """
    scores = (unit_length(x).astype(np.float64) @ unit_length(query[None]).astype(np.float64)[0]).clip(-1, 1)
    if left_out is not None:
        scores[left_out] = -np.inf
    best = np.argsort(-scores, kind="stable")[: min(count, len(x) - (left_out is not None))]
    return [(int(i), float(scores[i])) for i in best]
