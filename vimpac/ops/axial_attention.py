"""Axial attention with a shared [CLS] (Eq. 9, 11-13, 15).

    qkv [B, T, H, W, 3, N, D], cls_qkv [B, 3, N, D] → out [B, T, H, W, N, D], cls_out [B, N, D]

Heads are split evenly over `axes`; a group of heads attends along its axis. On each line of the axis the keys are the
line's tokens and [CLS], and so are the queries:

    out[line] = dropout(softmax(q kᵀ / √D)) v          cls_out = mean over lines of [CLS]'s output on the line

With `cls_in_context=False` (Eq. 12-15 read literally) the keys are the line's tokens only. PAD positions are never keys; a
line left without any key gives zeros. What stands at a PAD position reaches its own output only: its key and value do not
count, and its query counts as zeros where that is not finite. So NaN there is no one else's NaN, forward or backward.

Dropout is a function of (seed, element). A row of probabilities belongs to query token r (raster index over B, T, H, W;
for [CLS] the line's first token) and head n. Its key k (tokens in line order, [CLS] last) reads 16 bits of

    philox4x32-7(counter = (row low, row high, call, is_cls), key = seed),  row = r·N + n

and is kept when they reach round(p·2^16). One call serves 8 keys. A row of at most 8 keys takes call 0, key k in half k % 2
of word k // 2. In longer rows call 4·(k // 32) + (k % 8) // 2, word (k % 32) // 8, half k % 2: just the elements that one
thread holds of a 32-wide row of 16×8 matrix-instruction tiles. (Seven rounds are the fewest that pass BigCrush: table 2.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vimpac.layouts import axis_dimensions
from vimpac.ops import dispatch as backends
from vimpac.ops.choice import order
from vimpac.ops.philox import philox, seed_tensor, split_words

CPU_AXES, CUDA_AXES = 16, 32  # that the libraries have room for
LONGEST_LINE = 64  # tokens; longer lines and products of axes are scaled_dot_product_attention's
DROPOUT_ROUNDS = 7


@backends.full_precision
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
    axes: one per head group, each "T", "H", "W" or a product such as "HxW"; N must divide by their number.
    pad [B, T, H, W] bool: True where the position is padding: never a key, and a query like any other unless that is NaN or
    infinite, which counts as zeros.
    dropout_p in [0, 1): dropout of the attention probabilities, rounded to a multiple of 2^-16; needs `seed`, an int or a
    0-dimensional int64 tensor. backend: "reference", "sdpa", "triton", "cuda" (both CUDA), "cpu" or None (chooses). "sdpa"
    draws its dropout from torch's own generator instead of `seed`.

    Returns out [B, T, H, W, N, D] and cls_out [B, N, D] in qkv's dtype. Raises TypeError for what is not a tensor, ValueError
    for anything else.
    """
    axes = check_arguments(qkv, cls_qkv, axes, pad, dropout_p, seed)
    seed = seed_tensor(seed, qkv.device) if dropout_p > 0 else None
    call = (qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context)
    match backends.choose("axial_attention", backend, order(table_row(axes, qkv.shape), qkv.device.type), *call):
        case "reference":
            return axial_attention_reference(*call)
        case "sdpa":
            return axial_attention_sdpa(*call)
        case name:
            packed = _AxialAttention.apply(*call, name)
            return unpack(packed, qkv.shape[:4])


