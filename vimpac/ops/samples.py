"""Sample calls of the ops, as a model in training makes them: for checks and reports before anything runs."""

from __future__ import annotations

import torch

from vimpac.config import ModelConfig
from vimpac.layouts import parse_layout
from vimpac.ops.axial_attention import sample_call as attention_call
from vimpac.ops.bias_gelu import sample_call as gelu_call
from vimpac.ops.block_mask import sample_call as mask_call
from vimpac.ops.dispatch import Call
from vimpac.ops.dropout_add import sample_call as dropout_call
from vimpac.ops.info_nce import sample_call as contrastive_call
from vimpac.ops.masked_cross_entropy import sample_call as token_call
from vimpac.ops.residual_norm import sample_call as norm_call


def sample_calls(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Call]:
    """Label → call, for one clip: by op, and attention's by block. The tensors are of `dtype` and hold nothing."""
    blocks = dict.fromkeys(parse_layout(config.layout, config.heads))
    calls = {f"axial_attention {'|'.join(axes)}": attention_call(config, axes, device, dtype) for axes in blocks}
    calls["bias_gelu"] = gelu_call(config, device, dtype)
    calls["block_mask"] = mask_call(config, device)
    if config.dropout > 0:
        calls["dropout_add"] = dropout_call(config, device, dtype)
    calls["info_nce"] = contrastive_call(config, device, dtype)
    calls["masked_cross_entropy"] = token_call(config, device, dtype)
    calls["residual_norm"] = norm_call(config, device, dtype)
    return calls
