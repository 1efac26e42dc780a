"""InfoNCE on packed features: no score leaves a tile, forward or backward.

features [N, d] are the videos' features, in bfloat16 if they came so, else in float32: a rank's first views, then its second
views, rank after rank. inverse [N] holds 1 / length. This process scores the rows offset…offset + rows against all N columns.
Scores are (x_i·x_j) / (length_i length_j γ), products of the features themselves. Tensor cores take bfloat16 as it is, and
float32 as three tf32 products with float32's accuracy (one product where torch allows tf32).

Forward keeps a running maximum and sum a row (online logsumexp). Scores are symmetric, so a row's gradient needs no second pass
over columns and no gradient of the columns: with p_ij = exp(s_ij - lse_i), g_r rank r's upstream gradient,

    d loss / d unit_i = Σ_{j ≠ i} (g_i p_ij + g_j p_ji - 2 g_i [j is i's partner]) unit_j / (m γ)

Where rows alone would not fill the GPU, several programs share a row's columns, and the kernel that follows adds their partial
sums in a fixed order. No float is added by atomics: the same inputs give the same bits. Memory beyond the features and their
gradient: 2 floats a row, and the partial sums.

Tensor cores truncate their sums instead of rounding them, so the error grows with every step, always towards zero. In float32
sums are short: scores are added up every BK of d, gradients every 2048 columns, by ordinary additions.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vimpac.kernels.fusion import FUSED


class Launch(NamedTuple):
    """A tile of BM rows × BN columns, d in steps of BK; programs that a multiprocessor holds at a time; width of a gradient."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    resident: int
    width: int = 256  # more of d is shared by several programs, which all compute the scores


class Tile(NamedTuple):
    """The constants of a launch: rows × columns of scores, d and its steps, columns of the gradient."""

    D: int
    BM: int
    BN: int
    BK: int
    BD: int
    TF32: bool  # whether float32 products may be single tf32 ones


