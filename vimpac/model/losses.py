"""The two tasks' losses on a model's outputs (Eq. 1, 5, 6), written with the ops. Each spans the ranks of a process group
so that the mean over ranks, which is what DistributedDataParallel averages, is the loss of the whole batch."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from vimpac.model import PretrainModel
from vimpac.ops import info_nce, masked_cross_entropy


def mask_loss(
    model: PretrainModel, hidden: Tensor, rows: Tensor, targets: Tensor, share: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Eq. 1 and the accuracy on masked tokens.

    hidden [B, T, H, W, C]: last hidden states of the masked clips. rows [M] int64: raster indices of the masked positions.
    targets [M] int64: their ids before masking; negative = the row is filler and does not count.
    share: factor that turns the mean over these rows into their part of the mean over a larger batch.
    """
    head = model.token_head
    loss, accuracy = masked_cross_entropy(head.transform(hidden.flatten(0, 3)[rows]), head.decoder, head.bias, targets)
    return loss * share, accuracy * share


def contrastive_loss(model: PretrainModel, cls: Tensor, temperature: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """Eq. 5 on [CLS] states [2n, C], all first clips, then all second clips; negatives from all ranks of the group."""
    return info_nce(*model.cls_head(cls).chunk(2), temperature, group)
