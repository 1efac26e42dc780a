"""The residual connection with its dropout and layer norm, in one pass (Eq. 10).

    x [R, C], y [R, C], bias [C] → s = x + dropout(y + bias),   out = (s - mean(s)) · rstd(s) · weight + norm_bias

mean and rstd = 1 / √(variance + eps) are of each row. `residual_norm` (post-norm) returns out. `residual_sum_norm` (pre-norm)
returns s too, and normalises s as returned, rounded to x's dtype. Arithmetic is float32, or float64 if x is.

The dropout mask is that of `dropout_add`: a function of (seed, element), drawn again in backward.

Backward, with g the gradient of out, h that of s (pre-norm), x̂ = (s - mean) · rstd and a = g · weight:

    ds = rstd · (a - mean(a) - x̂ · mean(a · x̂)) + h          of x: ds          of y: dropout(ds)
    of weight: Σ g · x̂          of norm_bias: Σ g          of bias: Σ dropout(ds)          (sums over rows, in a fixed order)

For x̂ backward needs s, or out: x̂ = (out - norm_bias) / weight. A transformer keeps `out` anyway, as the input of the next
product. So `keeps="output"` saves the memory of s, and writing it. But weights that are small beside norm_bias magnify the
rounding of out. Where a weight is 0, or so small that 1 / weight overflows, its column's x̂ counts as 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vimpac.config import ModelConfig
from vimpac.dropout_rate import dropout_scale
from vimpac.ops import dispatch
from vimpac.ops.autograd import anchors, full_precision, once_differentiable
from vimpac.ops.dropout_add import BITS, dropout_keep
from vimpac.ops.philox import seed_tensor

BACKENDS = {"cuda": ("triton", "reference"), "cpu": ("triton", "cpu", "reference")}
EPS = 1e-12
WIDEST = 4096  # columns of a row that the Triton kernels hold in registers


@full_precision
def residual_norm(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor,
    p: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = EPS,
    keeps: str = "sum",
    backend: str | None = None,
    exact: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(x + dropout(y + bias)), the residual connection of post-norm (Eq. 10).

    x [R, C]: the residual stream, floating. y [R, C]: what is added to it, of x's dtype or a narrower one.
    bias [C] or None, weight [C], norm_bias [C]: floating, usually float32.
    p in [0, 1): probability that an element is dropped, rounded to a multiple of 2^-32. Above 0 it needs `seed`, an int or a
    0-dimensional int64 tensor.
    keeps: what is saved for backward, "sum" or "output". "output" saves a tensor if the caller keeps the result anyway, and is
    inexact where weights are small beside norm_bias.
    backend: "reference", "triton" (CUDA), "cpu" or None (chooses).
    exact [B, C], of the dtype of sums (float32): the last B rows of x before they were rounded. x's own are not read then. For
    rows that differ little, such as [CLS] of different clips, whose differences half precision would round away.

    Returns [R, C] in x's dtype; with `exact` also its last B rows before they are rounded, which are to be the next call's.
    Raises TypeError for what is not a tensor or a number, ValueError for anything else.
    """
    if keeps not in ("sum", "output"):
        raise ValueError(f"keeps must be 'sum' or 'output', got {keeps!r}")
    call = _checked(x, y, bias, weight, norm_bias, p, seed, eps)
    _check_exact(exact, x)
    match dispatch.choose("residual_norm", backend, dispatch.order(BACKENDS, x.device), *call):
        case "reference":
            if exact is None:
                return residual_norm_reference(*call)[1]
            first = x.shape[0] - exact.shape[0]
            wide = torch.cat([x[:first].to(exact.dtype), exact])
            out = residual_norm_reference(wide, *call[1:])[1]
            return out.to(x.dtype), out[first:]
        case name:
            given = [v for v in (x, y, bias, exact) if v is not None]  # "output" saves what depends on them
            parts = anchors(*given) if keeps == "sum" and torch.is_grad_enabled() else []
            out, _, out_exact = _ResidualNorm.apply(name, keeps, exact, *call, *parts)
            return out if exact is None else (out, out_exact)


