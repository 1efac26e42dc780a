"""Axial attention with a shared [CLS] in one launch, forward and backward, for lines of 1 to 64 tokens.

A program, usually a single warp, owns one head of one clip and a share of the lines of that head's axis. It walks over them one
block of LP rows at a time (LP: 16, 32 or 64). A block holds one line or, for lines of up to 7 tokens, as many as fit in 16
rows, kept apart by a block-diagonal mask. Rows are read in place, whatever the strides.

[CLS] costs no row of the block. Its query, key, value and output gradient are rows 0 to 3 of one constant 16-row matrix c, and
everything that involves them is a narrow matrix product with it: scores on [CLS] are a column of q cᵀ, and what [CLS] adds to a
token's output is one more product, weights · c. Sums over lines ([CLS]'s output, its gradients) collect in the rows of one
16-row accumulator. Each program writes its part, and a second kernel adds the parts in a fixed order, without atomics: the same
inputs give the same bits, and a clip's bits do not depend on the batch.

At PAD, keys and values count as zeros, and so do queries that are not finite, forward and backward: 0 · NaN would reach other
tokens. That costs a third to two thirds more instructions, so only clips with PAD pay for it: each program checks whether its
clip has any, and a clip without runs the same code as a call without `pad`.

Backward recomputes the probabilities from q and k. Bytes moved: 4 tensors [B, T, H, W, N, D] forward (q, k, v, out), 7 backward
(q, k, v, grad, and three gradients).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vimpac.dropout_rate import dropout_scale, dropout_threshold
from vimpac.kernels.fusion import FUSED
from vimpac.kernels.philox import philox

BLOCKS = 16  # of a program: few, so that programs are many; enough that [CLS]'s vectors and parts cost under 1 % of the bytes


class Lines(NamedTuple):
    """The lines of a group of heads, a constant of the kernel."""

    AXIS: int  # 0, 1, 2: T, H, W
    FIRST: int  # the first group of heads with lines like these, as long and numbered alike: they share its code
    L: int  # tokens of a line
    LP: int  # rows of a block: L, or those of several lines, padded to a power of two
    S: int  # lines of a clip
    INNER: int  # a line's number is outer · INNER + inner
    PACK: int  # lines of a block
    Q: int  # rows of [CLS] for a block: a power of two of at least PACK


class Constants(NamedTuple):
    """What a kernel is compiled for."""

    GROUPS: tuple[Lines, ...]  # of heads, one for each axis
    GRID: tuple[int, int, int]
    TOKENS: int  # of a clip
    N: int
    D: int
    BD: int  # D padded to a power of two
    SPLITS: int  # programs of a head of a clip
    SCALE: float  # of scores
    LOG2: float  # of scores in units of exp2
    THRESHOLD: int  # a probability whose 16 bits are below is dropped; 0: no dropout
    KEPT: float  # factor of a probability that dropout keeps
    CONTEXT: bool  # whether [CLS] is a key of every line, and of itself
    PAD: bool  # whether `pad` is given
    WIDE: bool  # whether offsets within a clip need 64 bits; a clip's own offset always has them


@triton.jit
def _dot(a, b, total=None):
    """a @ b (+ total). float32 is three tf32 products of high and low parts, small ones first, with float32's accuracy.

    Tensor cores truncate sums instead of rounding them, so in float32 no sum runs over several products. Triton's own float32
    products ("ieee") use no matrix instructions: backward spilled kilobytes a thread, lines of 64 tokens took up to 50 s to
    compile, and on sm_100 Triton 3.6 turned some into single tf32 products.
    """
    if a.dtype == tl.float32:
        a_high = ((a.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        b_high = ((b.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
        partial = tl.dot(a - a_high, b_high, input_precision="tf32")
        partial = tl.dot(a_high, b - b_high, partial, input_precision="tf32")
        partial = tl.dot(a_high, b_high, partial, input_precision="tf32")
        return partial if total is None else total + partial
    else:
        return tl.dot(a, b, total)


@triton.jit
def _product(a, b):
    """a · b, rounded, for sums over lanes. Otherwise the compiler fuses the product with the addition of a neighbour's: the
    lane's own product is not rounded, and lanes that should hold the same sum differ in its last bit."""
    return tl.fma(a, b, tl.zeros_like(a))


@triton.jit
def _halves(w):
    """[R, 4] words → [R, 8]: low half, high half, …"""
    return tl.reshape(tl.join(w & 0xFFFF, w >> 16), (w.shape[0], 8))


@triton.jit
def _words(row, group, is_cls, seed):
    """Words of keys 32·group … 32·group + 31 of each row, four tensors [R, 4]: word w of call c is at [:, c] of the w-th."""
    rows = row[:, None] + tl.zeros((row.shape[0], 4), tl.int64)
    return philox(rows, (4 * group + tl.arange(0, 4))[None, :], is_cls, seed, 7)


