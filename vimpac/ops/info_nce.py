"""InfoNCE over two views of n videos, both directions (Eq. 4, 5, 19, 20).

    z1, z2 [n, d] → loss = mean_i ℓ(z1_i → z2_i) + mean_i ℓ(z2_i → z1_i)
    ℓ(a → b) = logsumexp over all 2n - 1 other features x of (a·x / γ) - a·b / γ        features normalised to length 1

Written on unit features with local rows against all columns, so that the ranks of a process group share the work: rank r
holds rows offset…offset + m of n. Each rank returns the mean over its own rows. The mean over ranks is Eq. 5, and the
gradient that DistributedDataParallel averages is the gradient of Eq. 5 over the whole batch.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vimpac.ops import backend as backends


@backends.full_precision
def info_nce(
    z1: Tensor,
    z2: Tensor,
    temperature: float = 0.2,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Contrastive loss of paired features (Eq. 5), a float32 scalar (float64 for float64 features).

    z1, z2 [n, d] floating: features of the first and second clip of n videos, any length (they are normalised here).
    temperature: γ > 0. group: gather the features of its ranks, each with the same n, as further negatives; the result is
    then the mean over this rank's rows, whose mean over ranks is Eq. 5.

    Raises ValueError for other shapes, dtypes, devices or temperatures.
    """
    _check(z1, z2, temperature)
    if z1.shape[0] == 0:
        return (z1.sum() + z2.sum()).to(torch.promote_types(z1.dtype, torch.float32))  # no rows: zero, with a gradient
    dtype = torch.promote_types(z1.dtype, torch.float32)
    rows = [F.normalize(z.to(dtype), dim=-1).contiguous() for z in (z1, z2)]  # kernels see contiguous features only
    columns, offset = rows, 0
    if group is not None and group.size() > 1:
        columns, offset = [_AllGather.apply(z, group) for z in rows], group.rank() * z1.shape[0]
    call = (*rows, *columns, offset, temperature)
    match backends.choose("info_nce", backend, ("cuda", "triton", "cpu", "reference"), *call):
        case "reference":
            return info_nce_reference(*call)
        case name:
            # views: dynamo refuses a Function that gets one tensor twice
            return _InfoNCE.apply(*rows, *(x.view_as(x) for x in columns), offset, temperature, name)


@backends.full_precision
def info_nce_reference(rows1, rows2, columns1, columns2, offset=0, temperature=0.2) -> Tensor:
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
        out = x.new_empty(group.size() * x.shape[0], x.shape[1])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # summed in place below
        dist.all_reduce(grad, group=ctx.group)  # gloo has no reduce-scatter
        start = ctx.group.rank() * ctx.rows
        return grad[start : start + ctx.rows], None


class _InfoNCE(torch.autograd.Function):
    """A backend's kernels, differentiable. Saves the features and one logsumexp a row, never scores."""

    @staticmethod
    def forward(ctx, rows1, rows2, columns1, columns2, offset, temperature, backend):
        loss, lse = backends.overload("info_nce", backend)(rows1, rows2, columns1, columns2, offset, temperature)
        ctx.save_for_backward(rows1, rows2, columns1, columns2, lse)
        ctx.options = offset, temperature, backend
        return loss

    @staticmethod
    def backward(ctx, grad):
        offset, temperature, backend = ctx.options
        op = backends.overload("info_nce_backward", backend)
        return *op(grad, *ctx.saved_tensors, offset, temperature), None, None, None


def _check(z1, z2, temperature) -> None:
    if z1.ndim != 2 or z1.shape != z2.shape:
        raise ValueError(f"z1 and z2 must both be [n, d], got shapes {tuple(z1.shape)} and {tuple(z2.shape)}")
    if not z1.is_floating_point() or z1.dtype != z2.dtype:
        raise ValueError(f"z1 and z2 must share one floating dtype, got {z1.dtype} and {z2.dtype}")
    if z1.device != z2.device:
        raise ValueError(f"z1 and z2 must be on one device, got {z1.device} and {z2.device}")
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


FEATURES = "Tensor rows1, Tensor rows2, Tensor columns1, Tensor columns2"


def _fake_forward(rows1, rows2, columns1, columns2, offset, temperature):
    return rows1.new_empty(()), rows1.new_empty(2, rows1.shape[0])


def _fake_backward(grad, rows1, rows2, columns1, columns2, lse, offset, temperature):
    return tuple(torch.empty_like(x) for x in (rows1, rows2, columns1, columns2))


backends.define("info_nce", f"({FEATURES}, int offset, float temperature) -> (Tensor loss, Tensor lse)", _fake_forward)
backends.define(
    "info_nce_backward",
    f"(Tensor grad, {FEATURES}, Tensor lse, int offset, float temperature) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)
backends.register("info_nce", "reference", backends.always)
