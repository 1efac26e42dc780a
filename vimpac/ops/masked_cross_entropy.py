"""The token head's product and loss (Eq. 1, 17), without all logits in memory at once.

    hidden [M, C], weight [V, C], bias [V], target [M] → loss, accuracy
    logits = hidden weightᵀ + bias      loss = mean over rows of logsumexp(logits) - logits[target]
    accuracy = share of rows whose largest logit is the target's

Rows with a negative target do not count. The gradient of a block of logits is softmax - one_hot, known as soon as the block
is: "chunked" computes it in the forward pass, block by block, and scales it in backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vimpac.ops import backend as backends

CHUNK_LOGITS = 1 << 24  # logits in memory at once: 64 MiB of float32


def masked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a linear classifier and its accuracy (Eq. 1, 17), two float32 scalars (float64 for float64).

    hidden [M, C], weight [V, C], bias [V]: floating, one device; under autocast the product runs in autocast's dtype.
    target [M] int64: class of each row, negative = the row does not count. No counting row gives loss and accuracy 0.
    backend: "chunked" (default), "reference" or None.

    Raises ValueError for other shapes, dtypes or devices.
    """
    _check(hidden, weight, bias, target)
    call = (hidden, weight, bias, target)
    match backends.choose("masked_cross_entropy", backend, ("cuda", "triton", "cpu", "chunked"), *call):
        case "reference":
            return masked_cross_entropy_reference(*call)
        case name:
            if torch.is_autocast_enabled(hidden.device.type):
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                return _MaskedCrossEntropy.apply(hidden, weight, bias, target, name)


def masked_cross_entropy_reference(hidden, weight, bias, target) -> tuple[Tensor, Tensor]:
    """The definition, in plain float32 (float64 stays float64)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), bias.to(dtype))  # [M, V]
    counts = (target >= 0).sum().clamp(min=1)
    loss = F.cross_entropy(logits, target.clamp(min=-1), ignore_index=-1, reduction="sum") / counts
    return loss, (logits.argmax(-1) == target).sum() / counts.to(dtype)


class _MaskedCrossEntropy(torch.autograd.Function):
    """A backend's op, differentiable: it returns the gradients with the loss, and backward scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, backend):
        op = backends.overload("masked_cross_entropy", backend)
        loss, accuracy, *grads = op(hidden, weight, bias, target, any(ctx.needs_input_grad))
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    def backward(ctx, grad, _):
        return *(x * grad.to(x.dtype) for x in ctx.saved_tensors), None, None


def _chunked(hidden, weight, bias, target, gradients):
    M, V = hidden.shape[0], weight.shape[0]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    counts = (target >= 0).sum().clamp(min=1)
    loss, hits = hidden.new_zeros((), dtype=dtype), hidden.new_zeros((), dtype=dtype)
    grad_h = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    grad_w, grad_b = weight.new_zeros(weight.shape, dtype=dtype), bias.new_zeros(bias.shape, dtype=dtype)
    step = max(1, CHUNK_LOGITS // V)
    for rows in (slice(start, start + step) for start in range(0, M, step)):
        labels = target[rows, None]
        counted, labels = (labels >= 0).to(dtype), labels.clamp(min=0)
        logits = (hidden[rows] @ weight.T).to(dtype) + bias.to(dtype)
        lse = logits.logsumexp(-1, keepdim=True)
        loss += ((lse - logits.gather(1, labels)) * counted).sum()
        hits += ((logits.argmax(-1, keepdim=True) == labels) * counted).sum()
        if gradients:
            grad = (logits - lse).exp_().scatter_add_(1, labels, -torch.ones_like(counted)).mul_(counted / counts)
            grad_b += grad.sum(0)
            grad = grad.to(hidden.dtype)
            grad_h[rows] = grad @ weight
            grad_w += grad.T @ hidden[rows]
    return loss / counts, hits / counts, grad_h, grad_w.to(weight.dtype), grad_b.to(bias.dtype)


def _fake(hidden, weight, bias, target, gradients):
    scalar = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    grad_h = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    grad_w, grad_b = weight.new_empty(weight.shape), bias.new_empty(bias.shape)
    return scalar, scalar.clone(), grad_h, grad_w, grad_b


def _check(hidden, weight, bias, target) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [M, C] and weight [V, C], got shapes {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [{hidden.shape[0]}], got {target.dtype} of shape {tuple(target.shape)}")
    if not all(x.is_floating_point() for x in (hidden, weight, bias)):
        raise ValueError(f"hidden, weight and bias must be floating, got {hidden.dtype}, {weight.dtype}, {bias.dtype}")
    devices = [str(x.device) for x in (hidden, weight, bias, target)]
    if len(set(devices)) > 1:
        raise ValueError(f"hidden, weight, bias and target must be on one device, got {devices}")


SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor target, bool gradients)"
    " -> (Tensor loss, Tensor accuracy, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
backends.define("masked_cross_entropy", SCHEMA, _fake)
backends.define_overload("masked_cross_entropy", "chunked", SCHEMA, _fake)
backends.implement("masked_cross_entropy", "chunked", "CompositeExplicitAutograd", _chunked)
backends.register("masked_cross_entropy", "reference", backends.always)
backends.register("masked_cross_entropy", "chunked", backends.always)