@triton.jit
def _unpack(w0, w1, w2, w3, KEYS: tl.constexpr):
    """16 bits of keys 0 … KEYS - 1 of a group, [R, KEYS], KEYS 16 or 32."""
    R: tl.constexpr = w0.shape[0]
    low = tl.join(_halves(w0), _halves(w1))  # [R, 8, word]
    if KEYS == 16:
        return tl.reshape(tl.permute(low, (0, 2, 1)), (R, 16))
    else:
        both = tl.join(low, tl.join(_halves(w2), _halves(w3)))  # [R, 8, b, a], word 2a + b
        return tl.reshape(tl.permute(both, (0, 3, 2, 1)), (R, 32))


@triton.jit
def _column(x, j: tl.constexpr):
    """Column j of [R, C]."""
    return tl.sum(tl.where(tl.arange(0, x.shape[1])[None, :] == j, x, tl.zeros_like(x)), 1)


@triton.jit
def _keep_long(row, is_cls, seed, L: tl.constexpr, LP: tl.constexpr, THRESHOLD: tl.constexpr):
    """Which probabilities of each row of more than 8 keys dropout keeps: on the line's keys [R, LP], on [CLS] [R]."""
    w = _words(row, 0, is_cls, seed)
    keys = _unpack(w[0], w[1], w[2], w[3], 16 if LP == 16 else 32)
    if LP == 64:
        w = _words(row, 1, is_cls, seed)
        keys = tl.join(keys, _unpack(w[0], w[1], w[2], w[3], 32))
        keys = tl.reshape(tl.permute(keys, (0, 2, 1)), (row.shape[0], 64))
    NEXT: tl.constexpr = L == LP and L >= 32  # [CLS] is the first key of the next group
    word = philox(row, L // 8, is_cls, seed, 7)[0] if NEXT else _column(w[L % 32 // 8], L % 8 // 2)
    cls = (word >> (16 * (L % 2))) & 0xFFFF
    return keys >= THRESHOLD, cls >= THRESHOLD


@triton.jit
def _outer_inner_along(AXIS: tl.constexpr, t, h, w):
    """One of t, h, w each for the outer and the inner part of a line's number and for the place on the line."""
    if AXIS == 0:
        return h, w, t
    elif AXIS == 1:
        return t, w, h
    else:
        return t, h, w


@triton.jit
def _steps(group, G: tl.constexpr, CONST: tl.constexpr, t, h, w):
    """`_outer_inner_along` for the axis of a group of heads, known at run time only among those that share G's code."""
    outer, inner, along = _outer_inner_along(CONST.GROUPS[G].AXIS, t, h, w)
    for other in tl.static_range(G + 1, len(CONST.GROUPS)):
        if CONST.GROUPS[other].FIRST == G:
            steps = _outer_inner_along(CONST.GROUPS[other].AXIS, t, h, w)
            outer = tl.where(group == other, steps[0], outer)
            inner = tl.where(group == other, steps[1], inner)
            along = tl.where(group == other, steps[2], along)
    return outer, inner, along


@triton.jit
def _shares_code(group, G: tl.constexpr, CONST: tl.constexpr):
    """Whether a group of heads is G, or has lines like G's."""
    found = group == G
    for other in tl.static_range(G + 1, len(CONST.GROUPS)):
        if CONST.GROUPS[other].FIRST == G:
            found = found | (group == other)
    return found


@triton.jit
def _distance(line, place, steps, INNER: tl.constexpr, index: tl.constexpr):
    """From the clip's first token to the one at `place` on `line`."""
    return (line // INNER).to(index) * steps[0] + (line % INNER).to(index) * steps[1] + place.to(index) * steps[2]


@triton.jit
def _keep_short(block, name, seed, steps, LINES: tl.constexpr, N: tl.constexpr, THRESHOLD: tl.constexpr):
    """`_keep_long` for rows of at most 8 keys: the block's 16 rows of tokens and Q of [CLS] in one draw.

    A row is one call of Philox. In the layouts of probabilities a lane would make three calls, each in four lanes at once. Here
    it makes one, and lanes exchange a word of bits: those of its keys at the columns of its line, [CLS]'s at 16.
    """
    L: tl.constexpr = LINES.L
    Q: tl.constexpr = LINES.Q
    i = tl.arange(0, 32)
    of_cls = i >= 16
    line = tl.where(of_cls, i % Q, i // L)
    token = _distance(block * LINES.PACK + line, tl.where(of_cls, 0, i % L), steps, LINES.INNER, tl.int32)
    w0, w1, w2, w3 = philox(name + token * N, 0, of_cls.to(tl.uint32), seed, 7)
    keys = _kept(w0, 0, THRESHOLD) | _kept(w1, 2, THRESHOLD) | _kept(w2, 4, THRESHOLD) | _kept(w3, 6, THRESHOLD)
    bits = ((keys << (line * L)) & 0xFFFF) | ((keys >> L & 1) << 16)
    column = tl.arange(0, 16)[None, :]
    rows = tl.gather(bits, tl.arange(0, 16), 0)
    cls = tl.gather(bits, 16 + tl.arange(0, Q), 0)
    return (
        (rows[:, None] >> column) & 1 == 1,
        rows >> 16 == 1,
        (cls[:, None] >> column) & 1 == 1,
        cls >> 16 == 1,
    )


@triton.jit
def _kept(word, key: tl.constexpr, THRESHOLD: tl.constexpr):
    """Bits `key` and `key` + 1: whether dropout keeps the probabilities of a word's halves."""
    low = ((word & 0xFFFF) >= THRESHOLD).to(tl.int32)
    high = (word >= THRESHOLD * 65536).to(tl.int32)
    return (low << key) | (high << (key + 1))


@triton.jit
def _keep(block, line, token, name, seed, steps, LINES: tl.constexpr, CONST: tl.constexpr):
    """Which probabilities of a block dropout keeps: of its tokens on the line's keys [LP, LP] and on [CLS] [LP], of its lines'
    [CLS] on the line's keys [Q, LP] and on itself [Q]. `name`: the clip's first row."""
    if LINES.L + CONST.CONTEXT <= 8:
        return _keep_short(block, name, seed, steps, LINES, CONST.N, CONST.THRESHOLD)
    else:
        Q: tl.constexpr = LINES.Q
        first = _distance(line, tl.zeros((Q,), tl.int32), steps, LINES.INNER, tl.int32)
        of_token = _keep_long(name + token * CONST.N, 0, seed, LINES.L, LINES.LP, CONST.THRESHOLD)
        of_cls = _keep_long(name + first * CONST.N, 1, seed, LINES.L, LINES.LP, CONST.THRESHOLD)
        return of_token[0], of_token[1], of_cls[0], of_cls[1]


@triton.jit
def _drop(keep, x, KEPT: tl.constexpr):
    """Each of the four that `_keep` names: 0 or KEPT times itself."""
    return (
        tl.where(keep[0], x[0] * KEPT, 0.0),
        tl.where(keep[1], x[1] * KEPT, 0.0),
        tl.where(keep[2], x[2] * KEPT, 0.0),
        tl.where(keep[3], x[3] * KEPT, 0.0),
    )


@triton.jit
def _rows(block, LINES: tl.constexpr):
    """The rows of a block: line, place on it, whether there is such a token (line 0 where not)."""
    i = tl.arange(0, LINES.LP)
    line = block * LINES.PACK + i // LINES.L
    m_row = (i < LINES.PACK * LINES.L) & (line < LINES.S)
    return tl.where(m_row, line, 0), i % LINES.L, m_row


@triton.jit
def _lines(block, LINES: tl.constexpr):
    """The lines of a block: number, whether there is such a line (0 where not)."""
    i = tl.arange(0, LINES.Q)
    line = block * LINES.PACK + i
    m_line = (i < LINES.PACK) & (line < LINES.S)
    return tl.where(m_line, line, 0), m_line


@triton.jit
def _zeros_unless(keep, x):
    """[R, C] with zeros in the rows that are not kept, whatever they hold."""
    return tl.where(keep[:, None], x, tl.zeros_like(x))


@triton.jit
def _whole(score_cls, m_key):
    """Which queries count: all but those at PAD that are not finite, as their product with [CLS]'s key shows."""
    return m_key | (tl.abs(score_cls) < float("inf"))


@triton.jit
def _softmax(scores, score_cls, m_line, CONTEXT: tl.constexpr):
    """exp2(scores) [R, LP] and exp2(score_cls) [R], each row divided by its sum; 0 where there is nothing to sum."""
    top = tl.max(scores, 1)
    top = tl.maximum(top, score_cls) if CONTEXT else tl.where(top == float("-inf"), 0.0, top)
    probs = tl.exp2(scores - top[:, None])
    total = tl.sum(probs, 1)
    prob_cls = tl.zeros_like(total)
    if CONTEXT:
        prob_cls = tl.exp2(score_cls - top)
        total += prob_cls
    inverse = tl.where(m_line & (total > 0), 1.0 / total, 0.0)
    return probs * inverse[:, None], prob_cls * inverse


@triton.jit
def _place(weights, j: tl.constexpr, kind: tl.constexpr):
    """[R] → [R, 16] with the weights in column j: times c it adds weight · row j of c to each row."""
    return tl.where(tl.arange(0, 16)[None, :] == j, weights[:, None], 0.0).to(kind)


@triton.jit
def _place_row(weights, j: tl.constexpr, kind: tl.constexpr):
    """[R] → [16, R] with the weights in row j: times a block it collects the weighted sum of its rows in row j."""
    return tl.where(tl.arange(0, 16)[:, None] == j, weights[None, :], 0.0).to(kind)


@triton.jit
def _forward_axis(
    qkv,
    cls_qkv,
    pad,
    seed,
    out,
    part,
    program,
    strides,
    cls_strides,
    G: tl.constexpr,
    PAD: tl.constexpr,
    CONST: tl.constexpr,
):
    LINES: tl.constexpr = CONST.GROUPS[G]
    L: tl.constexpr = LINES.L
    S: tl.constexpr = LINES.S
    Q: tl.constexpr = LINES.Q
    N: tl.constexpr = CONST.N
    D: tl.constexpr = CONST.D
    BD: tl.constexpr = CONST.BD
    TOKENS: tl.constexpr = CONST.TOKENS
    THRESHOLD: tl.constexpr = CONST.THRESHOLD
    LOG2: tl.constexpr = CONST.LOG2
    kind: tl.constexpr = qkv.dtype.element_ty
    index: tl.constexpr = tl.int64 if CONST.WIDE else tl.int32
    b, head, split, group = program
    s_b, s_t, s_h, s_w, s_3, s_n = strides
    c_b, c_3, c_n = cls_strides
    strides_of_line = _steps(group, G, CONST, s_t, s_h, s_w)
    steps = _steps(group, G, CONST, CONST.GRID[1] * CONST.GRID[2], CONST.GRID[2], 1)  # in the clip's tokens
    o_d = tl.arange(0, BD)
    o_c = tl.arange(0, 16)
    m_d = o_d < D
    base = qkv + b * s_b + head.to(tl.int64) * s_n
    name = b * TOKENS * N + head  # of the clip's first row, for dropout
    value = tl.load(seed) if THRESHOLD > 0 else 0

    # [CLS]'s rows, and its score on itself
    p_cls = cls_qkv + b * c_b + head.to(tl.int64) * c_n + o_d
    m_kv = m_d if CONST.CONTEXT else o_d < 0  # [CLS] is no key: its key and value are not read
    m_c = tl.where(o_c[:, None] == 0, m_d[None, :], (o_c < 3)[:, None] & m_kv[None, :])
    c = tl.load(p_cls[None, :] + o_c[:, None].to(tl.int64) * c_3, mask=m_c, other=0.0)  # q, k, v
    q_cls = tl.load(p_cls, mask=m_d, other=0.0).to(tl.float32)
    k_cls = tl.load(p_cls + c_3, mask=m_kv, other=0.0).to(tl.float32)
    itself = tl.sum(_product(q_cls, k_cls), 0) * LOG2 + tl.zeros((Q,), tl.float32)

    i = tl.arange(0, LINES.LP)
    same_line = (i[:, None] // L == i[None, :] // L) & (i[None, :] < LINES.PACK * L)
    on_line = (tl.arange(0, Q)[:, None] == i[None, :] // L) & (i[None, :] < LINES.PACK * L)
    collected = tl.zeros((16, BD), tl.float32)  # row 0: [CLS]'s output from the lines' values
    from_itself = tl.zeros((Q,), tl.float32)
    for block in range(split, tl.cdiv(S, LINES.PACK), CONST.SPLITS):
        # load
        line, place, m_row = _rows(block, LINES)
        token = _distance(line, place, steps, LINES.INNER, tl.int32)
        offset = _distance(line, place, strides_of_line, LINES.INNER, index)
        pointer = base + offset[:, None] + o_d[None, :]
        mask = m_row[:, None] & m_d[None, :]
        q = tl.load(pointer, mask=mask, other=0.0)
        k = tl.load(pointer + s_3, mask=mask, other=0.0)
        v = tl.load(pointer + s_3 + s_3, mask=mask, other=0.0)  # 2 * s_3 may not fit 32 bits
        its_line, m_line = _lines(block, LINES)
        m_key = m_row
        if PAD:
            m_key = m_row & (tl.load(pad + b * TOKENS + token, mask=m_row, other=1) == 0)

        # dropout, while the loads are under way
        if THRESHOLD > 0:
            keep = _keep(block, its_line, token, name, value, steps, LINES, CONST)

        # scores and probabilities of tokens, then of [CLS]
        scores = _dot(q, tl.trans(k)) * LOG2
        score_cls = _column(_dot(q, tl.trans(c)), 1) * LOG2
        if PAD:
            whole = _whole(score_cls, m_key)
            scores, score_cls, v = _zeros_unless(whole, scores), tl.where(whole, score_cls, 0.0), _zeros_unless(m_key, v)
        scores = tl.where(same_line & m_key[None, :], scores, float("-inf"))
        probs, prob_cls = _softmax(scores, score_cls, m_row, CONST.CONTEXT)
        cls_scores = _column(_dot(k, tl.trans(c)), 0) * LOG2
        cls_scores = tl.where(on_line & m_key[None, :], cls_scores[None, :], float("-inf"))  # [Q, LP]
        cls_probs, cls_prob = _softmax(cls_scores, itself, m_line, CONST.CONTEXT)
        if THRESHOLD > 0:
            probs, prob_cls, cls_probs, cls_prob = _drop(keep, (probs, prob_cls, cls_probs, cls_prob), CONST.KEPT)

        # outputs of tokens, and the lines' part of [CLS]'s
        y = _dot(probs.to(kind), v)
        if CONST.CONTEXT:
            y = _dot(_place(prob_cls, 2, kind), c, y)
            from_itself += cls_prob
        collected = _dot(_place_row(tl.sum(cls_probs, 0), 0, kind), v, collected)
        tl.store(out + name * D + (token.to(index) * (N * D))[:, None] + o_d[None, :], y.to(kind), mask=mask)

    # [CLS]
    y_cls = tl.sum(tl.where(o_c[:, None] == 0, collected, 0.0), 0)
    y_cls += tl.sum(from_itself, 0) * tl.load(p_cls + c_3 + c_3, mask=m_kv, other=0.0).to(tl.float32)
    tl.store(part + ((b * N + head) * CONST.SPLITS + split) * D + o_d, y_cls / S, mask=m_d)


@triton.jit(do_not_specialize_on_alignment=["seed"])  # a table's seeds are aligned to 16 bytes every second time
def _forward(
    qkv,
    cls_qkv,
    pad,
    padded,
    seed,
    out,
    part,
    strides,
    cls_strides,
    CONST: tl.constexpr,
):
    N: tl.constexpr = CONST.N
    i = tl.program_id(0)
    head = i % N  # neighbouring programs take neighbouring heads: their rows share memory pages
    split = i // N % CONST.SPLITS
    b = (i // (N * CONST.SPLITS)).to(tl.int64)
    group = head // (N // len(CONST.GROUPS))
    program = (b, head, split, group)
    for g in tl.static_range(len(CONST.GROUPS)):
        if g == CONST.GROUPS[g].FIRST and _shares_code(group, g, CONST):
            for hides in tl.static_range(CONST.PAD + 1):
                if not CONST.PAD or tl.load(padded + b) == hides:
                    _forward_axis(qkv, cls_qkv, pad, seed, out, part, program, strides, cls_strides, g, hides, CONST)


@triton.jit
def _backward_axis(
    grad,
    qkv,
    cls_qkv,
    pad,
    seed,
    dqkv,
    part,
    program,
    B,
    strides,
    cls_strides,
    G: tl.constexpr,
    PAD: tl.constexpr,
    CONST: tl.constexpr,
):
    LINES: tl.constexpr = CONST.GROUPS[G]
    L: tl.constexpr = LINES.L
    S: tl.constexpr = LINES.S
    Q: tl.constexpr = LINES.Q
    N: tl.constexpr = CONST.N
    D: tl.constexpr = CONST.D
    BD: tl.constexpr = CONST.BD
    TOKENS: tl.constexpr = CONST.TOKENS
    THRESHOLD: tl.constexpr = CONST.THRESHOLD
    LOG2: tl.constexpr = CONST.LOG2
    kind: tl.constexpr = qkv.dtype.element_ty
    index: tl.constexpr = tl.int64 if CONST.WIDE else tl.int32
    b, head, split, group = program
    s_b, s_t, s_h, s_w, s_3, s_n = strides
    c_b, c_3, c_n = cls_strides
    strides_of_line = _steps(group, G, CONST, s_t, s_h, s_w)
    steps = _steps(group, G, CONST, CONST.GRID[1] * CONST.GRID[2], CONST.GRID[2], 1)  # in the clip's tokens
    o_d = tl.arange(0, BD)
    o_c = tl.arange(0, 16)
    m_d = o_d < D
    base = qkv + b * s_b + head.to(tl.int64) * s_n
    name = b * TOKENS * N + head  # of the clip's first row, for dropout
    value = tl.load(seed) if THRESHOLD > 0 else 0

    # [CLS]'s rows, its score on itself and that probability's gradient
    p_cls = cls_qkv + b * c_b + head.to(tl.int64) * c_n + o_d
    p_grad = grad + ((B.to(tl.int64) * TOKENS + b) * N + head) * D + o_d
    m_kv = m_d if CONST.CONTEXT else o_d < 0  # [CLS] is no key: its key and value are not read
    m_c = tl.where(o_c[:, None] == 0, m_d[None, :], (o_c < 3)[:, None] & m_kv[None, :])
    c = tl.load(p_cls[None, :] + o_c[:, None].to(tl.int64) * c_3, mask=m_c, other=0.0)
    c = tl.where(o_c[:, None] == 3, tl.load(p_grad, mask=m_d, other=0.0)[None, :], c)  # q, k, v, gradient of S · output
    q_cls = tl.load(p_cls, mask=m_d, other=0.0).to(tl.float32)
    k_cls = tl.load(p_cls + c_3, mask=m_kv, other=0.0).to(tl.float32)
    v_cls = tl.load(p_cls + c_3 + c_3, mask=m_kv, other=0.0).to(tl.float32)
    g_cls = tl.load(p_grad, mask=m_d, other=0.0).to(tl.float32)
    itself = tl.sum(_product(q_cls, k_cls), 0) * LOG2 + tl.zeros((Q,), tl.float32)
    dp_itself = tl.sum(_product(g_cls, v_cls), 0) + tl.zeros((Q,), tl.float32)

    i = tl.arange(0, LINES.LP)
    same_line = (i[:, None] // L == i[None, :] // L) & (i[None, :] < LINES.PACK * L)
    on_line = (tl.arange(0, Q)[:, None] == i[None, :] // L) & (i[None, :] < LINES.PACK * L)
    collected = tl.zeros((16, BD), tl.float32)  # rows 0, 1, 2: [CLS]'s gradients of q (times S), k, v from the lines
    ds_itself = tl.zeros((Q,), tl.float32)
    from_itself = tl.zeros((Q,), tl.float32)
    for block in range(split, tl.cdiv(S, LINES.PACK), CONST.SPLITS):
        # load
        line, place, m_row = _rows(block, LINES)
        token = _distance(line, place, steps, LINES.INNER, tl.int32)
        offset = _distance(line, place, strides_of_line, LINES.INNER, index)
        pointer = base + offset[:, None] + o_d[None, :]
        mask = m_row[:, None] & m_d[None, :]
        q = tl.load(pointer, mask=mask, other=0.0)
        k = tl.load(pointer + s_3, mask=mask, other=0.0)
        v = tl.load(pointer + s_3 + s_3, mask=mask, other=0.0)  # 2 * s_3 may not fit 32 bits
        g = tl.load(grad + name * D + (token.to(index) * (N * D))[:, None] + o_d[None, :], mask=mask, other=0.0)
        its_line, m_line = _lines(block, LINES)
        m_key = m_row
        if PAD:
            m_key = m_row & (tl.load(pad + b * TOKENS + token, mask=m_row, other=1) == 0)

        # dropout, while the loads are under way
        if THRESHOLD > 0:
            keep = _keep(block, its_line, token, name, value, steps, LINES, CONST)

        # scores and probabilities of tokens, then of [CLS]
        if PAD:
            whole = _whole(_column(_dot(q, tl.trans(c)), 1), m_key)
            q, k, v = _zeros_unless(whole, q), _zeros_unless(m_key, k), _zeros_unless(m_key, v)
        scores = _dot(q, tl.trans(k)) * LOG2
        scores = tl.where(same_line & m_key[None, :], scores, float("-inf"))
        score_cls = _column(_dot(q, tl.trans(c)), 1) * LOG2
        probs, prob_cls = _softmax(scores, score_cls, m_row, CONST.CONTEXT)
        cls_scores = _column(_dot(k, tl.trans(c)), 0) * LOG2
        cls_scores = tl.where(on_line & m_key[None, :], cls_scores[None, :], float("-inf"))  # [Q, LP]
        cls_probs, cls_prob = _softmax(cls_scores, itself, m_line, CONST.CONTEXT)
        dropped, dropped_cls, cls_dropped, cls_dropped_itself = probs, prob_cls, cls_probs, cls_prob
        if THRESHOLD > 0:
            all_probs = (probs, prob_cls, cls_probs, cls_prob)
            dropped, dropped_cls, cls_dropped, cls_dropped_itself = _drop(keep, all_probs, CONST.KEPT)

        # dV
        p_out = dqkv + (b * TOKENS * 3 * N + head) * D + (token.to(index) * (3 * N * D))[:, None] + o_d[None, :]
        dv = _dot(tl.trans(dropped.to(kind)), g)
        dv = _dot(_place(tl.sum(cls_dropped, 0) / S, 3, kind), c, dv)
        tl.store(p_out + 2 * N * D, dv.to(kind), mask=mask)
        if CONST.CONTEXT:
            collected = _dot(_place_row(dropped_cls, 2, kind), g, collected)
            from_itself += cls_dropped_itself

        # dP and dS; dropout is a factor on both sides: of the probabilities and of their gradients
        dp = _dot(g, tl.trans(v))
        dp_cls = _column(_dot(g, tl.trans(c)), 2)
        cls_dp = _column(_dot(v, tl.trans(c)), 3)[None, :]
        cls_dp_itself = dp_itself
        if THRESHOLD > 0:
            dp, dp_cls, cls_dp, cls_dp_itself = _drop(keep, (dp, dp_cls, cls_dp, dp_itself), CONST.KEPT)
        delta = tl.sum(probs * dp, 1) + prob_cls * dp_cls
        ds = (probs * (dp - delta[:, None]) * CONST.SCALE).to(kind)
        cls_delta = tl.sum(_product(cls_probs, cls_dp), 1) + cls_prob * cls_dp_itself
        cls_ds = tl.sum(_product(cls_probs, cls_dp - cls_delta[:, None]), 0) * CONST.SCALE  # [LP]: a key is on one line

        # dQ and dK
        dq = _dot(ds, k)
        dk = _dot(tl.trans(ds), q)
        dk = _dot(_place(cls_ds / S, 0, kind), c, dk)
        tl.store(p_out + N * D, dk.to(kind), mask=mask)
        collected = _dot(_place_row(cls_ds, 0, kind), k, collected)
        if CONST.CONTEXT:
            ds_cls = prob_cls * (dp_cls - delta) * CONST.SCALE
            dq = _dot(_place(ds_cls, 1, kind), c, dq)
            collected = _dot(_place_row(ds_cls, 1, kind), q, collected)
            ds_itself += cls_prob * (cls_dp_itself - cls_delta)
        if PAD:
            dq = _zeros_unless(whole, dq)
        tl.store(p_out, dq.to(kind), mask=mask)

    # [CLS]
    ds = tl.sum(ds_itself, 0) * (CONST.SCALE / S)
    row = o_c[:, None]
    parts = tl.where(row == 0, collected / S + ds * k_cls[None, :], collected + ds * q_cls[None, :])
    parts = tl.where(row == 2, collected + (tl.sum(from_itself, 0) / S) * g_cls[None, :], parts)
    p_part = part + (((b * N + head) * CONST.SPLITS + split) * 3 + row) * D + o_d[None, :]
    tl.store(p_part, parts, mask=(row < 3) & m_d[None, :])


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["seed"])  # B = 1 would be a constant, without .to
def _backward(
    grad,
    qkv,
    cls_qkv,
    pad,
    padded,
    seed,
    dqkv,
    part,
    B,
    strides,
    cls_strides,
    CONST: tl.constexpr,
):
    N: tl.constexpr = CONST.N
    i = tl.program_id(0)
    head = i % N
    split = i // N % CONST.SPLITS
    b = (i // (N * CONST.SPLITS)).to(tl.int64)
    group = head // (N // len(CONST.GROUPS))
    program = (b, head, split, group)
    for g in tl.static_range(len(CONST.GROUPS)):
        if g == CONST.GROUPS[g].FIRST and _shares_code(group, g, CONST):
            for hides in tl.static_range(CONST.PAD + 1):
                if not CONST.PAD or tl.load(padded + b) == hides:
                    _backward_axis(grad, qkv, cls_qkv, pad, seed, dqkv, part, program, B, strides, cls_strides, g, hides, CONST)


@triton.jit(do_not_specialize=["rows"])
def _add_parts(part, out, rows, KINDS: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr):
    """[CLS]'s rows of out from the programs' parts [B, N, SPLITS, KINDS, D]."""
    head = tl.program_id(0) % N
    b = (tl.program_id(0) // N).to(tl.int64)
    o_d = tl.arange(0, BD)[None, :]
    o_k = tl.arange(0, triton.next_power_of_2(KINDS))[:, None]
    mask = (o_k < KINDS) & (o_d < D)
    total = tl.zeros((triton.next_power_of_2(KINDS), BD), tl.float32)
    for split in range(SPLITS):
        total += tl.load(part + (((b * N + head) * SPLITS + split) * KINDS + o_k) * D + o_d, mask=mask, other=0.0)
    pointer = out + (((rows.to(tl.int64) + b) * KINDS + o_k) * N + head) * D + o_d
    tl.store(pointer, total.to(out.dtype.element_ty), mask=mask)


def forward(qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context):
    """qkv [B, T, H, W, 3, N, D], cls_qkv [B, 3, N, D] → packed rows [B·T·H·W + B, N, D]."""
    out = qkv.new_empty(_rows_of(qkv), *qkv.shape[5:])
    _launch(_forward, 1, (), (), qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context, out)
    return out


def backward(grad, qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context):
    """grad: contiguous packed rows [B·T·H·W + B, N, D] → gradient of qkv and cls_qkv as packed rows [.., 3, N, D], and its sum
    over rows [3, N, D], 0 for keys. The sum is another pass: in the kernel it took registers that there are not."""
    out = qkv.new_empty(_rows_of(qkv), *qkv.shape[4:])
    _launch(_backward, 3, (grad,), (len(qkv),), qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context, out)
    sums = out.sum(0, dtype=torch.float32)
    sums[1].zero_()
    return out, sums


def _launch(kernel, kinds, before, after, qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context, out):
    B, N, D = qkv.shape[0], *qkv.shape[5:]
    if B == 0:
        return
    const = constants(qkv.shape[1:], qkv.stride()[1:4], tuple(axes), pad is not None, dropout_p, cls_in_context)
    shape = launch_shape(kernel is _forward, const, qkv.element_size())
    part = torch.empty(B, N, const.SPLITS, kinds, D, dtype=torch.float32, device=qkv.device)
    padding = (out, out) if pad is None else (pad.contiguous(), pad.flatten(1).any(1))  # the first two: never read
    optional = (*padding, out if seed is None else seed)
    strides = tuple(qkv.stride()[:6]), tuple(cls_qkv.stride()[:3])
    grid = (B * const.SPLITS * N,)
    kernel[grid](*before, qkv, cls_qkv, *optional, out, part, *after, *strides, const, **shape, **FUSED)
    _add_parts[(B * N,)](part, out, len(out) - B, kinds, N, D, const.BD, const.SPLITS, num_warps=1, **FUSED)


def _rows_of(qkv):
    return math.prod(qkv.shape[:4]) + len(qkv)


@functools.lru_cache(256)
def constants(shape, strides, axes, padded, dropout_p, cls_in_context):
    """shape [T, H, W, 3, N, D], strides of T, H, W."""
    grid, (N, D) = tuple(shape[:3]), shape[4:]
    groups = groups_of(grid, axes)
    extent = sum((size - 1) * stride for size, stride in zip(grid, strides, strict=True))
    return Constants(
        GROUPS=groups,
        GRID=grid,
        TOKENS=math.prod(grid),
        N=N,
        D=D,
        BD=max(16, triton.next_power_of_2(D)),
        SPLITS=triton.cdiv(max(triton.cdiv(lines.S, lines.PACK) for lines in groups), BLOCKS),
        SCALE=D**-0.5,
        LOG2=D**-0.5 * 1.4426950408889634,
        THRESHOLD=dropout_threshold(dropout_p, 16),
        KEPT=dropout_scale(dropout_p, 16),
        CONTEXT=cls_in_context,
        PAD=padded,
        WIDE=max(3 * math.prod(grid) * N * D, extent) >= 2**31,
    )


def groups_of(grid, axes):
    """The lines of each group of heads."""
    T, H, W = grid
    groups, alike = [], []
    for axis in axes:
        code = "THW".index(axis)
        length, inner, pack = grid[code], (W, W, H)[code], lines_of_block(grid[code])
        alike.append((length, inner))
        groups.append(
            Lines(
                AXIS=code,
                FIRST=alike.index(alike[-1]),
                L=length,
                LP=max(16, triton.next_power_of_2(length)),
                S=T * H * W // length,
                INNER=inner,
                PACK=pack,
                Q=triton.next_power_of_2(pack),
            )
        )
    return tuple(groups)


def lines_of_block(length):
    return 16 // length if length <= 7 else 1


@functools.lru_cache(256)
def launch_shape(forward, const, itemsize):
    """num_warps and num_stages.

    Chosen by what tools/predicted.py computes from the compiled code; not measured on a GPU yet. With so many registers a
    multiprocessor has room for 8 to 16 warps, too few to hide one another's loads, so with three stages the loads of the next
    two blocks are under way. A warp holds 1024 elements of a block forward and 512 backward. Longer blocks have fewer stages:
    with more, some versions of Triton spill. By default ptxas spills a few bytes to run 12 warps instead of 8; maxnreg forbids
    it where that was seen. float32 takes four times the registers: even with more warps, backward spills 96 to 264 bytes.
    """
    rows = max(lines.LP for lines in const.GROUPS)
    elements = rows * const.BD
    if itemsize == 4:
        return {"num_warps": max(1, min(8, elements // 256)) if forward or elements <= 512 else 8, "num_stages": 1}
    if forward:
        warps, stages = elements // 1024, 1 if elements > 4096 else 2 if rows > 32 or elements > 2048 else 3
    else:
        warps, stages = elements // 512, 1 if rows > 32 or elements > 1024 else 2 if rows > 16 else 3
    shape = {"num_warps": max(1, min(8, warps)), "num_stages": stages}
    return shape | ({"maxnreg": 255} if elements >= (1024 if forward else 512) else {})
