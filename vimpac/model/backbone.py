"""The spatio-temporal transformer (section A.1): tokens [B, T, H, W] → [CLS] [B, C], hidden [B, T, H, W, C].

Inside, the states are one matrix of rows [R, C], R = B·T·H·W + B: the tokens in raster order, then the [CLS] rows. Every
linear layer and norm sees that matrix; attention reads and writes it in place.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimpac.config import ModelConfig
from vimpac.layouts import parse_layout
from vimpac.model.positions import Positions
from vimpac.ops import axial_attention_packed
from vimpac.ops.axial_attention import unpack

SPECIAL_IDS = 5
NORM_EPS = 1e-12  # BERT's
INIT_STD = 0.02


class Backbone(nn.Module):
    """Embedding, layers. Parameters are initialised by `reset_parameters`:

    | parameter                            | initial value                                                   |
    |--------------------------------------|-----------------------------------------------------------------|
    | linear weights, embedding, [CLS]     | normal, 0.02                                                    |
    | positions                            | normal, 0.02 / √3 an axis (0.02 for [CLS]'s)                    |
    | biases; norm weights                 | 0; 1                                                            |
    | pre-norm: projections into the       | normal, 0.02 / √(number of residual connections)                |
    | residual stream                      |                                                                 |
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size + SPECIAL_IDS, config.width)
        self.cls = nn.Parameter(torch.empty(config.width))
        self.positions = Positions(config.grid, config.width)
        self.embedding_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=NORM_EPS) if config.norm == "pre" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.apply(init_weights)
        nn.init.normal_(self.cls, std=INIT_STD)
        self.positions.reset_parameters(INIT_STD)
        if self.config.norm == "pre":
            blocks = [block for layer in self.layers for block in (*layer.attention, layer.mlp)]
            for block in blocks:
                nn.init.normal_(block.project.weight, std=INIT_STD / math.sqrt(len(blocks)))

    def forward(self, tokens: Tensor, padded: bool = True) -> tuple[Tensor, Tensor]:
        """Token ids [B, T, H, W] → [CLS] [B, C] and hidden states [B, T, H, W, C].

        padded: False promises that no id is PAD, which saves the attention its masks.
        Raises ValueError when the grid is not the configured one.
        """
        return unpack(self.rows(tokens, padded), tokens.shape)[::-1]

    def rows(self, tokens: Tensor, padded: bool = True) -> Tensor:
        """The same as rows [B·T·H·W + B, C], tokens first."""
        if tuple(tokens.shape[1:]) != self.config.grid:
            raise ValueError(
                f"tokens must be [B, T, H, W] with T, H, W = {self.config.grid}, got shape {tuple(tokens.shape)}; "
                "convert.load(path, grid=...) interpolates the positions to another grid"
            )
        pad = tokens == self.config.pad_id if padded else None
        x = self.embed(tokens)
        seeds = attention_seeds(x, self) if self.training and self.config.dropout > 0 else None
        for i, layer in enumerate(self.layers):
            arguments = (x, pad, None if seeds is None else seeds[i])
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return self.final_norm(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """Eq. 7, for tokens and [CLS]: rows [R, C]."""
        x = self.embedding(tokens) + self.positions()  # [B, T, H, W, C]
        cls = (self.cls + self.positions.cls).expand(tokens.shape[0], -1)
        return self._dropout(self.embedding_norm(torch.cat([x.flatten(0, 3), cls])))

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)


class Layer(nn.Module):
    """Attention blocks of the layout, then the MLP (Eq. 12-14)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        blocks = parse_layout(config.layout, config.heads)
        self.attention = nn.ModuleList(AttentionBlock(config, axes) for axes in blocks)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, pad: Tensor | None, seeds: Tensor | None) -> Tensor:
        for i, block in enumerate(self.attention):
            x = block(x, pad, None if seeds is None else seeds[i])
        return self.mlp(x)


class Residual(nn.Module):
    """x → norm(x + dropout(f(x))) (post, Eq. 10) or x + dropout(f(norm(x))) (pre)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = config.dropout
        self.pre = config.norm == "pre"
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)

    def residual(self, x: Tensor, *arguments) -> Tensor:
        y = self.transform(self.norm(x) if self.pre else x, *arguments)
        x = x + F.dropout(y, self.dropout, self.training)
        return x if self.pre else self.norm(x)


class AttentionBlock(Residual):
    """One attention over the axes of a block (Eq. 10, 11); heads are split evenly over the axes."""

    def __init__(self, config: ModelConfig, axes: tuple[str, ...]):
        super().__init__(config)
        self.grid, self.axes, self.heads = config.grid, axes, config.heads
        self.cls_in_context = config.cls_in_context
        self.qkv = nn.Linear(config.width, 3 * config.key_width)
        self.project = nn.Linear(config.key_width, config.width)

    def forward(self, x: Tensor, pad: Tensor | None, seed: Tensor | None) -> Tensor:
        return self.residual(x, pad, seed)

    def transform(self, x: Tensor, pad: Tensor | None, seed: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [R, 3, N, D]
        dropout = self.dropout if self.training else 0.0
        out = axial_attention_packed(qkv, self.grid, self.axes, pad, dropout, seed, self.cls_in_context)
        return self.project(out.flatten(1))


class MLP(Residual):
    """Two linear layers with GELU between."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.expand = nn.Linear(config.width, config.hidden_width)
        self.project = nn.Linear(config.hidden_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x)

    def transform(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.expand(x)))


def attention_seeds(x: Tensor, backbone: Backbone) -> Tensor:
    """Dropout seeds [layers, blocks a layer] of one forward pass, drawn from torch's generator on x's device."""
    blocks = len(backbone.layers[0].attention)
    return torch.randint(2**62, (len(backbone.layers), blocks), device=x.device)


def init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
