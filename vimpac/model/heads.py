"""Heads on the backbone (section A.2): tokens, contrastive features; and batch norm over all ranks."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vimpac.model.backbone import NORM_EPS, init_weights
from vimpac.ops.autograd import full_precision


class TokenHead(nn.Module):
    """Hidden states → logits over ids (Eq. 16, 17). The decoder is the embedding, which the backbone owns."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        ids, width = embedding.weight.shape
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.bias = nn.Parameter(torch.zeros(ids))
        self._embedding = (embedding,)  # in a tuple: a reference, not a second registration of its weight
        self.apply(init_weights)

    @property
    def decoder(self) -> Tensor:
        """Weight of the output layer [V + 5, C], tied to the embedding."""
        return self._embedding[0].weight

    def transform(self, hidden: Tensor) -> Tensor:
        """Eq. 16: [..., C] → [..., C]."""
        return self.norm(F.gelu(self.dense(hidden)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., C] → logits [..., V + 5]."""
        return F.linear(self.transform(hidden), self.decoder, self.bias)


class ContrastiveHead(nn.Module):
    """[CLS] [B, C] → features [B, head_out] float32 (Eq. 18): linear, batch norm, ReLU, …, last linear without bias.

    In float32 even under autocast: the states of different clips are similar, and batch norm magnifies the rounding errors of a
    half-precision linear layer. At initialisation and without dropout, bfloat16 in this head alone changed the loss by 7 to
    10 %, in the whole backbone by 1 % (the demo's model, on a CPU). A clip with features near zero has a gradient beyond
    float16's range.
    """

    def __init__(self, width: int, layers: int, hidden: int, out: int):
        super().__init__()
        sizes = [width] + [hidden] * (layers - 1)
        self.hidden = nn.ModuleList(
            nn.ModuleDict({"linear": nn.Linear(a, b), "norm": BatchNorm(b)}) for a, b in pairwise(sizes)
        )
        self.out = nn.Linear(sizes[-1], out, bias=False)
        self.apply(init_weights)

    @full_precision
    def forward(self, cls: Tensor) -> Tensor:
        cls = cls.to(self.out.weight.dtype)
        for block in self.hidden:
            assert isinstance(block, nn.ModuleDict)
            cls = F.relu(block["norm"](block["linear"](cls)))
        return self.out(cls)


class BatchNorm(nn.BatchNorm1d):
    """Batch norm whose training statistics span all ranks of the default process group, on any device.

    (torch's SyncBatchNorm runs on GPUs only.) Every rank must have the same number of rows. Statistics are at least float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        x = input
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x32).to(x.dtype)
        ranks = dist.get_world_size()
        var, mean = (moment.double() for moment in torch.var_mean(x32, 0, correction=0))
        # One message, in float64: the variance is a small difference of large numbers if the mean is large.
        mean, square = _AllReduce.apply(torch.stack([mean, var + mean.square()])) / ranks
        var = (square - mean.square()).to(x32.dtype)
        mean = mean.to(x32.dtype)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            rows = ranks * len(x)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (rows / max(rows - 1, 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        return ((x32 - mean) * (var + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


class _AllReduce(torch.autograd.Function):
    """Sum over ranks; the gradient of a sum that all ranks use is the sum of their gradients."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, *grad_outputs):
        grad = grad_outputs[0].clone()
        dist.all_reduce(grad)
        return grad
