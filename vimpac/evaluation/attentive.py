"""Trains the attentive probe (V-JEPA, Bardes et al., 2024) on the frozen token states of a backbone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vimpac.evaluation.features import Clips, Look
from vimpac.model import ClassificationModel, PretrainModel
from vimpac.model.attentive import AttentiveProbe

CACHE_BYTES = 2 << 30
"""Token states that may stay in memory. Above, every epoch computes them again."""


class AttentiveTraining(NamedTuple):
    """How an attentive probe is trained: with AdamW, its rate rising for a tenth of the updates and then falling to 0."""

    epochs: int
    learning_rate: float
    weight_decay: float
    batch_videos: int
    seed: int


class States:
    """Token states of videos from a frozen backbone: float32 [n, L, C] and PAD [n, L] bool, L = clips · views · T · H · W."""

    def __init__(
        self,
        model: PretrainModel | ClassificationModel,
        clips: Clips,
        rows: np.ndarray,
        look: Look,
        most_bytes: int = CACHE_BYTES,
    ):
        """rows: int [n], which of the clips' videos these are."""
        self.model, self.clips, self.rows, self.look, self.most_bytes = model, clips, rows, look, most_bytes
        self.device = next(model.parameters()).device
        self.cached: dict[int, tuple[Tensor, Tensor]] = {}
        self.cached_bytes = 0

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, videos: np.ndarray) -> tuple[Tensor, Tensor]:
        """States and PAD of the videos [b], on the model's device."""
        missing = [int(i) for i in videos if int(i) not in self.cached]
        computed = dict(zip(missing, self._compute(missing), strict=True)) if missing else {}
        for i, found in computed.items():
            size = found[0].nbytes
            if self.cached_bytes + size <= self.most_bytes:
                self.cached[i] = found
                self.cached_bytes += size
        found = [computed.get(int(i)) or self.cached[int(i)] for i in videos]
        return torch.stack([x for x, _ in found]), torch.stack([pad for _, pad in found])

    @torch.no_grad()
    def _compute(self, videos: list[int]) -> list[tuple[Tensor, Tensor]]:
        tokens = torch.from_numpy(np.concatenate([self.clips.read(int(self.rows[i]), 1) for i in videos])).to(self.device)
        parts = []
        for part in tokens.flatten(0, 2).split(self.look.batch):
            with torch.autocast(self.device.type, self.look.autocast, enabled=self.look.autocast is not None):
                parts.append(self.model.backbone(part, self.look.padded, self.look.layer)[1].float())
        states = torch.cat(parts).view(len(videos), tokens[0].numel(), -1)
        pad = (tokens == self.model.config.pad_id).flatten(1)
        return [(x.clone(), y) for x, y in zip(states, pad, strict=True)]  # clones, or one cached video would keep all


def attentive_probe(
    train: States,
    labels: np.ndarray,
    test: States,
    classes: int,
    config: AttentiveTraining,
    tick: Callable[[int], None] = lambda videos: None,
) -> np.ndarray:
    """Labels int64 [m] of the videos `test` by a probe trained on `train`, whose labels are int64 [n].

    A function of states, labels and config alone. tick: called with the number of videos after each update.
    """
    model, device = train.model.config, train.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        probe = AttentiveProbe(model.width, math.gcd(model.width, model.heads), classes)
    probe.to(device).train()
    targets = torch.from_numpy(labels).to(device)
    optimizer = torch.optim.AdamW(_groups(probe, config.weight_decay), lr=config.learning_rate)
    steps = config.epochs * math.ceil(len(labels) / config.batch_videos)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for epoch in range(config.epochs):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(labels))
        for first in range(0, len(order), config.batch_videos):
            chosen = order[first : first + config.batch_videos]
            loss = F.cross_entropy(probe(*train.batch(chosen)), targets[torch.from_numpy(chosen).to(device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            tick(len(chosen))
    return _predict(probe.eval(), test, config.batch_videos)


@torch.no_grad()
def _predict(probe: AttentiveProbe, states: States, videos: int) -> np.ndarray:
    parts = np.split(np.arange(len(states)), range(videos, len(states), videos))
    return torch.cat([probe(*states.batch(part)).argmax(-1) for part in parts]).cpu().numpy()


def _groups(probe: AttentiveProbe, weight_decay: float) -> list[dict]:
    """Weight decay on matrices only."""
    matrices = [p for p in probe.parameters() if p.ndim > 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": [p for p in probe.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def _rate(step: int, steps: int) -> float:
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