# By compute capability and bytes a feature. Chosen so that nothing spills at d = 256; not measured on a GPU yet.
# Float32 in backward: 64×64 tiles spill on sm_90 (432 bytes a thread); on sm_100 Triton 3.6 runs out of tensor memory with
# gradients wider than 128.
FORWARD = {
    (8, 4): Launch(64, 64, 32, 4, 3, 2),
    (8, 2): Launch(64, 64, 32, 4, 3, 4),
    (9, 4): Launch(128, 64, 32, 8, 3, 1),
    (9, 2): Launch(128, 64, 64, 8, 3, 2),
    (10, 4): Launch(128, 64, 32, 8, 3, 1),
    (10, 2): Launch(128, 64, 64, 8, 3, 1),
}
BACKWARD = {
    (8, 4): Launch(64, 32, 16, 8, 2, 1),
    (8, 2): Launch(64, 64, 64, 8, 2, 1),
    (9, 4): Launch(128, 32, 32, 8, 2, 1),
    (9, 2): Launch(128, 32, 64, 8, 2, 1),
    (10, 4): Launch(64, 64, 32, 8, 2, 1, 128),
    (10, 2): Launch(64, 64, 64, 8, 2, 1),
}
MAX_SPLITS = 16
COLUMNS = 2048  # of one float32 sum on tensor cores, backward: truncation costs at worst 1e-7 a step, in one direction
ROWS_PER_PROGRAM = 8  # of the kernels that only read and write
ROWS_COMBINED = 64  # by a program: 1024 videos have 400 KB of parts, at 64 bytes a clock 4 µs of one multiprocessor alone
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _pack_view(z, stride, features, inverse, m, first, D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr):
    """Copy R rows of a view to rows first… of the features; write 1 / length, where lengths are at least 1e-12."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    m_r = r < m
    p_z = z + r.to(tl.int64)[:, None] * stride
    p_x = features + (first + r).to(tl.int64)[:, None] * D
    squares = tl.zeros((R,), tl.float32)
    for k in range(0, D, BD):
        o_d = k + tl.arange(0, BD)
        mask = m_r[:, None] & (o_d < D)[None, :]
        b_z = tl.load(p_z + o_d[None, :], mask=mask, other=0.0)
        tl.store(p_x + o_d[None, :], b_z.to(features.dtype.element_ty), mask=mask)
        squares += tl.sum(b_z.to(tl.float32) * b_z.to(tl.float32), 1)
    length = tl.sqrt_rn(squares)
    tl.store(inverse + first + r, tl.where(length <= 1e-12, 1e12, tl.div_rn(1.0, length)), mask=m_r)


@triton.jit(do_not_specialize=["m"])
def _pack(z1, z2, stride1, stride2, features, inverse, m, D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr):
    _pack_view(z1, stride1, features, inverse, m, 0, D, BD, R)
    _pack_view(z2, stride2, features, inverse, m, m, D, BD, R)


@triton.jit
def _split(x):
    """float32 as a tf32 (10 bits after the point, rounded to nearest) and the rest, which tf32 holds to 2^-21 of x."""
    high = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _dot(a, b, total, TF32: tl.constexpr):
    """total + a @ b. In float32: three tf32 products, small ones first; the fourth is below float32's rounding.

    Written out because Triton's own "tf32x3" takes more registers: backward spilled on sm_90, 248 bytes a thread.
    """
    if a.dtype != tl.float32:
        return tl.dot(a, b, total)
    elif TF32:
        return tl.dot(a, b, total, input_precision="tf32")
    else:
        a_high, a_low = _split(a)
        b_high, b_low = _split(b)
        total = tl.dot(a_low, b_high, total, input_precision="tf32")
        total = tl.dot(a_high, b_low, total, input_precision="tf32")
        return tl.dot(a_high, b_high, total, input_precision="tf32")


@triton.jit
def _products(p_i, p_j, m_i, m_j, TILE: tl.constexpr):
    """x_i · x_j of a tile, [BM, BN] float32. p_i, p_j: its first row and column; offsets inside a tile fit int32."""
    D: tl.constexpr = TILE.D
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    BK: tl.constexpr = TILE.BK
    o_k = tl.arange(0, BK)
    o_i = tl.arange(0, BM) * D
    o_j = tl.arange(0, BN) * D
    products = tl.zeros((BM, BN), tl.float32)
    for k in range(0, D, BK):
        m_k = o_k < D - k
        b_i = tl.load(p_i + o_i[:, None] + (k + o_k)[None, :], mask=m_i[:, None] & m_k[None, :], other=0.0)
        b_j = tl.load(p_j + o_j[None, :] + (k + o_k)[:, None], mask=m_j[None, :] & m_k[:, None], other=0.0)
        if b_i.dtype == tl.float32:  # tensor cores truncate sums, so they are short
            products += _dot(b_i, b_j, tl.zeros((BM, BN), tl.float32), TILE.TF32)
        else:
            products = _dot(b_i, b_j, products, TILE.TF32)
    return products


@triton.jit(do_not_specialize=["N", "rows", "offset", "splits"])
def _forward(
    features,
    inverse,
    part,
    count,
    N,
    rows,
    offset,
    splits,
    scale,
    TILE: tl.constexpr,
):
    """part [3, splits, rows]: maximum, sum of 2^(score - maximum), partner's score; scores times log2(e). count: zero."""
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    tl.store(count, 0, mask=tl.program_id(0) == 0)
    tiles = tl.cdiv(rows, BM)
    split = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BM
    r = first + tl.arange(0, BM)
    m_i = r < rows
    i = offset + r
    partner = tl.where(r < rows // 2, i + rows // 2, i - rows // 2)
    p_i = features + (offset + first).to(tl.int64) * TILE.D
    scale_i = tl.load(inverse + i, mask=m_i, other=0.0) * scale
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    hit = tl.zeros((BM,), tl.float32)
    columns = tl.cdiv(N, BN)
    for tile in range(split * columns // splits, (split + 1) * columns // splits):
        j = tile * BN + tl.arange(0, BN)
        m_j = j < N
        scores = _products(p_i, features + tl.cast(tile * BN, tl.int64) * TILE.D, m_i, m_j, TILE)
        scores = scores * scale_i[:, None] * tl.load(inverse + j, mask=m_j, other=0.0)[None, :]
        hit += tl.sum(tl.where(j[None, :] == partner[:, None], scores, 0.0), 1)
        scores = tl.where(m_j[None, :] & (j[None, :] != i[:, None]), scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))  # finite: N and BN are even, no tile holds the row alone
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(scores - new[:, None]), 1)
        top = new
    p_part = part + split.to(tl.int64) * rows + r
    size = splits.to(tl.int64) * rows
    tl.store(p_part, top, mask=m_i)
    tl.store(p_part + size, total, mask=m_i)
    tl.store(p_part + 2 * size, hit, mask=m_i)


