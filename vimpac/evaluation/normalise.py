"""Normalising vectors so that their cosines differ: centring and whitening."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vimpac.config.probe import Normalisation
from vimpac.errors import InputError


class Normaliser(NamedTuple):
    """What turns a vector into a normalised one. Fitted on some videos, it applies to others as well.

    none: nothing. l2: unit length. center: minus the mean. whiten: minus the mean, times the inverse square root of the
    covariance, so that all directions vary equally. Cosines are the same for vectors of unit length, so center and whiten leave
    lengths as they are.
    """

    kind: Normalisation
    offset: np.ndarray | None = None
    """The mean [D] float64, for center and whiten."""
    matrix: np.ndarray | None = None
    """[D, D] float64, symmetric, for whiten."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[n, D] → [n, D] float32."""
        if self.kind == "l2":
            return unit_length(x)
        y = x.astype(np.float64)  # [CLS] states differ by a thousandth of their size
        if self.offset is not None:
            y = y - self.offset
        if self.matrix is not None:
            y = y @ self.matrix
        return y.astype(np.float32)


def fit_normaliser(x: np.ndarray, kind: Normalisation) -> Normaliser:
    """Fits on vectors [n, D]. Raises InputError to whiten fewer than two.

    The covariance for whitening is shrunk as Ledoit and Wolf (2004) have it: the plain one of fewer videos than dimensions
    would make all of them equally far from each other. It still takes several videos per dimension to whiten well.
    """
    if kind in ("none", "l2"):
        return Normaliser(kind)
    offset = x.mean(0, dtype=np.float64)
    if kind == "center":
        return Normaliser(kind, offset)
    if len(x) < 2:
        raise InputError(f"{len(x)} video cannot be whitened, expected at least 2: use another --normalize")
    from sklearn.covariance import ledoit_wolf

    covariance, _ = ledoit_wolf(x.astype(np.float64) - offset, assume_centered=True)
    values, directions = np.linalg.eigh(covariance)
    scale = np.where(values > values.max() * 1e-12, np.maximum(values, 1e-300) ** -0.5, 0.0)
    return Normaliser(kind, offset, (directions * scale) @ directions.T)


def unit_length(x: np.ndarray) -> np.ndarray:
    """[n, D] → float32 [n, D] of length 1; a vector of zeros stays as it is."""
    lengths = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return (x / np.where(lengths > 0, lengths, 1)).astype(np.float32)
