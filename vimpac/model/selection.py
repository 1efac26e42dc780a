"""The rows that heads read: few of them, in one gather whose gradient is written without atomics."""

from __future__ import annotations

import torch
from torch import Tensor


def select_rows(x: Tensor, rows: Tensor, targets: Tensor, clips: int) -> tuple[Tensor, Tensor]:
    """States x [R, C] of `clips` clips, [CLS] last → those of `rows` [M] and of [CLS], [M, C] and [clips, C].

    rows are distinct where targets [M] are not negative. The others are filler, whose gradient must be 0.
    """
    R, M = x.shape[0], rows.shape[0]
    cls = torch.arange(R - clips, R, device=x.device)
    nowhere = torch.where(targets < 0, R, rows)
    picked = _Selected.apply(x, torch.cat([rows, cls]), torch.cat([nowhere, cls]))
    return picked[:M], picked[M:]


class _Selected(torch.autograd.Function):
    """x[rows]. The gradient of row i goes to row `back[i]`, row R is dropped; other rows of `back` are distinct."""

    @staticmethod
    def forward(ctx, x, rows, back):
        ctx.save_for_backward(back)
        ctx.shape = x.shape
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad,), (back,) = grad_outputs, ctx.saved_tensors
        R, C = ctx.shape
        return grad.new_zeros(R + 1, C).index_copy(0, back, grad)[:R], None, None
