"""A model's weights in one file: safetensors with the configuration in its header, or a checkpoint of a run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vimpac.checkpoint import FOLDER, list_checkpoints, load_checkpoint
from vimpac.config import ModelConfig
from vimpac.data.format import TokenizerInfo
from vimpac.errors import InputError
from vimpac.files.atomic import replacing
from vimpac.files.checked import check_names, typed
from vimpac.files.tensorfile import UNSEALED, read_tensors, seal
from vimpac.model import ClassificationModel, PretrainModel
from vimpac.model.models import model_class
from vimpac.model.positions import IN_BACKBONE, interpolate_state
from vimpac.model.state import check_state, empty_model

FORMAT = "vimpac-model"
VERSION = 1


class Training(NamedTuple):
    """What a model was trained on, None where it is not known."""

    tokenizer: TokenizerInfo | None = None
    fps: float | None = None
    """Frames a second of its clips."""
    class_names: tuple[str, ...] | None = None
    """Of a ClassificationModel, in the order of its logits."""

    def to_header(self) -> dict:
        """As plain values, for a file's header."""
        tokenizer = dataclasses.asdict(self.tokenizer) if self.tokenizer else None
        known = {"fps": self.fps, "class_names": list(self.class_names) if self.class_names else None}
        return {"tokenizer": tokenizer, **{name: x for name, x in known.items() if x is not None}}


class TrainedModel(NamedTuple):
    """A model read from a file, in float32, on the CPU and in evaluation mode."""

    model: PretrainModel | ClassificationModel
    training: Training
    file: Path
    run: Path | None
    """The run folder that holds the file, if it is in one."""


