"""Loads weights of the released program: maps its parameter names and shapes to this model's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from vimpac.config import ModelConfig
from vimpac.errors import InputError
from vimpac.layouts import parse_layout
from vimpac.model import ClassificationModel, PretrainModel
from vimpac.model.models import model_class
from vimpac.model.positions import AXES, IN_BACKBONE, interpolate_state
from vimpac.model.state import empty_model, misfit


def from_authors(state_dict: Mapping[str, Tensor], config: ModelConfig) -> PretrainModel | ClassificationModel:
    """The released program's weights as a model in evaluation mode.

    state_dict: a released checkpoint's tensors (load the file with torch.load(..., weights_only=True)); a leading "module."
    is accepted. A pre-training checkpoint gives a PretrainModel, a fine-tuned one (`cls_fc`) a ClassificationModel.
    Positions of another grid are interpolated to config.grid, with a ResampledPositionsWarning. Batch-norm statistics missing
    from the checkpoint keep their initial values; cls_head's features are then meaningful in training mode only.
    Raises InputError, and nothing else, for a mapping that does not fit the config: other names, shapes or types, values that
    are not finite. Nothing is allocated before these checks.
    """
    released = without_prefix(state_dict)
    classes = _released_classes(released, config)
    make = model_class(classes)
    empty = empty_model(make, config, len(released))
    names = released_names(empty)
    names |= {ours: parts for ours, parts in released_statistics(empty).items() if parts[0] in released}
    missing = sorted({r for parts in names.values() for r in parts} - released.keys())
    unknown = sorted(released.keys() - {r for parts in names.values() for r in parts} - TIED.keys())
    if missing or unknown:
        raise InputError(
            f"checkpoint does not fit {config.layout=} {config.layers=}: missing {missing[:5]}, unexpected {unknown[:5]} "
            f"({len(missing)} and {len(unknown)} in all)"
        )
    _check_released(released, names, empty.state_dict())
    state = {}
    for ours, parts in names.items():
        tensors = [released[name] for name in parts]
        state[ours] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]  # a number of batches has no dimension
    state[IN_BACKBONE + "cls"] = state[IN_BACKBONE + "cls"].reshape(-1)
    _warn_of_resampling(state, config.grid)
    state = interpolate_state(state, config.grid, IN_BACKBONE)
    model = make(config)
    model.load_state_dict({**model.state_dict(), **state})
    return model.eval()


class ResampledPositionsWarning(UserWarning):
    """The position tables of a released checkpoint are for another grid than the model's."""


def _warn_of_resampling(state: Mapping[str, Tensor], grid: tuple[int, int, int]) -> None:
    found = tuple(len(state[f"{IN_BACKBONE}{axis}"]) for axis in AXES)
    if found != grid:
        shown, wanted = ("×".join(map(str, x)) for x in (found, grid))
        text = f"the checkpoint's positions are for a grid of {shown}, they were interpolated to {wanted}"
        warnings.warn(f"{text}; ModelConfig(grid={found}) loads them as they are", ResampledPositionsWarning, stacklevel=3)


def without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise InputError(
            f"a checkpoint must map names to tensors, got a {type(state_dict).__name__}; the weights may be under one of its "
            "keys"
        )
    released = {name.removeprefix("module."): x for name, x in state_dict.items()}
    if len(released) < len(state_dict):
        raise InputError('checkpoint holds the same name twice, with and without the prefix "module."')
    return released


def _released_classes(released: Mapping[str, Tensor], config: ModelConfig) -> int | None:
    """Rows of the classifier, None without one. Its weight must have as many rows, so that no file can claim billions."""
    bias, weight = (released.get(f"cls_fc.{kind}") for kind in ("bias", "weight"))
    if bias is None:
        return None
    reason = misfit(bias, torch.float32, None) or (None if bias.ndim == 1 and len(bias) else "has no row")
    reason = reason or misfit(weight, torch.float32, (len(bias), config.width))
    if reason:
        raise InputError(f"checkpoint does not fit the config: cls_fc {reason}")
    return len(bias)


def _check_released(released: Mapping[str, Tensor], names: Mapping[str, list[str]], own: Mapping[str, Tensor]) -> None:
    """Raises InputError unless every released tensor fits its part of our tensor. Runs before the parts are concatenated."""
    reasons = {
        name: _misfit_part(ours, released[name], own[ours], len(parts)) for ours, parts in names.items() for name in parts
    }
    for name in TIED.keys() & released.keys():
        reasons[name] = misfit(released[name], torch.float32, own[TIED[name]].shape if TIED[name] in own else None)
    if wrong := [f"{name} {reason}" for name, reason in reasons.items() if reason]:
        raise InputError(f"checkpoint does not fit the config: {'; '.join(wrong[:5])} ({len(wrong)} in all)")


