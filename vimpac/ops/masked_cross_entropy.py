"""The token head's product and loss (Eq. 1, 17), without all logits in memory at once.

    hidden [M, C], weight [V, C], bias [V], target [M] → loss, accuracy
    logits = hidden weightᵀ + bias      loss = mean over rows of logsumexp(logits) - logits[target]
    accuracy = share of rows whose largest logit is the target's

Rows with a negative target do not count, whatever they hold. They are set to zero before any product, as 0 · NaN is NaN.

The gradient of a block of logits is softmax - one_hot, which is known as soon as the block is. So backends compute it in the
forward pass, block by block, and backward scales it. A backend returns sums over rows. Backward divides them by the number of
rows together with the upstream gradient, since softmax / M alone underflows in float16.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vimpac.config import ModelConfig
from vimpac.ops import dispatch
from vimpac.ops.autograd import anchors, once_differentiable

BACKENDS = {"cuda": ("triton", "chunked"), "cpu": ("triton", "chunked")}
CHUNK_LOGITS = 1 << 24  # logits in memory at once: 64 MiB of float32
CHUNK_ROWS = 4096  # more could overflow float16 in a block's gradient to weight, a sum over its rows


def masked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a linear classifier and its accuracy (Eq. 1, 17), two float32 scalars (float64 for float64).

    hidden [M, C], weight [V, C], bias [V]: floating, one device; hidden and weight share a dtype, or are in autocast,
    whose dtype the product then runs in.
    target [M] int64: class of each row, negative = the row does not count. Without any counting row loss and accuracy are 0.
    Targets are not read here: a class of V or more is an error that the device reports, or a loss of NaN.
    backend: "chunked", "triton" (CUDA), "reference" or None (chooses).

    Raises ValueError for other shapes, dtypes or devices, TypeError for what is not a tensor.
    """
    _check(hidden, weight, bias, target)
    call = (hidden, weight, bias, target)
    match dispatch.choose("masked_cross_entropy", backend, dispatch.order(BACKENDS, hidden.device), *call):
        case "reference":
            return masked_cross_entropy_reference(*call)
        case name:
            if torch.is_autocast_enabled(hidden.device.type):
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
            gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, weight, bias))
            with torch.autocast(hidden.device.type, enabled=False):
                parts = anchors(hidden, weight, bias) if gradients else []
                return _MaskedCrossEntropy.apply(hidden, weight, bias, target, gradients, name, *parts)


def masked_cross_entropy_reference(hidden, weight, bias, target) -> tuple[Tensor, Tensor]:
    """The definition, in plain float32 (float64 stays float64)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden = counted_rows(hidden, target)
    logits = F.linear(hidden.to(dtype), weight.to(dtype), bias.to(dtype))  # [M, V]
    counts = (target >= 0).sum().clamp(min=1)
    loss = F.cross_entropy(logits, target.clamp(min=-1), ignore_index=-1, reduction="sum") / counts
    return loss, (logits.argmax(-1) == target).sum() / counts.to(dtype)


def counted_rows(hidden: Tensor, target: Tensor) -> Tensor:
    """Zeros in place of the rows that do not count."""
    return hidden.masked_fill(target[:, None] < 0, 0.0)


class _MaskedCrossEntropy(torch.autograd.Function):
    """A backend's op, differentiable: the op returns the gradients with the loss, and backward scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, gradients, backend, *anchors):
        op = dispatch.overload("masked_cross_entropy", backend)
        loss, hits, *grads = op(hidden, weight, bias, target, gradients)
        counts = (target >= 0).sum().clamp(min=1)
        ctx.save_for_backward(counts, *grads, *anchors)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        loss, accuracy = loss / counts, hits / counts
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable("masked_cross_entropy")
    def backward(ctx, saved, grad, _):
        counts, grads = saved[0], saved[1:4]
        scale = grad / counts
        scaled = [(x.to(scale.dtype) * scale).to(dtype) for x, dtype in zip(grads, ctx.dtypes, strict=True)]
        return *scaled, *[None] * (len(ctx.needs_input_grad) - 3)


