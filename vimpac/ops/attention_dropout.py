"""Dropout of attention's probabilities, by (seed, element); axial_attention.py has the definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vimpac.dropout_rate import dropout_threshold
from vimpac.ops.lines import to_lines
from vimpac.ops.philox import philox, split_words

DROPOUT_ROUNDS, DROPOUT_BITS = 7, 16


def dropout_keep(seed: Tensor, p: float, shape: Sequence[int], heads: slice, axis: str, keys: int) -> Tensor:
    """Which probabilities dropout keeps, bool [B, S, n, L + 1, keys]."""
    B, T, H, W, _, N, _ = shape
    device = seed.device
    r = torch.arange(B * T * H * W, device=device).view(B, T, H, W, 1) * N + torch.arange(
        heads.start, heads.stop, device=device
    )
    r = to_lines(r, axis).transpose(2, 3)  # [B, S, n, L]
    r = torch.cat([r, r[..., :1]], -1)[..., None]  # [CLS] is named by its line's first token
    is_cls = torch.zeros(r.shape[-2], 1, dtype=torch.int64, device=device)
    is_cls[-1] = 1
    calls = torch.arange(1 if keys <= 8 else 4 * math.ceil(keys / 32), device=device)
    words = torch.stack(philox((*split_words(r), calls, is_cls), seed, DROPOUT_ROUNDS), -1)  # [B, S, n, L + 1, calls, 4]
    bits = torch.stack([words & 0xFFFF, words >> 16], -1)  # [..., calls, word, half]
    if keys > 8:  # [..., 32-key group, quarter, word, half] → key order
        bits = bits.unflatten(-3, (-1, 4)).transpose(-3, -2)
    return bits.flatten(4)[..., :keys] >= dropout_threshold(p, DROPOUT_BITS)
