"""The spatio-temporal transformer (section A.1): tokens [B, T, H, W] → [CLS] [B, C], hidden [B, T, H, W, C].

Inside, the states are one matrix of rows [R, C], R = B·T·H·W + B: the tokens in raster order, then the [CLS] rows. Linear
layers, norms and attention all read and write that matrix directly.
"""

from __future__ import annotations

import math
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimpac.config import SPECIAL_IDS, ModelConfig
from vimpac.layouts import parse_layout
from vimpac.model.linear import Linear
from vimpac.model.positions import Positions
from vimpac.model.recompute import recomputed, recomputing
from vimpac.ops import axial_attention_packed, dropout, dropout_add
from vimpac.ops.axial_attention import draws_from_generator
from vimpac.ops.lines import unpack

NORM_EPS = 1e-12  # BERT's
INIT_STD = 0.02


class Backbone(nn.Module):
    """Embedding and layers. `reset_parameters` initialises the parameters:

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
        self.activation_checkpointing = "none"
        self.embedding = nn.Embedding(config.vocab_size + SPECIAL_IDS, config.width)
        self.cls = nn.Parameter(torch.empty(config.width))
        self.positions = Positions(config.grid, config.width)
        pre = config.norm != "post"  # norms on the inputs of blocks, and on the output of the last
        self.embedding_norm = nn.Identity() if pre else nn.LayerNorm(config.width, eps=NORM_EPS)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=NORM_EPS) if pre else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.apply(init_weights)
        nn.init.normal_(self.cls, std=INIT_STD)
        self.positions.reset_parameters(INIT_STD)
        if self.config.norm != "post":
            blocks = [block for block in self.modules() if isinstance(block, Residual)]
            for block in blocks:
                nn.init.normal_(block.project.weight, std=INIT_STD / math.sqrt(len(blocks)))

    def forward(self, tokens: Tensor, padded: bool = True, layers: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids [B, T, H, W] of any integer dtype, below vocab_size + 5 → [CLS] [B, C] and hidden states [B, T, H, W, C].

        padded: False promises that no id is PAD, so that attention needs no masks.
        layers: run only the first `layers` layers (0 = the embedding alone), with pre-norm the final norm too; None = all.
        Raises ValueError when the grid is not the configured one, or for ids that are not integers.
        """
        hidden, cls = unpack(self.rows(tokens, padded, layers), tokens.shape)
        return cls, hidden

    def rows(self, tokens: Tensor, padded: bool = True, layers: int | None = None) -> Tensor:
        """The states of `forward` as one matrix [B·T·H·W + B, C], tokens first."""
        if tuple(tokens.shape[1:]) != self.config.grid:
            raise ValueError(
                f"tokens must be [B, T, H, W] with T, H, W = {self.config.grid}, got shape {tuple(tokens.shape)}; "
                "convert.load(path, grid=...) interpolates the positions to another grid"
            )
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens must be integer ids, got {tokens.dtype}")
        tokens = tokens.long()
        pad = tokens == self.config.pad_id if padded else None
        seeds = dropout_seeds(tokens.device, self) if self.training and self.config.dropout > 0 else None
        # Not in the compiled part: there both terms would share one gradient tensor, and accumulation would add to it twice.
        cls = self.cls + self.positions.cls
        x = self.embed(tokens, cls, None if seeds is None else seeds[-1, 0])
        full = self.activation_checkpointing == "full" and torch.is_grad_enabled()
        with recomputing(self.activation_checkpointing == "selective"):
            for i, layer in enumerate(islice(self.layers, layers)):
                arguments = (x, pad, None if seeds is None else seeds[i])
                if full:  # saves the generator's state only if dropout draws from it, since a CUDA graph does not allow that
                    x = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=seeds is not None)
                else:
                    x = layer(*arguments)
        return self.final_norm(x)

    def compile_parts(self) -> None:
        """Compile the embedding and each layer."""
        self.embed = torch.compile(self.embed, dynamic=False)
        for layer in self.layers:
            layer.compile(dynamic=False)

    def embed(self, tokens: Tensor, cls: Tensor, seed: Tensor | None) -> Tensor:
        """Eq. 7 for tokens and [CLS] [C]: rows [R, C]. seed: of dropout, None = no dropout."""
        x = self.embedding(tokens) + self.positions()  # [B, T, H, W, C]
        x = self.embedding_norm(torch.cat([x.flatten(0, 3), cls.expand(tokens.shape[0], -1)]))
        return x if seed is None else dropout(x, self.config.dropout, seed)


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
        return self.mlp(x, None if seeds is None else seeds[-1])


