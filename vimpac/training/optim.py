"""AdamW with linear warm-up and decay (Table 4)."""

from __future__ import annotations

import torch
from torch import nn


def adamw(model: nn.Module, weight_decay: float, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """AdamW over what requires a gradient; biases and norm weights do not decay, as released."""
    norms = {id(p) for m in model.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    decayed, undecayed = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (undecayed if id(p) in norms or name.endswith(".bias") else decayed).append((name, p))
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.BatchNorm1d))


def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Rate of update `step` (from 0) of `steps`: linear up over the first `warmup` share, then linear down to 0."""
    up = max(1, round(warmup * steps))
    if step < up:
        return peak * (step + 1) / up
    return peak * max(0, steps - step) / max(1, steps - up)
