"""Class scores of videos: several clips and views of each, softmax averaged, over any number of processes.

Videos are scored in chunks, the same ones for any number of processes, so that every forward pass has the same shape and the
scores are the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from vimpac import distributed
from vimpac.data.test_clips import TestClips
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.model import ClassificationModel

Counter = Callable[[int], None]


@torch.inference_mode()
def score_videos(
    model: ClassificationModel,
    clips: TestClips,
    world: World,
    batch: int,
    autocast: torch.dtype | None = None,
    padded: bool = True,
    report: Counter = lambda clips: None,
) -> np.ndarray | None:
    """Softmax of the model's logits, averaged over views: float32 [videos, clips, K] on the first rank, None on others.

    model: on this rank's device; it is in evaluation mode meanwhile. batch: the most clips of a forward pass; a video's clips
    share passes with those of other videos, and are only split if there are more than `batch`. autocast: dtype of mixed
    precision, None = float32. padded: whether clips may hold PAD. report: called after each video of this rank with its clips.
    Every rank must call this. Raises InputError on all ranks if a score is not a finite number, naming the video.
    """
    if batch < 1:
        raise InputError(f"batch is {batch}, expected at least 1 clip a forward pass")
    scorer = _Scorer(model, clips, batch, autocast, padded, report)
    training = model.training
    model.eval()
    try:
        own = list(range(world.rank, scorer.chunks, world.size))
        scorer.score(own[:1])
        scorer.check(world)  # a broken model is noticed at once
        scorer.score(own[1:])
        scorer.check(world)
    finally:
        model.train(training)
    return scorer.gathered(world)


def clip_scores(model: ClassificationModel, tokens: Tensor, batch: int, padded: bool = True) -> Tensor:
    """Softmax of the model's logits, averaged over views.

    tokens: ids [videos, clips, views, T, H, W] on the CPU → float32 [videos, clips, K] on the model's device. batch: the most
    clips of a forward pass; the passes have equally many, as far as possible.
    """
    flat, device = tokens.flatten(0, 2), model.classifier.weight.device
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    passes = math.ceil(len(flat) / batch)
    softmax = [model(part, padded).float().softmax(-1) for part in flat.split(math.ceil(len(flat) / passes))]
    return torch.cat(softmax).unflatten(0, tokens.shape[:3]).mean(2)


class _Scorer:
    """This rank's chunks and their scores."""

    def __init__(
        self,
        model: ClassificationModel,
        clips: TestClips,
        batch: int,
        autocast: torch.dtype | None,
        padded: bool,
        report: Counter,
    ):
        self.model, self.clips, self.batch, self.autocast, self.padded = model, clips, batch, autocast, padded
        self.report, self.device = report, model.classifier.weight.device
        self.views = len(clips.views)
        self.chunk = max(1, batch // (clips.clips * self.views))  # videos
        self.chunks = math.ceil(len(clips.videos) / self.chunk)
        self.scores: dict[int, np.ndarray] = {}  # chunk → [videos, clips, K]
        self.bad = len(clips.videos)  # the first video with a score that is not finite

    def score(self, chunks: Sequence[int]) -> None:
        """Scores of these chunks. The device has the next chunk to work on while the host takes in the last one's scores."""
        arriving = None
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            for number in chunks:
                if self.bad < len(self.clips.videos):
                    break
                first = number * self.chunk
                count = min(self.chunk, len(self.clips.videos) - first)
                tokens = torch.from_numpy(self.clips.read(first, count))
                leaving = _Arriving(number, clip_scores(self.model, tokens, self.batch, self.padded))
                if arriving:
                    self.take(arriving)
                arriving = leaving
        if arriving:
            self.take(arriving)

    def take(self, arriving: _Arriving) -> None:
        scores = arriving.wait()
        self.scores[arriving.chunk] = scores
        wrong = ~np.isfinite(scores).all((1, 2))
        if wrong.any():
            self.bad = min(self.bad, arriving.chunk * self.chunk + int(wrong.argmax()))
        for video in scores:
            self.report(len(video) * self.views)

    def check(self, world: World) -> None:
        """Raises InputError on all ranks if one has scores that are not finite."""
        bad = min(int(x) for x in distributed.gather_rows(torch.tensor(self.bad), world))
        if bad < len(self.clips.videos):
            name = self.clips.store.names[self.clips.videos[bad]]
            half = self.autocast is not None
            way_out = "try --precision fp32" if half else "its weights are damaged or its training diverged"
            raise InputError(
                f"the model's scores of {name} are not finite numbers (NaN), in {'mixed precision' if half else 'float32'}: "
                f"nothing is evaluated; {way_out}"
            )

    def gathered(self, world: World) -> np.ndarray | None:
        """The scores of all ranks' chunks [videos, clips, K] on the first rank."""
        clips, classes = self.clips.clips, self.model.classifier.out_features
        own = torch.zeros(math.ceil(self.chunks / world.size), self.chunk, clips, classes)
        for number, scores in self.scores.items():
            own[number // world.size, : len(scores)] = torch.from_numpy(scores)
        parts = distributed.gather_on_first(own, world)
        return None if parts is None else torch.stack(parts, 1).flatten(0, 2)[: len(self.clips.videos)].numpy()


class _Arriving:
    """Scores on their way to the host."""

    def __init__(self, chunk: int, scores: Tensor):
        self.chunk, self.host, self.copied = chunk, scores.to("cpu", non_blocking=True), None
        if scores.device.type == "cuda":
            self.copied = torch.cuda.Event()
            self.copied.record()

    def wait(self) -> np.ndarray:
        if self.copied is not None:
            self.copied.synchronize()
        return self.host.numpy()
