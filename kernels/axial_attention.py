"""Axial attention with a shared [CLS] in one launch, forward and backward, for lines of 1 to 64 tokens.

A program owns one head of one clip and walks over the lines of that head's axis, a tile of token rows at a time. Rows are
read in place, whatever the strides. A tile is P blocks of LP rows (LP: 16, 32 or 64); a block holds one line, or, for lines of
up to 7 tokens, as many as fit, kept apart by a block-diagonal mask. So scores are P small matrix products, [P, LP, LP].

[CLS] costs no row: as a key it is one more score column, as a query one more probability vector a line, both plain products
with vectors that stay in registers. Its output and gradients are summed over lines in registers; only where a clip's lines are
split over several programs are the parts written out and added up, in a fixed order, by a second kernel. No atomics.

Backward recomputes the probabilities from q and k. Bytes moved: 4 tensors [B, T, H, W, N, D] forward (q, k, v, out), 7 backward
(q, k, v, grad, and three gradients).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 4096, 1024  # rows × head width of a tile
FORWARD, BACKWARD = {"num_warps": 4, "num_stages": 2}, {"num_warps": 4, "num_stages": 1}
# Chosen so that nothing spills on sm_80, sm_90 and sm_100; not measured on a GPU yet.
PROGRAMS = 1024  # fewer heads × clips than this: a clip's lines are split over several programs


@triton.jit
def _philox(row, call, is_cls, seed):
    """Four uint32 words of philox4x32-7 for int64 rows; vimpac/ops/axial_attention.py has the layout of their bits."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = (row & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = (tl.zeros_like(row) + call).to(tl.uint32)
    c3 = (tl.zeros_like(row) + is_cls).to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, c3, k0, k1, 7)


@triton.jit
def _pick(w0, w1, w2, w3, k):
    """16 bits of key k of a row whose words serve keys 0…7."""
    word = tl.where(k < 2, w0, tl.where(k < 4, w1, tl.where(k < 6, w2, w3)))
    return (word >> (16 * (k & 1)).to(tl.uint32)) & 0xFFFF


@triton.jit
def _halves(w):
    """[R, 4] words → [R, 8]: low half, high half, …"""
    return tl.reshape(tl.join(w & 0xFFFF, w >> 16), (w.shape[0], 8))


@triton.jit
def _bits32(row, group, is_cls, seed, R: tl.constexpr):
    """16 bits of keys 32·group … 32·group + 31 of each row, [R, 32]."""
    calls = 4 * group + tl.arange(0, 4)
    rows = row[:, None] + tl.zeros((R, 4), tl.int64)
    w0, w1, w2, w3 = _philox(rows, calls[None, :], is_cls, seed)
    pairs = tl.join(tl.join(_halves(w0), _halves(w1)), tl.join(_halves(w2), _halves(w3)))  # [R, 8, b, a], word 2a + b
    return tl.reshape(tl.permute(pairs, (0, 3, 2, 1)), (R, 32))


@triton.jit
def _bits16(row, is_cls, seed, R: tl.constexpr):
    """16 bits of keys 0 … 15 of each row, [R, 16]."""
    rows = row[:, None] + tl.zeros((R, 4), tl.int64)
    w0, w1, _w2, _w3 = _philox(rows, tl.arange(0, 4)[None, :], is_cls, seed)
    return tl.reshape(tl.permute(tl.join(_halves(w0), _halves(w1)), (0, 2, 1)), (R, 16))


@triton.jit
def _line_bits(row, is_cls, seed, R: tl.constexpr, LP: tl.constexpr):
    """16 bits of each key of a row of more than 8 keys, [R, LP]."""
    if LP == 16:
        return _bits16(row, is_cls, seed, R)
    elif LP == 32:
        return _bits32(row, 0, is_cls, seed, R)
    else:
        both = tl.join(_bits32(row, 0, is_cls, seed, R), _bits32(row, 1, is_cls, seed, R))
        return tl.reshape(tl.permute(both, (0, 2, 1)), (R, 64))


