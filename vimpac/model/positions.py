"""Factorised positions (Eq. 8): pos(t, i, j) = time(t) + height(i) + width(j), and one for [CLS]."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IN_BACKBONE = "backbone.positions."  # prefix of these parameters' names in a whole model
AXES = ("time", "height", "width")  # parameter names, in the order of the grid


class Positions(nn.Module):
    time: nn.Parameter
    height: nn.Parameter
    width: nn.Parameter

    def __init__(self, grid: tuple[int, int, int], width: int):
        super().__init__()
        for name, size in zip(AXES, grid, strict=True):
            setattr(self, name, nn.Parameter(torch.empty(size, width)))
        self.cls = nn.Parameter(torch.empty(width))

    def reset_parameters(self, std: float) -> None:
        """Initialise so that the sum over the three axes, and [CLS]'s position, have standard deviation `std`."""
        for name in AXES:
            nn.init.normal_(getattr(self, name), std=std / math.sqrt(3))
        nn.init.normal_(self.cls, std=std)

    def forward(self) -> Tensor:
        """Positions of the grid [T, H, W, C]."""
        return self.time[:, None, None] + self.height[:, None] + self.width


def interpolate(table: Tensor, size: int) -> Tensor:
    """Resample positions [n, C] linearly along their axis to [size, C]. With n = size the values stay the same."""
    if table.shape[0] == size:
        return table
    return F.interpolate(table.T[None].float(), size=size, mode="linear", align_corners=False)[0].T.to(table.dtype)


def interpolate_state(state: Mapping[str, Tensor], grid: tuple[int, int, int], prefix: str) -> dict[str, Tensor]:
    """A state dict with the position tables under `prefix` resampled to another grid; the rest is untouched."""
    state = dict(state)
    for name, size in zip(AXES, grid, strict=True):
        if prefix + name in state:
            state[prefix + name] = interpolate(state[prefix + name], size).contiguous()
    return state
