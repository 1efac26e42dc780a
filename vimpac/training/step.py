"""One micro-step: clip pairs → masks → backbone → heads → losses (Eq. 6)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vimpac.config import TrainConfig
from vimpac.losses import contrastive_loss, mask_loss
from vimpac.model import PretrainModel
from vimpac.ops import BlockMask, block_mask
from vimpac.ops.block_mask import expected_block_ratio

TARGET_RATIO = 0.15  # section B.1: the number of blocks whose expected ratio is closest to this
MOST_BLOCKS = 64


class PretrainStep(nn.Module):
    """The module that is trained: the model with both losses on top, so that DistributedDataParallel sees one forward.

    group: process group whose ranks form one contrastive batch, None = this rank alone.
    """

    def __init__(
        self,
        model: PretrainModel,
        config: TrainConfig,
        padded: bool,
        group: dist.ProcessGroup | None = None,
        autocast: torch.dtype | None = None,
    ):
        super().__init__()
        self.model, self.config, self.padded, self.group, self.autocast = model, config, padded, group, autocast
        self.n_blocks = config.n_blocks or blocks_for_ratio(config.model.grid)
        model.token_head.requires_grad_(config.mask_task)
        model.cls_head.requires_grad_(config.alpha > 0)

    def forward(self, tokens: Tensor, sample_ids: Tensor) -> dict[str, Tensor]:
        """tokens [2n, T, H, W] (first clips, then second clips), sample_ids [2n] → scalars.

        loss (with gradient), mask_loss, contrastive_loss (Eq. 5), mask_accuracy: those of the tasks that are on.
        Their mean over ranks is the value of the whole batch.
        """
        config, model = self.config, self.model
        with torch.autocast(tokens.device.type, self.autocast, enabled=self.autocast is not None):
            out, cls, loss = {}, None, 0.0
            if config.mask_task or config.contrastive_masked:
                masked = self.mask(tokens, sample_ids)
                cls, hidden = model.backbone(masked.tokens, self.padded)
            if config.mask_task:
                out["mask_loss"], out["mask_accuracy"] = mask_loss(model, hidden, tokens, masked)
                loss = loss + out["mask_loss"]
            if config.alpha > 0:
                if not config.contrastive_masked:
                    cls, _ = model.backbone(tokens, self.padded)
                out["contrastive_loss"] = contrastive_loss(model, cls, config.temperature, self.group)
                loss = loss + config.alpha * config.temperature * out["contrastive_loss"]
        return {"loss": loss, **{name: x.detach() for name, x in out.items()}}

    def mask(self, tokens: Tensor, sample_ids: Tensor) -> BlockMask:
        """The masks of these samples, a function of the run's seed and the sample ids."""
        config = self.config
        ratio = config.mask_ratio if config.mask == "iid" else None
        return block_mask(tokens, sample_ids, config.seed, self.n_blocks, ratio, config.noisy_mask, config.model.vocab_size)


def blocks_for_ratio(grid: tuple[int, int, int], ratio: float = TARGET_RATIO) -> int:
    """The number of blocks whose expected share of masked tokens is closest to `ratio` (bold in Table 2)."""
    return min(range(1, MOST_BLOCKS + 1), key=lambda n: abs(expected_block_ratio(grid, n) - ratio))