@backends.full_precision
def axial_attention_packed(
    qkv: Tensor,
    grid: tuple[int, int, int],
    axes: Sequence[str],
    pad: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    cls_in_context: bool = True,
    backend: str | None = None,
) -> Tensor:
    """`axial_attention` on rows: qkv [B·T·H·W + B, 3, N, D] → [B·T·H·W + B, N, D].

    Rows are the tokens in raster order, then the B [CLS] rows: one matrix for every linear layer and norm of the model, and
    no concatenation around the op, forward or backward.
    """
    backends.check_tensors(qkv=qkv)
    rows = math.prod(grid) + 1  # of one clip
    if qkv.shape[0] % rows:
        raise ValueError(f"qkv has {qkv.shape[0]} rows, not a multiple of T·H·W + 1 = {rows} for {grid=}")
    B = qkv.shape[0] // rows
    tokens, cls = unpack(qkv, (B, *grid))
    axes = check_arguments(tokens, cls, axes, pad, dropout_p, seed)
    seed = seed_tensor(seed, qkv.device) if dropout_p > 0 else None
    call = (axes, pad, dropout_p, seed, cls_in_context)
    match backends.choose(
        "axial_attention", backend, order(table_row(axes, tokens.shape), qkv.device.type), tokens, cls, *call
    ):
        case "reference":
            return pack(*axial_attention_reference(tokens, cls, *call))
        case "sdpa":
            return pack(*axial_attention_sdpa(tokens, cls, *call))
        case name:
            return _AxialAttentionPacked.apply(qkv, (B, *grid), *call, name)


@backends.full_precision
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
            probs = probs * dropout_keep(seed, dropout_p, qkv.shape, heads, axis, k.shape[3]) * dropout_scale(dropout_p)
        out = probs @ v
        outs.append(from_lines(out[..., :L, :], axis, qkv.shape[:4]))
        cls_outs.append(out[..., L, :].mean(1))
    return torch.cat(outs, 4).to(dtype), torch.cat(cls_outs, 1).to(dtype)


def axial_attention_sdpa(qkv, cls_qkv, axes, pad=None, dropout_p=0.0, seed=None, cls_in_context=True):
    """The same through torch's scaled_dot_product_attention on transposed copies; dropout from torch's generator."""
    outs, cls_outs = [], []
    qkv = without_broken_padding(qkv, pad)
    for heads, axis in head_groups(qkv.shape[5], axes):
        q, k, v = line_qkv(qkv, cls_qkv, heads, axis)
        B, S, L = q.shape[0], q.shape[1], q.shape[3] - 1
        k, v = k[..., : L + cls_in_context, :], v[..., : L + cls_in_context, :]
        is_key = None if pad is None else ~line_pad(pad, axis, q)[..., : L + cls_in_context].flatten(0, 1)
        out = _sdpa(*(x.flatten(0, 1) for x in (q, k, v)), is_key, dropout_p).unflatten(0, (B, S))
        outs.append(from_lines(out[..., :L, :], axis, qkv.shape[:4]))
        cls_outs.append(out[..., L, :].mean(1))
    return torch.cat(outs, 4), torch.cat(cls_outs, 1)


def _sdpa(q, k, v, is_key, dropout_p):
    """In parts where a CUDA grid's dimension, which torch's kernels put the lines on, would end at 65,535."""
    with _exact_dropout(dropout_p):
        if q.device.type != "cuda" or q.shape[0] <= 65535:
            return F.scaled_dot_product_attention(q, k, v, is_key, dropout_p)
        masks = [None] * -(-q.shape[0] // 65535) if is_key is None else is_key.split(65535)
        parts = zip(q.split(65535), k.split(65535), v.split(65535), masks, strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part, dropout_p) for part in parts])


def _exact_dropout(p: float) -> AbstractContextManager:
    """Without cuDNN's attention, some of whose kernels know dropout rates of multiples of 1/16 only and round others, which
    torch 2.11 gives them all the same (pytorch pull request 174245)."""
    exact = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return nullcontext() if (16 * p).is_integer() else sdpa_kernel(exact)


