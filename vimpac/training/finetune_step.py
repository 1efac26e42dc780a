"""One micro-step of fine-tuning: clips → backbone → [CLS] → classifier → cross-entropy (section A.2)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimpac.model import ClassificationModel
from vimpac.training.batch import LabelledBatch


class FinetuneStep(nn.Module):
    """The trained module: the classifier with its loss on top, so that DistributedDataParallel wraps a single forward.

    padded: whether clips may hold PAD. class_weights [classes]: factor of a class's loss, None = 1. label_smoothing: share of a
    label that is spread over all classes. last_dropout: dropout of [CLS] before the classifier. freeze_backbone: train the
    classifier only; the backbone then has no dropout. autocast: dtype of mixed precision, None = float32.
    """

    def __init__(
        self,
        model: ClassificationModel,
        padded: bool,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
        last_dropout: float = 0.0,
        freeze_backbone: bool = False,
        autocast: torch.dtype | None = None,
    ):
        super().__init__()
        self.model, self.padded, self.autocast = model, padded, autocast
        self.label_smoothing, self.last_dropout, self.freeze_backbone = label_smoothing, last_dropout, freeze_backbone
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)
        model.backbone.requires_grad_(not freeze_backbone)

    def train(self, mode: bool = True) -> FinetuneStep:
        super().train(mode)
        if self.freeze_backbone:
            self.model.backbone.eval()
        return self

    def forward(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """n labelled clips → loss (with gradient) and accuracy, both means over the clips.

        The loss of a clip is weighted by its class's weight and not divided by the sum of the weights, so that the mean over
        micro-steps and ranks is that of the whole batch.
        """
        device = batch.tokens.device.type
        mixed = torch.autocast(device, self.autocast, cache_enabled=torch.is_grad_enabled()) if self.autocast else nullcontext()
        with mixed:
            with torch.no_grad() if self.freeze_backbone else nullcontext():
                cls, _ = self.model.backbone(batch.tokens, self.padded)
            logits = self.model.classifier(F.dropout(cls, self.last_dropout, self.training))
        logits = logits.float()
        losses = F.cross_entropy(
            logits, batch.labels, self.class_weights, reduction="none", label_smoothing=self.label_smoothing
        )
        return {"loss": losses.mean(), "accuracy": (logits.argmax(-1) == batch.labels).float().mean().detach()}
