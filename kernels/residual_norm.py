"""The residual connection with its dropout and norm; vimpac/ops/residual_norm.py has the definition.

Forward: a program takes a few whole rows, so that sums over a row stay in registers. Backward: a program walks over its share
of the rows and adds up the column sums (gradients of weight, norm_bias and bias) in registers. It writes one part, and a second
kernel adds the parts in a fixed order, without atomics. The shares depend on the shape alone, not on the GPU.

Bytes moved: x, y and out forward, the sum too if it is asked for; backward the gradient, one kept tensor and two gradients, and
parts of 24 bytes a column, which are 1 % of that.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vimpac.dropout_rate import dropout_scale, dropout_threshold
from vimpac.kernels.fusion import FUSED
from vimpac.kernels.parts import add_parts
from vimpac.kernels.philox import philox

TILE = 1024  # elements that a program holds of each tensor, unless a row has more: 8 a thread. Not measured on a GPU yet
LEAST = tl.constexpr(2.0**-126)  # a weight whose inverse float32 holds, with subnormal numbers or without
MOST_ROWS = 8  # of a tile: 16 rows of 48 elements take more registers than there are
SHARES = 512  # programs of backward, at most: some four a multiprocessor of an H100


class Constants(NamedTuple):
    """What a kernel is compiled for."""

    C: int
    BC: int  # C padded to a power of two
    ROWS: int  # of a tile
    THRESHOLD: int  # an element whose word is below is dropped; 0: no dropout
    SCALE: float  # of what dropout keeps
    BIAS: bool  # forward: whether y has a bias
    SUM: bool  # forward: whether the sum is written, and rounded before the norm; backward: whether it is what was kept
    MORE: bool  # backward: whether the sum has a gradient of its own
    SAME: bool  # backward: the gradients of x and y are one tensor
    EXACT: bool  # whether the last rows of x, of out and of their gradients are also in float32


@triton.jit
def _keep(row, column, seed, CONST: tl.constexpr):
    """Which elements of rows [ROWS] dropout keeps, [ROWS, BC]."""
    C: tl.constexpr = CONST.C
    THRESHOLD: tl.constexpr = CONST.THRESHOLD
    if C % 64 == 0:  # a row is whole groups of 64 elements: every word of a counter is used
        GROUPS: tl.constexpr = CONST.BC // 64
        group = (row * (C // 64))[:, None, None] + tl.arange(0, GROUPS)[None, :, None]
        w0, w1, w2, w3 = philox(16 * group + tl.arange(0, 16)[None, None, :], 0, 2, seed, 7)
        first = tl.join((w0 >= THRESHOLD).to(tl.int8), (w1 >= THRESHOLD).to(tl.int8))
        second = tl.join((w2 >= THRESHOLD).to(tl.int8), (w3 >= THRESHOLD).to(tl.int8))
        both = tl.join(first, second)  # [ROWS, GROUPS, 16, b, a], word 2a + b
        return tl.reshape(tl.permute(both, (0, 1, 4, 3, 2)), (CONST.ROWS, CONST.BC)) != 0
    else:
        element = (row * C)[:, None] + column[None, :]
        w0, w1, w2, w3 = philox(element // 64 * 16 + element % 16, 0, 2, seed, 7)
        word = element % 64 // 16
        return tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3))) >= THRESHOLD


@triton.jit(do_not_specialize=["rows", "first_exact"], do_not_specialize_on_alignment=["seed"])
def _forward(
    x, y, bias, weight, norm_bias, seed, exact, out, total, statistics, out_exact, rows, first_exact, eps, CONST: tl.constexpr
):
    C: tl.constexpr = CONST.C
    row = tl.program_id(0).to(tl.int64) * CONST.ROWS + tl.arange(0, CONST.ROWS)
    column = tl.arange(0, CONST.BC)
    m_row, m_column = row < rows, column < C
    offset = row[:, None] * C + column[None, :]
    mask = m_row[:, None] & m_column[None, :]
    s = tl.load(y + offset, mask=mask, other=0.0).to(tl.float32)
    if CONST.BIAS:
        s += tl.load(bias + column, mask=m_column, other=0.0)[None, :]
    if CONST.THRESHOLD > 0:
        s *= tl.where(_keep(row, column, tl.load(seed), CONST), CONST.SCALE, 0.0)  # NaN stays, in what is dropped as well
    if CONST.EXACT:
        unrounded = mask & (row >= first_exact)[:, None]
        at = (row - first_exact)[:, None] * C + column[None, :]
        s += tl.load(exact + at, mask=unrounded, other=0.0)
        s += tl.load(x + offset, mask=mask & (row < first_exact)[:, None], other=0.0).to(tl.float32)
    else:
        s += tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    s = tl.where(mask, s, 0.0)  # the bias stands in columns of rows that are not there
    if CONST.SUM:
        rounded = s.to(total.dtype.element_ty)
        tl.store(total + offset, rounded, mask=mask)
        s = tl.where(unrounded, s, rounded.to(tl.float32)) if CONST.EXACT else rounded.to(tl.float32)
    mean = tl.sum(s, 1) / C
    centred = s - mean[:, None]
    rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.where(mask, centred * centred, 0.0), 1) / C + eps)  # no product but for `where` is added
    w = tl.load(weight + column, mask=m_column, other=0.0)[None, :]
    b = tl.load(norm_bias + column, mask=m_column, other=0.0)[None, :]
    result = centred * rstd[:, None] * w + b
    tl.store(out + offset, result.to(out.dtype.element_ty), mask=mask)
    if CONST.EXACT:
        tl.store(out_exact + at, result, mask=unrounded)
    tl.store(statistics + row, mean, mask=m_row)
    tl.store(statistics + rows + row, rstd, mask=m_row)


@triton.jit(do_not_specialize=["rows", "share", "first_exact"], do_not_specialize_on_alignment=["seed"])
def _backward(
    grad,
    grad_sum,
    grad_exact,
    kept,
    statistics,
    weight,
    norm_bias,
    seed,
    of_x,
    of_y,
    of_exact,
    parts,
    rows,
    first_exact,
    share,
    CONST: tl.constexpr,
):
    C: tl.constexpr = CONST.C
    BC: tl.constexpr = CONST.BC
    ROWS: tl.constexpr = CONST.ROWS
    column = tl.arange(0, BC)
    m_column = column < C
    w = tl.load(weight + column, mask=m_column, other=0.0)[None, :]
    b = tl.load(norm_bias + column, mask=m_column, other=0.0)[None, :]
    usable = tl.abs(w) >= LEAST
    inverse = tl.where(usable, 1.0 / tl.where(usable, w, 1.0), 0.0)
    of_weight = tl.zeros((ROWS, BC), tl.float32)
    of_norm_bias = tl.zeros((ROWS, BC), tl.float32)
    of_bias = tl.zeros((ROWS, BC), tl.float32)
    begin = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(begin + share, rows)
    for first in range(0, share, ROWS):
        row = begin + first + tl.arange(0, ROWS)
        m_row = row < end
        offset = row[:, None] * C + column[None, :]
        mask = m_row[:, None] & m_column[None, :]
        g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        if CONST.EXACT:
            unrounded = mask & (row >= first_exact)[:, None]
            at = (row - first_exact)[:, None] * C + column[None, :]
            g += tl.load(grad_exact + at, mask=unrounded, other=0.0)
        n = tl.load(kept + offset, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(statistics + rows + row, mask=m_row, other=0.0)
        if CONST.SUM:
            mean = tl.load(statistics + row, mask=m_row, other=0.0)
            n = (n - mean[:, None]) * rstd[:, None]
        else:
            n = (n - b) * inverse
        of_weight += g * n
        of_norm_bias += g
        a = g * w
        ds = a - (tl.sum(tl.where(mask, a, 0.0), 1) / C)[:, None] - n * (tl.sum(tl.where(mask, a * n, 0.0), 1) / C)[:, None]
        ds *= rstd[:, None]
        if CONST.MORE:
            ds += tl.load(grad_sum + offset, mask=mask, other=0.0).to(tl.float32)
        ds = tl.where(mask, ds, 0.0)
        of_stream = ds
        if CONST.EXACT:
            tl.store(of_exact + at, ds, mask=unrounded)
            of_stream = tl.where(unrounded, 0.0, ds)
        tl.store(of_x + offset, of_stream.to(of_x.dtype.element_ty), mask=mask)
        if CONST.THRESHOLD > 0:
            ds *= tl.where(_keep(row, column, tl.load(seed), CONST), CONST.SCALE, 0.0)
        if not CONST.SAME:
            tl.store(of_y + offset, ds.to(of_y.dtype.element_ty), mask=mask)
        of_bias += ds
    part = parts + tl.program_id(0).to(tl.int64) * (3 * C) + column
    tl.store(part, tl.sum(of_weight, 0), mask=m_column)
    tl.store(part + C, tl.sum(of_norm_bias, 0), mask=m_column)
    tl.store(part + 2 * C, tl.sum(of_bias, 0), mask=m_column)


def forward(x, y, bias, weight, norm_bias, p, seed, eps, writes_sum, exact=None):
    """The op vimpac::residual_norm.triton."""
    rows, C = x.shape
    out = torch.empty_like(x)
    total = torch.empty_like(x) if writes_sum else x.new_empty(0)
    statistics = x.new_empty(2, rows, dtype=torch.float32)
    out_exact = x.new_empty(0 if exact is None else len(exact), C, dtype=torch.float32)
    if rows > 0:
        const = constants(C, p, BIAS=bias is not None, SUM=writes_sum, EXACT=exact is not None)
        given = x, y, x if bias is None else bias, weight, norm_bias, x if seed is None else seed, x if exact is None else exact
        results = out, total if writes_sum else out, statistics, out_exact
        grid = (triton.cdiv(rows, const.ROWS),)
        _forward[grid](*given, *results, rows, rows - len(out_exact), eps, const, **shape(const), **FUSED)
    return out, total, statistics, out_exact


def backward(grad, grad_sum, kept, statistics, weight, norm_bias, p, seed, from_sum, dtype, grad_exact=None):
    """The op vimpac::residual_norm_backward.triton."""
    rows, C = kept.shape
    same = p == 0 and dtype == kept.dtype and grad_exact is None
    of_x = torch.empty_like(kept)
    of_y = kept.new_empty(0) if same else torch.empty_like(kept, dtype=dtype)
    of_exact = kept.new_empty(0 if grad_exact is None else len(grad_exact), C, dtype=torch.float32)
    if rows == 0:
        return of_x, of_y, torch.zeros(3, C, dtype=torch.float32, device=kept.device), of_exact
    const = constants(C, p, SUM=from_sum, MORE=grad_sum is not None, SAME=same, EXACT=grad_exact is not None)
    share = const.ROWS * triton.cdiv(rows, const.ROWS * SHARES)
    parts = kept.new_empty(triton.cdiv(rows, share), 3, C, dtype=torch.float32)
    gradients = grad, grad if grad_sum is None else grad_sum, grad if grad_exact is None else grad_exact
    given = kept, statistics, weight, norm_bias, kept if seed is None else seed
    results = of_x, of_x if same else of_y, of_exact, parts
    sizes = rows, rows - len(of_exact), share
    _backward[(len(parts),)](*gradients, *given, *results, *sizes, const, **shape(const), **FUSED)
    return of_x, of_y, add_parts(parts), of_exact


def constants(C, p, BIAS=False, SUM=False, MORE=False, SAME=False, EXACT=False):
    """What the kernels are compiled for."""
    BC = max(16, triton.next_power_of_2(C))
    rate = dropout_threshold(p, 32), dropout_scale(p, 32)
    return Constants(C, BC, min(MOST_ROWS, max(1, TILE // BC)), *rate, BIAS, SUM, MORE, SAME, EXACT)


def shape(const):
    """8 elements a thread of each tensor, and 16 in rows of more than 2048: what a program holds fits its registers."""
    return {"num_warps": min(8, max(1, const.ROWS * const.BC // 256))}
