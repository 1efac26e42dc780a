"""Lines of a token grid: the rows that axial attention runs along, their queries, keys and values, and packed rows.

An axis ("T", "H", "W" or a product such as "HxW") cuts the grid into S lines of L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vimpac.layouts import axis_dimensions


def to_lines(x: Tensor, axis: str) -> Tensor:
    """[B, T, H, W, ...] → [B, S, L, ...]: S lines of L tokens along the axis."""
    dims = axis_dimensions(axis)
    rest = [d for d in (1, 2, 3) if d not in dims]
    x = x.permute(0, *rest, *dims, *range(4, x.ndim))
    return x.flatten(1 + len(rest), 3).flatten(1, len(rest)) if rest else x.flatten(1, 3).unsqueeze(1)


def from_lines(x: Tensor, axis: str, grid: Sequence[int]) -> Tensor:
    """[B, S, n, L, D] → [B, T, H, W, n, D]; grid is (B, T, H, W)."""
    dims = axis_dimensions(axis)
    order = [*(d for d in (1, 2, 3) if d not in dims), *dims]
    x = x.transpose(2, 3).reshape(x.shape[0], *(grid[d] for d in order), x.shape[2], x.shape[4])
    return x.permute(0, *(1 + order.index(d) for d in (1, 2, 3)), 4, 5)


def longest_line(axes: Sequence[str], shape: Sequence[int]) -> int:
    """Tokens on a line of the axis with the longest ones, for a shape [B, T, H, W, ...]."""
    return max([math.prod([shape[d] for d in axis_dimensions(axis)]) for axis in axes])  # lists: dynamo takes no generators


def head_groups(heads: int, axes: Sequence[str]) -> list[tuple[slice, str]]:
    """The heads of each axis: equal runs, in order."""
    n = heads // len(axes)
    return [(slice(i * n, (i + 1) * n), axis) for i, axis in enumerate(axes)]


def line_qkv(qkv: Tensor, cls_qkv: Tensor, heads: slice, axis: str) -> tuple[Tensor, ...]:
    """q, k, v [B, S, n, L + 1, D] of some heads on every line, [CLS] last."""
    lines = to_lines(qkv[..., heads, :], axis)  # [B, S, L, 3, n, D]
    cls = cls_qkv[:, None, None, :, heads].expand(-1, lines.shape[1], -1, -1, -1, -1)
    return torch.cat([lines, cls], 2).permute(3, 0, 1, 4, 2, 5).unbind(0)


def line_pad(pad: Tensor | None, axis: str, q: Tensor) -> Tensor:
    """Positions that are no keys, [B, S, 1, 1, L + 1] bool. [CLS], the last one, always is a key."""
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
    """Tokens [B, T, H, W, ...] and [CLS] [B, ...] → rows [B·T·H·W + B, ...]."""
    return torch.cat([tokens.flatten(0, 3), cls])