def dropout_keep(seed: Tensor, p: float, shape: Sequence[int], heads: slice, axis: str, keys: int) -> Tensor:
    """Which probabilities dropout keeps, bool [B, S, n, L + 1, keys]."""
    B, T, H, W, _, N, _ = shape
    device = seed.device
    r = torch.arange(B * T * H * W, device=device).view(B, T, H, W, 1) * N + torch.arange(
        heads.start, heads.stop, device=device
    )
    r = to_lines(r, axis).transpose(2, 3)  # [B, S, n, L]
    r = torch.cat([r, r[..., :1]], -1)[..., None]  # [CLS] is named by its line's first token
    is_cls = torch.zeros(r.shape[-2], 1, dtype=torch.int64, device=device)
    is_cls[-1] = 1
    calls = torch.arange(1 if keys <= 8 else 4 * math.ceil(keys / 32), device=device)
    words = torch.stack(philox((*split_words(r), calls, is_cls), seed, DROPOUT_ROUNDS), -1)  # [B, S, n, L + 1, calls, 4]
    bits = torch.stack([words & 0xFFFF, words >> 16], -1)  # [..., calls, word, half]
    if keys > 8:  # [..., 32-key group, quarter, word, half] → key order
        bits = bits.unflatten(-3, (-1, 4)).transpose(-3, -2)
    return bits.flatten(4)[..., :keys] >= dropout_threshold(p)


def dropout_threshold(p: float) -> int:
    """The 16-bit value below which a probability is dropped; its share of 2^16 is the dropout rate in use."""
    return min(round(p * 65536), 65535)


def dropout_scale(p: float) -> float:
    """What the kept probabilities are multiplied with: 1 / (1 - the rate in use)."""
    return 65536 / (65536 - dropout_threshold(p))


# --- lines ------------------------------------------------------------------------------------------------------------


def to_lines(x: Tensor, axis: str) -> Tensor:
    """[B, T, H, W, ...] → [B, S, L, ...]: S lines of L tokens along the axis."""
    dims = axis_dimensions(axis)
    rest = [d for d in (1, 2, 3) if d not in dims]
    x = x.permute(0, *rest, *dims, *range(4, x.ndim))
    return x.flatten(1 + len(rest), 3).flatten(1, len(rest)) if rest else x.flatten(1, 3).unsqueeze(1)


def from_lines(x: Tensor, axis: str, grid: Sequence[int]) -> Tensor:
    """[B, S, n, L, D] → [B, T, H, W, n, D]."""
    dims = axis_dimensions(axis)
    order = [*(d for d in (1, 2, 3) if d not in dims), *dims]
    x = x.transpose(2, 3).reshape(x.shape[0], *(grid[d] for d in order), x.shape[2], x.shape[4])
    return x.permute(0, *(1 + order.index(d) for d in (1, 2, 3)), 4, 5)


def head_groups(heads: int, axes: Sequence[str]) -> list[tuple[slice, str]]:
    """The heads of each axis: equal runs, in order."""
    n = heads // len(axes)
    return [(slice(i * n, (i + 1) * n), axis) for i, axis in enumerate(axes)]


def line_qkv(qkv: Tensor, cls_qkv: Tensor, heads: slice, axis: str):
    """q, k, v [B, S, n, L + 1, D] of some heads on every line, [CLS] last."""
    lines = to_lines(qkv[..., heads, :], axis)  # [B, S, L, 3, n, D]
    cls = cls_qkv[:, None, None, :, heads].expand(-1, lines.shape[1], -1, -1, -1, -1)
    return torch.cat([lines, cls], 2).permute(3, 0, 1, 4, 2, 5).unbind(0)


def line_pad(pad: Tensor | None, axis: str, q: Tensor) -> Tensor:
    """Positions that are no keys, [B, S, 1, 1, L + 1] bool; [CLS], the last, always is one."""
    if pad is None:
        return torch.zeros(1, 1, 1, 1, q.shape[3], dtype=torch.bool, device=q.device)
    return F.pad(to_lines(pad, axis), (0, 1), value=False)[:, :, None, None]


def without_broken_padding(qkv: Tensor, pad: Tensor | None) -> Tensor:
    """Zeros in place of queries, keys and values at PAD positions that are not finite: 0 · NaN would reach other tokens."""
    if pad is None:
        return qkv
    return qkv.masked_fill(pad[..., None, None, None] & ~qkv.isfinite().all(-1, keepdim=True), 0.0)


