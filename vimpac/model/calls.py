"""What a model asks of the ops, as their `why_not` functions get it: for checks and reports before anything runs."""

from __future__ import annotations

import math

import torch

from vimpac.config import ModelConfig
from vimpac.layouts import parse_layout
from vimpac.ops.axial_attention import table_row
from vimpac.ops.choice import order

Call = tuple[str, tuple[str, ...], tuple]  # op, backends to try, arguments


def op_calls(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
    """Calls of a model of one clip in training, by op, attention's by block: its tensors are of `dtype` and hold nothing."""
    T, H, W = config.grid
    width = config.key_width // config.heads
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    seed = ids[0] if config.dropout > 0 else None
    calls = {}
    for axes in dict.fromkeys(parse_layout(config.layout, config.heads)):
        qkv = torch.empty(1, T, H, W, 3, config.heads, width, dtype=dtype, device=device)
        attention = (qkv, qkv[:, 0, 0, 0], axes, None, config.dropout, seed, config.cls_in_context)
        calls[f"axial_attention {'|'.join(axes)}"] = (table_row(axes, qkv.shape), attention)
    tokens = torch.empty(1, T, H, W, dtype=torch.int64, device=device)
    calls["block_mask"] = ("block_mask", (tokens, ids, ids[0], 5, None, False, config.vocab_size))
    states = torch.empty(math.prod(config.grid) + 1, config.width, dtype=dtype, device=device)
    if config.dropout > 0:
        calls["dropout_add"] = ("dropout_add", (states.float(), states, config.dropout, seed))  # autocast leaves the sum wide
    z = torch.empty(8, config.head_out, dtype=dtype, device=device)
    calls["info_nce"] = ("info_nce", (z, z))
    weight = torch.empty(config.vocab_size, config.width, dtype=dtype, device=device)
    bias = torch.empty(config.vocab_size, device=device)
    calls["masked_cross_entropy"] = ("masked_cross_entropy", (states, weight, bias, tokens.flatten()[:1].expand(len(states))))
    return {name: (name.split()[0], order(row, device.type), call) for name, (row, call) in calls.items()}
