"""How a run starts: from fresh weights, another run's model, an earlier stage, or its own last checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from vimpac.checkpoint import (
    check_moments,
    check_scaler,
    check_tokenizer,
    check_weights,
    list_checkpoints,
    load_checkpoint,
)
from vimpac.config import ModelConfig
from vimpac.data.store import TokenStore
from vimpac.errors import InputError
from vimpac.model import PretrainModel
from vimpac.model.positions import IN_BACKBONE, interpolate_state
from vimpac.model.state import check_state
from vimpac.training.finetune_step import FinetuneStep
from vimpac.training.optim import group_names, load_whole_state
from vimpac.training.step import PretrainStep


def initial_model(config: ModelConfig, init_from: str | None, tokenizer_digest: str) -> PretrainModel:
    """A fresh model, or one with `init_from`'s weights, its positions interpolated to this grid."""
    if init_from is None:
        return PretrainModel(config)
    from vimpac import weights  # imports safetensors, which a fresh start does not need

    model = weights.load_trained(init_from, config.grid, tokenizer_digest).model
    if not isinstance(model, PretrainModel) or shape_of(model.config) != shape_of(config):
        raise InputError(
            f"init_from={init_from} holds a {type(model).__name__} of shape {shape_of(model.config)}, expected a "
            f"PretrainModel of {shape_of(config)}"
        )
    fresh = PretrainModel(config)  # the configuration's dropout, not the file's
    fresh.load_state_dict(model.state_dict())
    return fresh


def shape_of(config: ModelConfig) -> dict:
    """The options that determine the names and shapes of a model's parameters."""
    return {name: value for name, value in asdict(config).items() if name != "dropout"}


def restore(
    checkpoint: dict,
    run: Path,
    module: PretrainStep | FinetuneStep,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> int:
    """Load this run's own checkpoint and return its step. Raises InputError for one that does not fit.

    The number of ranks may differ. Samples and masks stay the same; dropout stays the same only with the same number of ranks.
    """
    shapes = {name: p.shape for name, p in module.named_parameters()}
    try:
        check_state(checkpoint["model"], module.model.state_dict())
        check_moments(checkpoint["optimizer"], group_names(optimizer, module), shapes)
        check_scaler(checkpoint["scaler"], scaler.state_dict())
    except InputError as error:
        raise InputError(
            f"the checkpoint of step {checkpoint['step']} in {run} does not fit this model: {error}; it is damaged or another "
            "run's, delete it to resume from the previous one"
        ) from None
    load(checkpoint["model"], checkpoint["optimizer"], module, optimizer)
    scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["step"]


def load(
    weights: dict[str, Tensor], moments: dict, module: PretrainStep | FinetuneStep, optimizer: torch.optim.Optimizer
) -> None:
    """Load weights and moments. The optimizer's options, such as the weight decay, stay those of this run."""
    own = [{name: x for name, x in group.items() if name != "params"} for group in optimizer.param_groups]
    module.model.load_state_dict(weights)
    load_whole_state(optimizer, moments)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)


def continue_stage(run: Path, store: TokenStore, steps: int, module: PretrainStep, optimizer: torch.optim.Optimizer) -> int:
    """Continue from an earlier stage's last checkpoint: weights and moments, positions resampled to this grid.

    steps: the update at which this run ends. Returns the checkpoint's step. Raises InputError for a run without checkpoints, or
    one that does not fit.
    """
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise InputError(f"continue_from={run} has no checkpoint: expected the run folder of the earlier stage")
    state = load_checkpoint(checkpoints[-1])
    check_tokenizer(state["tokenizer"], store, checkpoints[-1])
    grid = module.model.config.grid
    try:
        shapes = {f"model.{name}": p.shape for name, p in check_weights(state).named_parameters()}
        check_moments(state["optimizer"], group_names(optimizer, module), shapes)
        weights, moments = interpolate_state(state["model"], grid, IN_BACKBONE), interpolate_moments(state["optimizer"], grid)
        load(weights, moments, module, optimizer)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{checkpoints[-1]} does not fit this model: {reason[:300]}") from None
    if state["step"] >= steps:
        raise InputError(
            f"{checkpoints[-1]} is at step {state['step']}, this run would end at {steps}: raise --epochs or "
            "--steps, which count from the start of the first stage"
        )
    return state["step"]


def interpolate_moments(state: dict, grid: tuple[int, int, int]) -> dict:
    """An AdamW state dict with the moments of the position tables resampled to another grid."""
    names = {i: name for group in state["param_groups"] for i, name in zip(group["params"], group["param_names"], strict=True)}
    moments = dict(state["state"])
    for key in ("exp_avg", "exp_avg_sq"):
        tables = {names[i]: s[key] for i, s in moments.items() if f"model.{IN_BACKBONE}" in names[i]}
        tables = interpolate_state(tables, grid, f"model.{IN_BACKBONE}")
        moments = {i: {**s, key: tables.get(names[i], s[key])} for i, s in moments.items()}
    return {**state, "state": moments}
