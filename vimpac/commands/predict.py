"""`vimpac predict`: what is in these videos?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vimpac.console import count, say
from vimpac.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from vimpac.weights import TrainedModel


def predict(
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    videos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO…")],
    top: int = 5,
    clips: int = 10,
    views: Literal["test", "center"] = "test",
    frames: int | None = None,
    fps: float | None = None,
    tokenizer_path: Path | None = None,
    batch: int = 32,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    workers: int | None = None,
    video_timeout: float = 3600.0,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Classify video files with a fine-tuned model: the likeliest classes of each, with their probabilities.

    A file that cannot be read is listed with the reason, and the others go on; the exit status is then 1.

    Example: vimpac predict runs/ucf101 one.mp4 two.avi

    Args:
        model: A run folder, a model.safetensors or a checkpoint.
        videos: Video files, or folders of them.
        top: Classes of each video to list.
        clips: Clips of each video, over which the probabilities are averaged.
        views: test = three crops, from the top left to the bottom right, center = one.
        frames: Frames of a clip; None = the model's. Its positions are interpolated.
        fps: Frames a second of a clip; None = the model's.
        tokenizer_path: Tokenizer, or a store that has it; None = tokenizer.safetensors beside the model.
        batch: Clips of a forward pass.
        precision: Autocast dtype; auto = bf16 on a GPU that has it, else fp32.
        workers: Processes that decode; None = one for each core.
        video_timeout: The longest that reading a file may take, in seconds.
        as_json: Print a JSON object a line instead, {"video", "classes": [{"class", "probability"}]} or {"video", "error"}.
    """
    _check(top=top, clips=clips, batch=batch, **({} if frames is None else {"frames": frames}))
    _check(**({} if workers is None else {"workers": workers}))
    if not videos:
        raise InputError("no video is given, expected video files or folders: vimpac predict MODEL VIDEO…")
    import torch

    from vimpac.data.format import view_set
    from vimpac.evaluation.predict import Predictor, tokenizer_of
    from vimpac.model import ClassificationModel
    from vimpac.processes.limits import share_of_cores
    from vimpac.training.device import autocast_dtype
    from vimpac.weights import load_trained

    trained = load_trained(model)
    if not isinstance(trained.model, ClassificationModel):
        raise InputError(f"{trained.file} is a pre-trained model, which knows no classes: fine-tune it first")
    grid, rate = trained.model.config.grid, fps or trained.training.fps
    if grid[1] != grid[2]:
        raise InputError(
            f"{trained.file} takes frames of {grid[1]}×{grid[2]} tokens, expected a square: videos are cropped to one"
        )
    if rate is None or not 1e-3 <= rate <= 1e4:
        given = f"fps is {rate}, expected" if rate is not None else f"{trained.file} does not say its frame rate: give --fps,"
        raise InputError(f"{given} a positive number of frames a second, such as 2")
    tokenizer, path = tokenizer_of(trained, tokenizer_path)
    files = _files(videos)
    if frames is not None and frames != grid[0]:
        trained = load_trained(model, (frames, *grid[1:]))
    classifier, device = trained.model, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(classifier, ClassificationModel)
    predictor = Predictor(
        classifier.to(device), tokenizer, path, rate, view_set(views), clips, batch, autocast_dtype(precision, device)
    )
    failed = []
    for name, found in predictor.predict(files, workers or share_of_cores(1), video_timeout):
        if isinstance(found, str):
            failed.append(name)
        _print(name, found, trained, top, as_json)
    if failed:
        raise InputError(f"{len(failed)} of {count(len(files), 'video')} could not be classified, such as {failed[0]}")


def _check(**values: int) -> None:
    for name, value in values.items():
        if not 1 <= value <= 1 << 20:
            raise InputError(f"{name} is {value}, expected 1 to {1 << 20}")


def _files(videos: tuple[Path, ...]) -> list[str]:
    """The names of files, with those in folders: each once. Raises InputError for a folder without videos."""
    from vimpac.data.video import find_videos, path_of

    named: list[str] = []
    for video in videos:
        found = [path_of(name, video) for name in find_videos(video).names] if video.is_dir() else [video]
        named += (os.fsencode(path).decode("utf-8", "surrogateescape") for path in found)
    return list(dict.fromkeys(named))


def _print(name: str, found: np.ndarray | str, trained: TrainedModel, top: int, as_json: bool) -> None:
    names = trained.training.class_names
    if isinstance(found, str):
        say(json.dumps({"video": name, "error": found}) if as_json else f"{name}: {found}")
        return
    order = (-found).argsort(kind="stable")[:top].tolist()
    listed = [(names[i] if names else f"class {i}", float(found[i])) for i in order]
    if as_json:
        classes = [{"class": label, "probability": probability} for label, probability in listed]
        say(json.dumps({"video": name, "classes": classes}))
        return
    say(name)
    for label, probability in listed:
        say(f"  {probability:.4f}  {label}")
