"""`vimpac evaluate`: how good is a model on a store's videos?"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar

import tyro

from vimpac.config.evaluate import CLIPS, EvaluateConfig
from vimpac.console import count, say
from vimpac.errors import InputError
from vimpac.processes.ranks import begin_rank, read_place

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import numpy as np
    import torch

    from vimpac.config import FinetuneConfig, RunConfig
    from vimpac.data.labelled import LabelledVideos, LabelSource
    from vimpac.data.store import TokenStore
    from vimpac.data.test_clips import TestClips
    from vimpac.distributed import World
    from vimpac.evaluation.classified import Classified
    from vimpac.weights import TrainedModel

AGAIN = "start the evaluation again"
SHOWN = 5  # confusions that are printed


def evaluate(
    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")],
    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")],
    config: Annotated[EvaluateConfig, tyro.conf.arg(name="")],
) -> None:
    """Measure a model on the videos of a store, and write numbers, scores and pictures to a folder.

    A fine-tuned model classifies the labelled videos of a split. The softmax is averaged over clips and over the store's test
    views. A pre-trained model needs no labels: both of its tasks are evaluated on held-out videos with the settings of its run,
    beside predictors that need no model. Under torchrun all processes share the videos.

    Example: vimpac evaluate runs/ucf101 store/ --labels ucfTrainTestlist/ --split test

    Args:
        checkpoint: A run folder, a model.safetensors or a checkpoint.
        store: Folder that `vimpac tokenize` wrote, with the model's tokenizer.
    """
    begin_rank()
    read_place()
    from vimpac import distributed
    from vimpac.data.store import TokenStore
    from vimpac.model import ClassificationModel
    from vimpac.training.memory import explaining_batch, keep_freed_memory

    with distributed.join_world(AGAIN) as world, ExitStack() as held, explaining_batch(config.batch):
        if world.device.type == "cpu":
            keep_freed_memory()
        tokens = TokenStore(store)
        trained, notes = _load(checkpoint, tokens, config.frames)
        work = _classify if isinstance(trained.model, ClassificationModel) else _pretraining
        work(trained, notes, tokens, config, world, held)


def _load(checkpoint: Path, store: TokenStore, frames: int | None) -> tuple[TrainedModel, list[str]]:
    """The model, which takes the store's frames and ids, and notes on it: its positions are interpolated to other `frames`."""
    from vimpac.evaluation.inputs import check_store
    from vimpac.weights import load_trained

    trained = load_trained(checkpoint, tokenizer_digest=store.tokenizer.digest)
    check_store(trained.model, trained.file, store)
    own = trained.model.config.grid[0]
    if frames is None or frames == own:
        return trained, []
    trained = load_trained(checkpoint, grid=(frames, *store.grid), tokenizer_digest=store.tokenizer.digest)
    return trained, [f"positions are interpolated from {count(own, 'frame')} to {frames}"]


Config = TypeVar("Config", bound="RunConfig")


def _run_config(trained: TrainedModel, kind: type[Config]) -> Config | None:
    """The options of the model's run; None for a model that lies alone. Raises InputError if config.json is damaged."""
    from vimpac.files.checked import typed
    from vimpac.training.run import read_description

    if trained.run is None:
        return None
    path = trained.run / "config.json"
    try:
        return typed(kind, read_description(path)["config"])
    except InputError as error:
        raise InputError(f"the run of {trained.file} cannot be read: {error}; evaluate a copy of the model alone") from None


