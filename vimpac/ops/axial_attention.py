"""Axial attention with a shared [CLS] (Eq. 9, 11-13, 15).

    qkv [B, T, H, W, 3, N, D], cls_qkv [B, 3, N, D] → out [B, T, H, W, N, D], cls_out [B, N, D]

Heads are split evenly over `axes`; a group of heads attends along its axis. On each line of the axis the keys are the
line's tokens and [CLS], and so are the queries:

    out[line] = dropout(softmax(q kᵀ / √D)) v          cls_out = mean over lines of [CLS]'s output on the line

With `cls_in_context=False` the keys are the line's tokens only: tokens attend to the tokens of their line and not to [CLS], and
[CLS] attends to the line's tokens and not to itself. Its output is the mean over lines as before, taken before the output
projection.

PAD positions are never keys. A line without any key gives zeros. The values at a PAD position affect its own output only: its
key and value do not count, and a query that is not finite counts as zeros. So NaN at PAD reaches no other position, forward
or backward.

Dropout is a function of (seed, element). A row of probabilities belongs to query token r (raster index over B, T, H, W;
for [CLS] the line's first token) and head n. Its key k (tokens in line order, [CLS] last) reads 16 bits of

    philox4x32-7(counter = (row low, row high, call, is_cls), key = seed),  row = r·N + n

and is kept when they reach round(p·2^16). One call serves 8 keys. A row of at most 8 keys takes call 0, key k in half k % 2
of word k // 2. In longer rows it is call 4·(k // 32) + (k % 8) // 2, word (k % 32) // 8, half k % 2: exactly the elements that
one thread holds of a 32-wide row of 16×8 matrix-instruction tiles. (Seven rounds are the fewest that pass BigCrush: table 2.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vimpac.config import ModelConfig
from vimpac.dropout_rate import dropout_scale
from vimpac.layouts import axis_dimensions
from vimpac.ops import dispatch
from vimpac.ops.attention_dropout import DROPOUT_BITS, dropout_keep
from vimpac.ops.autograd import full_precision, once_differentiable
from vimpac.ops.lines import (
    from_lines,
    head_groups,
    line_pad,
    line_qkv,
    longest_line,
    pack,
    unpack,
    without_broken_padding,
)
from vimpac.ops.philox import seed_tensor
from vimpac.ops.sdpa import axial_attention_sdpa

BACKENDS = {"cuda": ("cuda", "triton", "reference"), "cpu": ("triton", "cpu", "reference")}
LONG_LINE_BACKENDS = {"cuda": ("sdpa",), "cpu": ("sdpa",)}  # torch's scaled_dot_product_attention is made for long sequences
LONGEST_LINE = 64  # tokens of a line that the kernels take
CPU_AXES, CUDA_AXES = 16, 32  # the most that the libraries take


class AttentionCall(NamedTuple):
    """The checked arguments of every implementation, in the order of the torch op's schema."""

    qkv: Tensor
    cls_qkv: Tensor
    axes: tuple[str, ...]
    pad: Tensor | None
    dropout_p: float
    seed: Tensor | None
    cls_in_context: bool


