"""`vimpac probe`: what the frozen features of a model say about labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from vimpac.config.probe import ProbeConfig
from vimpac.console import count, say
from vimpac.errors import InputError
from vimpac.files.atomic import make_folder
from vimpac.files.checked import load_json, write_json
from vimpac.processes.ranks import begin_rank

if TYPE_CHECKING:
    from vimpac.evaluation.probe import Row, Task

FORMAT = "vimpac-probe"
VERSION = 1


def probe(
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")],
    config: Annotated[ProbeConfig, tyro.conf.arg(name="")],
) -> None:
    """Measure what frozen features say about labels: k-nearest neighbours, a linear and an attentive probe.

    Each stands beside the same probe on a random backbone of the same size, and on token histograms. Probes are fitted on the
    train split of the labels. Without splits, a share of each class's videos is held out, chosen by name.

    Example: vimpac probe runs/mine store/ --labels labels.csv

    Args:
        model: A run folder, a model.safetensors or a checkpoint.
        store: Folder that `vimpac tokenize` wrote, with the model's tokenizer.
    """
    begin_rank()
    from vimpac.commands.looking import ticking
    from vimpac.data.labelled import LabelSource, label_store
    from vimpac.distributed import join_world
    from vimpac.evaluation.attentive import AttentiveTraining
    from vimpac.evaluation.features import Look
    from vimpac.evaluation.neighbors import resolve_neighbors
    from vimpac.evaluation.probe import divide, run_probes
    from vimpac.evaluation.subject import open_subject
    from vimpac.training.device import autocast_dtype

    with join_world("run the same command again") as world:
        subject = open_subject(model, store, config)
        labels = label_store(subject.store, LabelSource.of(config.labels, config)).divided(config.held_out)
        measured = config.split or ("test" if "test" in labels.splits else "validation")
        task = divide(labels, measured)
        neighbors = resolve_neighbors(config.neighbors, len(task.train))
        output = config.output or (subject.trained.run or subject.trained.file.parent) / "probe.json"
        check_output(output)
        clips = subject.clips(task.videos, config.clips)
        look = Look(config.layer, config.batch, clips.padded, autocast_dtype(config.precision, world.device))
        network = subject.trained.model.to(world.device)
        training = (config.epochs, config.learning_rate, config.weight_decay, config.batch_videos, config.seed)
        for line in (*labels.notes, *subject.notes()) if world.is_first else ():
            say(f"note: {line}")
        report = partial(ticking, shown=world.is_first)
        rows = run_probes(network, clips, task, config.probes, neighbors, look, AttentiveTraining(*training), world, report)
        if world.is_first:
            for line in table(rows, task, measured):
                say(line)
            shown = {"model": str(subject.trained.file), "store": str(store), **_plain(asdict(config))}
            shown |= {"split": measured, "neighbors": neighbors, "clip_frames": subject.clip_frames, "fps": subject.fps}
            write(output, rows, task, shown)
            say(f"wrote {output}")


def check_output(path: Path) -> None:
    """Raises InputError if `path` is something other than an earlier result, so that nothing is lost."""
    if not path.exists() and not path.is_symlink():
        make_folder(path.parent)
        return
    try:
        fields, _ = load_json(path)
        found = fields.get("format")
    except InputError as error:
        found = str(error)
    if found != FORMAT:
        raise InputError(f"{path} exists and is not a result of `vimpac probe`: give another --output")


def write(path: Path, rows: Sequence[Row], task: Task, settings: dict[str, Any]) -> None:
    """Writes all numbers as JSON."""
    counts = {"train_videos": len(task.train), "test_videos": len(task.test), "classes": list(task.classes)}
    baselines = {"chance": task.chance, "most_frequent_class": task.most_frequent}
    found = {"format": FORMAT, "version": VERSION, "settings": settings, **counts, **baselines}
    write_json(path, {**found, "results": [row._asdict() for row in rows]}, indent=1)


def table(rows: Sequence[Row], task: Task, split: str) -> Iterator[str]:
    """Lines of text: a probe on a kind of features each, the model beside the random backbone, histograms at the end."""
    measured = f"accuracy on the {count(len(task.test), 'video')} of the split {split}, each {1 / len(task.test):.3f} of it"
    classes = count(len(set(task.train_labels.tolist())), "class", "classes")
    yield f"{measured}, fitted on {count(len(task.train), 'video')} of {classes}"
    yield f"{'probe':<10} {'features':<15} {'model':>7} {'random backbone':>16}"
    found = {(row.probe, row.features, row.backbone): row.top1 for row in rows}
    for name in dict.fromkeys(row.probe for row in rows):
        for features in dict.fromkeys(row.features for row in rows if row.probe == name and row.backbone == "model"):
            model, random = (found[name, features, backbone] for backbone in ("model", "random"))
            yield f"{name:<10} {features:<15} {model:>7.3f} {random:>16.3f}"
        if (name, "histogram", "none") in found:
            yield f"{name:<10} {'token histogram':<15} {found[name, 'histogram', 'none']:>7.3f}"
    yield f"{'chance':<26} {task.chance:>7.3f}"
    yield f"{'most frequent class':<26} {task.most_frequent:>7.3f}"


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: str(x) if isinstance(x, Path) else x for name, x in options.items()}