class Residual(nn.Module):
    """A block f with its norm, dropout and residual connection.

    post (Eq. 10):  norm(x + dropout(f(x)))
    pre-vit:        x + dropout(f(norm(x)))
    pre:            as pre-vit for MLPs; attention adds to its normalised input: norm(x) + dropout(f(norm(x))), as released
    """

    project: Linear  # the last layer of f

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = config.dropout
        self.pre = config.norm != "post"
        self.adds_to_normalised = False
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)

    def residual(self, x: Tensor, seed: Tensor | None, pad: Tensor | None = None) -> Tensor:
        if not self.pre:
            return recomputed(self.norm, dropout_add(x, self.transform(x, seed, pad), self.dropout_p, seed))
        normalised = recomputed(self.norm, x)
        y = self.transform(normalised, seed, pad)
        return dropout_add(normalised if self.adds_to_normalised else x, y, self.dropout_p, seed)

    def transform(self, x: Tensor, seed: Tensor | None, pad: Tensor | None) -> Tensor:
        """f, without the dropout of its output."""
        raise NotImplementedError

    @property
    def dropout_p(self) -> float:
        return self.dropout if self.training else 0.0


class AttentionBlock(Residual):
    """One attention over the axes of a block (Eq. 10, 11); heads are split evenly over the axes."""

    def __init__(self, config: ModelConfig, axes: tuple[str, ...]):
        super().__init__(config)
        self.adds_to_normalised = config.norm == "pre"
        self.grid, self.axes, self.heads = config.grid, axes, config.heads
        self.cls_in_context = config.cls_in_context
        self.qkv = Linear(config.width, 3 * config.key_width)
        self.project = Linear(config.key_width, config.width)

    def forward(self, x: Tensor, pad: Tensor | None, seed: Tensor | None) -> Tensor:
        return self.residual(x, seed, pad)

    def transform(self, x: Tensor, seed: Tensor | None, pad: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [R, 3, N, D]
        arguments = (qkv, self.grid, self.axes, pad, self.dropout_p, seed, self.cls_in_context)
        repeatable = self.dropout_p == 0 or not draws_from_generator(self.axes, (1, *self.grid))
        out = recomputed(axial_attention_packed, *arguments) if repeatable else axial_attention_packed(*arguments)
        return self.project(out.flatten(1))


class MLP(Residual):
    """Two linear layers with GELU between them."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.expand = Linear(config.width, config.hidden_width)
        self.project = Linear(config.hidden_width, config.width)

    def forward(self, x: Tensor, seed: Tensor | None) -> Tensor:
        return self.residual(x, seed)

    def transform(self, x: Tensor, seed: Tensor | None, pad: Tensor | None) -> Tensor:
        return self.project(recomputed(F.gelu, self.expand(x)))


def dropout_seeds(device: torch.device, backbone: Backbone) -> Tensor:
    """Dropout seeds [layers + 1, residual blocks per layer] of one forward pass, drawn from torch's generator on the device.

    The last row is for the embedding. A block's attention and its residual connection share a seed, but use different random
    words of it.
    """
    blocks = len(parse_layout(backbone.config.layout, backbone.config.heads)) + 1  # attention's, and the MLP
    return torch.randint(2**62, (len(backbone.layers) + 1, blocks), device=device)


def init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