def _classify(
    trained: TrainedModel, notes: list[str], store: TokenStore, config: EvaluateConfig, world: World, held: ExitStack
) -> None:
    from vimpac import distributed
    from vimpac.config import FinetuneConfig
    from vimpac.data.labelled import label_store
    from vimpac.data.rates import frame_step
    from vimpac.data.report import Report
    from vimpac.data.test_clips import TestClips
    from vimpac.data.views import center_view, test_views
    from vimpac.evaluation.classified import Classified
    from vimpac.evaluation.classify import score_videos
    from vimpac.evaluation.inputs import choose_split, class_names, model_labels
    from vimpac.model import ClassificationModel

    model = trained.model
    assert isinstance(model, ClassificationModel)
    # Read what there is to evaluate, and check all of it.
    every = frame_step(store, config.fps or trained.training.fps)
    run = _run_config(trained, FinetuneConfig)
    source = _labels(trained.file, config, run)
    labelled = label_store(store, source)
    names = class_names(trained.training.class_names, labelled.classes, model.classifier.out_features, source.path)
    chosen, found = choose_split(labelled, config.split, run and run.held_out)
    truth = model_labels(found, labelled.classes, names, source.path)
    views = test_views(store) if config.views == "test" else [center_view(store)]
    clips_each = _clips(store, found.videos, config.clips)
    clips = TestClips(store, found.videos, clips_each, views, model.config.grid[0], model.config.pad_id, every)
    precision, autocast = _precision(config, world.device)
    folder = _open_output(trained, config.output, chosen, world, held)
    if world.is_first:
        notes = [*notes, *_doubts(trained, labelled.splits.keys(), chosen, store, found)]
        _say_inputs(trained, clips, [*labelled.notes, *notes], chosen, names)
    # Score the videos.
    report = Report(len(range(world.rank, len(clips), world.size)), "evaluating", "clips", world.is_first)
    scores = score_videos(model.to(world.device), clips, world, config.batch, autocast, clips.padded, report)
    report.close()
    # Write the files.
    shape = {"clips": clips.clips, "views": len(clips.views), "frames": clips.clip_frames, "fps": store.fps / every}
    settings = {
        "model": str(trained.file),
        "store": str(store.folder),
        "labels": source.path,
        **shape,
        "precision": precision,
        "batch": config.batch,
    }

    def write() -> None:
        assert scores is not None and folder is not None
        result = Classified(chosen, clips, truth, scores, names)
        missing = result.write(folder.temporary, settings)
        held.close()
        _say_result(result, missing, folder.final)

    distributed.on_first_rank(write, world)


def _labels(file: Path, config: EvaluateConfig, run: FinetuneConfig | None) -> LabelSource:
    """The labels that are asked for, else those of the model's run. Raises InputError if there are neither."""
    from vimpac.data.labelled import LabelSource

    if config.labels is not None:
        return LabelSource.of(config.labels, config)
    if run is None or run.labels is None:
        raise InputError(f"{file} is a fine-tuned model, which is evaluated on labelled videos: give --labels FILE")
    return LabelSource.of(run.labels, run)


def _doubts(trained: TrainedModel, splits: Collection[str], chosen: str, store: TokenStore, found: LabelledVideos) -> list[str]:
    """Why the model may have been trained on the videos that are evaluated."""
    from vimpac.data.labelled import ALL
    from vimpac.training.run import read_description

    if trained.run is None:
        unknown = "no config.json is beside the model: which videos it was trained on is not known, some may be among these"
        return [unknown] if ALL in splits or chosen in ("train", ALL) else []
    if chosen in ("train", ALL):
        return [f"the videos of the split {chosen} are those that the model was trained on"]
    kept = read_description(trained.run / "config.json").get("labels", {}).get("validation_crc32")
    if ALL in splits and kept is not None and kept != found.crc32(store):
        return ["these are not the videos that the run held out: store or labels differ, and some may have been trained on"]
    return []


def _clips(store: TokenStore, videos: np.ndarray, asked: int | None) -> int:
    """How many clips of each video. Raises InputError if no video has as many as are asked for."""
    longest = int(store.frames[videos].max())
    if asked is not None and asked > longest:
        raise InputError(
            f"clips is {asked}, but the longest of the videos has {longest} frames, so that clips would only repeat: "
            f"give --clips {min(CLIPS, longest)}"
        )
    return asked or min(CLIPS, longest)


class _Output(NamedTuple):
    final: Path
    temporary: Path


def _open_output(trained: TrainedModel, given: Path | None, what: str, world: World, held: ExitStack) -> _Output | None:
    """On the first rank, the folder to write, held to the end. Raises InputError if it must not be written."""
    from vimpac import distributed
    from vimpac.evaluation.folder import replacing_folder
    from vimpac.evaluation.inputs import output_beside

    final = given or output_beside(trained.file, trained.run, what)
    opened: list[_Output] = []
    distributed.on_first_rank(lambda: opened.append(_Output(final, held.enter_context(replacing_folder(final)))), world)
    return opened[0] if opened else None


