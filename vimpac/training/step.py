"""One micro-step of pre-training: masked clip pairs → backbone → heads → losses (Eq. 6)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vimpac.model import PretrainModel
from vimpac.model.losses import Objective, contrastive_loss, mask_loss
from vimpac.model.masking import Masking
from vimpac.model.selection import select_rows
from vimpac.ops.dispatch import ANY
from vimpac.training.batch import ROWS, Batch, fill_rows, pack


class PretrainStep(nn.Module):
    """The trained module: the model with both losses on top, so that DistributedDataParallel wraps a single forward.

    padded: whether clips may hold PAD. group: process group whose ranks form one contrastive batch, None = this rank only.
    autocast: dtype of mixed precision, None = float32. capacity: rows of the token head for masks that are drawn on the
    device, None = the host draws them.
    """

    beyond: Tensor
    """[2] int64: batches with more masked tokens than the capacity, and these tokens, which the loss leaves out."""

    def __init__(
        self,
        model: PretrainModel,
        objective: Objective,
        masking: Masking,
        padded: bool,
        group: dist.ProcessGroup | None = None,
        autocast: torch.dtype | None = None,
        capacity: int | None = None,
    ):
        super().__init__()
        self.model, self.objective, self.masking = model, objective, masking
        self.padded, self.group, self.autocast, self.capacity = padded, group, autocast, capacity
        device = model.token_head.bias.device
        self.register_buffer("beyond", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)
        model.token_head.requires_grad_(objective.mask_task)
        model.cls_head.requires_grad_(objective.contrasts)

    def forward(self, batch: Batch, cached: bool = False) -> dict[str, Tensor]:
        """A batch of n clip pairs → scalars.

        loss (with gradient), mask_loss, contrastive_loss (Eq. 5), mask_accuracy: those of the tasks that are on.
        Their mean over ranks is the value of the whole batch.

        cached: with gradient caching the gradient of the contrastive loss is computed separately. The loss then leaves that
        term out, and the result also has `cls` [2n, C], the states that the term depends on.
        """
        objective, model = self.objective, self.model
        batch = self.drawn(batch)
        out, cls, loss = {}, None, 0.0
        with self.mixed():
            if objective.contrasts and not objective.contrastive_masked:
                cls = self.contrasted_states(batch)
            if objective.reads_masked_clips:
                assert batch.masked is not None
                states, exact = model.backbone.rows(batch.masked, self.padded)
                clips, masked_cls = batch.masked.shape[0], exact
                if objective.mask_task:
                    assert batch.rows is not None and batch.targets is not None and batch.share is not None
                    states, rounded = select_rows(states, batch.rows, batch.targets, clips if exact is None else 0)
                    masked_cls = rounded if exact is None else exact
                    out["mask_loss"], out["mask_accuracy"] = mask_loss(model, states, batch.targets, batch.share)
                    loss = loss + out["mask_loss"]
                elif exact is None:
                    masked_cls = states[-clips:]
                cls = masked_cls if objective.contrastive_masked else cls
            if objective.contrasts and not cached:
                assert cls is not None
                out["contrastive_loss"] = self.contrast(cls)
                loss = loss + objective.contrastive_weight * out["contrastive_loss"]
        out = {"loss": loss, **{name: x.detach() for name, x in out.items()}}
        if objective.contrasts and cached:
            out["cls"] = _WithAbsentGradients.apply(cls, *model.cls_head.parameters())
        return out

    def contrasted_states(self, batch: Batch) -> Tensor:
        """The [CLS] states [2n, C] that the contrastive loss compares."""
        clips = batch.masked if self.objective.contrastive_masked else batch.tokens
        with self.mixed():
            return self.model.backbone(clips, self.padded)[0]

    def contrast(self, cls: Tensor) -> Tensor:
        """Eq. 5 of [CLS] states [2n, C]."""
        with self.mixed():
            return contrastive_loss(self.model, cls, self.objective.temperature, self.group)

    def mixed(self) -> AbstractContextManager:
        """The autocast context of this step's precision.

        It caches the weights' low-precision copies only while gradients are computed: a later pass that needs a graph must not
        reuse copies made without one.
        """
        if self.autocast is None:
            return nullcontext()
        device = self.model.token_head.bias.device.type
        return torch.autocast(device, self.autocast, cache_enabled=torch.is_grad_enabled())

    def batch(self, tokens: Tensor, sample_ids: Tensor, multiple: int = ROWS) -> Batch:
        """The batch of clips [2n, T, H, W] with sample ids [2n], masked unless the device masks it (`drawn`). With CPU tensors
        nothing waits for a device.

        multiple: the token head's number of rows is rounded up to it.
        """
        if not self.objective.reads_masked_clips:
            return Batch(tokens, None, None, None, None, 0)
        if self.capacity is not None:
            return Batch(tokens, None, None, None, None, 0, sample_ids)
        return pack(tokens, self.masking.draw(tokens, sample_ids, ANY), multiple)

    def drawn(self, batch: Batch) -> Batch:
        """The batch with masks, drawn here unless it has them, without a wait. Counts the tokens beyond the capacity."""
        if batch.sample_ids is None:
            return batch
        assert self.capacity is not None
        masked = self.masking.draw(batch.tokens, batch.sample_ids)
        if not self.objective.mask_task:
            return batch._replace(masked=masked.tokens, sample_ids=None)
        count = masked.counts.sum()
        over = (count - self.capacity).clamp_(min=0)
        self.beyond += torch.stack([over.sign(), over])
        return fill_rows(batch.tokens, masked, self.capacity, count - over)


class _WithAbsentGradients(torch.autograd.Function):
    """The identity of x, with parameters as further inputs whose gradient is None.

    With gradient caching the first pass computes the head's gradients. DistributedDataParallel nevertheless waits for every
    parameter in the backward pass in which it averages gradients.
    """

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.parameters = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grad_outputs):
        return *grad_outputs, *[None] * ctx.parameters