def unpack(rows: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows [B·T·H·W + B, ...] as views: tokens [B, T, H, W, ...] and [CLS] [B, ...]; grid is (B, T, H, W)."""
    tokens = math.prod(grid)
    return rows[:tokens].view(*grid, *rows.shape[1:]), rows[tokens:]


def pack(tokens: Tensor, cls: Tensor) -> Tensor:
    return torch.cat([tokens.flatten(0, 3), cls])


# --- arguments, backends ----------------------------------------------------------------------------------------------


def check_arguments(qkv, cls_qkv, axes, pad, dropout_p, seed) -> tuple[str, ...]:
    """Raise ValueError for a call that no backend could run; return axes as a tuple. Reads no device memory."""
    backends.check_tensors(qkv=qkv, cls_qkv=cls_qkv, **({} if pad is None else {"pad": pad}))
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
    backends.check_numbers(dropout_p=dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if dropout_p > 0 and seed is None:
        raise ValueError(f"dropout_p={dropout_p} needs a seed: an int or a 0-dimensional int64 tensor")
    return axes


def longest_line(axes: Sequence[str], shape: Sequence[int]) -> int:
    return max([math.prod([shape[d] for d in axis_dimensions(axis)]) for axis in axes])  # lists: dynamo takes no generators


def has_long_lines(axes: Sequence[str], shape: Sequence[int]) -> bool:
    """Whether an axis is beyond the kernels: a product of axes, or lines of more than 64 tokens."""
    return longest_line(axes, shape) > LONGEST_LINE or any("x" in axis for axis in axes)


def draws_from_generator(axes: Sequence[str], shape: Sequence[int]) -> bool:
    """Whether dropout comes from torch's generator, as `sdpa` draws it, so that a second call has another one."""
    return has_long_lines(axes, shape) or backends.named_by_environment("axial_attention") == "sdpa"


def table_row(axes: Sequence[str], shape: Sequence[int]) -> str:
    """The row of choice.py's table for a call."""
    return "axial_attention on long lines" if has_long_lines(axes, shape) else "axial_attention"


ARGUMENTS = "Tensor qkv, Tensor cls_qkv, str[] axes, Tensor? pad, float dropout_p, Tensor? seed, bool cls_in_context"


def _fake_forward(qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context):
    B, T, H, W, _, N, D = qkv.shape
    return qkv.new_empty(B * T * H * W + B, N, D)


def _fake_backward(grad, qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context):
    B, T, H, W, _, N, D = qkv.shape
    return qkv.new_empty(B * T * H * W + B, 3, N, D)


# Kernels return packed rows, so that the model's next linear layer reads them in place.
SCHEMAS = {
    "axial_attention": (f"({ARGUMENTS}) -> Tensor", _fake_forward),
    "axial_attention_backward": (f"(Tensor grad, {ARGUMENTS}) -> Tensor", _fake_backward),
}
for _name, (_schema, _fake) in SCHEMAS.items():
    backends.define(_name, _schema, _fake)
backends.register("axial_attention", "reference", backends.always)
backends.register("axial_attention", "sdpa", backends.always)


# Item size, head width → bytes of shared memory that a block takes, on lines of more than 32 tokens; all else takes at most
# 96 KB, and the smallest GPU has 99.
TRITON_SHARED = {(2, 128): 135168, (4, 64): 131072, (4, 128): 245760}
TRITON_SHARED_PADDED = {(4, 128): 147456}  # and on lines of 17 to 32 tokens, where there is PAD


def _why_not_triton(qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context) -> list[str]:
    reasons = backends.why_not_triton(qkv, backends.HALF_AND_SINGLE)
    if has_long_lines(axes, qkv.shape):
        reasons.append(f"axes {axes} of grid {tuple(qkv.shape[1:4])}, it takes lines of at most {LONGEST_LINE} tokens")
    if qkv.shape[6] > 128:
        reasons.append(f"head width {qkv.shape[6]}, it takes at most 128")
    longest = longest_line(axes, qkv.shape)
    if longest > 16 and qkv.shape[6] > 32 and qkv.device.type == "cuda":
        shorter, table = (32, TRITON_SHARED) if longest > 32 else (16, {} if pad is None else TRITON_SHARED_PADDED)
        needed = table.get((qkv.itemsize, 64 if qkv.shape[6] <= 64 else 128), 0)
        if needed > (has := backends.shared_memory(qkv.device)):
            reasons.append(
                f"lines of more than {shorter} tokens, head width {qkv.shape[6]}, {qkv.dtype}: backward takes {needed} bytes "
                f"of shared memory, {qkv.device} has {has}"
            )
    if qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu":
        reasons.append("bfloat16 in Triton's interpreter, which multiplies it wrongly")
    return reasons


backends.implement_triton("axial_attention", "axial_attention.forward")
backends.implement_triton("axial_attention_backward", "axial_attention.backward")
backends.register("axial_attention", "triton", _why_not_triton)


CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def _why_not_cpu(qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context) -> list[str]:
    reasons = backends.why_not_library(qkv, "cpu", CPU_DTYPES)
    if has_long_lines(axes, qkv.shape):
        reasons.append(f"axes {axes} of grid {tuple(qkv.shape[1:4])}, it takes lines of at most {LONGEST_LINE} tokens")
    if len(axes) > CPU_AXES:
        reasons.append(f"{len(axes)} axes, it takes at most {CPU_AXES}")
    if math.prod(qkv.shape[1:4]) > 2**30:
        reasons.append(f"a clip of {math.prod(qkv.shape[1:4])} tokens, it takes up to 2^30")
    return reasons


CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_LINE, CUDA_WIDTHS = 32, (32, 64)


def _why_not_cuda(qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context) -> list[str]:
    reasons = backends.why_not_library(qkv, "cuda", CUDA_DTYPES)
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
    backends.implement_library(_name, "cpu")
    backends.implement_library(_name, "cuda")
backends.register("axial_attention", "cpu", _why_not_cpu)
backends.register("axial_attention", "cuda", _why_not_cuda)


class _AxialAttention(torch.autograd.Function):
    """A backend's kernels, differentiable. Saves only the inputs: the probabilities are recomputed in backward."""

    @staticmethod
    def forward(ctx, qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context, backend):
        ctx.save_for_backward(qkv, cls_qkv, pad, seed)
        ctx.options = axes, dropout_p, cls_in_context, backend
        return backends.overload("axial_attention", backend)(qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context)

    @staticmethod
    @backends.once_differentiable("axial_attention")
    def backward(ctx, saved, grad):
        qkv, cls_qkv, pad, seed = saved
        axes, dropout_p, cls_in_context, backend = ctx.options
        packed = backends.overload("axial_attention_backward", backend)(
            grad.contiguous(), qkv, cls_qkv, axes, pad, dropout_p, seed, cls_in_context
        )
        return *unpack(packed, qkv.shape[:4]), None, None, None, None, None, None


class _AxialAttentionPacked(torch.autograd.Function):
    """The same on packed rows: neither the inputs nor their gradients are ever split into copies or concatenated."""

    @staticmethod
    def forward(ctx, rows, grid, axes, pad, dropout_p, seed, cls_in_context, backend):
        ctx.save_for_backward(rows, pad, seed)
        ctx.options = grid, axes, dropout_p, cls_in_context, backend
        return backends.overload("axial_attention", backend)(*unpack(rows, grid), axes, pad, dropout_p, seed, cls_in_context)

    @staticmethod
    @backends.once_differentiable("axial_attention")
    def backward(ctx, saved, grad):
        rows, pad, seed = saved
        grid, axes, dropout_p, cls_in_context, backend = ctx.options
        packed = backends.overload("axial_attention_backward", backend)(
            grad.contiguous(), *unpack(rows, grid), axes, pad, dropout_p, seed, cls_in_context
        )
        return packed, None, None, None, None, None, None, None
