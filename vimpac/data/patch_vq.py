"""Vector quantisation of 8×8 patches x, a tokenizer without pre-trained weights: id = argmax over codes c of 2·x·c - c·c."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vimpac.data.format import MAX_VOCABULARY
from vimpac.data.tokenizer_file import STRIDE, Tensors, check_frames, check_ids, digest_of, write_tokenizer
from vimpac.errors import InputError
from vimpac.files.checked import check_names, typed

MAX_CODES = 8192
_EPOCHS_TIMES_CODES = 10_240  # the cost of an epoch grows with codes: keeps a fit of 200,000 patches below a minute
_BLOCK = 2048  # patches per matrix product: 64 MiB of scores at 8192 codes


class PatchVQ:
    """Vector quantisation of 8×8 patches: an id is the index of the nearest of `codes` patches.

    Codes are whole pixel values, so float32 computes 2·x·c - c·c exactly: the sums of 2·x·c are even and below 2²⁵, c·c is
    below 2²⁴. Ids do not depend on the machine, the threads or the batch. Ties go to the lower id.
    """

    name = "patch-vq"
    stride = STRIDE

    def __init__(self, codebook: np.ndarray, requested: int | None = None, seed: int | None = None):
        """codebook: uint8 [codes, 192], each a patch [3, 8, 8]. requested, seed: how it was fitted, if known."""
        _check_codebook(codebook)
        self.codebook = np.ascontiguousarray(codebook)
        self.vocab_size = len(self.codebook)
        self.requested, self.seed = requested, seed
        self.digest = digest_of(self.name, {"codebook": self.codebook})
        pixels = self.codebook.astype(np.float32)
        self._weight = np.ascontiguousarray(2 * pixels.T)
        self._bias = np.square(pixels).sum(1)

    @classmethod
    def fit(cls, data: np.ndarray, codes: int = 512, seed: int = 0) -> PatchVQ:
        """k-means (mini-batches, k-means++ start) over frames uint8 [T, 3, S, S] or patches uint8 [n, 192].

        The vocabulary is smaller than `codes` if the data has fewer distinct patches.
        """
        from sklearn.cluster import MiniBatchKMeans, kmeans_plusplus
        from threadpoolctl import threadpool_limits

        if not 2 <= codes <= MAX_CODES:
            raise InputError(f"codes is {codes}, expected 2 to {MAX_CODES}")
        patches = to_patches(data) if data.ndim == 4 else data
        distinct = np.unique(patches, axis=0)
        if len(distinct) <= codes:
            return cls(distinct, codes, seed)
        random = np.random.RandomState(seed)
        start = patches[random.permutation(len(patches))[: max(4 * codes, 8192)]].astype(np.float32)
        start = np.unique(start, axis=0) if len(start) > codes else start
        epochs = max(2, _EPOCHS_TIMES_CODES // codes)
        # One trial per centre: the usual 2 + log(codes) make 8192 codes ten times slower and the fit no better.
        # One thread: sums are computed in one order, so a seed always gives the same codebook.
        with threadpool_limits(1):
            centres, _ = kmeans_plusplus(start, min(codes, len(start)), random_state=random, n_local_trials=1)
            means = MiniBatchKMeans(
                len(centres),
                init=centres,  # pyright: ignore[reportArgumentType]  scikit-learn has no annotations, and the default is a str
                n_init=1,  # pyright: ignore[reportArgumentType]  likewise
                batch_size=2048,
                max_iter=epochs,
                random_state=random,
            ).fit(patches.astype(np.float32))
        codebook = np.clip(np.rint(means.cluster_centers_), 0, 255).astype(np.uint8)
        return cls(np.unique(codebook, axis=0), codes, seed)

    def encode(self, frames: np.ndarray) -> np.ndarray:
        check_frames(frames)
        patches = to_patches(frames)
        ids = np.empty(len(patches), np.uint16)
        for begin in range(0, len(patches), _BLOCK):
            scores = patches[begin : begin + _BLOCK].astype(np.float32) @ self._weight
            scores -= self._bias
            ids[begin : begin + _BLOCK] = scores.argmax(1)
        side = frames.shape[-1] // STRIDE
        return ids.reshape(len(frames), side, side)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        T, h, w = ids.shape
        check_ids(ids, self)
        patches = self.codebook[ids].reshape(T, h, w, 3, STRIDE, STRIDE)
        return patches.transpose(0, 3, 1, 4, 2, 5).reshape(T, 3, h * STRIDE, w * STRIDE)

    def save(self, path: str | Path) -> None:
        config = {"requested": self.requested, "seed": self.seed}
        write_tokenizer(Path(path), self.name, {"codebook": self.codebook}, config)

    @classmethod
    def from_file(cls, path: Path, tensors: Tensors, config: dict) -> PatchVQ:
        """The tokenizer that the file at `path` holds."""
        return cls(tensors["codebook"], **config)

    @staticmethod
    def check(tensors: Tensors, config: dict) -> None:
        """Raises InputError unless they are a PatchVQ's."""
        typed(_PatchVQConfig, config)
        check_names(tensors, {"codebook"})
        _check_codebook(tensors["codebook"])

    @staticmethod
    def codes_in(tensors: Tensors, config: dict) -> int:
        """The vocabulary size that a checked file gives."""
        return len(tensors["codebook"])


def to_patches(frames: np.ndarray) -> np.ndarray:
    """uint8 [T, 3, S, S] → [T * (S / 8)², 192], each row a patch [3, 8, 8]."""
    T, C, H, W = frames.shape
    grid = frames.reshape(T, C, H // STRIDE, STRIDE, W // STRIDE, STRIDE)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(-1, C * STRIDE * STRIDE)


@dataclass(frozen=True)
class _PatchVQConfig:
    """The configuration in a PatchVQ's file."""

    requested: int | None = None
    seed: int | None = None


def _check_codebook(codebook: np.ndarray) -> None:
    expected = f"uint8 [codes, {3 * STRIDE * STRIDE}], 1 to {MAX_VOCABULARY} codes"
    if codebook.dtype != np.uint8 or codebook.ndim != 2 or codebook.shape[1] != 3 * STRIDE * STRIDE:
        raise InputError(f"the codebook is {codebook.dtype} {codebook.shape}, expected {expected}")
    if not 1 <= len(codebook) <= MAX_VOCABULARY:
        raise InputError(f"the codebook has {len(codebook)} codes, expected {expected}")
