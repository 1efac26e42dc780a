"""A fine-tuning run, from top to bottom."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vimpac import distributed, weights
from vimpac.config import FROM_SCRATCH, FinetuneConfig
from vimpac.data.store import TokenStore
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.evaluation.classified import Classified
from vimpac.evaluation.classify import score_videos
from vimpac.evaluation.folder import replacing_folder
from vimpac.evaluation.inputs import output_beside
from vimpac.evaluation.scores import accuracies, average
from vimpac.training.device import plain_ops, resolve_compile
from vimpac.training.facts import start_facts
from vimpac.training.finetune_data import FinetuneClips, FinetuneData, make_clips, read_data
from vimpac.training.finetune_start import fit_to_store, read_start, start_notes, starting_model
from vimpac.training.finetune_step import FinetuneStep
from vimpac.training.finetune_task import finetuning_loop
from vimpac.training.loop import Loop
from vimpac.training.memory import MemoryUse, explaining_model_size, keep_freed_memory
from vimpac.training.metrics import MetricsLog
from vimpac.training.plan import plan_classification, plan_steps
from vimpac.training.progress import Progress
from vimpac.training.run import describe, open_run, start_run
from vimpac.training.session import check_data, check_machine, end_run, synthetic_store, train_to_end
from vimpac.training.signals import handling_signals

METRICS = ("loss", "accuracy")
MOTION = "motion"  # the label of generated videos
SCRATCH = "from-scratch"


def finetune(config: FinetuneConfig) -> dict | None:
    """Run `config` to its end and return the evaluation (None on ranks other than the first).

    Raises InputError for anything the user can fix, Stopped after SIGTERM, SIGHUP or SIGINT.
    """
    run = Path(config.output)
    if config.compare_scratch and (run / "config.json").exists() and not config.resume:  # said before the other run's hours
        raise InputError(f"run folder {run} exists: add --resume to continue it, or give another --output")
    compared = None
    with distributed.join_world() as world:
        if config.compare_scratch:  # first, so that the run's last line has both accuracies
            with ExitStack() as held:
                compared = _finetune(from_scratch(config), world, held)
        with ExitStack() as held:
            return _finetune(config, world, held, compared)


def from_scratch(config: FinetuneConfig) -> FinetuneConfig:
    """The same run on a new model of the same shape, in a folder beside the run's."""
    trained = read_start(config)
    assert trained is not None
    model = replace(trained.model.config, dropout=config.model.dropout)
    output = f"{config.output}-{SCRATCH}"
    done = (Path(output) / "config.json").exists() and not (Path(config.output) / "config.json").exists()
    options: dict[str, Any] = {"start": FROM_SCRATCH, "scratch_epochs": 1.0, "compare_scratch": False, "output": output}
    return replace(config, model=model, resume=config.resume or done, **options)