@triton.jit(do_not_specialize=["rows", "splits"])
def _combine(part, sums, count, lse, loss, rows, splits, R: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr):
    """Logsumexp of R rows a program, and its sum of their losses; the program that ends last adds these up, in their order."""
    s = tl.arange(0, SPLITS)
    size = splits.to(tl.int64) * rows
    r = tl.program_id(0) * R + tl.arange(0, R)
    mask = (s < splits)[:, None] & (r < rows)[None, :]
    p_part = part + s[:, None].to(tl.int64) * rows + r[None, :]
    b_top = tl.load(p_part, mask=mask, other=float("-inf"))
    b_total = tl.load(p_part + size, mask=mask, other=0.0)
    b_hit = tl.load(p_part + 2 * size, mask=mask, other=0.0)
    top = tl.where(r < rows, tl.max(b_top, 0), 0.0)
    total = tl.sum(b_total * tl.exp2(b_top - top[None, :]), 0)
    log = top + tl.log2(tl.where(r < rows, total, 1.0))
    tl.store(lse + r, log * LN_2, mask=r < rows)
    tl.store(sums + tl.program_id(0), tl.sum(log - tl.sum(b_hit, 0), 0))
    programs = tl.num_programs(0)
    if tl.atomic_add(count, 1) == programs - 1:  # acquire and release: the others' sums are there
        o_s = tl.arange(0, BS)
        totals = tl.zeros((BS,), tl.float32)
        for first in range(0, programs, BS):  # .cg: from the cache that all multiprocessors share
            totals += tl.load(sums + first + o_s, mask=first + o_s < programs, other=0.0, cache_modifier=".cg")
        tl.store(loss, tl.sum(totals, 0) * LN_2 / (rows // 2))


@triton.jit
def _weighted(weights, x, total, TF32: tl.constexpr):
    """total + weights @ x, weights float32."""
    if x.dtype == tl.bfloat16:
        high = weights.to(tl.bfloat16)  # two products keep 16 bits of a weight; gradients are rounded to 8
        total = tl.dot((weights - high.to(tl.float32)).to(tl.bfloat16), x, total)
        return tl.dot(high, x, total)
    else:
        return _dot(weights, x, total, TF32)


@triton.jit(do_not_specialize=["N", "rows", "offset", "splits", "begin", "end"])
def _backward(
    grad,
    features,
    inverse,
    lse,
    part,
    N,
    rows,
    offset,
    splits,
    begin,
    end,
    scale,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """part [splits, rows, D]: sums of the header's formula without 1 / (m γ), over column tiles begin…end.
    GROUP: whether there are several ranks."""
    D: tl.constexpr = TILE.D
    BM: tl.constexpr = TILE.BM
    BN: tl.constexpr = TILE.BN
    BD: tl.constexpr = TILE.BD
    tiles = tl.cdiv(rows, BM)
    program = tl.program_id(0)  # neighbours read the same columns
    first = program % tiles * BM
    r = first + tl.arange(0, BM)
    split = program // tiles % splits
    o_d = program // (tiles * splits) * BD + tl.arange(0, BD)
    m_d = o_d < D
    m_i = r < rows
    i = offset + r
    partner = tl.where(r < rows // 2, i + rows // 2, i - rows // 2)
    p_i = features + (offset + first).to(tl.int64) * D
    scale_i = tl.load(inverse + i, mask=m_i, other=0.0) * scale
    lse_i = tl.load(lse + i, mask=m_i, other=0.0) * LOG2_E
    grad_i = tl.load(grad + offset // rows)
    o_x = tl.arange(0, BN) * D
    total = tl.zeros((BM, BD), tl.float32)
    columns = end - begin
    for tile in range(begin + split * columns // splits, begin + (split + 1) * columns // splits):
        j = tile * BN + tl.arange(0, BN)
        m_j = j < N
        p_j = features + tl.cast(tile * BN, tl.int64) * D
        scores = _products(p_i, p_j, m_i, m_j, TILE)
        inverse_j = tl.load(inverse + j, mask=m_j, other=0.0)
        lse_j = tl.load(lse + j, mask=m_j, other=0.0) * LOG2_E
        scores = scores * scale_i[:, None] * inverse_j[None, :]
        if not GROUP:
            weights = grad_i * (tl.exp2(scores - lse_i[:, None]) + tl.exp2(scores - lse_j[None, :]))
        else:
            grad_j = tl.load(grad + j // rows, mask=m_j, other=0.0)
            weights = grad_i * tl.exp2(scores - lse_i[:, None]) + grad_j[None, :] * tl.exp2(scores - lse_j[None, :])
        weights = tl.where(j[None, :] == partner[:, None], weights - 2 * grad_i, weights)
        weights = tl.where(m_j[None, :] & (j[None, :] != i[:, None]), weights, 0.0) * inverse_j[None, :]
        x = tl.load(p_j + o_x[:, None] + o_d[None, :], mask=m_j[:, None] & m_d[None, :], other=0.0)
        total = _weighted(weights, x, total, TILE.TF32)
    p_part = part + (split.to(tl.int64) * rows + r)[:, None] * D + o_d[None, :]
    tl.store(p_part, total, mask=m_i[:, None] & m_d[None, :])


@triton.jit
def _unit_and_sum(part, row, p_x, b_inverse, m_r, size, splits, k, D: tl.constexpr, BD: tl.constexpr, R: tl.constexpr):
    """Columns k… of R rows' unit features and of their gradients, splits added up, [R, BD]."""
    o_d = (k + tl.arange(0, BD))[None, :]
    mask = m_r[:, None] & (o_d < D)
    unit = tl.load(p_x + o_d, mask=mask, other=0.0).to(tl.float32) * b_inverse[:, None]
    total = tl.zeros((R, BD), tl.float32)
    for first in range(0, splits, 4):
        for s in tl.static_range(4):  # four loads in flight
            split = first + s + tl.zeros((1, 1), tl.int64)
            total += tl.load(part + split * size + row + o_d, mask=mask & (split < splits), other=0.0)
    return unit, total


@triton.jit(do_not_specialize=["rows", "offset", "splits"])
def _finish(
    part,
    features,
    inverse,
    out,
    along,
    rows,
    offset,
    splits,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    ALONG: tl.constexpr,
):
    """Add the splits up and go back through the normalisation: (g - unit (unit·g)) / length; with ALONG also write unit·g.
    out may be part, for one split."""
    r = tl.program_id(0) * R + tl.arange(0, R)
    m_r = r < rows
    size = rows.to(tl.int64) * D
    row = r.to(tl.int64)[:, None] * D
    p_x = features + (offset + r).to(tl.int64)[:, None] * D
    b_inverse = tl.load(inverse + offset + r, mask=m_r, other=0.0)
    b_along = tl.zeros((R,), tl.float32)
    if D > BD:
        for k in range(0, D, BD):
            unit, g = _unit_and_sum(part, row, p_x, b_inverse, m_r, size, splits, k, D, BD, R)
            b_along += tl.sum(unit * g, 1)
    for k in range(0, D, BD):
        unit, g = _unit_and_sum(part, row, p_x, b_inverse, m_r, size, splits, k, D, BD, R)
        if D <= BD:
            b_along = tl.sum(unit * g, 1)
        taken_out = tl.where(b_inverse < 1e12, b_along, 0.0)  # a length below 1e-12 counts as 1e-12, whatever the features
        dz = (g - unit * taken_out[:, None]) * scale * b_inverse[:, None]
        o_d = (k + tl.arange(0, BD))[None, :]
        tl.store(out + row + o_d, dz.to(out.dtype.element_ty), mask=m_r[:, None] & (o_d < D))
    if ALONG:
        tl.store(along + r, b_along * scale, mask=m_r)


def pack(z1, z2):
    """z1, z2 [m, d] → features [2m, d] in bfloat16 or float32, inverse lengths [2m]."""
    m, D = z1.shape
    z1, z2 = (z if z.stride(1) == 1 else z.contiguous() for z in (z1, z2))
    features = z1.new_empty(2 * m, D, dtype=torch.bfloat16 if z1.dtype == torch.bfloat16 else torch.float32)
    inverse = torch.empty(2 * m, dtype=torch.float32, device=z1.device)
    grid = (triton.cdiv(m, ROWS_PER_PROGRAM),)
    arguments = (z1, z2, z1.stride(0), z2.stride(0), features, inverse, m)
    _pack[grid](*arguments, D=D, BD=block(D, 256), R=ROWS_PER_PROGRAM, num_warps=4, **FUSED)
    return features, inverse


def forward(features, inverse, offset, rows, temperature):
    N, D = features.shape
    launch = choose(FORWARD, features)
    tiles = triton.cdiv(rows, launch.BM)
    splits = count_splits(tiles, triton.cdiv(N, launch.BN), launch.resident * multiprocessors(features))
    part = torch.empty(3, splits, rows, dtype=torch.float32, device=features.device)
    lse = torch.empty(rows, dtype=torch.float32, device=features.device)
    loss = torch.empty((), dtype=torch.float32, device=features.device)
    programs = triton.cdiv(rows, ROWS_COMBINED)
    sums = torch.empty(programs, dtype=torch.float32, device=features.device)
    count = torch.empty((), dtype=torch.int32, device=features.device)
    arguments = (features, inverse, part, count, N, rows, offset, splits, LOG2_E.value / temperature)
    _forward[(tiles * splits,)](*arguments, TILE=tile(launch, D), **options(launch))
    arguments = (part, sums, count, lse, loss, rows, splits)
    _combine[(programs,)](*arguments, R=ROWS_COMBINED, SPLITS=MAX_SPLITS, BS=256, num_warps=4, **FUSED)
    return loss, lse


def backward(grad, features, inverse, lse, offset, rows, temperature):
    """The gradient of both views, [rows, d]. grad has one number a rank."""
    return _backward_of(grad, features, inverse, inverse, lse, offset, rows, temperature, None)


def forward_learned(features, inverse, learned, offset, rows):
    """γ goes into the features' lengths, so that the CPU need not read it."""
    return forward(features, inverse * learned.rsqrt(), offset, rows, 1.0)


def backward_learned(grad, features, inverse, lse, learned, offset, rows):
    """The gradient of both views, [rows, d], and each row's unit feature times the gradient of that, [rows]."""
    root = learned.rsqrt()  # once in every feature, once in the gradient of a unit feature by a scaled one's
    along = torch.empty(rows, dtype=torch.float32, device=features.device)
    return _backward_of(grad * root, features, inverse * root, inverse, lse, offset, rows, 1.0, along), along


def _backward_of(grad, features, scaled, inverse, lse, offset, rows, temperature, along):
    """Scores and sums take features times `scaled`; the normalisation that the gradient goes back through took `inverse`."""
    N, D = features.shape
    launch = choose(BACKWARD, features)
    shape = tile(launch, D)
    tiles = triton.cdiv(rows, launch.BM) * triton.cdiv(D, shape.BD)
    columns = triton.cdiv(N, launch.BN)
    splits = count_splits(tiles, columns, launch.resident * multiprocessors(features))
    part = torch.empty(splits, rows, D, dtype=torch.float32, device=features.device)
    for begin, end in ranges(columns, splits * COLUMNS // launch.BN if features.dtype == torch.float32 else columns):
        target = part if begin == 0 else torch.empty_like(part)
        arguments = (grad, features, scaled, lse, target, N, rows, offset, splits, begin, end, LOG2_E.value / temperature)
        _backward[(tiles * splits,)](*arguments, GROUP=rows < N, TILE=shape, **options(launch))
        if begin:
            part += target
    in_place = splits == 1 and features.dtype == torch.float32
    out = part.view(rows, D) if in_place else features.new_empty(rows, D)
    arguments = (part, features, inverse, out, out if along is None else along)  # a pointer never written to
    grid = (triton.cdiv(rows, ROWS_PER_PROGRAM),)
    constants = {"D": D, "BD": block(D, 256), "R": ROWS_PER_PROGRAM, "ALONG": along is not None}
    _finish[grid](*arguments, rows, offset, splits, 2 / (rows * temperature), **constants, num_warps=4, **FUSED)
    return out


def ranges(columns, most):
    """Equal parts of at most `most` of the column tiles, in order."""
    parts = triton.cdiv(columns, max(1, most))
    return [(columns * i // parts, columns * (i + 1) // parts) for i in range(parts)]


def block(D, most):
    """Columns of a tile: a power of two."""
    return max(16, min(most, triton.next_power_of_2(D)))


def choose(table, features):
    """The launch for a device. Architectures that are not in the table get the smallest tiles, compute capability 8's."""
    major = torch.cuda.get_device_capability(features.device)[0] if features.is_cuda else 8
    size = features.element_size()
    return table.get((major, size), table[8, size])


def tile(launch, D):
    return Tile(D, launch.BM, launch.BN, BK=block(D, launch.BK), BD=block(D, launch.width), TF32=allows_tf32())


def options(launch):
    """Of the compiler."""
    return {"num_warps": launch.num_warps, "num_stages": launch.num_stages, **registers(launch), **FUSED}


def registers(launch):
    """The limit that lets the table's resident programs fit: under Triton 3.7 ptxas took 141 where two need 128."""
    most = 65536 // (32 * launch.num_warps * launch.resident)
    return {"maxnreg": most} if most < 255 else {}


def allows_tf32():
    """In float32 products: torch's own switch. `allow_tf32` says the same, but raises where the newer switch was used."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def multiprocessors(features):
    return torch.cuda.get_device_properties(features.device).multi_processor_count if features.is_cuda else 132


@functools.cache
def count_splits(tiles, columns, programs):
    """Programs that share a tile of rows: the fewest that keep the GPU 90 % busy, else those that do best.

    columns: their tiles. programs: that the GPU holds at a time.
    """

    def busy(splits):
        rounds = triton.cdiv(tiles * splits, programs) * triton.cdiv(columns, splits)
        return tiles * columns / (rounds * programs)

    choices = range(1, min(MAX_SPLITS, columns) + 1)
    return next((splits for splits in choices if busy(splits) >= 0.9), max(choices, key=busy))
