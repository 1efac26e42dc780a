"""A step of fine-tuning against a straightforward loop, and against a step of pre-training of as many videos.

Ours is the run itself: vimpac.training.loop.Loop with fine-tuning as its task, labelled clips from a store of random ids,
dropout 0.1, clipping, AdamW. naive eager is the loop that one would first write around naive.py: the same clips, cross-entropy
on [CLS], backward, clipping, fused AdamW. The third row is our step of pre-training, which has two clips of each video and both
heads: a step of fine-tuning should cost at most half of it. All take turns in one run.

Check: logits of two clips, without dropout, against naive.py in float64 on the same weights; of pre-training as in training.py.

On a GPU: bfloat16 autocast, 128 videos. On a CPU: Small, float32, 8 videos.

    python benchmarks/finetune.py [--videos 8] [--quick]
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import harness
import naive
import report
from harness import Case, Impl
from train_step import StepBenchmark
from training import BOUNDS, CHECKED, PRECISIONS, STEPS, TINY, Cell, Stores, Trained
from vimpac.config import FinetuneConfig, ModelConfig
from vimpac.data.labelled import LabelledVideos
from vimpac.data.labelled_clips import LabelledClips
from vimpac.distributed import World
from vimpac.model import ClassificationModel
from vimpac.training.batch import LabelledBatch
from vimpac.training.finetune_task import finetuning_loop
from vimpac.training.loader import BatchLoader
from vimpac.training.loop import Loop
from vimpac.training.memory import keep_freed_memory
from vimpac.training.optim import adamw
from vimpac.training.plan import Schedule, plan_classification
from vimpac.weights import Training

CLASSES = 400
CPU_VIDEOS, GPU_VIDEOS, QUICK_VIDEOS = 8, 128, 2
PRETRAINING = "pre-training"
SPEED_GOAL, COST_GOAL = 1.2, 0.5  # times as fast as naive eager on a CPU; of the cost of a step of pre-training


class Ours(Trained):
    def __init__(self, loop: Loop):
        self.loop, self.model = loop, loop.module
        loop.loader = BatchLoader(loop.make_batch, loop.first_samples(), loop.world.device)
        loop.module.train()

    @property
    def waited(self) -> float:
        return self.loop.loader.waited

    def logits(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, self.model.autocast, enabled=self.model.autocast is not None):
            return self.model.model(tokens, False)

    def step(self) -> None:
        self.loop.update()
        self.loop.step += 1
        self.loop.optimizer.zero_grad()

    def close(self) -> None:
        self.loop.close()


class NaiveClassifier(nn.Module):
    def __init__(self, backbone: naive.NaiveModel):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.config.width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(self.backbone.backbone(tokens, False)[0])


class Naive(Trained):
    def __init__(self, model: NaiveClassifier, config: FinetuneConfig, clips: LabelledClips, autocast: torch.dtype | None):
        self.model, self.config, self.clips, self.autocast = model, config, clips, autocast
        self.device = model.classifier.bias.device
        for name, p in model.backbone.named_parameters():  # of heads that classify nothing
            p.requires_grad_(not name.startswith(("dense", "bias", "cls_head")))
        self.optimizer = adamw(model, config.weight_decay, config.betas, config.eps)
        self.first, self.waited = 0, 0.0
        model.train()

    def mixed(self):
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def logits(self, tokens: Tensor) -> Tensor:
        with self.mixed():
            return self.model(tokens)

    def step(self) -> None:
        drawn = self.clips.batch(self.first, self.config.batch_size)
        self.first += self.config.batch_size
        batch = LabelledBatch(*(torch.from_numpy(x).to(self.device) for x in (drawn.tokens, drawn.labels)))
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-5
        with self.mixed():
            loss = F.cross_entropy(self.model(batch.tokens), batch.labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


class FinetuneCell:
    """One model on some labelled videos, and the ways to train it."""

    def __init__(self, bench: StepBenchmark, stores: Stores, config: ModelConfig, videos: int):
        self.pretraining = Cell(bench, stores, config, videos)
        self.config, self.device, self.autocast = config, self.pretraining.device, self.pretraining.autocast
        folder = str(stores.folder / "tuned")
        options = {"precision": PRECISIONS[bench.dtype], "batch_size": videos, "micro_batch": videos, "steps": STEPS}
        self.train = FinetuneConfig(start="none", output=folder, model=config, **options)
        torch.manual_seed(0)
        model = ClassificationModel(config, CLASSES)
        nn.init.normal_(model.classifier.weight, std=0.02)  # as it starts, at zero, every model would be right
        self.weights = model.state_dict()

    @property
    def clips(self) -> LabelledClips:
        """The same each time it is asked for."""
        store = self.pretraining.store
        labels = LabelledVideos(np.arange(len(store)), np.arange(len(store)) % CLASSES)
        return LabelledClips(store, labels, [0], self.config.grid[0], self.config.pad_id, seed=0)

    def ours(self) -> Ours:
        model = ClassificationModel(self.config, CLASSES)
        model.load_state_dict(self.weights)
        plan = plan_classification(self.train.batch_size, self.train.micro_batch, 1)
        training = Training(class_names=tuple(map(str, range(CLASSES))))
        schedule, world = Schedule(STEPS, STEPS), World(0, 1, self.device)
        return Ours(finetuning_loop(self.train, model, training, self.clips, lambda step: None, plan, schedule, world))

    def naive_model(self) -> NaiveClassifier:
        model = NaiveClassifier(self.pretraining.naive_model())
        state = {naive.naive_name(name, model.backbone): x for name, x in self.weights.items() if "classifier" not in name}
        missing = model.backbone.load_state_dict(state, strict=False)
        assert not missing.unexpected_keys
        model.classifier.load_state_dict({name: self.weights[f"classifier.{name}"] for name in ("weight", "bias")})
        return model

    def naive(self) -> Naive:
        return Naive(self.naive_model().to(self.device), self.train, self.clips, self.autocast)

    def check(self, trained: Trained) -> float:
        if not isinstance(trained, Ours | Naive):
            return self.pretraining.check(trained)
        tokens = torch.from_numpy(self.clips.batch(0, CHECKED).tokens).to(self.device)
        exact = self.naive_model().to(self.device, torch.float64).eval()
        trained.model.eval()
        with torch.no_grad():
            error = harness.distance([trained.logits(tokens)], [exact(tokens)])
        trained.model.train()
        return error


def comparison(rows: list[dict]) -> list[str]:
    ms = {row["impl"]: row["ms"] for row in rows if row["ms"] is not None}
    lines = []
    if {"ours", "naive eager"} <= ms.keys():
        lines.append(
            f"ours is {ms['naive eager'] / ms['ours']:.2f} times as fast as naive eager (goal on a CPU ≥ {SPEED_GOAL})"
        )
    if {"ours", PRETRAINING} <= ms.keys():
        share = ms["ours"] / ms[PRETRAINING]
        lines.append(f"a step costs {share:.2f} of one of pre-training of as many videos (goal ≤ {COST_GOAL})")
    return lines


def main(argv: list[str] | None = None) -> int:
    videos = {"type": int, "help": f"videos a step; default: {GPU_VIDEOS} on a GPU, {CPU_VIDEOS} on a CPU"}
    options = harness.arguments(__doc__, argv, videos=videos)
    if options.device == "cpu":
        keep_freed_memory()  # as train.py does; for all sides, since it is the process's
    bench = StepBenchmark(options, "finetune")
    count = options.videos or (GPU_VIDEOS if bench.on_gpu else QUICK_VIDEOS if bench.quick else CPU_VIDEOS)
    config = ModelConfig.small(**TINY) if bench.quick else ModelConfig.small()
    print(report.header(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        cell = FinetuneCell(bench, Stores(Path(folder)), config, count)
        case = Case("fine-tuning step", f"small 5x128 videos={count}", bench.dtype, (), cell.check, ("step",))
        make = partial(Impl, bound=BOUNDS[bench.dtype], graph=False)
        impls = [
            make("ours", cell.ours, ours=True, required=True),
            make("naive eager", cell.naive),
            make(PRETRAINING, partial(cell.pretraining.ours, False)),
        ]
        for impl in [[impl] for impl in impls] if bench.on_gpu else [impls]:
            bench.rows += bench.race(case, impl)
    for row in bench.rows:
        row |= {"preset": "small 5x128", "videos": count}
        row["videos_per_s"] = None if row["ms"] is None else 1e3 * count / row["ms"]
        print(report.line(row), flush=True)
    print("\n".join(["", *comparison(bench.rows)]))
    return bench.finish(small=not bench.on_gpu)


if __name__ == "__main__":
    sys.exit(main())