@full_precision
def residual_sum_norm(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    norm_bias: Tensor,
    p: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = EPS,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """s = x + dropout(y + bias) and norm(s), the residual connection of pre-norm with the norm of the block that follows.

    Arguments and errors are those of `residual_norm`. Returns s and norm(s), [R, C] in x's dtype.
    """
    call = _checked(x, y, bias, weight, norm_bias, p, seed, eps)
    match dispatch.choose("residual_norm", backend, dispatch.order(BACKENDS, x.device), *call):
        case "reference":
            return residual_norm_reference(*call, rounds_sum=True)
        case name:
            out, total, _ = _ResidualNorm.apply(name, "both", None, *call)
            return total, out


def residual_norm_reference(x, y, bias, weight, norm_bias, p=0.0, seed=None, eps=EPS, rounds_sum=False):
    """The definition, in plain float32 (float64 stays float64): s and norm(s)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    s = y.to(dtype) if bias is None else y.to(dtype) + bias.to(dtype)
    if p > 0:
        assert seed is not None  # checked before
        s = s * (dropout_keep(y.shape, p, seed).to(dtype) * dropout_scale(p, BITS))
    s = x.to(dtype) + s
    rounded = s.to(x.dtype)
    s = rounded.to(dtype) if rounds_sum else s
    centred = s - s.mean(-1, keepdim=True)
    normalised = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return rounded, (normalised * weight.to(dtype) + norm_bias.to(dtype)).to(x.dtype)


# --- arguments, backends ----------------------------------------------------------------------------------------------


def _checked(x, y, bias, weight, norm_bias, p, seed, eps) -> tuple:
    """The call, or ValueError or TypeError if no backend could run it. Reads no device memory."""
    given = {"weight": weight, "norm_bias": norm_bias} | ({} if bias is None else {"bias": bias})
    dispatch.check_tensors(x=x, y=y, **given)
    if x.ndim != 2 or x.shape != y.shape or x.shape[1] == 0:
        raise ValueError(f"x and y must be [R, C] of one shape, C at least 1, got {tuple(x.shape)} and {tuple(y.shape)}")
    for name, v in given.items():
        if tuple(v.shape) != (x.shape[1],):
            raise ValueError(f"{name} must be [C] = [{x.shape[1]}], got shape {tuple(v.shape)}")
    for name, v in {"x": x, "y": y, **given}.items():
        if not v.is_floating_point():
            raise ValueError(f"{name} must be floating, got {v.dtype}")
        if v.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {v.device}")
    if torch.promote_types(x.dtype, y.dtype) != x.dtype:
        raise ValueError(f"y must be of x's dtype {x.dtype} or a narrower one, got {y.dtype}")
    dispatch.check_numbers(p=p, eps=eps)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be in [0, 1), got {p}")
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if p > 0 and seed is None:
        raise ValueError(f"p={p} needs a seed: an int or a 0-dimensional int64 tensor")
    return x, y, bias, weight, norm_bias, p, seed_tensor(seed, x.device) if p > 0 else None, eps


def _check_exact(exact: Tensor | None, x: Tensor) -> None:
    if exact is None:
        return
    dispatch.check_tensors(exact=exact)
    dtype = _statistics_dtype(x)
    fits = exact.ndim == 2 and exact.shape[1] == x.shape[1] and exact.shape[0] <= x.shape[0]
    if not fits or exact.dtype != dtype or exact.device != x.device:
        raise ValueError(
            f"exact must be {dtype} [B, C] with B at most {x.shape[0]} and C = {x.shape[1]} on {x.device}, "
            f"got {exact.dtype} of shape {tuple(exact.shape)} on {exact.device}"
        )


def sample_call(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dispatch.Call:
    """What a model calls in training, for a row: tensors that hold nothing."""
    y = torch.empty(1, config.width, dtype=dtype, device=device)
    vector = torch.empty(config.width, device=device)
    seed = torch.zeros((), dtype=torch.int64, device=device) if config.dropout > 0 else None
    call = (y, y, vector, vector, vector, config.dropout, seed, EPS)
    return dispatch.Call("residual_norm", dispatch.order(BACKENDS, device), call)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake_forward(x, y, bias, weight, norm_bias, p, seed, eps, writes_sum, exact=None):
    statistics = x.new_empty(2, x.shape[0], dtype=_statistics_dtype(x))
    out_exact = x.new_empty(0 if exact is None else exact.shape[0], x.shape[1], dtype=_statistics_dtype(x))
    return x.new_empty(x.shape), x.new_empty(x.shape if writes_sum else (0,)), statistics, out_exact


def _fake_backward(grad, grad_sum, kept, statistics, weight, norm_bias, p, seed, from_sum, dtype, grad_exact=None):
    same = p == 0 and dtype == kept.dtype and grad_exact is None
    columns = kept.new_empty(3, kept.shape[1], dtype=_statistics_dtype(kept))
    of_exact = columns.new_empty(0 if grad_exact is None else grad_exact.shape[0], kept.shape[1])
    return kept.new_empty(kept.shape), kept.new_empty((0,) if same else kept.shape, dtype=dtype), columns, of_exact


# Forward: out, the sum (empty unless writes_sum), mean and rstd [2, R], out's exact rows. A sum that is written is rounded
# before the norm. Backward: the gradients of x and y (empty where it is that of x), those of weight, norm_bias and bias [3, C],
# and of the exact rows, which are zeros in that of x.
SCHEMAS = {
    "residual_norm": (
        "(Tensor x, Tensor y, Tensor? bias, Tensor weight, Tensor norm_bias, float p, Tensor? seed, float eps, bool writes_sum,"
        " Tensor? exact=None) -> (Tensor, Tensor, Tensor, Tensor)",
        _fake_forward,
    ),
    "residual_norm_backward": (
        "(Tensor grad, Tensor? grad_sum, Tensor kept, Tensor statistics, Tensor weight, Tensor norm_bias, float p,"
        " Tensor? seed, bool from_sum, ScalarType dtype, Tensor? grad_exact=None) -> (Tensor, Tensor, Tensor, Tensor)",
        _fake_backward,
    ),
}
for _name, (_schema, _fake) in SCHEMAS.items():
    dispatch.define(_name, _schema, _fake)
    dispatch.implement_library(_name, "cpu")
dispatch.register("residual_norm", "reference", dispatch.always)

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _why_not_cpu(x, y, *_rest) -> list[str]:
    reasons = dispatch.why_not_library(x, "cpu", CPU_DTYPES)
    if x.dtype != y.dtype and (x.dtype, y.dtype) != (torch.float32, torch.bfloat16):
        reasons.append(f"x of {x.dtype} and y of {y.dtype}, it takes one dtype, or float32 and bfloat16")
    return reasons


dispatch.register("residual_norm", "cpu", _why_not_cpu)


def _why_not_triton(x, y, *_rest) -> list[str]:
    reasons = dispatch.why_not_triton(x, dispatch.HALF_AND_SINGLE)
    if x.dtype != y.dtype:
        reasons += dispatch.unfit_dtype(y, dispatch.HALF_AND_SINGLE)
    if x.shape[1] > WIDEST:
        reasons.append(f"rows of {x.shape[1]} elements, it takes at most {WIDEST}")
    return reasons


dispatch.implement_triton("residual_norm", "residual_norm.forward")
dispatch.implement_triton("residual_norm_backward", "residual_norm.backward")
dispatch.register("residual_norm", "triton", _why_not_triton)


def _vector(v: Tensor | None, x: Tensor) -> Tensor | None:
    """As the kernels take it: in the dtype of sums."""
    return None if v is None else v.to(_statistics_dtype(x)).contiguous()


class _ResidualNorm(torch.autograd.Function):
    """A backend's kernels, differentiable. Saves one tensor [R, C] and two numbers a row. Backward draws the mask again."""

    @staticmethod
    def forward(ctx, backend, keeps, exact, x, y, bias, weight, norm_bias, p, seed, eps, *anchors):
        writes_sum = keeps != "output"
        vectors = (_vector(v, x) for v in (bias, weight, norm_bias))
        given = None if exact is None else exact.contiguous()
        call = (x.contiguous(), y.contiguous(), *vectors, p, seed, eps, writes_sum, given)
        out, total, statistics, out_exact = dispatch.overload("residual_norm", backend)(*call)
        ctx.save_for_backward(total if writes_sum else out, statistics, weight, norm_bias, seed, *anchors)
        ctx.options = backend, p, writes_sum, y.dtype, None if bias is None else bias.dtype
        ctx.exact = None if exact is None else exact.shape[0]
        ctx.set_materialize_grads(False)
        return out, total if keeps == "both" else None, None if exact is None else out_exact

    @staticmethod
    @once_differentiable("residual_norm")
    def backward(ctx, saved, grad, grad_sum, grad_exact):
        kept, statistics, weight, norm_bias, seed = saved[:5]
        backend, p, from_sum, dtype, bias_dtype = ctx.options
        if grad is None and grad_sum is None and grad_exact is None:
            return (None,) * len(ctx.needs_input_grad)
        grad = torch.zeros_like(kept) if grad is None else grad.contiguous()
        grad_sum = None if grad_sum is None else grad_sum.contiguous()
        if ctx.exact is not None:
            size = ctx.exact, kept.shape[1]
            grad_exact = statistics.new_zeros(size) if grad_exact is None else grad_exact.contiguous()
        vectors = _vector(weight, kept), _vector(norm_bias, kept)
        call = (grad, grad_sum, kept, statistics, *vectors, p, seed, from_sum, dtype, grad_exact)
        of_x, of_y, columns, of_exact = dispatch.overload("residual_norm_backward", backend)(*call)
        of_weight, of_norm_bias, of_bias = columns.unbind()
        of_y = of_x if p == 0 and dtype == kept.dtype and ctx.exact is None else of_y
        of_bias = None if bias_dtype is None else of_bias.to(bias_dtype)
        of_vectors = of_bias, of_weight.to(weight.dtype), of_norm_bias.to(norm_bias.dtype)
        of_exact = None if ctx.exact is None else of_exact
        return None, None, of_exact, of_x, of_y, *of_vectors, *[None] * (len(ctx.needs_input_grad) - 8)