def _finetune(config: FinetuneConfig, world: World, held: ExitStack, compared: dict | None = None) -> dict | None:
    # Open the store, and read what there is to train on. Nothing is written before all options are checked.
    check_data(config)
    before = read_start(config)
    grid = config.model.grid if before is None else before.model.config.grid
    labels, path = config.labels, config.data
    if path is None:
        made, drawn = synthetic_store(config.output, config.synthetic_videos, grid, world)
        path = str(made)
        if labels is None:
            labels, config = str(drawn), replace(config, label_column=config.label_column or MOTION)
    if labels is None:
        raise InputError("--labels is missing: expected a label file, or the folder of a data set's files (docs/data.md)")
    store = TokenStore(path)
    start = fit_to_store(config, before, store)
    config, data = start.config, read_data(config, labels, store)
    clips = make_clips(config, store, data)
    fps = store.fps / clips.training.every
    # Plan the run.
    plan = plan_classification(config.batch_size, config.micro_batch, world.size)
    epochs = config.epochs * (config.scratch_epochs if config.from_scratch else 1)
    schedule = plan_steps(config.steps, epochs, None, config.batch_size, len(data.training.videos))
    memory = MemoryUse.of_run(config, plan.micro_batch, 1, 0, world.device)
    calls = check_machine(config, memory, plan, world)
    run, description = Path(config.output), describe(config, store, labels=data.describe(store))
    resumes = (run / "config.json").exists()
    checkpoint = open_run(run, description, config.resume, store, world.device)
    compiled, why_not = resolve_compile(config.compile, world.device)
    # Build the model and its loop.
    if world.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)
    with explaining_model_size(world.device):
        model = starting_model(start, data.classes)

        def validate(step: FinetuneStep) -> float | None:
            scores = score_videos(step.model, clips.validation, world, plan.micro_batch, step.autocast, clips.validation.padded)
            return None if scores is None else accuracies(average(scores), data.validation.labels)["top1"]

        training = weights.Training(store.tokenizer, fps, data.classes)
        loop = finetuning_loop(config, model, training, clips.training, validate, plan, schedule, world, checkpoint, compiled)
    start_run(run, description, store, world, loop.step, held)
    log = MetricsLog(run, world, loop.step, METRICS)
    with Progress(schedule.steps, loop.step, enabled=world.is_first) as progress:
        notes = (
            f"{run} holds no run to resume: a new run starts" if config.resume and not resumes else None,
            *start_facts(loop, store, len(data.training.videos), len(data.validation.videos)),
            *start_notes(before, config, fps, data.classes),
            *data.notes,
            plain_ops(calls, world.device),
            None if checkpoint else log.recomputed(),
            log.gap(1) if checkpoint else None,
            why_not and f"training without torch.compile, which does not work here: {why_not}",
        )
        # Train.
        train_to_end(loop, log, progress, memory, notes)
        # Write the model, evaluate it on all processes, draw the curves.
        with handling_signals(loop.stop_now):
            return finish(loop, config, data, clips, log, progress, compared)


def finish(
    loop: Loop,
    config: FinetuneConfig,
    data: FinetuneData,
    clips: FinetuneClips,
    log: MetricsLog,
    progress: Progress,
    compared: dict | None,
) -> dict | None:
    """Write the model, evaluate it on the validation videos, draw the curves. compared: the result of a run from scratch."""
    if loop.stop.number is not None:  # during the last update
        loop.stop_now(loop.stop.number, None)
    step, world, training, path = loop.module, loop.world, loop.training, loop.run / "model.safetensors"
    if world.is_first:
        weights.save(step.model, path, training.to_header()["tokenizer"], training.fps, training.class_names)
    evaluated = clips.evaluation
    with torch.compiler.set_stance("force_eager"):  # not worth another compilation
        scores = score_videos(step.model, evaluated, world, loop.plan.micro_batch, step.autocast, evaluated.padded)
    loop.drop_wrapper()
    if scores is None:
        return None
    found = Classified(data.validation_split, evaluated, data.validation.labels, scores, data.classes)
    settings = {
        "model": str(path),
        "store": str(data.validation_store.folder),
        "labels": config.labels,
        "clips": evaluated.clips,
        "views": len(evaluated.views),
        "frames": evaluated.clip_frames,
        "fps": training.fps,
    }
    with replacing_folder(output_beside(path, loop.run, found.split)) as folder:
        for note in found.write(folder, settings):
            progress.note(note)
    result = {"final": True, "step": loop.step, **summary(found, config, compared)}
    end_run(loop.run, log, progress, result)
    return result


def summary(found: Classified, config: FinetuneConfig, compared: dict | None) -> dict:
    """The numbers of the run's last line."""
    numbers = found.numbers()
    names = ("top1", "top5", "mean_class_accuracy", "most_frequent_accuracy")
    scratch = {"from_scratch_top1": compared["top1"]} if compared else {}
    return {
        **{name: numbers[name] for name in names},
        **scratch,
        "chance": 1 / len(found.classes),
        "split": found.split,
        "videos": len(found.labels),
        "clips": found.clips.clips,
        "views": len(found.clips.views),
    }
