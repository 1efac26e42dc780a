"""Fine-tuning as a task of the training loop: labelled clips, cross-entropy, validation between updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vimpac import weights
from vimpac.config import FinetuneConfig
from vimpac.data.labelled_clips import LabelledClips
from vimpac.distributed import World
from vimpac.model import ClassificationModel
from vimpac.training.batch import LabelledBatch
from vimpac.training.device import autocast_dtype
from vimpac.training.finetune_step import FinetuneStep
from vimpac.training.loop import Loop
from vimpac.training.metrics import read_lines
from vimpac.training.optim import adamw
from vimpac.training.plan import BatchPlan, Schedule
from vimpac.training.start import restore
from vimpac.weights import Training

VALIDATION = "validation_top1"
BEST = "best.safetensors"


class FinetuneTask:
    """Batches of labelled clips, their gradients, and the accuracy on validation videos every `every` updates.

    validate: returns top-1 accuracy on the first rank, None elsewhere; all ranks call it. every: 0 = after the last update.
    keep_best: keep the model with the best validation accuracy so far in RUN/best.safetensors.
    """

    def __init__(
        self,
        module: FinetuneStep,
        clips: LabelledClips,
        plan: BatchPlan,
        validate: Callable[[], float | None],
        every: int,
        keep_best: bool,
    ):
        self.module, self.clips, self.plan = module, clips, plan
        self.validate, self.every, self.keep_best = validate, every, keep_best
        self.best: float | None = None  # validation accuracy so far; None = not looked up since the start or the resume

    def make_batch(self, first: int, videos: int) -> LabelledBatch:
        """Samples first, first + 1, …, on the CPU."""
        drawn = self.clips.batch(first, videos)
        return LabelledBatch(torch.from_numpy(drawn.tokens), torch.from_numpy(drawn.labels))

    def accumulate(self, loop: Loop, first: int, unit: list[LabelledBatch]) -> dict[str, Tensor]:
        """Add the gradients of micro-step `first`. Returns its part of the update's metrics."""
        (batch,) = unit
        return {name: x / self.plan.micro_steps for name, x in loop.micro_step(first, batch).items()}

    def measure(self, loop: Loop) -> dict[str, float]:
        """The validation accuracy when it is due; empty on ranks other than the first."""
        last = loop.step == loop.schedule.steps
        if not (last or (self.every and loop.step % self.every == 0)):
            return {}
        self.module.eval()
        top1 = self.validate()
        self.module.train()
        if top1 is None:
            return {}
        if self.best is None:  # then in memory: recent lines may not be written yet
            self.best = best_before(loop.run, loop.step)
        if self.keep_best and top1 > self.best:
            known = loop.training
            weights.save(self.module.model, loop.run / BEST, known.to_header()["tokenizer"], known.fps, known.class_names)
        self.best = max(self.best, top1)
        return {VALIDATION: top1}

    def warning(self) -> None:
        """Fine-tuning has nothing to say beside its metrics."""


def best_before(run: Path, step: int) -> float:
    """The best validation accuracy that a run's metrics hold of the updates before `step`; -1 if there is none."""
    lines = read_lines(run / "metrics.jsonl")
    return max((line[VALIDATION] for line in lines if line["step"] < step and line.get(VALIDATION) is not None), default=-1.0)


def finetuning_loop(
    config: FinetuneConfig,
    model: ClassificationModel,
    training: Training,
    clips: LabelledClips,
    validate: Callable[[FinetuneStep], float | None],
    plan: BatchPlan,
    schedule: Schedule,
    world: World,
    checkpoint: dict | None = None,
    compiled: bool = False,
) -> Loop:
    """The loop of a fine-tuning run on `clips`, from the model's weights or a checkpoint of the run."""
    model = model.to(world.device)
    model.backbone.activation_checkpointing = config.activation_checkpointing
    model.backbone.residual = config.residual
    autocast = autocast_dtype(config.precision, world.device)
    balance = None
    if config.class_weights == "balanced":
        balance = balanced_weights(clips.found.labels, model.classifier.out_features).to(world.device)
    options = config.label_smoothing, config.last_dropout, config.freeze_backbone
    module = FinetuneStep(model, clips.padded, balance, *options, autocast)
    shard = config.shard_optimizer and world.size > 1
    scale = layer_scale(config.layer_decay, model.config.layers)
    optimizer = adamw(module, config.weight_decay, config.betas, config.eps, shard, scale)
    scaler = torch.amp.GradScaler(world.device.type, enabled=autocast == torch.float16)
    step = 0 if checkpoint is None else restore(checkpoint, Path(config.output), module, optimizer, scaler)
    if compiled:
        model.backbone.compile_parts()
    every = round(config.validate_every * len(clips.found.videos) / config.batch_size)
    if config.validate_every:
        every = max(1, every)
    task = FinetuneTask(module, clips, plan, lambda: validate(module), every, config.keep_best)
    return Loop(task, optimizer, scaler, config, plan, schedule, world, training, step)


def balanced_weights(labels: np.ndarray, classes: int) -> Tensor:
    """float32 [classes]: the inverse of each class's share of the videos, over the number of classes; 0 for one without videos.

    Their mean over the videos is 1 where every class has one.
    """
    counts = torch.bincount(torch.from_numpy(labels), minlength=classes).float()
    return torch.where(counts > 0, len(labels) / (classes * counts.clamp(min=1)), 0.0)


def layer_scale(decay: float, layers: int) -> Callable[[str], float]:
    """By a parameter's name, the factor of its learning rate: 1 for the classifier, decay ** n for the n-th layer below it.

    The embedding and the positions are one more layer, at the bottom.
    """

    def scale(name: str) -> float:
        parts = name.split(".")
        if "backbone" not in parts:
            return 1.0
        if "layers" in parts:
            return decay ** (layers - int(parts[parts.index("layers") + 1]))
        return 1.0 if "final_norm" in parts else decay ** (layers + 1)

    return scale
