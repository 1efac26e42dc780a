"""The random words of every kernel; vimpac/ops/philox.py has the definition."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(counter, c2, c3, seed, ROUNDS: tl.constexpr):
    """Four uint32 words of philox4x32 for counters (counter low, counter high, c2, c3).

    counter, seed: int64, a tensor and a scalar. c2, c3: integers or tensors of them; all counters broadcast.
    """
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = (counter & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = (tl.zeros((), tl.uint32) + c2).to(tl.uint32)
    c3 = (tl.zeros((), tl.uint32) + c3).to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, c3, k0, k1, ROUNDS)
