"""The two tasks' losses on a model's outputs (Eq. 1, 5, 6), written with the ops. Each spans the ranks of a process group
so that the mean over ranks, which is what DistributedDataParallel averages, is the loss of the whole batch."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from vimpac.model import PretrainModel
from vimpac.ops import BlockMask, info_nce, masked_cross_entropy

ROWS = (
    256  # the token head runs on a multiple of this: oneDNN keeps megabytes for every shape it meets, and shapes would not end
)


def mask_loss(model: PretrainModel, hidden: Tensor, tokens: Tensor, masked: BlockMask) -> tuple[Tensor, Tensor]:
    """Eq. 1 and the accuracy on masked tokens, over all ranks' masked tokens.

    hidden [B, T, H, W, C]: last hidden states of masked.tokens. tokens [B, T, H, W]: the ids before masking.
    """
    head, count = model.token_head, int(masked.counts.sum())
    indices = masked.indices[: math.ceil(count / ROWS) * ROWS]
    rows, filler = indices.clamp(min=0), indices < 0
    target = tokens.flatten()[rows].masked_fill(filler, -1)  # a row with a negative target does not count
    loss, accuracy = masked_cross_entropy(head.transform(hidden.flatten(0, 3)[rows]), head.decoder, head.bias, target)
    weight = _share_of_rows(count, loss)
    return loss * weight, accuracy * weight


def contrastive_loss(model: PretrainModel, cls: Tensor, temperature: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """Eq. 5 on [CLS] states [2n, C], all first clips, then all second clips; negatives from all ranks of the group."""
    return info_nce(*model.cls_head(cls).chunk(2), temperature, group)


def _share_of_rows(rows: int, like: Tensor) -> Tensor | float:
    """ranks · rows / rows of all ranks: turns a mean over this rank's rows into this rank's part of the mean over all."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return 1.0
    total = torch.tensor(float(rows), device=like.device)
    dist.all_reduce(total)
    return dist.get_world_size() * rows / total.clamp(min=1)
