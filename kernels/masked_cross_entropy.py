"""Cross-entropy of a chunk of logits in one launch; products by cuBLAS. vimpac/ops/masked_cross_entropy.py has the definition.

A chunk's logits are a product in the operands' dtype. A program takes one row of them: it adds the bias, finds the largest
logit and the sum of exponentials, and overwrites the logits with the gradient softmax - one_hot. Two more products then add the
chunk to the gradients of hidden and weight. The row is read three times, the last two from L1 (8197 bf16 are 16 KB). Finding
the largest logit first takes no exponential, so each logit takes two, not three.

Losses and hits are written row by row and summed at the end, without atomics: the same sum every time. Rows that do not count
(negative target) are zeros instead of being left out, so nothing waits for their number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from vimpac.kernels.fusion import FUSED

# Bytes of logits at once. With the weight (12.6 MB of bf16 at [8197, 768]) they stay in an H100's 50 MB of L2 until the
# products read them. In bf16 that is 2048 rows of 8197: 528 tiles of 128×256, 4 on each of 132 multiprocessors. Not measured
# on a GPU yet.
CHUNK_BYTES = 36 << 20
CHUNK_STEP = 256  # rows, whole tiles of a product
ROW_STEP = 64  # columns a row is padded to: 16-byte loads and tensor cores need rows that start on 16 bytes, 8197 is odd
BLOCK = 1024  # columns at once: with 4 warps one 16-byte load of half precision a thread
OPTIONS = {"num_warps": 4, **FUSED}


@triton.jit
def _logits(row, bias, o_v, V, PITCH: tl.constexpr):
    """Logits with their bias, float32, -inf past the last class: masked only after a load of whole 16 bytes."""
    m_v = o_v < PITCH
    x = tl.load(row + o_v, mask=m_v, other=0.0).to(tl.float32) + tl.load(bias + o_v, mask=m_v, other=0.0)
    return tl.where(o_v < V, x, float("-inf"))


@triton.jit
def _cross_entropy(
    logits, bias, target, loss, hits, V, s_target, PITCH: tl.constexpr, BLOCK: tl.constexpr, GRADIENTS: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * PITCH
    label = tl.load(target + n * s_target)
    counts = label >= 0
    o = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = o
    at_label = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = _logits(row, bias, start + o, V, PITCH)
        where = tl.where(x > largest, start + o, where)  # of equals the first
        largest = tl.maximum(largest, x)
        at_label = tl.where(start + o == label, x, at_label)
    top = tl.max(largest, 0)
    first = tl.min(tl.where(largest == top, where, V), 0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        total += tl.exp(_logits(row, bias, start + o, V, PITCH) - top)
    lse = top + tl.log(tl.sum(total, 0))
    tl.store(loss + n, tl.where(counts, tl.where(label < V, lse - tl.sum(at_label, 0), float("nan")), 0.0))
    tl.store(hits + n, tl.where(counts & (first == label), 1.0, 0.0))
    if GRADIENTS:
        for start in range(0, V, BLOCK):
            o_v = start + o
            grad = tl.exp(_logits(row, bias, o_v, V, PITCH) - lse) - (o_v == label).to(tl.float32)
            grad = tl.where(counts, grad, 0.0)
            tl.store(row + o_v, grad.to(logits.dtype.element_ty), mask=o_v < PITCH)


def sums(hidden, weight, bias, target, gradients):
    """hidden [M, C], weight [V, C], bias [V], target [M] → sums of loss and hits, and the loss's gradients."""
    (M, C), V = hidden.shape, weight.shape[0]
    loss, hits = (hidden.new_empty(M, dtype=torch.float32) for _ in range(2))
    grad_h = hidden.new_empty(M if gradients else 0, C)
    grad_w, grad_b = (hidden.new_zeros(V if gradients else 0, *rest, dtype=torch.float32) for rest in ((C,), ()))
    pitch = triton.cdiv(V, ROW_STEP) * ROW_STEP
    step = chunk_rows(pitch, hidden.element_size())
    chunk = hidden.new_empty(min(M, step), pitch)
    bias = F.pad(bias.float(), (0, pitch - V))
    for start in range(0, M, step):
        rows = slice(start, start + step)
        h = hidden[rows]
        logits = chunk[: len(h), :V]
        torch.mm(h, weight.T, out=logits)
        _cross_entropy[(len(h),)](
            logits, bias, target[rows], loss[rows], hits[rows], V, *target.stride(), pitch, _block(pitch), gradients, **OPTIONS
        )
        if gradients:
            torch.mm(logits, weight, out=grad_h[rows])
            _add_product(
                grad_w, logits.T, h.masked_fill(target[rows, None] < 0, 0.0)
            )  # their gradient is 0, and 0 · NaN is NaN
            grad_b += logits.sum(0, dtype=torch.float32)
    return loss.sum(), hits.sum(), grad_h, grad_w, grad_b


def chunk_rows(pitch, itemsize):
    """Rows of a chunk of logits."""
    rows = max(1, CHUNK_BYTES // (pitch * itemsize))
    return rows // CHUNK_STEP * CHUNK_STEP or rows


def _block(pitch):
    return min(BLOCK, triton.next_power_of_2(pitch))


def _add_product(total, a, b):
    """total += a @ b, summed in float32 from the first product on."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # has no product of two dtypes
        total.addmm_(a.float(), b.float())
