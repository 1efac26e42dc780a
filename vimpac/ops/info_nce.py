"""InfoNCE over two views of n videos, both directions (Eq. 4, 5, 19, 20).

    z1, z2 [n, d] → loss = mean_i ℓ(z1_i → z2_i) + mean_i ℓ(z2_i → z1_i)
    ℓ(a → b) = logsumexp over all 2n - 1 other features x of (a·x / γ) - a·b / γ        features normalised to length 1

Written with local rows against all columns, so that the ranks of a process group share the work: rank r holds rows
offset…offset + m of n. Each rank returns the mean over its own rows. The mean over ranks is Eq. 5, and the
gradient that DistributedDataParallel averages is the gradient of Eq. 5 over the whole batch.

A learned temperature's gradient does not need the scores again. Scaling all unit features by c equals dividing γ by c², so

    d loss / dγ = -1 / (2γ) Σ_i unit_i · (d loss / d unit_i)        over all 2n features

Backward computes these products anyway: the gradient of the normalisation contains them.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vimpac.config import ModelConfig
from vimpac.ops import dispatch
from vimpac.ops.autograd import full_precision, once_differentiable

BACKENDS = {"cuda": ("triton", "reference"), "cpu": ("triton", "cpu", "reference")}


@full_precision
def info_nce(
    z1: Tensor,
    z2: Tensor,
    temperature: float | Tensor = 0.2,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Contrastive loss of paired features (Eq. 5), a float32 scalar (float64 for float64 features).

    z1, z2 [n, d] floating: features of the first and second clip of n videos. They are normalised here. Their lengths may be
    1e-12 to 1e18 (float64: 1e150): a shorter one counts as 1e-12, and the square of a longer one overflows in some backends.
    temperature: γ > 0, a number or, to learn it, a 0-dimensional floating tensor on the features' device. A tensor's value is
    not read here: if it is not positive, the loss is meaningless.
    group: gather the features of its ranks, each with the same n and temperature, as further negatives. The result is then the
    mean over this rank's rows, and the mean over ranks is Eq. 5. The same holds for the gradients that DistributedDataParallel
    averages, including the temperature's. A rank's share of the temperature's gradient is that of its rows with "reference",
    and that of its features with the other backends.
    backend: "reference", "triton" (CUDA), "cpu" or None (chooses).

    Raises ValueError for other shapes, dtypes, devices or temperatures, TypeError for what is not a tensor or a number.
    """
    _check(z1, z2, temperature)
    if z1.shape[0] == 0:
        zero = z1.sum() + z2.sum() + (0 * temperature if isinstance(temperature, Tensor) else 0)  # no rows, but a gradient
        return zero.to(torch.promote_types(z1.dtype, torch.float32))
    group = None if group is None or group.size() == 1 else group
    match dispatch.choose("info_nce", backend, dispatch.order(BACKENDS, z1.device), z1, z2):
        case "reference":
            dtype = torch.promote_types(z1.dtype, torch.float32)
            rows1, rows2 = (F.normalize(z.to(dtype), dim=-1) for z in (z1, z2))
            if group is None:
                return info_nce_reference(rows1, rows2, rows1, rows2, 0, temperature)
            columns1, columns2 = (_AllGather.apply(z, group) for z in (rows1, rows2))
            return info_nce_reference(rows1, rows2, columns1, columns2, group.rank() * z1.shape[0], temperature)
        case name:
            z2 = z2.view_as(z2) if z2 is z1 else z2  # dynamo refuses a Function that gets one tensor twice
            return _InfoNCE.apply(z1, z2, temperature, group, name)


@full_precision
def info_nce_reference(rows1, rows2, columns1, columns2, offset=0, temperature: float | Tensor = 0.2) -> Tensor:
    """The definition, on unit features: rows [m, d] are columns offset…offset + m of [n, d]."""
    m, n = rows1.shape[0], columns1.shape[0]
    me = torch.arange(offset, offset + m, device=rows1.device)
    columns = torch.cat([columns1, columns2])
    loss = 0.0
    for rows, itself, partner in ((rows1, me, me + n), (rows2, me + n, me)):
        scores = (rows @ columns.T / temperature).scatter(1, itself[:, None], -math.inf)  # [m, 2n]
        loss = loss + F.cross_entropy(scores, partner)
    return loss


