"""GELU of a linear layer's output, with the layer's bias.

    h [R, F], bias [F] → out = gelu(h + bias),   gelu(z) = z · Φ(z),   Φ(z) = (1 + erf(z / √2)) / 2

Forward and backward are one pass each. h alone is saved. From h and the upstream gradient g, backward makes the gradient of h,
`g · (Φ(z) + z · φ(z))` with φ the normal density, and its column sums, which are the gradient of bias. Where the next linear
layer needs `out` for the gradient of its weight (`gelu_linear`), backward makes it again. Arithmetic is float32, or float64 if
h is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vimpac.config import ModelConfig
from vimpac.ops import dispatch
from vimpac.ops.autograd import full_precision, once_differentiable

BACKENDS = {"cuda": ("triton", "reference"), "cpu": ("triton", "cpu", "reference")}


@full_precision
def bias_gelu(h: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
    """gelu(h + bias), exact (erf).

    h [R, F], bias [F]: floating. backend: "reference", "triton" (CUDA), "cpu" or None (chooses).

    Returns [R, F] in h's dtype. Raises TypeError for what is not a tensor, ValueError for anything else.
    """
    match choose(h, bias, backend):
        case "reference":
            return bias_gelu_reference(h, bias)
        case name:
            return _BiasGelu.apply(name, h, bias)


@full_precision
def gelu_linear(
    h: Tensor, bias: Tensor, weight: Tensor, recompute: bool = True, product: Callable | None = None, backend: str | None = None
) -> Tensor:
    """gelu(h + bias) · weightᵀ, the second half of an MLP.

    h [R, F], bias [F], weight [C, F] of h's dtype.
    recompute: save h alone for backward, which computes the activation again while it reads h. False saves both.
    product: function of (x [R, K], weight [N, K]) → x · weightᵀ; None is torch's.
    backend: as in `bias_gelu`.

    Returns [R, C] in h's dtype. Raises as `bias_gelu` does.
    """
    name = choose(h, bias, backend)
    dispatch.check_tensors(weight=weight)
    if weight.ndim != 2 or weight.shape[1] != h.shape[1] or weight.dtype != h.dtype or weight.device != h.device:
        raise ValueError(
            f"weight must be {h.dtype} [C, F] with F = {h.shape[1]} on {h.device}, "
            f"got {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}"
        )
    product = product or F.linear
    if name == "reference":
        return product(bias_gelu_reference(h, bias), weight)
    return _GeluLinear.apply(name, product, recompute, h, bias, weight)


def bias_gelu_reference(h: Tensor, bias: Tensor) -> Tensor:
    """The definition, in plain float32 (float64 stays float64)."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    return F.gelu(h.to(dtype) + bias.to(dtype)).to(h.dtype)


# --- arguments, backends ----------------------------------------------------------------------------------------------


def choose(h: Tensor, bias: Tensor, backend: str | None) -> str:
    """The backend of a call. Raises ValueError or TypeError for a call that no backend could run. Reads no device memory."""
    dispatch.check_tensors(h=h, bias=bias)
    if h.ndim != 2 or h.shape[1] == 0 or tuple(bias.shape) != (h.shape[1],):
        raise ValueError(f"h must be [R, F], F at least 1, and bias [F], got {tuple(h.shape)} and {tuple(bias.shape)}")
    if not h.is_floating_point() or not bias.is_floating_point():
        raise ValueError(f"h and bias must be floating, got {h.dtype} and {bias.dtype}")
    if bias.device != h.device:
        raise ValueError(f"h and bias must be on one device, got {h.device} and {bias.device}")
    return dispatch.choose("bias_gelu", backend, dispatch.order(BACKENDS, h.device), h, bias)


def sample_call(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dispatch.Call:
    """What a model calls in training, for a row: tensors that hold nothing."""
    h = torch.empty(1, config.hidden_width, dtype=dtype, device=device)
    return dispatch.Call("bias_gelu", dispatch.order(BACKENDS, device), (h, h[0].float()))


def _sum_dtype(h: Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)


def _fake_forward(h, bias):
    return h.new_empty(h.shape)


def _fake_backward(grad, h, bias, with_output):
    return h.new_empty(h.shape), h.new_empty(h.shape if with_output else (0,)), bias.new_empty(bias.shape)


# Backward: the gradient of h, the output (empty unless with_output), and the gradient of bias. bias is in the dtype of sums.
SCHEMAS = {
    "bias_gelu": ("(Tensor h, Tensor bias) -> Tensor", _fake_forward),
    "bias_gelu_backward": (
        "(Tensor grad, Tensor h, Tensor bias, bool with_output) -> (Tensor, Tensor, Tensor)",
        _fake_backward,
    ),
}
for _name, (_schema, _fake) in SCHEMAS.items():
    dispatch.define(_name, _schema, _fake)
    dispatch.implement_library(_name, "cpu")
dispatch.register("bias_gelu", "reference", dispatch.always)

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _why_not_cpu(h, bias) -> list[str]:
    return dispatch.why_not_library(h, "cpu", CPU_DTYPES)


def _why_not_triton(h, bias) -> list[str]:
    return dispatch.why_not_triton(h, dispatch.HALF_AND_SINGLE)


dispatch.register("bias_gelu", "cpu", _why_not_cpu)
dispatch.implement_triton("bias_gelu", "bias_gelu.forward")
dispatch.implement_triton("bias_gelu_backward", "bias_gelu.backward")
dispatch.register("bias_gelu", "triton", _why_not_triton)


def _forward(backend: str, h: Tensor, bias: Tensor) -> Tensor:
    return dispatch.overload("bias_gelu", backend)(h.contiguous(), bias.to(_sum_dtype(h)).contiguous())


def _backward(backend: str, grad: Tensor, h: Tensor, bias: Tensor, with_output: bool) -> tuple[Tensor, Tensor, Tensor]:
    call = grad.contiguous(), h.contiguous(), bias.to(_sum_dtype(h)).contiguous(), with_output
    of_h, out, of_bias = dispatch.overload("bias_gelu_backward", backend)(*call)
    return of_h, out, of_bias.to(bias.dtype)


class _BiasGelu(torch.autograd.Function):
    """A backend's kernels, differentiable. Saves the inputs."""

    @staticmethod
    def forward(ctx, backend, h, bias):
        ctx.save_for_backward(h, bias)
        ctx.backend = backend
        return _forward(backend, h, bias)

    @staticmethod
    @once_differentiable("bias_gelu")
    def backward(ctx, saved, grad):
        h, bias = saved
        of_h, _, of_bias = _backward(ctx.backend, grad, h, bias, False)
        return None, of_h, of_bias


class _GeluLinear(torch.autograd.Function):
    """GELU and the product that reads it: so backward gets the activation from the kernel that reads h for its gradient."""

    @staticmethod
    def forward(ctx, backend, product, recompute, h, bias, weight):
        out = _forward(backend, h, bias)
        ctx.save_for_backward(h, bias, weight, None if recompute else out)
        ctx.options = backend, product
        return product(out, weight)

    @staticmethod
    @once_differentiable("bias_gelu")
    def backward(ctx, saved, grad):
        h, bias, weight, out = saved
        backend, product = ctx.options
        grad = grad.contiguous()
        of_out = full_precision(product)(grad, weight.t())
        of_h, again, of_bias = _backward(backend, of_out, h, bias, out is None)
        return None, None, None, of_h, of_bias, full_precision(torch.mm)(grad.t(), again if out is None else out)
