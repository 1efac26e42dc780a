"""The attentive probe: one cross-attention block with a learned query, then a linear layer, on frozen token states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimpac.model.backbone import INIT_STD, NORM_EPS


class AttentiveProbe(nn.Module):
    """Classifies the token states of a video (V-JEPA, Bardes et al. 2024, section E.1).

    query [C] attends to the normalised states; its residual connection, an MLP with one of its own, a norm and a linear layer
    follow. Attention is written out, because torch's fused kernels add gradients in a different order on each run on a GPU.
    """

    def __init__(self, width: int, heads: int, classes: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(width))
        self.states_norm, self.mlp_norm, self.norm = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(3))
        self.q, self.project = nn.Linear(width, width), nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.classifier = nn.Linear(width, classes)
        nn.init.normal_(self.query, std=INIT_STD)  # linear layers as torch has them: their scale fits any width

    def forward(self, states: Tensor, pad: Tensor) -> Tensor:
        """Token states [B, L, C], pad [B, L] bool (True: not attended to) → logits [B, classes]."""
        B, _, C = states.shape
        k, v = self.kv(self.states_norm(states)).unflatten(-1, (2, self.heads, -1)).unbind(2)  # [B, L, N, D]
        q = self.q(self.query).view(self.heads, -1)
        scores = torch.einsum("nd,blnd->bnl", q, k) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(pad[:, None], -torch.inf).softmax(-1)
        seen = torch.einsum("bnl,blnd->bnd", weights, v).reshape(B, C)
        x = self.query + self.project(seen)
        x = x + self.contract(F.gelu(self.expand(self.mlp_norm(x))))
        return self.classifier(self.norm(x))