def _misfit_part(ours: str, x: Tensor, like: Tensor, parts: int) -> str | None:
    """The reason why x cannot be one of the equal parts of our tensor `like`; None if it can."""
    shape = (like.shape[0] // parts, *like.shape[1:]) if like.ndim else like.shape
    if reason := misfit(x, like.dtype, None):
        return reason
    if ours == IN_BACKBONE + "cls" and x.numel() == len(like):  # released as [1, C]
        return None
    if ours.startswith(IN_BACKBONE) and x.ndim == 2 and len(x) and x.shape[1:] == shape[1:]:  # positions, of any grid
        return None
    return misfit(x, like.dtype, shape)


TIED = {"mlm_head.decoder.weight": "backbone.embedding.weight", "mlm_head.decoder.bias": "token_head.bias"}
"""Tensors that a released checkpoint may hold a second time → our tensor with the same values."""


def released_names(model: PretrainModel | ClassificationModel) -> dict[str, list[str]]:
    """For each of our tensors, the released tensors that are concatenated to it."""
    names = {
        "backbone.embedding.weight": ["backbone.embedding.weight"],
        "backbone.cls": ["backbone.cls_param"],
        "backbone.positions.cls": ["backbone.positional_embedding.cls_pos_embedding"],
        "backbone.positions.time": ["backbone.positional_embedding.temporal_pos_embedding"],
        "backbone.positions.height": ["backbone.positional_embedding.height_pos_embedding"],
        "backbone.positions.width": ["backbone.positional_embedding.width_pos_embedding"],
    }
    pre = model.config.norm != "post"
    names |= _both("backbone.final_norm", "backbone.ln_post") if pre else _both("backbone.embedding_norm", "backbone.ln_pre")
    output = "" if pre else ".output"
    blocks = parse_layout(model.config.layout, model.config.heads)
    for i in range(model.config.layers):
        ours, theirs = f"backbone.layers.{i}", f"backbone.transformer.resblocks.{i}"
        for j, axes in enumerate(blocks):
            a, b = f"{ours}.attention.{j}", f"{theirs}.attention_blocks.{j}"
            for kind in ("weight", "bias"):  # q of each axis, then k, then v: heads of an axis are neighbours
                names[f"{a}.qkv.{kind}"] = [
                    f"{b}.attentions.{axis}.attention.{part}.{kind}"
                    for part in ("query", "key", "value")
                    for axis in range(len(axes))
                ]
            names |= _both(f"{a}.project", f"{b}{output}.dense") | _both(f"{a}.norm", f"{b}{output}.LayerNorm")
        names |= _both(f"{ours}.mlp.expand", f"{theirs}.mlp.c_fc") | _both(f"{ours}.mlp.project", f"{theirs}.mlp.c_proj")
        names |= _both(f"{ours}.mlp.norm", f"{theirs}.ln")
    if isinstance(model, ClassificationModel):
        return names | _both("classifier", "cls_fc")
    names |= _both("token_head.dense", "mlm_head.transform.0") | _both("token_head.norm", "mlm_head.transform.2")
    names["token_head.bias"] = ["mlm_head.bias"]
    last = len(model.cls_head.hidden)
    for i in range(last):
        names |= _both(f"cls_head.hidden.{i}.linear", f"cls_head.mlp.linear_{i}")
        names |= _both(f"cls_head.hidden.{i}.norm", f"cls_head.mlp.bn_{i}")
    return names | {"cls_head.out.weight": [f"cls_head.mlp.linear_{last}.weight"]}


def released_statistics(model: PretrainModel | ClassificationModel) -> dict[str, list[str]]:
    """The same for the batch norms' statistics, which are buffers and may be missing from a checkpoint."""
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    norms = range(0 if isinstance(model, ClassificationModel) else len(model.cls_head.hidden))
    return {f"cls_head.hidden.{i}.norm.{name}": [f"cls_head.mlp.bn_{i}.{name}"] for i in norms for name in statistics}


def _both(ours: str, theirs: str) -> dict[str, list[str]]:
    return {f"{ours}.{kind}": [f"{theirs}.{kind}"] for kind in ("weight", "bias")}