@full_precision
def axial_attention(
    qkv: Tensor,
    cls_qkv: Tensor,
    axes: Sequence[str],
    pad: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    cls_in_context: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention along axes of a token grid with a [CLS] shared by all lines (Eq. 9, 11-13, 15).

    qkv [B, T, H, W, 3, N, D] and cls_qkv [B, 3, N, D]: queries, keys, values, floating, one dtype, last dimension contiguous.
    axes: one per head group, each "T", "H", "W" or a product such as "HxW". N must be divisible by the number of axes.
    pad [B, T, H, W] bool: True at padding, which is never a key. As a query it is like any other, but if NaN or infinite it
    counts as zeros.
    dropout_p in [0, 1): dropout of the attention probabilities, rounded to a multiple of 2^-16. Above 0 it needs `seed`, an
    int or a 0-dimensional int64 tensor.
    cls_in_context: False takes [CLS] out of the keys.
    backend: "reference", "sdpa", "triton", "cuda" (both CUDA), "cpu" or None (chooses). "sdpa" draws its dropout from torch's
    own generator instead of `seed`.

    Returns out [B, T, H, W, N, D] and cls_out [B, N, D] in qkv's dtype. Raises TypeError for what is not a tensor or a number,
    ValueError for anything else.
    """
    call = checked_call(qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context)
    match dispatch.choose("axial_attention", backend, backends_of(call), call):
        case "reference":
            return axial_attention_reference(*call)
        case "sdpa":
            return axial_attention_sdpa(*call)
        case name:
            return unpack(_AxialAttention.apply(name, *call), qkv.shape[:4])


@full_precision
def axial_attention_packed(
    qkv: Tensor,
    grid: tuple[int, int, int],
    axes: Sequence[str],
    pad: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    cls_in_context: bool = True,
    backend: str | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`axial_attention` on rows: qkv [B·T·H·W + B, 3, N, D] → [B·T·H·W + B, N, D]. grid is (T, H, W).

    Rows are the tokens in raster order, then the B [CLS] rows. So every linear layer and norm of the model has one matrix, and
    nothing is concatenated around the op, forward or backward.

    bias [3·N·D]: the bias of the linear layer that made qkv, to which it was added as a constant (`bias.detach()`). It gets its
    gradient here, the sum over rows of that of qkv, from the kernel that has the rows at hand. That of the keys is exactly 0:
    a constant added to all keys changes no softmax.
    """
    dispatch.check_tensors(qkv=qkv, **({} if bias is None else {"bias": bias}))
    if len(grid) != 3:
        raise ValueError(f"grid must be (T, H, W), got {grid!r}")
    dispatch.check_numbers(T=grid[0], H=grid[1], W=grid[2])
    rows = math.prod(grid) + 1  # of one clip
    if qkv.shape[0] % rows:
        raise ValueError(f"qkv has {qkv.shape[0]} rows, not a multiple of T·H·W + 1 = {rows} for {grid=}")
    batch = (qkv.shape[0] // rows, *grid)
    call = checked_call(*unpack(qkv, batch), axes, pad, dropout_p, seed, cls_in_context)
    width = math.prod(qkv.shape[1:])
    if bias is not None and (bias.shape != (width,) or not bias.is_floating_point() or bias.device != qkv.device):
        raise ValueError(
            f"bias must be floating [3·N·D] = [{width}] on {qkv.device}, "
            f"got {bias.dtype} of shape {tuple(bias.shape)} on {bias.device}"
        )
    match dispatch.choose("axial_attention", backend, backends_of(call), call):
        case "reference" | "sdpa" as name:
            attend = axial_attention_reference if name == "reference" else axial_attention_sdpa
            if bias is not None:  # adds 0, and so passes on the gradient
                rows = qkv + (bias - bias.detach()).view(qkv.shape[1:]).to(qkv.dtype)
                call = AttentionCall(*unpack(rows, batch), *call[2:])
            return pack(*attend(*call))
        case name:
            return _AxialAttentionPacked.apply(name, qkv, bias, batch, *call[2:])


@full_precision
def axial_attention_reference(qkv, cls_qkv, axes, pad=None, dropout_p=0.0, seed=None, cls_in_context=True):
    """The definition, in plain float32 (float64 stays float64)."""
    dtype, outs, cls_outs = qkv.dtype, [], []
    qkv = without_broken_padding(qkv, pad)
    qkv, cls_qkv = (x.to(torch.promote_types(dtype, torch.float32)) for x in (qkv, cls_qkv))
    for heads, axis in head_groups(qkv.shape[5], axes):
        q, k, v = line_qkv(qkv, cls_qkv, heads, axis)  # [B, S, n, L + 1, D]: S lines of L tokens, then [CLS]
        L = q.shape[3] - 1
        no_key = line_pad(pad, axis, q)[..., : L + cls_in_context]  # [B, S, 1, 1, K]
        k, v = k[..., : L + cls_in_context, :], v[..., : L + cls_in_context, :]
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(no_key, -math.inf)  # [B, S, n, L + 1, K]
        probs = scores.softmax(-1).masked_fill(no_key, 0.0)  # the softmax of no keys at all is NaN
        if dropout_p > 0:
            assert seed is not None
            keep = dropout_keep(seed, dropout_p, qkv.shape, heads, axis, k.shape[3])
            probs = probs * keep * dropout_scale(dropout_p, DROPOUT_BITS)
        out = probs @ v
        outs.append(from_lines(out[..., :L, :], axis, qkv.shape[:4]))
        cls_outs.append(out[..., L, :].mean(1))
    return torch.cat(outs, 4).to(dtype), torch.cat(cls_outs, 1).to(dtype)


# --- arguments, backends ----------------------------------------------------------------------------------------------


def checked_call(qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context) -> AttentionCall:
    """The call, or ValueError or TypeError if no backend could run it. Reads no device memory."""
    dispatch.check_tensors(qkv=qkv, cls_qkv=cls_qkv, **({} if pad is None else {"pad": pad}))
    if qkv.ndim != 7 or qkv.shape[4] != 3:
        raise ValueError(f"qkv must be [B, T, H, W, 3, N, D], got shape {tuple(qkv.shape)}")
    B, T, H, W, _, N, D = qkv.shape
    if tuple(cls_qkv.shape) != (B, 3, N, D):
        raise ValueError(f"cls_qkv must be [B, 3, N, D] = {(B, 3, N, D)}, got shape {tuple(cls_qkv.shape)}")
    if not qkv.is_floating_point() or cls_qkv.dtype != qkv.dtype:
        raise ValueError(f"qkv and cls_qkv must share one floating dtype, got {qkv.dtype} and {cls_qkv.dtype}")
    if cls_qkv.device != qkv.device:
        raise ValueError(f"qkv and cls_qkv must be on one device, got {qkv.device} and {cls_qkv.device}")
    if 0 in (T, H, W, N, D):
        raise ValueError(f"T, H, W, N and D must be at least 1, got qkv of shape {tuple(qkv.shape)}")
    if D > 1 and (qkv.stride(-1) != 1 or cls_qkv.stride(-1) != 1):
        raise ValueError(f"the last dimension must be contiguous (stride 1), got strides {qkv.stride()} and {cls_qkv.stride()}")
    if isinstance(axes, str):
        raise ValueError(f"axes must be a sequence with one axis per head group such as ('H', 'W'), got {axes!r}")
    axes = tuple(axes)
    for axis in axes:
        axis_dimensions(axis)
    if not axes or N % len(axes):
        raise ValueError(f"{N} heads cannot be split evenly over {len(axes)} axes {axes}")
    if pad is not None and (tuple(pad.shape) != (B, T, H, W) or pad.dtype != torch.bool or pad.device != qkv.device):
        raise ValueError(
            f"pad must be bool [B, T, H, W] = {(B, T, H, W)} on {qkv.device}, "
            f"got {pad.dtype} of shape {tuple(pad.shape)} on {pad.device}"
        )
    dispatch.check_numbers(dropout_p=dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError(f"dropout_p={dropout_p} needs a seed: an int or a 0-dimensional int64 tensor")
    seed = seed_tensor(seed, qkv.device) if dropout_p > 0 else None
    return AttentionCall(qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context)


def has_long_lines(axes: Sequence[str], shape: Sequence[int]) -> bool:
    """Whether the kernels cannot run an axis: a product of axes, or lines of more than 64 tokens."""
    return longest_line(axes, shape) > LONGEST_LINE or any("x" in axis for axis in axes)


def draws_from_generator(axes: Sequence[str], shape: Sequence[int]) -> bool:
    """Whether dropout comes from torch's generator, as in `sdpa`, so that a second call drops other probabilities."""
    return has_long_lines(axes, shape) or dispatch.named_by_environment("axial_attention") == "sdpa"


def backends_of(call: AttentionCall) -> tuple[str, ...]:
    """The backends to try, fastest first."""
    row = LONG_LINE_BACKENDS if has_long_lines(call.axes, call.qkv.shape) else BACKENDS
    return dispatch.order(row, call.qkv.device)


def sample_call(config: ModelConfig, axes: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> dispatch.Call:
    """What a model calls in training, for one clip: tensors that hold nothing."""
    T, H, W = config.grid
    qkv = torch.empty(1, T, H, W, 3, config.heads, config.key_width // config.heads, dtype=dtype, device=device)
    seed = torch.zeros((), dtype=torch.int64, device=device) if config.dropout > 0 else None
    call = AttentionCall(qkv, qkv[:, 0, 0, 0], axes, None, config.dropout, seed, config.cls_in_context)
    return dispatch.Call("axial_attention", backends_of(call), (call,))


ARGUMENTS = "Tensor qkv, Tensor cls_qkv, str[] axes, Tensor? pad, float dropout_p, Tensor? seed, bool cls_in_context"


def _fake_forward(qkv, *_options):
    B, T, H, W, _, N, D = qkv.shape
    return qkv.new_empty(B * T * H * W + B, N, D)


def _fake_backward(grad, qkv, *_options):
    B, T, H, W, _, N, D = qkv.shape
    sums = qkv.new_empty(3, N, D, dtype=torch.promote_types(qkv.dtype, torch.float32))
    return qkv.new_empty(B * T * H * W + B, 3, N, D), sums


# Kernels return packed rows, so that the model's next linear layer reads them in place. Backward also returns the sum over rows
# of the gradients of queries, keys (0) and values, [3, N, D] in the dtype of sums.
SCHEMAS = {
    "axial_attention": (f"({ARGUMENTS}) -> Tensor", _fake_forward),
    "axial_attention_backward": (f"(Tensor grad, {ARGUMENTS}) -> (Tensor, Tensor)", _fake_backward),
}
for _name, (_schema, _fake) in SCHEMAS.items():
    dispatch.define(_name, _schema, _fake)
dispatch.register("axial_attention", "reference", dispatch.always)
dispatch.register("axial_attention", "sdpa", dispatch.always)


# Item size, head width → bytes of shared memory that a block takes, on lines of more than 32 tokens. All else takes at most
# 96 KB, and the smallest GPU has 99.
TRITON_SHARED = {(2, 128): 135168, (4, 64): 131072, (4, 128): 245760}
TRITON_SHARED_PADDED = {(4, 128): 147456}  # and on lines of 17 to 32 tokens, where there is PAD


def _why_not_triton(call: AttentionCall) -> list[str]:
    qkv, axes = call.qkv, call.axes
    reasons = dispatch.why_not_triton(qkv, dispatch.HALF_AND_SINGLE)
    if has_long_lines(axes, qkv.shape):
        reasons.append(f"axes {axes} of grid {tuple(qkv.shape[1:4])}, it takes lines of at most {LONGEST_LINE} tokens")
    if qkv.shape[6] > 128:
        reasons.append(f"head width {qkv.shape[6]}, it takes at most 128")
    longest = longest_line(axes, qkv.shape)
    if longest > 16 and qkv.shape[6] > 32 and qkv.device.type == "cuda":
        shorter, table = (32, TRITON_SHARED) if longest > 32 else (16, {} if call.pad is None else TRITON_SHARED_PADDED)
        needed = table.get((qkv.itemsize, 64 if qkv.shape[6] <= 64 else 128), 0)
        if needed > (has := dispatch.shared_memory(qkv.device)):
            reasons.append(
                f"lines of more than {shorter} tokens, head width {qkv.shape[6]}, {qkv.dtype}: backward takes {needed} bytes "
                f"of shared memory, {qkv.device} has {has}"
            )
    if qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu":
        reasons.append("bfloat16 in Triton's interpreter, which multiplies it wrongly")
    return reasons


dispatch.implement_triton("axial_attention", "axial_attention.forward")
dispatch.implement_triton("axial_attention_backward", "axial_attention.backward")
dispatch.register("axial_attention", "triton", _why_not_triton)


CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _why_not_cpu(call: AttentionCall) -> list[str]:
    qkv, axes = call.qkv, call.axes
    reasons = dispatch.why_not_library(qkv, "cpu", CPU_DTYPES)
    if has_long_lines(axes, qkv.shape):
        reasons.append(f"axes {axes} of grid {tuple(qkv.shape[1:4])}, it takes lines of at most {LONGEST_LINE} tokens")
    if len(axes) > CPU_AXES:
        reasons.append(f"{len(axes)} axes, it takes at most {CPU_AXES}")
    if math.prod(qkv.shape[1:4]) > 2**30:
        reasons.append(f"a clip of {math.prod(qkv.shape[1:4])} tokens, it takes up to 2^30")
    return reasons


CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_LINE, CUDA_WIDTHS = 32, (32, 64)


def _why_not_cuda(call: AttentionCall) -> list[str]:
    qkv, cls_qkv, axes = call[:3]
    reasons = dispatch.why_not_library(qkv, "cuda", CUDA_DTYPES)
    if any("x" in axis for axis in axes) or longest_line(axes, qkv.shape) > CUDA_LINE:
        reasons.append(f"axes {axes} of grid {tuple(qkv.shape[1:4])}, it takes lines of at most {CUDA_LINE} tokens")
    if len(axes) > CUDA_AXES:
        reasons.append(f"{len(axes)} axes, it takes at most {CUDA_AXES}")
    if qkv.shape[6] not in CUDA_WIDTHS:
        reasons.append(f"head width {qkv.shape[6]}, it takes {' and '.join(map(str, CUDA_WIDTHS))}")
    if not all(map(_in_wide_pieces, (qkv, cls_qkv))):
        reasons.append(f"strides {qkv.stride()} and {cls_qkv.stride()}, it reads 8 elements at a time")
    T, H, W, _, N, D = qkv.shape[1:]
    if sum([(qkv.shape[d] - 1) * qkv.stride(d) for d in (1, 2, 3)]) >= 2**34 - 8 or 3 * T * H * W * N * D >= 2**34 - 8:
        reasons.append(
            f"a clip of {tuple(qkv.shape[1:])} and strides {qkv.stride()}, it takes clips that span up to 2^34 elements"
        )
    return reasons


def _in_wide_pieces(x: Tensor) -> bool:
    """Whether every row starts at a multiple of 8 elements from the first one."""
    return all([s % 8 == 0 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1])


for _name in SCHEMAS:
    dispatch.implement_library(_name, "cpu")
    dispatch.implement_library(_name, "cuda")
dispatch.register("axial_attention", "cpu", _why_not_cpu)
dispatch.register("axial_attention", "cuda", _why_not_cuda)


class _AxialAttention(torch.autograd.Function):
    """A backend's kernels, differentiable. Saves only the inputs: the probabilities are recomputed in backward."""

    @staticmethod
    def forward(ctx, backend, *arguments):
        call = AttentionCall(*arguments)
        ctx.save_for_backward(call.qkv, call.cls_qkv, call.pad, call.seed)
        ctx.options = backend, call.axes, call.dropout_p, call.cls_in_context
        return dispatch.overload("axial_attention", backend)(*call)

    @staticmethod
    @once_differentiable("axial_attention")
    def backward(ctx, saved, grad):
        qkv, cls_qkv, pad, seed = saved
        backend, axes, dropout_p, cls_in_context = ctx.options
        call = AttentionCall(qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context)
        packed, _ = dispatch.overload("axial_attention_backward", backend)(grad.contiguous(), *call)
        return None, *unpack(packed, qkv.shape[:4]), *[None] * 5


class _AxialAttentionPacked(torch.autograd.Function):
    """The same on packed rows: neither the inputs nor their gradients are ever split into copies or concatenated."""

    @staticmethod
    def forward(ctx, backend, rows, bias, grid, *options):
        call = AttentionCall(*unpack(rows, grid), *options)
        ctx.save_for_backward(rows, call.pad, call.seed)
        bias_dtype = None if bias is None else bias.dtype
        ctx.options = backend, grid, call.axes, call.dropout_p, call.cls_in_context, bias_dtype
        return dispatch.overload("axial_attention", backend)(*call)

    @staticmethod
    @once_differentiable("axial_attention")
    def backward(ctx, saved, grad):
        rows, pad, seed = saved
        backend, grid, axes, dropout_p, cls_in_context, bias_dtype = ctx.options
        call = AttentionCall(*unpack(rows, grid), axes, pad, dropout_p, seed, cls_in_context)
        packed, sums = dispatch.overload("axial_attention_backward", backend)(grad.contiguous(), *call)
        return None, packed, None if bias_dtype is None else sums.flatten().to(bias_dtype), *[None] * 6