def _chunked(hidden, weight, bias, target, gradients):
    M, V = hidden.shape[0], weight.shape[0]
    loss, hits, grad_h, grad_w, grad_b = _zeros(hidden, weight, bias, target, gradients)
    dtype = loss.dtype
    step = max(1, min(CHUNK_ROWS, CHUNK_LOGITS // V))
    for rows in (slice(start, start + step) for start in range(0, M, step)):
        h, labels = counted_rows(hidden[rows], target[rows]), target[rows, None]
        counted, labels = (labels >= 0).to(dtype), labels.clamp(min=0)
        logits = (h @ weight.T).to(dtype) + bias.to(dtype)
        lse = logits.logsumexp(-1, keepdim=True)
        loss += ((lse - logits.gather(1, labels)) * counted).sum()
        hits += ((logits.argmax(-1, keepdim=True) == labels) * counted).sum()
        if gradients:
            grad = (logits - lse).exp_().scatter_add_(1, labels, -torch.ones_like(counted)).mul_(counted)
            grad_b += grad.sum(0)
            grad = grad.to(hidden.dtype)
            grad_h[rows] = grad @ weight
            grad_w += grad.T @ h
    return loss, hits, grad_h, grad_w, grad_b


def _zeros(hidden, weight, bias, target, gradients):
    """What a backend returns, filled with zeros; also the fake."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    M, V, C = (hidden.shape[0], *weight.shape) if gradients else (0, 0, weight.shape[1])
    loss, hits = hidden.new_zeros((), dtype=dtype), hidden.new_zeros((), dtype=dtype)
    return loss, hits, hidden.new_zeros(M, C), weight.new_zeros(V, C, dtype=dtype), bias.new_zeros(V, dtype=dtype)


def _check(hidden, weight, bias, target) -> None:
    dispatch.check_tensors(hidden=hidden, weight=weight, bias=bias, target=target)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [M, C] and weight [V, C], got shapes {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one class, got shape {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [{hidden.shape[0]}], got {target.dtype} of shape {tuple(target.shape)}")
    if not all(x.is_floating_point() for x in (hidden, weight, bias)):
        raise ValueError(f"hidden, weight and bias must be floating, got {hidden.dtype}, {weight.dtype}, {bias.dtype}")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"hidden and weight must share one dtype outside autocast, got {hidden.dtype} and {weight.dtype}")
    devices = [str(x.device) for x in (hidden, weight, bias, target)]
    if len(set(devices)) > 1:
        raise ValueError(f"hidden, weight, bias and target must be on one device, got {devices}")


def sample_call(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dispatch.Call:
    """What a model calls in training, if all of a clip's tokens were masked: tensors that hold nothing."""
    rows = math.prod(config.grid) + 1
    hidden = torch.empty(rows, config.width, dtype=dtype, device=device)
    weight = torch.empty(config.vocab_size, config.width, dtype=dtype, device=device)
    bias = torch.empty(config.vocab_size, device=device)
    target = torch.empty(1, dtype=torch.int64, device=device).expand(rows)
    order = dispatch.order(BACKENDS, device)
    return dispatch.Call("masked_cross_entropy", order, (hidden, weight, bias, target))


# Sums over counted rows: loss, hits (rows whose largest logit is the target's) and the loss's gradients. grad_hidden has
# hidden's dtype, the others at least float32. If gradients is False they have no rows.
SCHEMA = (
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor target, bool gradients)"
    " -> (Tensor loss, Tensor hits, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)
dispatch.define("masked_cross_entropy", SCHEMA, _zeros)
dispatch.define_overload("masked_cross_entropy", "chunked", SCHEMA, _zeros)
dispatch.implement("masked_cross_entropy", "chunked", "CompositeExplicitAutograd", _chunked)
dispatch.register("masked_cross_entropy", "reference", dispatch.always)
dispatch.register("masked_cross_entropy", "chunked", dispatch.always)


def _why_not_triton(hidden, weight, bias, target) -> list[str]:
    return dispatch.why_not_triton(hidden, dispatch.HALF_AND_SINGLE)


dispatch.implement_triton("masked_cross_entropy", "masked_cross_entropy.sums")
dispatch.register("masked_cross_entropy", "triton", _why_not_triton)
