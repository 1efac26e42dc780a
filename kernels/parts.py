"""Column sums from the parts that programs leave: added up in a fixed order, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vimpac.kernels.fusion import FUSED

COLUMNS, AT_ONCE = 64, 16


@triton.jit(do_not_specialize=["count"])
def _add_parts(parts, out, count, COLUMNS: tl.constexpr, SIZE: tl.constexpr, AT_ONCE: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    m_column = column < SIZE
    total = tl.zeros((AT_ONCE, COLUMNS), tl.float32)
    for first in range(0, count, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        mask = (part < count)[:, None] & m_column[None, :]
        total += tl.load(parts + part[:, None] * SIZE + column[None, :], mask=mask, other=0.0)
    tl.store(out + column, tl.sum(total, 0), mask=m_column)


def add_parts(parts):
    """float32 parts [P, ...] → their sum [...]."""
    out = torch.empty_like(parts[0])
    grid = (triton.cdiv(out.numel(), COLUMNS),)
    _add_parts[grid](parts, out, len(parts), COLUMNS, out.numel(), AT_ONCE, num_warps=4, **FUSED)
    return out
