"""GELU with a bias; vimpac/ops/bias_gelu.py has the definition.

A program takes a block of columns of its share of the rows. Backward adds up the gradient of bias in registers on the way and
writes one part, and a second kernel adds the parts in a fixed order, without atomics. The shares depend on the shape alone.

Bytes moved, in tensors [R, F]: h and out forward; backward the gradient, h and the gradient of h, and out if it is made again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vimpac.kernels.fusion import FUSED
from vimpac.kernels.parts import add_parts

COLUMNS, ROWS, WARPS = 256, 4, 4  # of a tile: 8 elements a thread. Not measured on a GPU yet
SHARES = 128  # of the rows, at most: with 8 blocks of columns, those of Small, some 8 programs a multiprocessor of an H100


@triton.jit
def _distribution(z):
    """The normal distribution, with the absolute error of float32."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit(do_not_specialize=["rows"])
def _forward(h, bias, out, rows, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_column = column < F
    offset = row[:, None] * F + column[None, :]
    mask = (row < rows)[:, None] & m_column[None, :]
    z = tl.load(h + offset, mask=mask, other=0.0).to(tl.float32)
    z += tl.load(bias + column, mask=m_column, other=0.0)[None, :]
    tl.store(out + offset, (z * _distribution(z)).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "share"])
def _backward(
    grad,
    h,
    bias,
    of_h,
    out,
    parts,
    rows,
    share,
    F: tl.constexpr,
    OUTPUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_column = column < F
    b = tl.load(bias + column, mask=m_column, other=0.0)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    for first in range(0, share, ROWS):
        row = begin + first + tl.arange(0, ROWS)
        offset = row[:, None] * F + column[None, :]
        mask = (row < end)[:, None] & m_column[None, :]
        z = tl.load(h + offset, mask=mask, other=0.0).to(tl.float32) + b
        distribution = _distribution(z)
        if OUTPUT:
            tl.store(out + offset, (z * distribution).to(out.dtype.element_ty), mask=mask)
        density = tl.exp2(z * z * -0.7213475204444817) * 0.3989422804014327
        g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32) * (distribution + z * density)
        tl.store(of_h + offset, g.to(of_h.dtype.element_ty), mask=mask)
        total += g
    part = parts + tl.program_id(0).to(tl.int64) * F + column
    tl.store(part, tl.sum(total, 0), mask=m_column)


def forward(h, bias):
    """The op vimpac::bias_gelu.triton."""
    (rows, F), out = h.shape, torch.empty_like(h)
    if rows > 0:
        grid = triton.cdiv(rows, ROWS), triton.cdiv(F, COLUMNS)
        _forward[grid](h, bias, out, rows, F, ROWS, COLUMNS, num_warps=WARPS, **FUSED)
    return out


def backward(grad, h, bias, with_output):
    """The op vimpac::bias_gelu_backward.triton."""
    (rows, F), of_h = h.shape, torch.empty_like(h)
    out = torch.empty_like(h) if with_output else h.new_empty(0)
    if rows == 0:
        return of_h, out, torch.zeros_like(bias)
    share = ROWS * triton.cdiv(rows, ROWS * SHARES)
    parts = torch.empty(triton.cdiv(rows, share), F, dtype=torch.float32, device=h.device)
    grid = len(parts), triton.cdiv(F, COLUMNS)
    pointers = grad, h, bias, of_h, out if with_output else of_h, parts
    _backward[grid](*pointers, rows, share, F, with_output, ROWS, COLUMNS, num_warps=WARPS, **FUSED)
    return of_h, out, add_parts(parts)
