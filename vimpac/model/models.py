"""Backbone plus heads: what pre-training and fine-tuning train."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vimpac.config import ModelConfig
from vimpac.model.backbone import Backbone
from vimpac.model.heads import ContrastiveHead, TokenHead


class PretrainModel(nn.Module):
    """The model of both pre-training tasks.

    backbone(tokens [B, T, H, W]) → (cls [B, C], hidden [B, T, H, W, C])
    token_head(hidden [..., C]) → logits [..., V + 5]
    cls_head(cls [B, C]) → features [B, head_out], not yet normalised
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.token_head = TokenHead(self.backbone.embedding)
        self.cls_head = ContrastiveHead(config.width, config.head_layers, config.head_width, config.head_out)

    def compile_parts(self) -> None:
        """Compile the embedding, each layer and the token head separately, so that equal layers compile once.

        Parameter names stay the same. The token head takes any number of rows without recompiling.
        """
        self.backbone.compile_parts()
        self.token_head.transform = torch.compile(self.token_head.transform, dynamic=True)


class ClassificationModel(nn.Module):
    """The fine-tuned model: one linear layer on [CLS], zero at the start (section A.2)."""

    def __init__(self, config: ModelConfig, classes: int):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.classifier = nn.Linear(config.width, classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, tokens: Tensor, padded: bool = True) -> Tensor:
        """Token ids [B, T, H, W] → logits [B, classes]."""
        return self.classifier(self.backbone(tokens, padded)[0])


def model_class(classes: int | None) -> Callable[[ModelConfig], PretrainModel | ClassificationModel]:
    """What makes the model of a configuration: PretrainModel, or with a number of classes ClassificationModel."""
    return PretrainModel if classes is None else partial(ClassificationModel, classes=classes)
