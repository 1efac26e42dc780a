"""Seeds of dropout: what a micro-step draws is a function of (run's seed, update, micro-step, rank), so it can be drawn again.

A resumed run needs no generator states, and a batch that is computed in two passes has the same dropout in both.
"""

from __future__ import annotations

import numpy as np
import torch


def seed_dropout(device: torch.device, seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seed torch's generator of `device`. On a CUDA device that is two numbers on the host: nothing waits."""
    words = np.random.SeedSequence([seed % 2**64, step, micro_step, rank]).generate_state(2, np.uint32)
    generator_of(device).manual_seed(int(words[0]) | int(words[1]) << 32)


def generator_of(device: torch.device) -> torch.Generator:
    """The generator that F.dropout on `device` draws from."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
