"""The paper's model and both losses as a careful researcher would first write them: the opponent of the benchmarks.

Sequences [B, 1 + T·H·W, C] with [CLS] first; for every axis the tokens are transposed into lines and [CLS] is concatenated to
each (Eq. 12-15); attention is matmul, softmax, dropout, matmul (Eq. 9); logits are computed at every position and the masked
ones selected (Eq. 1, 16, 17); InfoNCE is one dense score matrix (Eq. 5); block masks are drawn in a Python loop (Eq. 3).
Nothing is slowed down on purpose: one fused QKV projection a block, one batched matmul for all lines, nothing computed twice.
`tests/benchmarks/test_naive.py` shows that it computes what `vimpac.model` computes.
"""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimpac.config import ModelConfig
from vimpac.layouts import axis_dimensions, parse_layout

EPS = 1e-12


class Attention(nn.Module):
    """Eq. 9, 11, 15: heads split evenly over axes, [CLS] a key and a query on every line."""

    def __init__(self, config: ModelConfig, axes: tuple[str, ...]):
        super().__init__()
        self.grid, self.heads, self.dropout = config.grid, config.heads, config.dropout
        self.axes = [axis_dimensions(axis) for axis in axes]
        self.cls_in_context = config.cls_in_context
        self.qkv = nn.Linear(config.width, 3 * config.key_width)
        self.project = nn.Linear(config.key_width, config.width)

    def forward(self, x: Tensor, pad: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, 1 + T·H·W, 3, N, D]
        groups = qkv.chunk(len(self.axes), dim=3)
        outs = [self.attend(group, dims, pad) for group, dims in zip(groups, self.axes, strict=True)]
        return self.project(torch.cat(outs, 2).flatten(2))

    def attend(self, qkv: Tensor, dims: tuple[int, ...], pad: Tensor | None) -> Tensor:
        """Some heads along one axis: [B, 1 + T·H·W, 3, n, D] → [B, 1 + T·H·W, n, D]."""
        cls, tokens = qkv[:, :1], qkv[:, 1:].unflatten(1, self.grid)
        lines = to_lines(tokens, dims)  # [B, S, L, 3, n, D]
        cls = cls[:, None].expand(-1, lines.shape[1], -1, -1, -1, -1)
        q, k, v = torch.cat([cls, lines], 2).permute(3, 0, 1, 4, 2, 5)  # [B, S, n, 1 + L, D] each
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        no_key = self.no_key(pad, dims, scores)
        if no_key is not None:
            scores = scores.masked_fill(no_key, -math.inf)
        probs = scores.softmax(-1)
        if no_key is not None:
            probs = probs.masked_fill(no_key, 0.0)  # the softmax of no keys at all is NaN
        out = F.dropout(probs, self.dropout, self.training) @ v
        tokens = from_lines(out[..., 1:, :].transpose(2, 3), dims, self.grid)
        return torch.cat([out[..., 0, :].mean(1)[:, None], tokens.flatten(1, 3)], 1)

    def no_key(self, pad: Tensor | None, dims: tuple[int, ...], scores: Tensor) -> Tensor | None:
        """[B or 1, S or 1, 1, 1, 1 + L] bool: PAD, and [CLS] where it is no context; None = all are keys."""
        if pad is None and self.cls_in_context:
            return None
        if pad is None:
            pad = torch.zeros(1, *self.grid, dtype=torch.bool, device=scores.device)
        return F.pad(to_lines(pad, dims), (1, 0), value=not self.cls_in_context)[:, :, None, None]


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.expand = nn.Linear(config.width, config.hidden_width)
        self.project = nn.Linear(config.hidden_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.expand(x)))


