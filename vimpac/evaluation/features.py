"""Vectors of videos from a trained backbone: [CLS], mean-pooled token states and contrastive features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vimpac.config import ModelConfig
from vimpac.distributed import World, sum_over_ranks
from vimpac.errors import InputError
from vimpac.evaluation.pretraining import histograms
from vimpac.model import ClassificationModel, PretrainModel

VECTORS = ("cls", "mean", "contrastive")
CHUNK_VIDEOS = 64
"""Videos that are read and computed together. A constant, so that the shapes of forward passes, and with them the last bits of
the results, do not depend on the number of processes."""


class Clips(Protocol):
    """Clips of some videos, such as `vimpac.data.test_clips.TestClips`."""

    def __len__(self) -> int:
        """Number of videos."""
        ...

    def read(self, first: int, count: int) -> np.ndarray:
        """int64 [count, clips, views, T, H, W] of the videos first, first + 1, …"""
        ...


@dataclass(frozen=True)
class Look:
    """How a model looks at clips.

    layer: whose output is taken, from 1; 0 = the embedding, None = the last. batch: clips per forward pass.
    padded: whether clips may hold PAD. autocast: dtype of mixed precision, None = float32.
    """

    layer: int | None = None
    batch: int = 64
    padded: bool = True
    autocast: torch.dtype | None = None


def vectors_of(model: nn.Module, layer: int | None) -> tuple[str, ...]:
    """The vectors that a model gives at a layer: only a pre-training model's last [CLS] has contrastive features."""
    assert isinstance(model, PretrainModel | ClassificationModel)
    last = layer in (None, model.config.layers)
    return VECTORS if isinstance(model, PretrainModel) and last else VECTORS[:2]


def check_layer(config: ModelConfig, layer: int | None) -> None:
    """Raises InputError unless the model has this layer."""
    if layer is not None and not 0 <= layer <= config.layers:
        raise InputError(f"layer is {layer}, expected 1 to {config.layers}, the last, or 0 for the embedding")


def mean_pooled(hidden: Tensor, pad: Tensor) -> Tensor:
    """Mean over the tokens that are not PAD: hidden [B, T, H, W, C], pad [B, T, H, W] bool → [B, C] float32, 0 without any."""
    kept = (~pad).flatten(1).float()  # [B, L]
    total = torch.einsum("bl,blc->bc", kept, hidden.flatten(1, 3).float())
    return total / kept.sum(1, keepdim=True).clamp_(min=1)


def clip_vectors(
    model: PretrainModel | ClassificationModel, tokens: Tensor, layer: int | None = None, padded: bool = True
) -> dict[str, Tensor]:
    """Clips [B, T, H, W] → float32 cls [B, C], mean [B, C] and, where `vectors_of` lists it, contrastive [B, head_out].

    The contrastive head's features are not normalised. The model must be in evaluation mode.
    """
    cls, hidden = model.backbone(tokens, padded, layer)
    found = {"cls": cls.float(), "mean": mean_pooled(hidden, tokens == model.config.pad_id)}
    if isinstance(model, PretrainModel) and "contrastive" in vectors_of(model, layer):
        found["contrastive"] = model.cls_head(cls).float()
    return found


@torch.inference_mode()
def chunk_vectors(model: PretrainModel | ClassificationModel, clips: np.ndarray, look: Look) -> dict[str, Tensor]:
    """Clips [n, clips, views, T, H, W] → each vector of the n videos on the CPU: the mean over a video's clips and views.

    One forward pass per clip and view, `look.batch` at a time; the host waits for the device once, at the end.
    """
    device = next(model.parameters()).device
    tokens = torch.from_numpy(clips).flatten(0, 2)
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    parts = []
    for part in tokens.split(look.batch):
        with torch.autocast(device.type, look.autocast, enabled=look.autocast is not None):
            parts.append(clip_vectors(model, part.to(device, non_blocking=True), look.layer, look.padded))
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: x.unflatten(0, (len(clips), -1)).mean(1).cpu() for name, x in rows.items()}


def chunk_histograms(clips: np.ndarray, vocab_size: int) -> Tensor:
    """Clips [n, clips, views, T, H, W] → the share of each id in all of a video's tokens [n, V]: a baseline without a model."""
    counts = histograms(torch.from_numpy(clips).flatten(1).view(len(clips), 1, 1, -1), vocab_size)
    return counts / counts.sum(1, keepdim=True).clamp_(min=1)


class Chunk(NamedTuple):
    """Some consecutive videos."""

    number: int
    first: int
    videos: int


def chunks_of(videos: int) -> list[Chunk]:
    """All videos in order, CHUNK_VIDEOS at a time."""
    starts = range(0, videos, CHUNK_VIDEOS)
    return [Chunk(i, first, min(CHUNK_VIDEOS, videos - first)) for i, first in enumerate(starts)]


def read_ahead(clips: Clips, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Each chunk with its clips. A thread reads the next one meanwhile, so that the model need not wait."""
    with ThreadPoolExecutor(1) as reader:
        waiting = None
        for chunk in chunks:
            ahead = chunk, reader.submit(clips.read, chunk.first, chunk.videos)
            if waiting:
                yield waiting[0], waiting[1].result()
            waiting = ahead
        if waiting:
            yield waiting[0], waiting[1].result()


def check_finite(vectors: dict[str, Tensor], names: list[str]) -> None:
    """Raises InputError that names the first video with a vector that is not finite."""
    for kind, x in vectors.items():
        bad = ~torch.isfinite(x).all(1)
        if bad.any():
            raise InputError(
                f"the {kind} vector of {names[int(bad.int().argmax())]} is not finite: use --precision fp32, or a model that "
                "was trained without overflow"
            )


def all_vectors(
    model: PretrainModel | ClassificationModel | None,
    clips: Clips,
    names: list[str],
    look: Look,
    world: World,
    codes: int = 0,
    tick: Callable[[int], None] = lambda videos: None,
) -> dict[str, np.ndarray]:
    """float32 [n, …] of all videos, on every rank: the model's vectors, or without a model `histogram` [n, codes].

    names: of the videos, for messages. tick: called with the number of videos after each chunk. The ranks share the chunks; the
    result does not depend on how many there are.
    """
    found: dict[str, Tensor] = {}
    for chunk, tokens in read_ahead(clips, chunks_of(len(clips))[world.rank :: world.size]):
        part = {"histogram": chunk_histograms(tokens, codes)} if model is None else chunk_vectors(model, tokens, look)
        check_finite(part, names[chunk.first : chunk.first + chunk.videos])
        for name, x in part.items():
            found.setdefault(name, torch.zeros(len(clips), x.shape[1]))[chunk.first : chunk.first + chunk.videos] = x
        tick(chunk.videos)
    sizes = vector_sizes(model, look.layer, codes)
    whole = {name: found.get(name, torch.zeros(len(clips), size)) for name, size in sizes.items()}
    return {name: sum_over_ranks(x, world).numpy() for name, x in whole.items()}  # the other ranks' rows are 0


def vector_sizes(model: PretrainModel | ClassificationModel | None, layer: int | None, codes: int = 0) -> dict[str, int]:
    """The width of each vector of `all_vectors`."""
    if model is None:
        return {"histogram": codes}
    sizes = {"cls": model.config.width, "mean": model.config.width, "contrastive": model.config.head_out}
    return {name: sizes[name] for name in vectors_of(model, layer)}