def save(
    model: PretrainModel | ClassificationModel,
    path: str | Path,
    tokenizer: Mapping | None = None,
    fps: float | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write weights and config as one safetensors file, atomically.

    tokenizer: name, vocab_size, stride and digest of the tokenizer whose ids the model was trained on.
    fps: frames a second of the clips that it was trained on. class_names: of a ClassificationModel, in the order of its logits.
    Raises OSError, for example for a full disk; an earlier file then stays as it is.
    """
    header = {"config": dataclasses.asdict(model.config), "tokenizer": dict(tokenizer) if tokenizer else None}
    if fps is not None:
        header["fps"] = fps
    if isinstance(model, ClassificationModel):
        header["classes"] = model.classifier.out_features
        if class_names is not None:
            header["class_names"] = list(class_names)
    metadata = {"format": FORMAT, "version": str(VERSION), "header": json.dumps(header), **UNSEALED}
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    with replacing(Path(path)) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            if number := re.search(r"\(os error (\d+)\)", str(error)):  # a full disk, for one
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
            raise
        seal(temporary)


def load(
    path: str | Path, grid: tuple[int, int, int] | None = None, tokenizer_digest: str | None = None
) -> PretrainModel | ClassificationModel:
    """Read a model that `save` wrote, or that of a checkpoint (RUN/checkpoints/step-….pt), for example of an unfinished run.

    The model is in float32, on the CPU and in evaluation mode (no dropout).
    grid: T, H, W to interpolate the positions to. tokenizer_digest: refuse a model trained on another tokenizer's ids.
    Raises InputError for a missing or broken file, another format or version, or another tokenizer.
    """
    return load_trained(path, grid, tokenizer_digest).model


def load_trained(
    path: str | Path, grid: tuple[int, int, int] | None = None, tokenizer_digest: str | None = None
) -> TrainedModel:
    """Read a model and what is known about its training. path: as for `load`, or a run folder. Raises InputError as `load`."""
    path = model_file(Path(path))
    header, state = read_model_file(path)
    model = _model(path, header, state, grid, tokenizer_digest)
    tokenizer, names = header["tokenizer"], header.get("class_names")
    training = Training(
        TokenizerInfo(**tokenizer) if tokenizer else None, header.get("fps"), tuple(names) if names is not None else None
    )
    run = path.parent.parent if path.suffix == ".pt" and path.parent.name == FOLDER else path.parent
    return TrainedModel(model, training, path, run if (run / "config.json").is_file() else None)


def model_file(path: Path) -> Path:
    """`path` itself if it is a file; in a run folder the model, or the newest checkpoint if the run has not ended.

    Raises InputError for a folder without either.
    """
    if not path.is_dir():
        return path
    found = [x for x in (*list_checkpoints(path), path / "model.safetensors") if x.exists()]
    if not found:
        raise InputError(
            f"cannot read model {path}: it is a folder without a model.safetensors or checkpoints; expected a run folder, a "
            "model.safetensors or a checkpoint of a run"
        )
    return found[-1]


def _model(
    path: Path, header: dict, state: dict[str, Tensor], grid: tuple[int, int, int] | None, tokenizer_digest: str | None
) -> PretrainModel | ClassificationModel:
    trained_on = (header["tokenizer"] or {}).get("digest")
    if tokenizer_digest and trained_on and trained_on != tokenizer_digest:
        raise InputError(
            f"{path} was trained on tokenizer {trained_on[:12]}…, the store was made with {tokenizer_digest[:12]}…: "
            "tokenize the videos again with the model's tokenizer, `vimpac tokenize VIDEOS STORE --tokenizer-path RUN`"
        )
    classes = header.get("classes")
    make = model_class(classes)
    config = ModelConfig(**header["config"])
    try:
        model = empty_model(make, config, len(state))
        check_state(state, model.state_dict())
    except InputError as error:
        reason = str(error)[:500]
        raise InputError(f"{path} does not fit the model that it describes: {reason}; it is damaged, copy it again") from None
    if grid is not None:
        config = dataclasses.replace(config, grid=tuple(grid))
        state = interpolate_state(state, config.grid, IN_BACKBONE)
        model = empty_model(make, config, len(state))
    own = model.state_dict()  # copies of the file's memory map, in float32
    whole = {name: x.to(own[name].dtype, copy=True, memory_format=torch.contiguous_format) for name, x in state.items()}
    model.load_state_dict(whole, assign=True)
    return model.eval()


def read_model_file(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Header {"config", "tokenizer", "classes"?, "class_names"?, "fps"?} and state dict of a model file.

    Raises InputError as `load`.

    Checks the header's types and ranges; `load` checks that the state dict fits the header.
    """
    path = Path(path)
    if path.suffix == ".pt":
        checkpoint = load_checkpoint(path)
        header, state = {"config": checkpoint["config"].get("model"), "tokenizer": checkpoint["tokenizer"]}, checkpoint["model"]
        header |= {name: checkpoint[name] for name in ("fps", "class_names") if name in checkpoint}
        if isinstance(names := header.get("class_names"), list):
            header["classes"] = len(names)
    else:
        header, state = _read_safetensors(path)
    try:
        typed(_Header, header)
    except InputError as error:
        reason = str(error)[:500]
        raise InputError(f"{path} is damaged or was not written by this program: {reason}; copy it again") from None
    return header, state


@dataclasses.dataclass(frozen=True)
class _Header:
    """What a model file's header must hold."""

    config: ModelConfig
    tokenizer: TokenizerInfo | None
    classes: int | None = None
    class_names: tuple[str, ...] | None = None
    fps: float | None = None

    def __post_init__(self):
        if self.classes is not None and not 1 <= self.classes < 2**31:
            raise InputError(f"classes is {self.classes}, expected 1 or more")
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise InputError(f"class_names has {len(self.class_names)} names, expected {self.classes}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise InputError(f"fps is {self.fps}, expected a positive number of frames a second")


def _read_safetensors(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        metadata, state = read_tensors(path, "pt")
    except InputError as error:
        raise InputError(f"cannot read model {path}: {error}; expected a model.safetensors or a checkpoint of a run") from None
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        raise InputError(
            f"{path} is not a model of this program: format {metadata.get('format')!r} version "
            f"{metadata.get('version')!r}, expected {FORMAT!r} version {VERSION}"
        )
    try:
        check_names(metadata, {"format", "version", "header"})
        return json.loads(metadata["header"]), state
    except (ValueError, RecursionError) as error:  # an InputError among them
        raise InputError(f"cannot read model {path}: its header is damaged, {error}; copy it again") from None
