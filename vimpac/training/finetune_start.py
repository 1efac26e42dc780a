"""What fine-tuning starts from: another run's backbone, positions interpolated to this run's clips, or a new model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vimpac import weights
from vimpac.config import FROM_SCRATCH, FinetuneConfig
from vimpac.data.store import TokenStore
from vimpac.errors import InputError
from vimpac.model import ClassificationModel
from vimpac.weights import TrainedModel


class Start(NamedTuple):
    """A configuration whose model fits the store, and the trained model to start from, None for a new one."""

    config: FinetuneConfig
    trained: TrainedModel | None


def read_start(config: FinetuneConfig) -> TrainedModel | None:
    """The model of `--from`; None for a new one. Raises InputError if the option is missing or the model cannot be read."""
    if config.start is None:
        raise InputError(
            f"--from is missing: expected a run folder, a model.safetensors or a checkpoint, or {FROM_SCRATCH} to train a new "
            "model"
        )
    if config.from_scratch:
        return None
    if not Path(config.start).exists():
        demo = "; `make train` trains the demo's" if config.start == "runs/demo" else ""
        raise InputError(
            f"--from {config.start} does not exist: expected a run folder, a model.safetensors or a checkpoint{demo}"
        )
    return weights.load_trained(config.start)


def fit_to_store(config: FinetuneConfig, trained: TrainedModel | None, store: TokenStore) -> Start:
    """The configuration with the shape of the model to train: T from `frames`, H and W and the vocabulary from the store.

    Raises InputError if the model was trained on the ids of another tokenizer.
    """
    shape = config.model if trained is None else replace(trained.model.config, dropout=config.model.dropout)
    grid = (config.frames or shape.grid[0], *store.grid)
    if trained is not None:
        digest = store.tokenizer.digest
        trained = weights.load_trained(trained.file, grid, digest)
        if trained.model.config.vocab_size != store.tokenizer.vocab_size:
            raise InputError(
                f"{trained.file} has a vocabulary of {trained.model.config.vocab_size} codes, store {store.folder} was made "
                f"with {store.tokenizer.vocab_size}: tokenize the videos with the model's tokenizer (--tokenizer-path)"
            )
    model = replace(shape, grid=grid, vocab_size=store.tokenizer.vocab_size)
    return Start(replace(config, model=model, data=str(store.folder)), trained)


def starting_model(start: Start, class_names: tuple[str, ...]) -> ClassificationModel:
    """The classifier to train. It keeps the head of a model that was fine-tuned on the same classes; any other head is new."""
    model = ClassificationModel(start.config.model, len(class_names))
    if start.trained is not None:
        model.backbone.load_state_dict(start.trained.model.backbone.state_dict())
        if keeps_head(start.trained, class_names):
            assert isinstance(start.trained.model, ClassificationModel)
            model.classifier.load_state_dict(start.trained.model.classifier.state_dict())
    return model


def keeps_head(trained: TrainedModel, class_names: tuple[str, ...]) -> bool:
    return isinstance(trained.model, ClassificationModel) and trained.training.class_names == class_names


def start_notes(before: TrainedModel | None, config: FinetuneConfig, fps: float, class_names: tuple[str, ...]) -> list[str]:
    """Sentences on what is carried over from the model as it was saved, and what is not."""
    if before is None:
        return ["a new model is trained, not a pre-trained one"]
    notes = []
    old, new = before.model.config.grid, config.model.grid
    if old != new:
        shapes = ["×".join(map(str, grid)) for grid in (old, new)]
        notes.append(f"positions of {before.file} are interpolated from {shapes[0]} to {shapes[1]} tokens (T×H×W)")
    rate = before.training.fps
    if rate and not math.isclose(rate, fps, rel_tol=1e-6):
        notes.append(f"{before.file} was trained on clips of {rate:g} frames a second, this run has {fps:g}")
    if keeps_head(before, class_names):
        notes.append(f"{before.file} was fine-tuned on the same classes: its classifier is kept")
    return notes