@triton.jit
def _scale(bits, THRESHOLD: tl.constexpr):
    """What dropout multiplies a probability with."""
    return tl.where(bits >= THRESHOLD, 65536 / (65536 - THRESHOLD), 0.0)


@triton.jit
def _coordinates(line, place, AXIS: tl.constexpr, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
    """t, h, w of the token at `place` on `line` of an axis (0, 1, 2 for T, H, W)."""
    if AXIS == 0:
        return place, line // W, line % W
    elif AXIS == 1:
        return line // W, place, line % W
    else:
        return line // H, line % H, place


@triton.jit
def _tile(tile, AXIS: tl.constexpr, T: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, LP: tl.constexpr):
    """Rows of a tile: token coordinates t, h, w and whether the row is a token, [P·LP]."""
    L: tl.constexpr = (T, H, W)[AXIS]
    PACK: tl.constexpr = 16 // L if L <= 7 else 1  # lines a block
    o = tl.arange(0, P * LP)
    i = o % LP
    line = (tile * P + o // LP) * PACK + i // L
    m_row = (i < PACK * L) & (line < T * H * W // L)
    t, h, w = _coordinates(tl.where(m_row, line, 0), i % L, AXIS, T, H, W)
    return t, h, w, m_row


@triton.jit
def _dropout_tokens(row, seed, L: tl.constexpr, P: tl.constexpr, LP: tl.constexpr, KEYS: tl.constexpr, THRESHOLD: tl.constexpr):
    """Factors of the token rows: on the line's keys [P, LP, LP], on [CLS] [P, LP]."""
    key = tl.arange(0, LP) % L
    if KEYS <= 8:
        words = _philox(row, 0, 0, seed)
        keys = _pick(words[0][:, None], words[1][:, None], words[2][:, None], words[3][:, None], key[None, :])
        cls = _pick(words[0], words[1], words[2], words[3], tl.full((P * LP,), L, tl.int32))
    else:
        keys = _line_bits(row, 0, seed, P * LP, LP)
        words = _philox(row, 4 * (L // 32) + (L % 8) // 2, 0, seed)
        cls = (words[(L % 32) // 8] >> (16 * (L % 2))) & 0xFFFF
    return tl.reshape(_scale(keys, THRESHOLD), (P, LP, LP)), tl.reshape(_scale(cls, THRESHOLD), (P, LP))


@triton.jit
def _dropout_cls(
    row, seed, L: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, LP: tl.constexpr, KEYS: tl.constexpr, THRESHOLD: tl.constexpr
):
    """Factors of [CLS]'s rows, one a line: on the line's keys [P, Q, LP], on [CLS] [P, Q]."""
    key = tl.arange(0, LP) % L
    if KEYS <= 8:
        words = _philox(row, 0, 1, seed)
        keys = _pick(words[0][:, None], words[1][:, None], words[2][:, None], words[3][:, None], key[None, :])
        cls = _pick(words[0], words[1], words[2], words[3], tl.full((P * Q,), L, tl.int32))
    else:
        keys = _line_bits(row, 1, seed, P * Q, LP)
        words = _philox(row, 4 * (L // 32) + (L % 8) // 2, 1, seed)
        cls = (words[(L % 32) // 8] >> (16 * (L % 2))) & 0xFFFF
    return tl.reshape(_scale(keys, THRESHOLD), (P, Q, LP)), tl.reshape(_scale(cls, THRESHOLD), (P, Q))


@triton.jit
def _probabilities(
    q,
    k,
    k_cls,
    m_key,
    SCALE: tl.constexpr,
    L: tl.constexpr,
    PACK: tl.constexpr,
    P: tl.constexpr,
    LP: tl.constexpr,
    CONTEXT: tl.constexpr,
):
    """Softmax of the token rows over their line and [CLS]: [P, LP, LP] and [P, LP]. q, k [P, LP, D], m_key [P, LP]."""
    i = tl.arange(0, LP)
    same_line = (i[:, None] // L == i[None, :] // L) & (i[None, :] < PACK * L)
    scores = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision="ieee") * SCALE
    scores = tl.where(same_line[None] & m_key[:, None, :], scores, float("-inf"))
    top = tl.max(scores, 2)
    if CONTEXT:
        score_cls = tl.sum(q.to(tl.float32) * k_cls[None, None, :], 2) * SCALE
        top = tl.maximum(top, score_cls)
        probs = tl.exp(scores - top[:, :, None])
        prob_cls = tl.exp(score_cls - top)
        total = tl.sum(probs, 2) + prob_cls
    else:
        top = tl.where(top == float("-inf"), 0.0, top)
        probs = tl.exp(scores - top[:, :, None])
        prob_cls = tl.zeros((P, LP), tl.float32)
        total = tl.sum(probs, 2)
    inverse = tl.where(total > 0, 1.0 / total, 0.0)
    return probs * inverse[:, :, None], prob_cls * inverse


@triton.jit
def _probabilities_cls(
    k,
    q_cls,
    k_cls,
    m_key,
    m_line,
    SCALE: tl.constexpr,
    L: tl.constexpr,
    PACK: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    LP: tl.constexpr,
    CONTEXT: tl.constexpr,
):
    """Softmax of [CLS]'s row on each line over the line and [CLS]: [P, Q, LP] and [P, Q], 0 on lines that are none."""
    i = tl.arange(0, LP)
    on_line = (tl.arange(0, Q)[:, None] == i[None, :] // L) & (i[None, :] < PACK * L)
    score = tl.sum(k.to(tl.float32) * q_cls[None, None, :], 2) * SCALE
    scores = tl.where(on_line[None] & m_key[:, None, :], score[:, None, :], float("-inf"))
    top = tl.max(scores, 2)
    if CONTEXT:
        score_cls = tl.sum(q_cls * k_cls, 0) * SCALE
        top = tl.maximum(top, score_cls)
        probs = tl.exp(scores - top[:, :, None])
        prob_cls = tl.exp(score_cls - top)
        total = tl.sum(probs, 2) + prob_cls
    else:
        top = tl.where(top == float("-inf"), 0.0, top)
        probs = tl.exp(scores - top[:, :, None])
        prob_cls = tl.zeros((P, Q), tl.float32)
        total = tl.sum(probs, 2)
    inverse = tl.where(m_line & (total > 0), 1.0 / total, 0.0)
    return probs * inverse[:, :, None], prob_cls * inverse


@triton.jit
def _forward_axis(
    qkv,
    cls_qkv,
    pad,
    seed,
    out,
    part,
    b,
    head,
    split,
    strides,
    cls_strides,
    AXIS: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    LP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    CONTEXT: tl.constexpr,
    PAD: tl.constexpr,
):
    L: tl.constexpr = (T, H, W)[AXIS]
    S: tl.constexpr = T * H * W // L
    P: tl.constexpr = ROWS // LP
    PACK: tl.constexpr = 16 // L if L <= 7 else 1
    Q: tl.constexpr = (1, 16, 8, 8, 4, 4, 2, 2)[L] if L <= 7 else 1
    s_b, s_t, s_h, s_w, s_3, s_n = strides
    c_b, c_3, c_n = cls_strides
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    base = qkv + b * s_b + head * s_n
    p_cls = cls_qkv + b * c_b + head * c_n + o_d
    q_cls = tl.load(p_cls, mask=m_d, other=0.0).to(tl.float32)
    k_cls = tl.load(p_cls + c_3, mask=m_d, other=0.0).to(tl.float32)
    v_cls = tl.load(p_cls + 2 * c_3, mask=m_d, other=0.0).to(tl.float32)
    sum_out = tl.zeros((LP, BD), tl.float32)
    sum_cls = tl.zeros((P, Q), tl.float32)
    for tile in range(split, tl.cdiv(S, P * PACK), SPLITS):
        t, h, w, m_row = _tile(tile, AXIS, T, H, W, P, LP)
        token = (b * T + t) * (H * W) + h * W + w  # int64 raster index
        offset = t.to(tl.int64) * s_t + h.to(tl.int64) * s_h + w.to(tl.int64) * s_w
        pointer = base + offset[:, None] + o_d[None, :]
        mask = m_row[:, None] & m_d[None, :]
        q = tl.reshape(tl.load(pointer, mask=mask, other=0.0), (P, LP, BD))
        k = tl.reshape(tl.load(pointer + s_3, mask=mask, other=0.0), (P, LP, BD))
        v = tl.reshape(tl.load(pointer + 2 * s_3, mask=mask, other=0.0), (P, LP, BD))
        m_key = m_row
        if PAD:
            m_key = m_row & (tl.load(pad + token, mask=m_row, other=1) == 0)
        m_key = tl.reshape(m_key, (P, LP))
        probs, prob_cls = _probabilities(q, k, k_cls, m_key, SCALE, L, PACK, P, LP, CONTEXT)
        line = (tile * P + tl.arange(0, P)[:, None]) * PACK + tl.arange(0, Q)[None, :]
        m_line = (tl.arange(0, Q)[None, :] < PACK) & (line < S)
        cls_probs, cls_prob = _probabilities_cls(k, q_cls, k_cls, m_key, m_line, SCALE, L, PACK, P, Q, LP, CONTEXT)
        if THRESHOLD > 0:
            value = tl.load(seed)
            keep, keep_cls = _dropout_tokens(token * N + head, value, L, P, LP, L + CONTEXT, THRESHOLD)
            probs *= keep
            prob_cls *= keep_cls
            t0, h0, w0 = _coordinates(
                tl.reshape(tl.where(m_line, line, 0), (P * Q,)), tl.zeros((P * Q,), tl.int32), AXIS, T, H, W
            )
            first = (b * T + t0) * (H * W) + h0 * W + w0
            keep, keep_cls = _dropout_cls(first * N + head, value, L, P, Q, LP, L + CONTEXT, THRESHOLD)
            cls_probs *= keep
            cls_prob *= keep_cls
        y = tl.dot(probs.to(v.dtype), v, input_precision="ieee")
        if CONTEXT:
            y += prob_cls[:, :, None] * v_cls[None, None, :]
        tl.store(
            out + (token * N + head)[:, None] * D + o_d[None, :],
            tl.reshape(y, (P * LP, BD)).to(out.dtype.element_ty),
            mask=mask,
        )
        sum_out += tl.sum(tl.sum(cls_probs, 1)[:, :, None] * v.to(tl.float32), 0)
        sum_cls += cls_prob
    y_cls = tl.sum(sum_out, 0) + tl.sum(tl.sum(sum_cls, 0), 0) * v_cls
    tl.store(part + ((b * N + head) * SPLITS + split) * D + o_d, y_cls / S, mask=m_d)


@triton.jit
def _forward(
    qkv,
    cls_qkv,
    pad,
    seed,
    out,
    part,
    strides,
    cls_strides,
    GRID: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    AXES: tl.constexpr,
    LPS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    CONTEXT: tl.constexpr,
    PAD: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % N  # neighbouring programs take neighbouring heads: their rows share memory pages
    split = program // N % SPLITS
    b = (program // (N * SPLITS)).to(tl.int64)
    for g in tl.static_range(len(AXES)):
        if head // (N // len(AXES)) == g:
            _forward_axis(
                qkv,
                cls_qkv,
                pad,
                seed,
                out,
                part,
                b,
                head,
                split,
                strides,
                cls_strides,
                AXES[g],
                GRID[0],
                GRID[1],
                GRID[2],
                N,
                D,
                BD,
                LPS[g],
                max(ROWS, LPS[g]),
                SPLITS,
                SCALE,
                THRESHOLD,
                CONTEXT,
                PAD,
            )


@triton.jit
def _backward_axis(
    grad,
    qkv,
    cls_qkv,
    pad,
    seed,
    dqkv,
    part,
    b,
    head,
    split,
    B,
    strides,
    cls_strides,
    AXIS: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    LP: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    CONTEXT: tl.constexpr,
    PAD: tl.constexpr,
):
    L: tl.constexpr = (T, H, W)[AXIS]
    S: tl.constexpr = T * H * W // L
    P: tl.constexpr = ROWS // LP
    PACK: tl.constexpr = 16 // L if L <= 7 else 1
    Q: tl.constexpr = (1, 16, 8, 8, 4, 4, 2, 2)[L] if L <= 7 else 1
    s_b, s_t, s_h, s_w, s_3, s_n = strides
    c_b, c_3, c_n = cls_strides
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    base = qkv + b * s_b + head * s_n
    p_cls = cls_qkv + b * c_b + head * c_n + o_d
    q_cls = tl.load(p_cls, mask=m_d, other=0.0).to(tl.float32)
    k_cls = tl.load(p_cls + c_3, mask=m_d, other=0.0).to(tl.float32)
    v_cls = tl.load(p_cls + 2 * c_3, mask=m_d, other=0.0).to(tl.float32)
    row_cls = B.to(tl.int64) * (T * H * W) + b
    g_cls = tl.load(grad + (row_cls * N + head) * D + o_d, mask=m_d, other=0.0).to(tl.float32) / S  # of each line's output
    dp_cls_cls = tl.sum(g_cls * v_cls, 0)
    sum_dq = tl.zeros((LP, BD), tl.float32)  # of q_cls, from the lines' keys
    sum_dk = tl.zeros((LP, BD), tl.float32)  # of k_cls, from the lines' queries
    sum_dv = tl.zeros((LP, BD), tl.float32)
    sum_ds = tl.zeros((P, Q), tl.float32)  # of the score of [CLS] on itself
    sum_p = tl.zeros((P, Q), tl.float32)
    for tile in range(split, tl.cdiv(S, P * PACK), SPLITS):
        t, h, w, m_row = _tile(tile, AXIS, T, H, W, P, LP)
        token = (b * T + t) * (H * W) + h * W + w
        offset = t.to(tl.int64) * s_t + h.to(tl.int64) * s_h + w.to(tl.int64) * s_w
        pointer = base + offset[:, None] + o_d[None, :]
        mask = m_row[:, None] & m_d[None, :]
        q = tl.reshape(tl.load(pointer, mask=mask, other=0.0), (P, LP, BD))
        k = tl.reshape(tl.load(pointer + s_3, mask=mask, other=0.0), (P, LP, BD))
        v = tl.reshape(tl.load(pointer + 2 * s_3, mask=mask, other=0.0), (P, LP, BD))
        g = tl.reshape(tl.load(grad + (token * N + head)[:, None] * D + o_d[None, :], mask=mask, other=0.0), (P, LP, BD))
        m_key = m_row
        if PAD:
            m_key = m_row & (tl.load(pad + token, mask=m_row, other=1) == 0)
        m_key = tl.reshape(m_key, (P, LP))
        probs, prob_cls = _probabilities(q, k, k_cls, m_key, SCALE, L, PACK, P, LP, CONTEXT)
        line = (tile * P + tl.arange(0, P)[:, None]) * PACK + tl.arange(0, Q)[None, :]
        m_line = (tl.arange(0, Q)[None, :] < PACK) & (line < S)
        cls_probs, cls_prob = _probabilities_cls(k, q_cls, k_cls, m_key, m_line, SCALE, L, PACK, P, Q, LP, CONTEXT)
        # Gradients of the dropped probabilities, then of the probabilities: dropout is a factor (keep) on both sides.
        dp = tl.dot(g, tl.permute(v, (0, 2, 1)), input_precision="ieee")
        dp_cls = tl.sum(g.to(tl.float32) * v_cls[None, None, :], 2)  # [P, LP], on the key [CLS]
        cls_dp = tl.sum(v.to(tl.float32) * g_cls[None, None, :], 2)[:, None, :]  # [P, 1, LP], of the query [CLS]
        if THRESHOLD > 0:
            value = tl.load(seed)
            keep, keep_cls = _dropout_tokens(token * N + head, value, L, P, LP, L + CONTEXT, THRESHOLD)
            t0, h0, w0 = _coordinates(
                tl.reshape(tl.where(m_line, line, 0), (P * Q,)), tl.zeros((P * Q,), tl.int32), AXIS, T, H, W
            )
            first = (b * T + t0) * (H * W) + h0 * W + w0
            cls_keep, cls_keep_cls = _dropout_cls(first * N + head, value, L, P, Q, LP, L + CONTEXT, THRESHOLD)
            dropped, dropped_cls = probs * keep, prob_cls * keep_cls
            cls_dropped, cls_dropped_cls = cls_probs * cls_keep, cls_prob * cls_keep_cls
            dp, dp_cls = dp * keep, dp_cls * keep_cls
            cls_dp, cls_dp_cls = cls_dp * cls_keep, dp_cls_cls * cls_keep_cls
        else:
            dropped, dropped_cls, cls_dropped, cls_dropped_cls = probs, prob_cls, cls_probs, cls_prob
            cls_dp_cls = dp_cls_cls + tl.zeros((P, Q), tl.float32)
        delta = tl.sum(probs * dp, 2) + prob_cls * dp_cls
        ds = probs * (dp - delta[:, :, None]) * SCALE
        ds_cls = prob_cls * (dp_cls - delta) * SCALE  # [P, LP]
        cls_delta = tl.sum(cls_probs * cls_dp, 2) + cls_prob * cls_dp_cls
        cls_ds = tl.sum(cls_probs * (cls_dp - cls_delta[:, :, None]), 1) * SCALE  # [P, LP]: a key belongs to one line
        w_cls = tl.sum(cls_dropped, 1)  # [P, LP]
        dq = tl.dot(ds.to(k.dtype), k, input_precision="ieee")
        dk = (
            tl.dot(tl.permute(ds, (0, 2, 1)).to(q.dtype), q, input_precision="ieee") + cls_ds[:, :, None] * q_cls[None, None, :]
        )
        dv = (
            tl.dot(tl.permute(dropped, (0, 2, 1)).to(g.dtype), g, input_precision="ieee")
            + w_cls[:, :, None] * g_cls[None, None, :]
        )
        if CONTEXT:
            dq += ds_cls[:, :, None] * k_cls[None, None, :]
            sum_dk += tl.sum(ds_cls[:, :, None] * q.to(tl.float32), 0)
            sum_dv += tl.sum(dropped_cls[:, :, None] * g.to(tl.float32), 0)
            sum_ds += cls_prob * (cls_dp_cls - cls_delta) * SCALE
            sum_p += cls_dropped_cls
        sum_dq += tl.sum(cls_ds[:, :, None] * k.to(tl.float32), 0)
        p_out = dqkv + (token * 3 * N + head)[:, None] * D + o_d[None, :]
        kind = dqkv.dtype.element_ty
        tl.store(p_out, tl.reshape(dq, (P * LP, BD)).to(kind), mask=mask)
        tl.store(p_out + N * D, tl.reshape(dk, (P * LP, BD)).to(kind), mask=mask)
        tl.store(p_out + 2 * N * D, tl.reshape(dv, (P * LP, BD)).to(kind), mask=mask)
    total_ds = tl.sum(tl.sum(sum_ds, 0), 0)
    p_part = part + ((b * N + head) * SPLITS + split) * 3 * D + o_d
    tl.store(p_part, tl.sum(sum_dq, 0) + total_ds * k_cls, mask=m_d)
    tl.store(p_part + D, tl.sum(sum_dk, 0) + total_ds * q_cls, mask=m_d)
    tl.store(p_part + 2 * D, tl.sum(sum_dv, 0) + tl.sum(tl.sum(sum_p, 0), 0) * g_cls, mask=m_d)


@triton.jit
def _backward(
    grad,
    qkv,
    cls_qkv,
    pad,
    seed,
    dqkv,
    part,
    B,
    strides,
    cls_strides,
    GRID: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    AXES: tl.constexpr,
    LPS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    CONTEXT: tl.constexpr,
    PAD: tl.constexpr,
):
    program = tl.program_id(0)
    head = program % N
    split = program // N % SPLITS
    b = (program // (N * SPLITS)).to(tl.int64)
    for g in tl.static_range(len(AXES)):
        if head // (N // len(AXES)) == g:
            _backward_axis(
                grad,
                qkv,
                cls_qkv,
                pad,
                seed,
                dqkv,
                part,
                b,
                head,
                split,
                B,
                strides,
                cls_strides,
                AXES[g],
                GRID[0],
                GRID[1],
                GRID[2],
                N,
                D,
                BD,
                LPS[g],
                max(ROWS, LPS[g]),
                SPLITS,
                SCALE,
                THRESHOLD,
                CONTEXT,
                PAD,
            )


def forward(qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context):
    """qkv [B, T, H, W, 3, N, D], cls_qkv [B, 3, N, D] → packed rows [B·T·H·W + B, N, D]."""
    B, T, H, W, _, N, D = qkv.shape
    out = qkv.new_empty(B * T * H * W + B, N, D)
    splits = _splits(B, N)
    part = torch.empty(B, N, splits, D, dtype=torch.float32, device=qkv.device)
    if B:
        arguments = (qkv, cls_qkv, *_optional(pad, seed, out), out, part, *_strides(qkv, cls_qkv))
        options = _options(qkv, axes, pad, dropout_p, cls_in_context)
        _forward[(B * splits * N,)](*arguments, **options, ROWS=rows(D, FORWARD_ELEMENTS), SPLITS=splits, **FORWARD)
    out[B * T * H * W :] = part.sum(2).to(out.dtype)
    return out


def backward(grad, qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context):
    """grad: contiguous packed rows [B·T·H·W + B, N, D] → gradient of qkv and cls_qkv as packed rows [.., 3, N, D]."""
    B, T, H, W, _, N, D = qkv.shape
    out = qkv.new_empty(B * T * H * W + B, 3, N, D)
    splits = _splits(B, N)
    part = torch.empty(B, N, splits, 3, D, dtype=torch.float32, device=qkv.device)
    if B:
        arguments = (grad, qkv, cls_qkv, *_optional(pad, seed, out), out, part, B, *_strides(qkv, cls_qkv))
        options = _options(qkv, axes, pad, dropout_p, cls_in_context)
        _backward[(B * splits * N,)](*arguments, **options, ROWS=rows(D, BACKWARD_ELEMENTS), SPLITS=splits, **BACKWARD)
    out[B * T * H * W :] = part.sum(2).transpose(1, 2).to(out.dtype)
    return out


def rows(D, elements):
    """Token rows of a tile, a power of two from 16 to 64."""
    return max(16, min(64, elements // triton.next_power_of_2(D)))


def _splits(B, N):
    return max(1, min(8, PROGRAMS // max(1, B * N)))


def _optional(pad, seed, unused):
    """Pointers for what is not there: never read."""
    return unused if pad is None else pad.contiguous(), unused if seed is None else seed


def _strides(qkv, cls_qkv):
    return tuple(qkv.stride()[:6]), tuple(cls_qkv.stride()[:3])


def _options(qkv, axes, pad, dropout_p, cls_in_context):
    """What a kernel is compiled for."""
    _, T, H, W, _, N, D = qkv.shape
    codes = tuple("THW".index(axis) for axis in axes)
    return {
        "GRID": (T, H, W),
        "N": N,
        "D": D,
        "BD": max(16, triton.next_power_of_2(D)),
        "AXES": codes,
        "LPS": tuple(max(16, triton.next_power_of_2((T, H, W)[code])) for code in codes),
        "SCALE": D**-0.5,
        "THRESHOLD": min(round(dropout_p * 65536), 65535),
        "CONTEXT": int(cls_in_context),
        "PAD": pad is not None,
    }
