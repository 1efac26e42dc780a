"""The spatio-temporal transformer (section A.1): tokens [B, T, H, W] → [CLS] [B, C], hidden [B, T, H, W, C].

Inside, the states are one matrix of rows [R, C], R = B·T·H·W + B: the tokens in raster order, then the [CLS] rows. Linear
layers, norms and attention all read and write that matrix directly.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vimpac.config import SPECIAL_IDS, ModelConfig
from vimpac.layouts import parse_layout
from vimpac.model.linear import Linear, fits_convolution, product
from vimpac.model.positions import Positions
from vimpac.model.recompute import recomputed, recomputing
from vimpac.ops import axial_attention_packed, dropout, dropout_add, gelu_linear, residual_norm, residual_sum_norm
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
        self.embedding = nn.Embedding(config.vocab_size + SPECIAL_IDS, config.width)
        self.cls = nn.Parameter(torch.empty(config.width))
        self.positions = Positions(config.grid, config.width)
        pre = config.norm != "post"  # norms on the inputs of blocks, and on the output of the last
        self.embedding_norm = nn.Identity() if pre else nn.LayerNorm(config.width, eps=NORM_EPS)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=NORM_EPS) if pre else nn.Identity()
        self.activation_checkpointing, self.residual = "none", "auto"
        self.reset_parameters()

    @property
    def activation_checkpointing(self) -> str:
        """What is recomputed for backward: "none", "selective" (attention's and GELU's outputs) or "full" (every layer)."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, mode: str) -> None:
        self._activation_checkpointing = mode
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.mlp.recompute = mode == "selective"

    @property
    def residual(self) -> str:
        """The dtype of the states that layers pass on: "auto", which is autocast's, or "fp32".

        With pre-norm it is always "fp32", since states are sums over all layers.
        """
        return self._residual

    @residual.setter
    def residual(self, choice: str) -> None:
        self._residual = choice if self.config.norm == "post" else "fp32"
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layer.residual = self._residual

    def reset_parameters(self) -> None:
        self.apply(init_weights)
        nn.init.normal_(self.cls, std=INIT_STD)
        self.positions.reset_parameters(INIT_STD)
        if self.config.norm != "post":
            blocks = [block for block in self.modules() if isinstance(block, Block)]
            for block in blocks:
                nn.init.normal_(block.project.weight, std=INIT_STD / math.sqrt(len(blocks)))

    def forward(self, tokens: Tensor, padded: bool = True, layers: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids [B, T, H, W] of any integer dtype, below vocab_size + 5 → [CLS] [B, C] and hidden states [B, T, H, W, C].

        padded: False promises that no id is PAD, so that attention needs no masks.
        layers: run only the first `layers` layers (0 = the embedding alone), with pre-norm the final norm too; None = all.
        Raises ValueError when the grid is not the configured one, or for ids that are not integers.
        """
        x, exact = self.rows(tokens, padded, layers)
        hidden, cls = unpack(x, tokens.shape)
        return cls if exact is None else exact, hidden

    def rows(self, tokens: Tensor, padded: bool = True, layers: int | None = None) -> tuple[Tensor, Tensor | None]:
        """The states of `forward` as one matrix [B·T·H·W + B, C], tokens first; and those of [CLS] [B, C] in float32 if the
        matrix holds them rounded.

        [CLS] states differ little from clip to clip. Rounding would drown the differences, which the contrastive head reads. So
        layers also pass [CLS] on unrounded.
        """
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
        x, exact = self.embed(tokens, cls, None if seeds is None else seeds[-1, 0])
        full = self.activation_checkpointing == "full" and torch.is_grad_enabled()
        with recomputing(self.activation_checkpointing == "selective"):
            for i, layer in enumerate(islice(self.layers, layers)):
                arguments = (x, pad, None if seeds is None else seeds[i], exact)
                if full:  # saves the generator's state only if dropout draws from it, since a CUDA graph does not allow that
                    given = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=seeds is not None)
                else:
                    given = layer(*arguments)
                x, exact = (given, None) if exact is None else given
        return self.final_norm(x), exact

    def compile_parts(self) -> None:
        """Compile the embedding and each layer."""
        self.embed = torch.compile(self.embed, dynamic=False)
        for layer in self.layers:
            layer.compile(dynamic=False)

    def embed(self, tokens: Tensor, cls: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Eq. 7 for tokens and [CLS] [C]: rows [R, C] of the residual stream, and [CLS]'s [B, C] in float32 if the stream is
        narrower. seed: of dropout, None = no dropout."""
        B, count = tokens.shape[0], tokens.numel()
        row = torch.arange(count + B, device=tokens.device)
        places = self.positions().flatten(0, 2)  # [T·H·W, C]
        x = self.embedding(F.pad(tokens.flatten(), (0, B))) + places[row % places.shape[0]]
        x = torch.where((row < count)[:, None], x, cls)  # not torch.cat: compiled, it would write what the norm reads
        x = residual_stream(self.embedding_norm(x), self.residual)
        x = x if seed is None else dropout(x, self.config.dropout, seed)
        return x, None if x.dtype.itemsize > 2 else x[count:].float()


class Layer(nn.Module):
    """Attention blocks of the layout, then the MLP (Eq. 12-14), each with its norm, dropout and residual connection.

    post (Eq. 10):  x ← norm(x + dropout(f(x)))
    pre-vit:        x ← x + dropout(f(norm(x)))
    pre:            as pre-vit for MLPs; attention adds to its normalised input: norm(x) + dropout(f(norm(x))), as released
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        blocks = parse_layout(config.layout, config.heads)
        self.norm, self.residual = config.norm, "auto"
        self.attention = nn.ModuleList(AttentionBlock(config, axes) for axes in blocks)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, pad: Tensor | None, seeds: Tensor | None, exact: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """States [R, C] → states [R, C]. With `exact`, [CLS]'s [B, C] in float32 (post-norm), also those."""
        return self.blocks(residual_stream(x, self.residual), pad, seeds, exact)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the blocks. Between layers the states have the stream's dtype, so that the cast is no part of them."""
        self.blocks = torch.compile(self.blocks, *args, **kwargs)

    def blocks(
        self, x: Tensor, pad: Tensor | None, seeds: Tensor | None, exact: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        blocks = [*self.attention, self.mlp]
        given = [None] * len(blocks) if seeds is None else seeds.unbind()
        if self.norm == "post":
            for block, seed in zip(blocks, given, strict=True):
                x, exact = block.norm_of_sum(x, block(x, seed, pad), seed, exact)
            return x if exact is None else (x, exact)
        y = block_norm(x, blocks[0].norm)
        for block, following, seed in zip(blocks, blocks[1:], given, strict=False):
            x = y if self.norm == "pre" else x  # what attention adds to
            x, y = block.sum_and_norm(x, block(y, seed, pad), seed, following.norm)
        return self.mlp.sum(x, self.mlp(y, given[-1], pad), given[-1])


def residual_stream(x: Tensor, choice: str) -> Tensor:
    """The states in the dtype in which layers pass them on. "auto" is autocast's: narrow tensors are read and written."""
    device = x.device.type
    if choice != "auto" or device == "meta" or not torch.is_autocast_enabled(device):  # asking about meta raises
        return x
    return x.to(torch.get_autocast_dtype(device))


class Block(nn.Module):
    """A block f: what it adds to the residual stream, and the stream's next state, which one kernel makes of both."""

    project: Linear  # the last layer of f. Its bias is added with the residual connection

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.dropout = config.dropout
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.keeps_output = True
        self.register_load_state_dict_post_hook(_choose_what_to_keep)

    def forward(self, x: Tensor, seed: Tensor | None, pad: Tensor | None) -> Tensor:
        """f(x) [R, C] without the bias of `project` and the dropout of the output."""
        raise NotImplementedError

    def norm_of_sum(self, x: Tensor, y: Tensor, seed: Tensor | None, exact: Tensor | None) -> tuple[Tensor, Tensor | None]:
        keeps, norm = "output" if self.keeps_output or not torch.is_grad_enabled() else "sum", self.norm
        options = self.dropout_p, seed, norm.eps, keeps, None, exact
        out = residual_norm(x, y, self.project.bias, norm.weight, norm.bias, *options)
        return out if isinstance(out, tuple) else (out, None)

    def sum_and_norm(self, x: Tensor, y: Tensor, seed: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        return residual_sum_norm(x, y, self.project.bias, norm.weight, norm.bias, self.dropout_p, seed, norm.eps)

    def sum(self, x: Tensor, y: Tensor, seed: Tensor | None) -> Tensor:
        return dropout_add(x, y + self.project.bias.to(y.dtype), self.dropout_p, seed)

    @property
    def dropout_p(self) -> float:
        return self.dropout if self.training else 0.0


class AttentionBlock(Block):
    """One attention over the axes of a block (Eq. 10, 11); heads are split evenly over the axes."""

    def __init__(self, config: ModelConfig, axes: tuple[str, ...]):
        super().__init__(config)
        self.grid, self.axes, self.heads = config.grid, axes, config.heads
        self.cls_in_context = config.cls_in_context
        self.qkv = Linear(config.width, 3 * config.key_width)
        self.project = Linear(config.key_width, config.width)

    def forward(self, x: Tensor, seed: Tensor | None, pad: Tensor | None) -> Tensor:
        bias = self.qkv.bias
        qkv = self.qkv.product(x, bias.detach()).unflatten(-1, (3, self.heads, -1))  # [R, 3, N, D]
        arguments = (qkv, self.grid, self.axes, pad, self.dropout_p, seed, self.cls_in_context, None, bias)
        repeatable = self.dropout_p == 0 or not draws_from_generator(self.axes, (1, *self.grid))
        out = recomputed(axial_attention_packed, *arguments) if repeatable else axial_attention_packed(*arguments)
        return self.project.product(out.flatten(1))


class MLP(Block):
    """Two linear layers with GELU between them."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.recompute = True
        self.expand = Linear(config.width, config.hidden_width)
        self.project = Linear(config.hidden_width, config.width)

    def forward(self, x: Tensor, seed: Tensor | None, pad: Tensor | None) -> Tensor:
        h, weight = self.expand.product(x), self.project.weight
        multiply = product if self.training and fits_convolution(h, weight) else None
        return gelu_linear(h, self.expand.bias, weight.to(h.dtype), self.recompute, multiply)


def block_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """norm(x) in x's dtype, computed in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(dtype), norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)


SMALLEST_SHARE = 1 / 8  # of a norm's bias that its weight may be, for the norm's input to be recovered from its output


def _choose_what_to_keep(block: Block, _keys) -> None:
    """After loading a state: whether backward finds the norm's input from its output, which costs no memory."""
    weight, bias = block.norm.weight.detach(), block.norm.bias.detach()
    block.keeps_output = bool((weight.abs() > SMALLEST_SHARE * bias.abs()).all())


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
