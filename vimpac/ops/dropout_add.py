"""The residual connection (Eq. 10) with its dropout.

    x [...], y [...], seed → out [...] = x + keep · y / (1 - p)

Dropout is a function of (seed, element). Element i (raster index of the tensor) reads word (i % 64) // 16 of

    philox4x32-7(counter = (c low, c high, 0, 2), key = seed),  c = 16·(i // 64) + i % 16

and is kept when that reaches round(p·2^32). So a group of 64 elements takes 16 counters, and a register of counters gives
four registers of neighbouring elements. (Attention's counters end in 0 or 1, so that the two draw different words of a seed.)

The mask is never stored. Backward draws it again: grad_x is the upstream gradient, grad_y = keep · grad / (1 - p). So the
kernel of y's gradient also computes dropout alone (`dropout`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vimpac.config import ModelConfig
from vimpac.dropout_rate import dropout_scale, dropout_threshold
from vimpac.ops import dispatch
from vimpac.ops.philox import philox, seed_tensor, split_words

BACKENDS = {"cuda": ("triton", "torch", "reference"), "cpu": ("triton", "cpu", "torch", "reference")}
ROUNDS = 7  # the fewest that pass BigCrush
PURPOSE = 2  # the fourth counter word
GROUP, COUNTERS = 64, 16
BITS = 32  # of the word that decides on an element


def dropout_add(x: Tensor, y: Tensor, p: float, seed: int | Tensor | None = None, backend: str | None = None) -> Tensor:
    """x + dropout(y), the residual connection (Eq. 10).

    x, y: floating, one shape, any strides. The result has the wider of their dtypes.
    p in [0, 1): probability that an element is dropped, rounded to a multiple of 2^-32; 0 is x + y. Above 0 it needs `seed`, an
    int or a 0-dimensional int64 tensor.
    backend: "reference", "triton" (CUDA), "cpu", "torch" or None (chooses). "torch" draws from torch's own generator instead of
    `seed`: torch.compile fuses its dropout and sum with neighbouring ops.

    Raises TypeError for what is not a tensor or a number, ValueError for anything else.
    """
    _check(x, y, p, seed)
    if p == 0:
        return x + y
    assert seed is not None  # checked above
    call = (x, y, p, seed_tensor(seed, x.device))
    match dispatch.choose("dropout_add", backend, dispatch.order(BACKENDS, x.device), *call):
        case "reference":
            return dropout_add_reference(*call)
        case "torch":
            return x + F.dropout(y, p)
        case name:
            return _DropoutAdd.apply(*call, name)


def dropout(y: Tensor, p: float, seed: int | Tensor | None = None, backend: str | None = None) -> Tensor:
    """dropout(y) alone, the embedding's: what `dropout_add` adds to x, by the same backends, in y's dtype.

    Arguments and errors are those of `dropout_add`.
    """
    _check(y, y, p, seed)
    if p == 0:
        return y
    assert seed is not None  # checked above
    call = (y, y, p, seed_tensor(seed, y.device))
    match dispatch.choose("dropout_add", backend, dispatch.order(BACKENDS, y.device), *call):
        case "reference":
            return dropout_add_reference(torch.zeros_like(y), *call[1:])
        case "torch":
            return F.dropout(y, p)
        case name:
            return _Dropped.apply(*call[1:], y.dtype, name)


def dropout_add_reference(x: Tensor, y: Tensor, p: float, seed: Tensor) -> Tensor:
    """The definition, in plain float32 (float64 stays float64)."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = (z.to(torch.promote_types(dtype, torch.float32)) for z in (x, y))
    return (x + y * (dropout_keep(y.shape, p, seed).to(y.dtype) * dropout_scale(p, BITS))).to(dtype)


