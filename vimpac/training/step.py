"""One micro-step: masked clip pairs → backbone → heads → losses (Eq. 6)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vimpac.config import TrainConfig
from vimpac.model import PretrainModel
from vimpac.model.losses import contrastive_loss, mask_loss
from vimpac.ops import BlockMask, block_mask
from vimpac.ops.block_mask import expected_block_ratio
from vimpac.ops.dispatch import ANY
from vimpac.training.batch import ROWS, Batch, pack

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
        self.masks = config.mask_task or config.contrastive_masked
        model.token_head.requires_grad_(config.mask_task)
        model.cls_head.requires_grad_(config.alpha > 0)

    def forward(self, batch: Batch, contrast: bool = True) -> dict[str, Tensor]:
        """A batch of n clip pairs → scalars.

        loss (with gradient), mask_loss, contrastive_loss (Eq. 5), mask_accuracy: those of the tasks that are on.
        Their mean over ranks is the value of the whole batch.

        contrast: False leaves the contrastive loss to the caller, who gets `cls` [2n, C], the states it depends on.
        """
        config, model = self.config, self.model
        out, cls, loss = {}, None, 0.0
        with self.mixed():
            if config.alpha > 0 and not config.contrastive_masked:
                cls = self.contrasted(batch)
            if self.masks:
                masked_cls, hidden = model.backbone(batch.masked, self.padded)
                cls = masked_cls if config.contrastive_masked else cls
            if config.mask_task:
                out["mask_loss"], out["mask_accuracy"] = mask_loss(model, hidden, batch.rows, batch.targets, batch.share)
                loss = loss + out["mask_loss"]
            if config.alpha > 0 and contrast:
                out["contrastive_loss"] = contrastive_loss(model, cls, config.temperature, self.group)
                loss = loss + config.alpha * config.temperature * out["contrastive_loss"]
        out = {"loss": loss, **{name: x.detach() for name, x in out.items()}}
        if config.alpha > 0 and not contrast:
            out["cls"] = _Reaches.apply(cls, *model.cls_head.parameters())
        return out

    def contrasted(self, batch: Batch) -> Tensor:
        """The [CLS] states [2n, C] that the contrastive loss compares."""
        with self.mixed():
            return self.model.backbone(batch.masked if self.config.contrastive_masked else batch.tokens, self.padded)[0]

    def contrast(self, cls: Tensor) -> Tensor:
        """Eq. 5 of [CLS] states [2n, C]."""
        with self.mixed():
            return contrastive_loss(self.model, cls, self.config.temperature, self.group)

    def mixed(self) -> AbstractContextManager:
        """The autocast context of this step's precision. Weights' copies are kept only where they have a gradient: without one
        they would be taken for the copies of a later pass that needs it."""
        if self.autocast is None:
            return nullcontext()
        device = self.model.token_head.bias.device.type
        return torch.autocast(device, self.autocast, cache_enabled=torch.is_grad_enabled())

    def batch(self, tokens: Tensor, sample_ids: Tensor, multiple: int = ROWS) -> Batch:
        """What a forward pass reads of clips [2n, T, H, W] with sample ids [2n]. On CPU tensors nothing is waited for.

        multiple: the number of rows of the token head is rounded up to it.
        """
        if not self.masks:
            return Batch(tokens, None, None, None, None, 0)
        return pack(tokens, self.mask(tokens, sample_ids, ANY), multiple)

    def mask(self, tokens: Tensor, sample_ids: Tensor, backend: str | None = None, noisy: bool | None = None) -> BlockMask:
        """The masks of these samples, a function of the run's seed and the sample ids.

        noisy: replace only 80 % of the masked tokens by MASK (section G.3), None = as the run does.
        """
        config = self.config
        ratio = config.mask_ratio if config.mask == "iid" else None
        options = (self.n_blocks, ratio, config.noisy_mask if noisy is None else noisy, config.model.vocab_size)
        return block_mask(tokens, sample_ids, config.seed, *options, backend)

    @property
    def mask_share(self) -> float:
        """Expected share of masked tokens in clips without padding."""
        config = self.config
        return config.mask_ratio if config.mask == "iid" else expected_block_ratio(config.model.grid, self.n_blocks)


class _Reaches(torch.autograd.Function):
    """x, whose gradient also arrives, as nothing, at parameters that got theirs before: DistributedDataParallel waits for
    every parameter in the backward pass in which it averages gradients."""

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.parameters = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, *[None] * ctx.parameters


def blocks_for_ratio(grid: tuple[int, int, int], ratio: float = TARGET_RATIO) -> int:
    """The number of blocks whose expected share of masked tokens is closest to `ratio` (bold in Table 2)."""
    return min(range(1, MOST_BLOCKS + 1), key=lambda n: abs(expected_block_ratio(grid, n) - ratio))