class _AllGather(torch.autograd.Function):
    """[m, d] of each rank → [ranks·m, d]; the gradient is summed over ranks and each keeps its part."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.rows = group, x.shape[0]
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx, *grad_outputs):
        grad = grad_outputs[0].clone(memory_format=torch.contiguous_format)  # summed in place below
        dist.all_reduce(grad, group=ctx.group)  # gloo has no reduce-scatter
        start = ctx.group.rank() * ctx.rows
        return grad[start : start + ctx.rows], None


def _all_gather(x, group):
    """[m, ...] of each rank → [ranks·m, ...]."""
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(out, x.contiguous(), group=group)
    return out


def _all_gather_rows(tensors, group):
    """Tensors [m, …] of each rank → each [ranks·m, …], sent as one."""
    parts = [x.reshape(len(x), -1).view(torch.uint8) for x in tensors]
    whole = _all_gather(torch.cat(parts, 1), group).split([part.shape[1] for part in parts], 1)
    return [part.contiguous().view(x.dtype).view(-1, *x.shape[1:]) for part, x in zip(whole, tensors, strict=True)]


class _InfoNCE(torch.autograd.Function):
    """A backend's kernels, differentiable. Saves the features, one length and one logsumexp a row, never scores.

    In a group forward gathers the features, and backward the logsumexps and the ranks' upstream gradients. Scores are
    symmetric, so a rank can then compute the whole gradient of its own features, and no gradients are exchanged.
    """

    @staticmethod
    def forward(ctx, z1, z2, temperature, group, backend):
        features, inverse = dispatch.overload("info_nce_pack", backend)(z1, z2)
        rows, offset = features.shape[0], 0
        if group is not None:
            offset = group.rank() * rows
            features, inverse = _all_gather_rows((features, inverse), group)
        if isinstance(temperature, Tensor):
            learned, temperature = temperature, None
            call = features, inverse, learned.detach().to(inverse.dtype), offset, rows
            loss, lse = dispatch.overload("info_nce_learned", backend)(*call)
        else:
            learned = None
            loss, lse = dispatch.overload("info_nce", backend)(features, inverse, offset, rows, temperature)
        ctx.save_for_backward(features, inverse, lse, learned, z1, z2)
        ctx.options = offset, rows, temperature, group, backend
        ctx.dtype = z1.dtype
        return loss

    @staticmethod
    @once_differentiable("info_nce")
    def backward(ctx, saved, grad):
        features, inverse, lse, learned, *_z = saved
        offset, rows, temperature, group, backend = ctx.options
        grad = grad.reshape(1)
        if group is not None:
            lse, grad = _all_gather(torch.cat([lse, grad]), group).view(group.size(), -1).split([rows, 1], 1)
            lse, grad = lse.flatten(), grad.flatten()
        call, of_temperature = (grad, features, inverse, lse), None
        if learned is None:
            dz = dispatch.overload("info_nce_backward", backend)(*call, offset, rows, temperature)
        else:
            op = dispatch.overload("info_nce_learned_backward", backend)
            dz, along = op(*call, learned.detach().to(inverse.dtype), offset, rows)
            of_temperature = (along.sum() / (-2 * learned)).to(learned.dtype)
        dz = dz.to(ctx.dtype)
        return dz[: rows // 2], dz[rows // 2 :], of_temperature, None, None


def _check(z1, z2, temperature) -> None:
    dispatch.check_tensors(z1=z1, z2=z2)
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must both be [n, d], got shapes {tuple(z1.shape)} and {tuple(z2.shape)}")
    if not z1.is_floating_point() or z1.dtype != z2.dtype:
        raise ValueError(f"z1 and z2 must share one floating dtype, got {z1.dtype} and {z2.dtype}")
    if z1.device != z2.device:
        raise ValueError(f"z1 and z2 must be on one device, got {z1.device} and {z2.device}")
    if isinstance(temperature, Tensor):
        if temperature.ndim != 0 or not temperature.is_floating_point() or temperature.device != z1.device:
            raise ValueError(
                f"temperature must be a number or a 0-dimensional floating tensor on {z1.device}, "
                f"got {temperature.dtype} of shape {tuple(temperature.shape)} on {temperature.device}"
            )
        return
    dispatch.check_numbers(temperature=temperature)
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def sample_call(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dispatch.Call:
    """What a model calls in training, for eight videos: features that hold nothing."""
    z = torch.empty(8, config.head_out, dtype=dtype, device=device)
    return dispatch.Call("info_nce", dispatch.order(BACKENDS, device), (z, z))


# What a compiled backend brings. Packed: the first views, then the second views, of rank 0, of rank 1, …
#   info_nce_pack      z1, z2 [m, d] → features [2m, d] (float16 widened to float32), inverse [2m] = 1 / max(length, 1e-12)
#   info_nce           rows offset…offset + rows of features [N, d] against all of them → the mean over them, lse [rows]
#   info_nce_backward  grad [N / rows], one a rank, lse [N] → the gradient of these rows' z1 and z2, [rows, d]
# The last two exist once more for a learned temperature, a tensor of the inverses' dtype, which is never read on the host. That
# backward also returns, for each row, the product of its unit feature and the unit feature's gradient, [rows].
PACKED = "Tensor features, Tensor inverse"
ROWS = "SymInt offset, SymInt rows"  # symbolic: a changing batch compiles once


def _accumulator(dtype):
    return torch.promote_types(dtype, torch.float32)


def packed_dtype(dtype):
    """Dtype of the features in a kernel. Unlike bfloat16's, float16's range is too small for the weights of the sums."""
    return dtype if dtype == torch.bfloat16 else _accumulator(dtype)


def _fake_pack(z1, z2):
    m, d = z1.shape
    return z1.new_empty(2 * m, d, dtype=packed_dtype(z1.dtype)), z1.new_empty(2 * m, dtype=_accumulator(z1.dtype))


def _fake_forward(features, inverse, offset, rows, temperature):
    return inverse.new_empty(()), inverse.new_empty(rows)


def _fake_backward(grad, features, inverse, lse, offset, rows, temperature):
    return features.new_empty(rows, features.shape[1])


def _fake_learned(features, inverse, learned, offset, rows):
    return inverse.new_empty(()), inverse.new_empty(rows)


def _fake_learned_backward(grad, features, inverse, lse, learned, offset, rows):
    return features.new_empty(rows, features.shape[1]), inverse.new_empty(rows)


SCHEMAS = {
    "info_nce_pack": ("(Tensor z1, Tensor z2) -> (Tensor features, Tensor inverse)", _fake_pack),
    "info_nce": (f"({PACKED}, {ROWS}, float temperature) -> (Tensor loss, Tensor lse)", _fake_forward),
    "info_nce_backward": (f"(Tensor grad, {PACKED}, Tensor lse, {ROWS}, float temperature) -> Tensor", _fake_backward),
    "info_nce_learned": (f"({PACKED}, Tensor learned, {ROWS}) -> (Tensor loss, Tensor lse)", _fake_learned),
    "info_nce_learned_backward": (
        f"(Tensor grad, {PACKED}, Tensor lse, Tensor learned, {ROWS}) -> (Tensor dz, Tensor along)",
        _fake_learned_backward,
    ),
}
for _name, (_schema, _fake) in SCHEMAS.items():
    dispatch.define(_name, _schema, _fake)
dispatch.register("info_nce", "reference", dispatch.always)


CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _why_not_triton(z1, z2) -> list[str]:
    reasons = dispatch.why_not_triton(z1, dispatch.HALF_AND_SINGLE)
    if z1.shape[1] == 0:
        reasons.append("features of width 0")
    return reasons


dispatch.implement_triton("info_nce_pack", "info_nce.pack")
dispatch.implement_triton("info_nce", "info_nce.forward")
dispatch.implement_triton("info_nce_backward", "info_nce.backward")
dispatch.implement_triton("info_nce_learned", "info_nce.forward_learned")
dispatch.implement_triton("info_nce_learned_backward", "info_nce.backward_learned")
dispatch.register("info_nce", "triton", _why_not_triton)


def _why_not_cpu(z1, z2) -> list[str]:
    reasons = dispatch.why_not_library(z1, "cpu", CPU_DTYPES)
    if z1.shape[1] == 0:
        reasons.append("features of width 0")
    return reasons


for _name in SCHEMAS:
    dispatch.implement_library(_name, "cpu")
dispatch.register("info_nce", "cpu", _why_not_cpu)
