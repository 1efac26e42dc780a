"""AdamW with linear warm-up and decay (Table 4), whole on every rank or sharded over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:  # it imports all of torch.jit
    from typing import TypeGuard

    from torch.distributed.optim import ZeroRedundancyOptimizer


def adamw(
    model: nn.Module,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    shard: bool = False,
    rate_scale: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.Optimizer:
    """AdamW over all parameters that require a gradient. No weight decay for biases and norm weights, as released.

    shard: ZeRO-1, each rank of the process group keeps the moments of a part of the parameters and updates only that part.
    rate_scale: by a parameter's name, what its learning rate is multiplied by; each group keeps it as its `rate_scale`.
    """
    norms = {id(p) for m in model.modules() if is_norm(m) for p in m.parameters(recurse=False)}
    found: dict[tuple[float, bool], list] = {(1.0, True): [], (1.0, False): []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decayed = id(p) not in norms and not name.endswith(".bias")
            found.setdefault((rate_scale(name), decayed), []).append((name, p))
    groups = [
        {"params": named, "weight_decay": weight_decay if decayed else 0.0, "rate_scale": scale}
        for (scale, decayed), named in found.items()
        if named
    ]
    options = {"lr": 0.0, "betas": betas, "eps": eps, "fused": True}
    if not shard:
        return torch.optim.AdamW(groups, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer  # imports all of torch.jit

    groups = [{**group, "params": [p for _, p in group["params"]]} for group in groups]  # it takes no names
    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, parameters_as_bucket_view=True, **options)


def whole_state(optimizer: torch.optim.Optimizer, model: nn.Module, is_first: bool) -> dict | None:
    """AdamW's complete state dict with parameter names, sharded or not; None on ranks other than the first.

    Every rank must call it: a sharded state is sent to the first rank.
    """
    if is_sharded(optimizer):
        optimizer.consolidate_state_dict(to=0)
    if not is_first:
        return None
    state = optimizer.state_dict()
    for saved, names in zip(state["param_groups"], group_names(optimizer, model), strict=True):
        saved["param_names"] = names
    return state


def group_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Names of the optimizer's parameters, group by group."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a state from `whole_state` into an optimizer, sharded or not."""
    if is_sharded(optimizer):
        groups = [{name: x for name, x in group.items() if name != "param_names"} for group in state["param_groups"]]
        state = {**state, "state": dict(state["state"]), "param_groups": groups}  # loading removes the other ranks' part
    optimizer.load_state_dict(state)
    if is_sharded(optimizer):
        optimizer.state.clear()  # a second copy, which nothing reads; the moments are in the inner one, optimizer.optim
        for p, moments in optimizer.optim.state.items():
            moments["step"] = moments["step"].to(p.device)  # loaded to the CPU, where the fused op cannot read it


def is_sharded(optimizer: torch.optim.Optimizer) -> TypeGuard[ZeroRedundancyOptimizer]:
    return hasattr(optimizer, "consolidate_state_dict")


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.BatchNorm1d))


def learning_rate(step: int, steps: int, warmup: float, peak: float) -> float:
    """Rate of update `step` (from 0) of `steps`: linear warm-up over the first `warmup` share, then linear decay to 0."""
    up = max(1, round(warmup * steps))
    if step < up:
        return peak * (step + 1) / up
    return peak * max(0, steps - step) / max(1, steps - up)
