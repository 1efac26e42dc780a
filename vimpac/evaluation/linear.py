"""The linear probe: logistic regression on frozen features, its strength chosen on a held-out part of the training videos."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

STRENGTHS = tuple(10.0**power for power in range(-4, 5))
"""C of logistic regression, the inverse of its L2 penalty, among which the held-out part of training chooses."""
HELD_OUT = 0.2
"""Share of each class's training videos that chooses C."""
MOST_ITERATIONS = 1000


class Linear(NamedTuple):
    """A linear probe's answers and the strength that it chose."""

    guesses: np.ndarray  # int64 [m]
    strength: float


def linear_probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray, held_out: np.ndarray) -> Linear:
    """Logistic regression on train [n, D], each feature scaled to variance 1; labels int64 [n]; predicts test [m, D].

    held_out: bool [n], the training videos that choose C among STRENGTHS, each fitted on the others. The last fit is on all.
    Of equal accuracies the smallest C wins. Without held-out videos C is 1.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MOST_ITERATIONS))
    with warnings.catch_warnings():  # a fit that stops early is one with a little more penalty
        warnings.simplefilter("ignore", ConvergenceWarning)
        if not held_out.any():
            return Linear(model.fit(train.astype(np.float64), labels).predict(test.astype(np.float64)), 1.0)
        division = [(np.flatnonzero(~held_out), np.flatnonzero(held_out))]
        search = GridSearchCV(model, {"logisticregression__C": STRENGTHS}, scoring="accuracy", cv=division)
        search.fit(train.astype(np.float64), labels)
        return Linear(search.predict(test.astype(np.float64)), search.best_params_["logisticregression__C"])


def held_out_part(names: Sequence[str], labels: np.ndarray, share: float = HELD_OUT) -> np.ndarray:
    """bool [n]: a share of each class's videos, at least one of two or more; a function of names and labels alone.

    A class of one video stays whole in the other part.
    """
    order = [zlib.crc32(name.encode("utf-8", "surrogateescape")) for name in names]
    held = np.zeros(len(names), bool)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label).tolist()
        count = max(round(share * len(mine)), 1) if len(mine) > 1 else 0
        held[sorted(mine, key=lambda i: (order[i], names[i]))[:count]] = True
    return held