def dropout_keep(shape: Sequence[int], p: float, seed: Tensor) -> Tensor:
    """Which elements dropout keeps, bool of a shape."""
    elements = math.prod(shape)
    groups = -(-elements // GROUP)
    counters = torch.arange(groups * COUNTERS, device=seed.device).view(-1, COUNTERS)
    words = torch.stack(philox((*split_words(counters), 0, PURPOSE), seed, ROUNDS), 1)  # [groups, word, counter]
    return (words.flatten()[:elements] >= dropout_threshold(p, BITS)).view(shape)


def _check(x, y, p, seed) -> None:
    """Raise ValueError or TypeError for a call that no backend could run. Reads no device memory."""
    dispatch.check_tensors(x=x, y=y)
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not x.is_floating_point() or not y.is_floating_point():
        raise ValueError(f"x and y must be floating, got {x.dtype} and {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"x and y must be on one device, got {x.device} and {y.device}")
    dispatch.check_numbers(p=p)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be in [0, 1), got {p}")
    if p > 0 and seed is None:
        raise ValueError(f"p={p} needs a seed: an int or a 0-dimensional int64 tensor")


def sample_call(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dispatch.Call:
    """What a model calls in training, for one clip: tensors that hold nothing. Autocast leaves the sum, x, in float32."""
    y = torch.empty(math.prod(config.grid) + 1, config.width, dtype=dtype, device=device)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    return dispatch.Call("dropout_add", dispatch.order(BACKENDS, device), (y.float(), y, config.dropout, seed))


def _fake_forward(x, y, p, seed):
    return y.new_empty(y.shape, dtype=torch.promote_types(x.dtype, y.dtype))  # contiguous, as its inputs


def _fake_backward(grad, p, seed, dtype):
    return grad.new_empty(grad.shape, dtype=dtype)


SCHEMAS = {
    "dropout_add": ("(Tensor x, Tensor y, float p, Tensor seed) -> Tensor", _fake_forward),
    "dropout_add_backward": ("(Tensor grad, float p, Tensor seed, ScalarType dtype) -> Tensor", _fake_backward),
}
for _name, (_schema, _fake) in SCHEMAS.items():
    dispatch.define(_name, _schema, _fake)
    dispatch.implement_library(_name, "cpu")
dispatch.register("dropout_add", "reference", dispatch.always)
dispatch.register("dropout_add", "torch", dispatch.always)

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _why_not_cpu(x, y, p, seed) -> list[str]:
    reasons = dispatch.why_not_library(x, "cpu", CPU_DTYPES)
    if x.dtype != y.dtype and (x.dtype, y.dtype) != (torch.float32, torch.bfloat16):
        reasons.append(f"x of {x.dtype} and y of {y.dtype}, it takes one dtype or, as autocast has them, float32 and bfloat16")
    return reasons


dispatch.register("dropout_add", "cpu", _why_not_cpu)


def _why_not_triton(x, y, p, seed) -> list[str]:
    reasons = dispatch.why_not_triton(y, dispatch.HALF_AND_SINGLE)
    if x.dtype != y.dtype:
        reasons += dispatch.unfit_dtype(x, dispatch.HALF_AND_SINGLE)
    return reasons


dispatch.implement_triton("dropout_add", "dropout_add.forward")
dispatch.implement_triton("dropout_add_backward", "dropout_add.backward")
dispatch.register("dropout_add", "triton", _why_not_triton)


class _DropoutAdd(torch.autograd.Function):
    """A backend's kernels, differentiable. Saves nothing but the seed: the mask is drawn again in backward."""

    @staticmethod
    def forward(ctx, x, y, p, seed, backend):
        ctx.save_for_backward(seed)
        ctx.options = p, backend, y.dtype
        return dispatch.overload("dropout_add", backend)(x.contiguous(), y.contiguous(), p, seed)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad,), (seed,) = grad_outputs, ctx.saved_tensors
        p, backend, dtype = ctx.options
        return grad, dropped(grad, p, seed, dtype, backend), None, None, None


def dropped(grad: Tensor, p: float, seed: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """keep · grad / (1 - p) in y's dtype, differentiable if the gradient's own graph is needed."""
    if torch.is_grad_enabled() and grad.requires_grad:
        return _Dropped.apply(grad, p, seed, dtype, backend)
    return dispatch.overload("dropout_add_backward", backend)(grad.contiguous(), p, seed, dtype)


class _Dropped(torch.autograd.Function):
    """The gradient of y, and dropout alone. It is linear, so its own gradient is the same op."""

    @staticmethod
    def forward(ctx, grad, p, seed, dtype, backend):
        ctx.save_for_backward(seed)
        ctx.options = p, backend, grad.dtype
        return dispatch.overload("dropout_add_backward", backend)(grad.contiguous(), p, seed, dtype)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad,), (seed,) = grad_outputs, ctx.saved_tensors
        p, backend, dtype = ctx.options
        return dropped(grad, p, seed, dtype, backend), None, None, None, None
