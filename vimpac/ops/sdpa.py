"""Axial attention by torch's scaled_dot_product_attention, on transposed copies: made for long lines and products of axes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vimpac.ops.lines import from_lines, head_groups, line_pad, line_qkv, without_broken_padding


def axial_attention_sdpa(qkv, cls_qkv, axes, pad=None, dropout_p=0.0, seed=None, cls_in_context=True):
    """`axial_attention_reference` by torch's kernels, in qkv's dtype; dropout from torch's generator, not from `seed`."""
    outs, cls_outs = [], []
    qkv = without_broken_padding(qkv, pad)
    for heads, axis in head_groups(qkv.shape[5], axes):
        q, k, v = line_qkv(qkv, cls_qkv, heads, axis)
        B, S, L = q.shape[0], q.shape[1], q.shape[3] - 1
        k, v = k[..., : L + cls_in_context, :], v[..., : L + cls_in_context, :]
        is_key = None if pad is None else ~line_pad(pad, axis, q)[..., : L + cls_in_context].flatten(0, 1)
        out = _sdpa(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), is_key, dropout_p).unflatten(0, (B, S))
        outs.append(from_lines(out[..., :L, :], axis, qkv.shape[:4]))
        cls_outs.append(out[..., L, :].mean(1))
    return torch.cat(outs, 4), torch.cat(cls_outs, 1)


def _sdpa(q, k, v, is_key, dropout_p):
    """On CUDA in parts of 65,535 lines: torch's kernels have the lines on a grid dimension that takes no more."""
    with _exact_dropout(dropout_p):
        if q.device.type != "cuda" or q.shape[0] <= 65535:
            return F.scaled_dot_product_attention(q, k, v, is_key, dropout_p)
        masks = [None] * -(-q.shape[0] // 65535) if is_key is None else is_key.split(65535)
        parts = zip(q.split(65535), k.split(65535), v.split(65535), masks, strict=True)
        return torch.cat([F.scaled_dot_product_attention(*part, dropout_p) for part in parts])


def _exact_dropout(p: float) -> AbstractContextManager:
    """Without cuDNN's attention for rates that are no multiple of 1/16: some of its kernels round them, and torch 2.11 uses
    these kernels nevertheless (pytorch pull request 174245)."""
    exact = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return nullcontext() if (16 * p).is_integer() else sdpa_kernel(exact)