class Layer(nn.Module):
    """Attention blocks of the layout, then the MLP, each with its residual connection and norm (Eq. 10, 12-14)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm, self.dropout = config.norm, config.dropout
        self.attention = nn.ModuleList(Attention(config, axes) for axes in parse_layout(config.layout, config.heads))
        self.mlp = MLP(config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width, eps=EPS) for _ in range(len(self.attention) + 1))

    def forward(self, x: Tensor, pad: Tensor | None) -> Tensor:
        for attention, norm in zip(self.attention, self.norms, strict=False):
            read = x if self.norm == "post" else norm(x)
            x = self.add(read if self.norm == "pre" else x, attention(read, pad), norm)
        return self.add(x, self.mlp(x if self.norm == "post" else self.norms[-1](x)), self.norms[-1])

    def add(self, x: Tensor, y: Tensor, norm: nn.LayerNorm) -> Tensor:
        x = x + F.dropout(y, self.dropout, self.training)
        return norm(x) if self.norm == "post" else x


class NaiveModel(nn.Module):
    """tokens [B, T, H, W] → logits [B, T, H, W, V + 5], features [B, head_out]."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, ids = config.width, config.vocab_size + 5
        self.config = config
        self.embedding = nn.Embedding(ids, C)
        self.time, self.height, self.breadth = (nn.Parameter(torch.empty(size, C)) for size in config.grid)
        self.cls, self.cls_position = nn.Parameter(torch.empty(C)), nn.Parameter(torch.empty(C))
        pre = config.norm != "post"
        self.embedding_norm = nn.Identity() if pre else nn.LayerNorm(C, eps=EPS)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(C, eps=EPS) if pre else nn.Identity()
        self.dense, self.dense_norm = nn.Linear(C, C), nn.LayerNorm(C, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(ids))
        self.cls_head = contrastive_head(config)
        for name, p in self.named_parameters():
            if p.ndim > 1 or name.startswith("cls"):
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor, padded: bool = True) -> tuple[Tensor, Tensor]:
        cls, hidden = self.backbone(tokens, padded)
        return self.token_logits(hidden), self.cls_head(cls)

    def backbone(self, tokens: Tensor, padded: bool = True) -> tuple[Tensor, Tensor]:
        """Eq. 7-15: [CLS] [B, C], hidden states [B, T, H, W, C]."""
        pad = tokens == self.config.pad_id if padded else None
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, pad)
        x = self.final_norm(x)
        return x[:, 0], x[:, 1:].unflatten(1, self.config.grid)

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.time[:, None, None] + self.height[:, None] + self.breadth
        cls = (self.cls + self.cls_position).expand(len(tokens), 1, -1)
        x = self.embedding_norm(torch.cat([cls, x.flatten(1, 3)], 1))
        return F.dropout(x, self.config.dropout, self.training)

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Eq. 16, 17 at every position; the decoder is the embedding."""
        return F.linear(self.dense_norm(F.gelu(self.dense(hidden))), self.embedding.weight, self.bias)


def contrastive_head(config: ModelConfig) -> nn.Sequential:
    """Eq. 18: linear, batch norm, ReLU, …, last linear without bias."""
    sizes, modules = [config.width] + [config.head_width] * (config.head_layers - 1), []
    for a, b in pairwise(sizes):
        modules += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*modules, nn.Linear(sizes[-1], config.head_out, bias=False))


def to_lines(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """[B, T, H, W, ...] → [B, S, L, ...]: S lines of L tokens along the joined dimensions."""
    rest = [d for d in (1, 2, 3) if d not in dims]
    length = math.prod(x.shape[d] for d in dims)
    return x.permute(0, *rest, *dims, *range(4, x.ndim)).reshape(x.shape[0], -1, length, *x.shape[4:])


def from_lines(x: Tensor, dims: tuple[int, ...], grid: tuple[int, int, int]) -> Tensor:
    """[B, S, L, ...] → [B, T, H, W, ...]."""
    order = [*(d for d in (1, 2, 3) if d not in dims), *dims]
    x = x.reshape(x.shape[0], *(grid[d - 1] for d in order), *x.shape[3:])
    return x.permute(0, *(1 + order.index(d) for d in (1, 2, 3)), *range(4, x.ndim))


# --- masks and losses -------------------------------------------------------------------------------------------------


def block_masks(clips: int, grid: tuple[int, int, int], n_blocks: int) -> Tensor:
    """Eq. 3, bool [B, T, H, W] on the CPU: random boxes, one after another."""
    T, H, W = grid
    longest = (max(1, 2 * T // 3), max(1, H // 2), max(1, W // 2))
    mask = torch.zeros(clips, T, H, W, dtype=torch.bool)
    for clip in mask:
        for _ in range(n_blocks):
            sizes = [random.randint(1, n) for n in longest]
            starts = [random.randint(0, n - size) for n, size in zip(grid, sizes, strict=True)]
            t, h, w = (slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
            clip[t, h, w] = True
    return mask


def mask_loss(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Eq. 1."""
    return F.cross_entropy(logits[mask], tokens[mask])


def contrastive_loss(features: Tensor, temperature: float) -> Tensor:
    """Eq. 5 of features [2n, d], first clips, then second clips."""
    z = F.normalize(features, dim=-1)
    scores = z @ z.T / temperature
    scores = scores.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return 2 * F.cross_entropy(scores, partner)  # the sum of two directions' means


def loss(model: NaiveModel, tokens: Tensor, mask: Tensor, alpha: float, temperature: float, padded: bool) -> Tensor:
    """Eq. 6 of clip pairs [2n, T, H, W]."""
    logits, features = model(tokens.masked_fill(mask, model.config.mask_id), padded)
    return mask_loss(logits, tokens, mask) + alpha * temperature * contrastive_loss(features, temperature)


# --- the same weights as vimpac.model ---------------------------------------------------------------------------------

NAMES = [  # (name in PretrainModel, name here)
    (r"backbone\.", ""),
    (r"positions\.cls", "cls_position"),
    (r"positions\.width", "breadth"),
    (r"positions\.", ""),
    (r"token_head\.norm", "dense_norm"),
    (r"token_head\.", ""),
]


def copy_weights(naive: NaiveModel, state: dict[str, Tensor]) -> None:
    """Load the state dict of a vimpac.model.PretrainModel of the same configuration."""
    naive.load_state_dict({naive_name(name, naive): x for name, x in state.items()})


def naive_name(name: str, naive: NaiveModel) -> str:
    for pattern, replacement in NAMES:
        name = re.sub("^" + pattern, replacement, name)
    name = re.sub(r"attention\.(\d+)\.norm", r"norms.\1", name)
    name = name.replace("mlp.norm", f"norms.{len(naive.layers[0].attention)}")
    name = re.sub(r"cls_head\.hidden\.(\d+)\.linear", lambda m: f"cls_head.{3 * int(m[1])}", name)
    name = re.sub(r"cls_head\.hidden\.(\d+)\.norm", lambda m: f"cls_head.{3 * int(m[1]) + 1}", name)
    return name.replace("cls_head.out", f"cls_head.{len(naive.cls_head) - 1}")
