"""What a forward pass reads: clips, their masks, and the rows for the token head.

Masks are functions of (seed, sample id), the same bits on every device. The number of rows is a shape, which the host must know
without asking the device. Where the host draws the masks, it counts the masked tokens and rounds up. Where the device draws
them, the number of rows is fixed: enough for nearly every batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vimpac.model.masking import Masking
from vimpac.ops import BlockMask

# The token head's number of rows is a multiple of this: oneDNN keeps megabytes for every shape, so there must be few shapes.
ROWS = 256


class Batch(NamedTuple):
    """Clips of n videos, all first clips, then all second clips. Fields that no task needs are None."""

    tokens: Tensor  # [2n, T, H, W] integer: the ids
    masked: Tensor | None  # [2n, T, H, W]: with MASK (or noise) at masked positions
    rows: Tensor | None  # [M] int64: raster indices of the masked positions, then filler
    targets: Tensor | None  # [M] int64: the ids there, then -1
    share: Tensor | None  # [] float32: weight of this batch's mean mask loss; 1 unless it is part of a larger batch
    masked_count: int | Tensor  # masked positions among the rows; [] int64 where the device drew the masks
    sample_ids: Tensor | None = None  # [2n] int64: what the device is to draw the masks from, until it has


class LabelledBatch(NamedTuple):
    """Clips of n videos and their labels."""

    tokens: Tensor  # [n, T, H, W] integer: the ids
    labels: Tensor  # [n] int64


AnyBatch = TypeVar("AnyBatch", Batch, LabelledBatch)


def map_tensors(batch: AnyBatch, f: Callable[[Tensor], Tensor]) -> AnyBatch:
    """The batch with f applied to every tensor."""
    return batch._replace(**{name: f(x) for name, x in batch._asdict().items() if isinstance(x, Tensor)})


def tensors_of(batch: Batch | LabelledBatch) -> list[Tensor]:
    return [x for x in batch if isinstance(x, Tensor)]


def pack(tokens: Tensor, masked: BlockMask, multiple: int = ROWS) -> Batch:
    """A batch of masked clips. multiple: M is rounded up to it. For CPU tensors: it reads the number of masked positions."""
    count = int(masked.counts.sum())
    return fill_rows(tokens, masked, math.ceil(count / multiple) * multiple, count)


def row_capacity(masking: Masking, clips: int) -> int:
    """Rows of the token head for so many clips whose masks the device draws.

    Mean plus six standard deviations of the number of masked tokens (clips are independent), rounded up to ROWS. PAD only makes
    the number smaller.
    """
    tokens = clips * math.prod(masking.grid)
    most = tokens * masking.expected_share + 6 * math.sqrt(clips * masking.count_variance)
    return min(math.ceil(most / ROWS) * ROWS, tokens)


def fill_rows(tokens: Tensor, masked: BlockMask, length: int, count: int | Tensor) -> Batch:
    """A batch with the first `length` masked positions, then filler. count: masked positions among the rows."""
    indices = masked.indices[:length]
    indices = F.pad(indices, (0, length - len(indices)), value=-1)  # if M exceeds the number of tokens
    filler = indices < 0
    # Each filler reads a different row: on a GPU, gradients of the same row are added one after another.
    rows = torch.where(filler, torch.arange(length, device=indices.device) % tokens.numel(), indices)
    targets = tokens.flatten()[rows].long().masked_fill(filler, -1)
    return Batch(tokens, masked.tokens, rows, targets, torch.ones((), device=tokens.device), count)
