"""Philox4x32, the counter-based random numbers behind every mask (Salmon et al., SC 2011, figure 2 and table 2).

Four 32-bit words depend on a 128-bit counter and a 64-bit key alone: the same (seed, element) gives the same number on every
backend and device, and however a batch is split.

Words are kept in int64 tensors. The product of a word and a multiplier M can exceed 2^63, and a compiler need not wrap there
(torch.compile's C++ does not). So the code computes q = word · (M - 2^32), which fits. The product is q + word · 2^32: its high
half is (q >> 32) + word, its low half that of q.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], seed: Tensor, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four int64 tensors of uniform 32-bit words, in the shape that the counters broadcast to.

    counter: four words, each in [0, 2^32), tensors (int64) or ints, at least one of them a tensor.
    seed: int64 tensor, its 64 bits are the key.
    """
    c0, c1, c2, c3 = counter
    c0, c2 = c0 & WORD, c2 & WORD  # changes no word; torch.compile's C++ multiplies a bare arange in int32
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    for _ in range(rounds):
        q0, q1 = (MULTIPLIERS[0] - 2**32) * c0, (MULTIPLIERS[1] - 2**32) * c2
        c0, c1, c2, c3 = ((q1 >> 32) + c2) ^ c1 ^ k0, q1 & WORD, ((q0 >> 32) + c0) ^ c3 ^ k1, q0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return cast("tuple[Tensor, Tensor, Tensor, Tensor]", (c0, c1, c2, c3))  # rounds mix the key, a tensor, into every word


def split_words(x: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of int64 values."""
    return x & WORD, (x >> 32) & WORD


def below(word: Tensor, bound: Tensor | int) -> Tensor:
    """Uniform integer in [0, bound) from a uniform word: the high half of word × bound (bias below bound / 2^32)."""
    return (word * bound) >> 32


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed as a 0-dimensional int64 tensor on `device`, without a host-device copy. Raises ValueError for other kinds."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim != 0 or seed.device != device:
            raise ValueError(
                f"seed must be an int or a 0-dimensional int64 tensor on {device}, "
                f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            )
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed must be an int or a 0-dimensional int64 tensor, got {seed!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)
