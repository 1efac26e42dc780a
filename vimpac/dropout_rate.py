"""The rate that dropout runs at, for ops and kernels alike: a probability p rounded to what a random word can express.

An element whose random word of `bits` bits is below the threshold is dropped. What is kept is multiplied with the scale.
Attention draws words of 16 bits, the residual connections words of 32.
"""

from __future__ import annotations


def dropout_threshold(p: float, bits: int) -> int:
    """round(p · 2^bits), at most 2^bits - 1. Its share of 2^bits is the rate in use."""
    return min(round(p * 2**bits), 2**bits - 1)


def dropout_scale(p: float, bits: int) -> float:
    """1 / (1 - the rate in use)."""
    return 2**bits / (2**bits - dropout_threshold(p, bits))