def _precision(config: EvaluateConfig, device: torch.device) -> tuple[str, torch.dtype | None]:
    from vimpac.training.device import autocast_dtype, resolve_precision

    return resolve_precision(config.precision, device), autocast_dtype(config.precision, device)


def _say_inputs(trained: TrainedModel, clips: TestClips, notes: Sequence[str], split: str, names: Sequence[str]) -> None:
    shape = f"clips of {count(clips.clip_frames, 'frame')} at {clips.store.fps / clips.every:g} a second"
    say(f"{trained.file}: {count(len(names), 'class', 'classes')}, {shape}")
    each = f"{count(clips.clips, 'clip')} × {count(len(clips.views), 'view')} of each"
    say(f"{clips.store.folder}: {count(len(clips), 'video')} of the split {split}, {each}")
    for note in notes:
        say(f"  {'note':<17}  {note}")


def _say_result(found: Classified, notes: Sequence[str], folder: Path) -> None:
    numbers = found.numbers()
    by_clips = [f"{clips}: {x['top1']:.3f}" for clips, x in numbers["by_clips"].items()]
    rows = {
        "top-1": f"{numbers['top1']:.4f}",
        "top-5": f"{numbers['top5']:.4f}",
        "mean of classes": f"{numbers['mean_class_accuracy']:.4f}",
        "most frequent": f"{numbers['most_frequent_accuracy']:.4f}, by always answering the class with the most videos",
        "top-1 by clips": ", ".join(by_clips),
    }
    for name, value in rows.items():
        say(f"  {name:<17}  {value}")
    for x in numbers["confusions"][:SHOWN]:
        say(f"  {'confused':<17}  {x['label']} taken for {x['prediction']}: {x['videos']} of {count(x['of'], 'video')}")
    for note in notes:
        say(f"  {'note':<17}  {note}")
    say(f"wrote {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def _pretraining(
    trained: TrainedModel, notes: list[str], store: TokenStore, config: EvaluateConfig, world: World, held: ExitStack
) -> None:
    """Both pre-training tasks on held-out videos. One process does it, since retrieval compares all clips of a batch."""
    from vimpac import distributed
    from vimpac.config import PretrainConfig
    from vimpac.evaluation.folder import write_pretraining
    from vimpac.model import PretrainModel
    from vimpac.training.pretrain import evaluate_held_out, split_clips

    model, saved = trained.model, _run_config(trained, PretrainConfig)
    assert isinstance(model, PretrainModel)
    if config.labels is not None or config.split is not None:
        given = "labels" if config.labels is not None else "split"
        raise InputError(
            f"{given} is {getattr(config, given)}, but {trained.file} is a pre-trained model, which classifies nothing: leave "
            f"out --{given}, fine-tune the model first, or use `vimpac probe`"
        )
    run = replace(saved or PretrainConfig(), data=str(store.folder), model=model.config, fps=config.fps or trained.training.fps)
    clips = split_clips(run, store)
    precision, autocast = _precision(config, world.device)
    folder = _open_output(trained, config.output, "held-out", world, held)
    settings = {
        "model": str(trained.file),
        "store": str(store.folder),
        "frames": model.config.grid[0],
        "fps": config.fps or trained.training.fps or store.fps,
        "precision": precision,
        "batch": config.batch,
    }

    def work() -> None:
        assert folder is not None
        say(f"{trained.file}: pre-trained, clips of {count(model.config.grid[0], 'frame')} at {settings['fps']:g} a second")
        say(f"{store.folder}: {count(len(clips.held_out.videos), 'held-out video')} of {len(store)}")
        alone = ["no config.json beside the model: held-out videos, masks and losses are the defaults"] if saved is None else []
        for note in (*notes, *alone):
            say(f"  {'note':<30}  {note}")
        found = evaluate_held_out(model.to(world.device), run, clips, max(1, config.batch // 2), autocast)
        write_pretraining(folder.temporary, settings, found)
        held.close()
        for name, value in found.items():
            say(f"  {name:<30}  {'-' if value is None else f'{value:.4f}' if isinstance(value, float) else value}")
        say(f"wrote {folder.final}: {', '.join(sorted(path.name for path in folder.final.iterdir()))}")

    distributed.on_first_rank(work, world)
