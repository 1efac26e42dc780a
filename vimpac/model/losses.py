"""The losses of both pre-training tasks (Eq. 1, 5, 6), written with the ops.

Each is defined so that its mean over the ranks, as DistributedDataParallel averages gradients, is the loss of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from vimpac.config import PretrainConfig
from vimpac.model import PretrainModel
from vimpac.ops import info_nce, masked_cross_entropy


@dataclass(frozen=True)
class Objective:
    """What a pre-training run minimises (Eq. 6): L_mask + alpha · temperature · L_cl."""

    mask_task: bool
    alpha: float
    temperature: float
    contrastive_masked: bool
    """Contrast the masked clips; otherwise the intact ones, which takes a separate forward pass."""

    @classmethod
    def from_config(cls, config: PretrainConfig) -> Objective:
        return cls(config.mask_task, config.alpha, config.temperature, config.contrastive_masked)

    @property
    def contrasts(self) -> bool:
        return self.alpha > 0

    @property
    def reads_masked_clips(self) -> bool:
        return self.mask_task or self.contrastive_masked

    @property
    def contrastive_weight(self) -> float:
        """The factor of the contrastive loss in Eq. 6."""
        return self.alpha * self.temperature


def mask_loss(model: PretrainModel, states: Tensor, targets: Tensor, share: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Eq. 1 and the accuracy on masked tokens.

    states [M, C]: last hidden states at the masked positions.
    targets [M] int64: the ids there before masking; a negative one marks a filler row, which does not count.
    share: factor that turns the mean over these rows into their part of the mean over a larger batch.
    """
    head = model.token_head
    loss, accuracy = masked_cross_entropy(head.transform(states), head.decoder, head.bias, targets)
    return loss * share, accuracy * share


def contrastive_loss(model: PretrainModel, cls: Tensor, temperature: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """Eq. 5 on [CLS] states [2n, C], all first clips, then all second clips; negatives from all ranks of the group."""
    first, second = model.cls_head(cls).chunk(2)
    return info_nce(first, second, temperature, group)
