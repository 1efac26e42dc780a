"""x + dropout(y) and the gradient of y; vimpac/ops/dropout_add.py has the definition.

A program takes several groups of 64 consecutive elements. Each of a group's 16 counters gives four words; word w is for
elements 16w … 16w + 15. So no word is wasted, and each piece of 16 elements is loaded and stored in 16-byte parts.

Bytes moved: x, y and the sum; backward the gradient in and out. Seven rounds of Philox serve four elements. A generator of one
word an element makes ten rounds for each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vimpac.dropout_rate import dropout_scale, dropout_threshold
from vimpac.kernels.fusion import FUSED
from vimpac.kernels.philox import philox

GROUPS, WARPS = 64, 4  # 32 elements a thread: 16-byte accesses even in half precision. Not measured on a GPU yet


@triton.jit(do_not_specialize=["elements"], do_not_specialize_on_alignment=["seed"])
def _dropout_add(
    x,
    y,
    out,
    seed,
    elements,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    ADD: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr = 64,
):
    """out = keep · y · SCALE, with ADD + x, in float32."""
    group = tl.program_id(0).to(tl.int64) * GROUPS
    g = tl.arange(0, GROUPS)[:, None]
    c = tl.arange(0, 16)[None, :]
    words = philox(16 * group + (16 * g + c), 0, 2, tl.load(seed), 7)
    first = GROUP * group
    for w in tl.static_range(4):
        o = GROUP * g + 16 * w + c
        inside = first + (GROUP * g + 16 * w if WHOLE else o) < elements  # a piece of 16 at once, or each element
        value = tl.load(y + first + o, mask=inside, other=0.0).to(tl.float32) * tl.where(words[w] >= THRESHOLD, SCALE, 0.0)
        if ADD:
            value += tl.load(x + first + o, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + first + o, value.to(out.dtype.element_ty), mask=inside)


def forward(x, y, p, seed):
    """The op vimpac::dropout_add.triton."""
    return _launch(x, y, p, seed, torch.empty_like(y, dtype=torch.promote_types(x.dtype, y.dtype)))


def backward(grad, p, seed, dtype):
    """The op vimpac::dropout_add_backward.triton."""
    return _launch(None, grad, p, seed, torch.empty_like(grad, dtype=dtype))


def _launch(x, y, p, seed, out):
    if (elements := y.numel()) > 0:
        grid = (triton.cdiv(elements, GROUPS * 64),)
        pointers = (y if x is None else x, y, out, seed)  # one that is never read
        _dropout_add[grid](*pointers, elements, **constants(p, x is not None, elements), num_warps=WARPS, **FUSED)
    return out


def constants(p, add, elements):
    """What the kernel is compiled for."""
    rate = {"THRESHOLD": dropout_threshold(p, 32), "SCALE": dropout_scale(p, 32)}
    return {**rate, "ADD": add, "WHOLE": elements % 16 == 0, "GROUPS": GROUPS}
