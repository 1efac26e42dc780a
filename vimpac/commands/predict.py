"""`vimpac predict`: what is in these videos?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vimpac.config.evaluate import CLIPS, PredictConfig
from vimpac.console import count, say
from vimpac.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from vimpac.weights import TrainedModel


def predict(
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    videos: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO…")],
    config: Annotated[PredictConfig, tyro.conf.arg(name="")],
) -> None:
    """Classify video files with a fine-tuned model: the likeliest classes of each, with their probabilities.

    A file that cannot be read is listed with the reason, and the others go on; the exit status is then 1.

    Example: vimpac predict runs/ucf101 one.mp4 two.avi

    Args:
        model: A run folder, a model.safetensors or a checkpoint.
        videos: Video files, or folders of them.
    """
    if not videos:
        raise InputError("no video is given, expected video files or folders: vimpac predict MODEL VIDEO…")
    import torch

    from vimpac.data.format import view_set
    from vimpac.evaluation.predict import Predictor, tokenizer_of
    from vimpac.model import ClassificationModel
    from vimpac.processes.limits import share_of_cores
    from vimpac.training.device import autocast_dtype
    from vimpac.training.memory import explaining_batch, keep_freed_memory
    from vimpac.weights import load_trained

    trained = load_trained(model)
    if not isinstance(trained.model, ClassificationModel):
        raise InputError(f"{trained.file} is a pre-trained model, which knows no classes: fine-tune it first")
    grid, rate = trained.model.config.grid, config.fps or trained.training.fps
    if grid[1] != grid[2]:
        raise InputError(
            f"{trained.file} takes frames of {grid[1]}×{grid[2]} tokens, expected a square: videos are cropped to one"
        )
    if rate is None:
        raise InputError(
            f"{trained.file} does not say its frame rate: give --fps, a positive number of frames a second, such as 2"
        )
    tokenizer, path = tokenizer_of(trained, config.tokenizer_path)
    files, refused = _files(videos)
    if config.frames is not None and config.frames != grid[0]:
        trained = load_trained(model, (config.frames, *grid[1:]))
    if not torch.cuda.is_available():
        keep_freed_memory()
    classifier, device = trained.model, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(classifier, ClassificationModel)
    looks = view_set(config.views), config.clips or CLIPS, config.batch, autocast_dtype(config.precision, device)
    predictor = Predictor(classifier.to(device), tokenizer, path, rate, *looks)
    failed = list(refused)
    for name, reason in refused.items():
        _print(name, reason, trained, config)
    with explaining_batch(config.batch):
        for name, found in predictor.predict(files, config.workers or share_of_cores(1), config.video_timeout):
            if isinstance(found, str):
                failed.append(name)
            _print(name, found, trained, config)
    if failed:
        of_all = count(len(files) + len(refused), "video")
        raise InputError(f"{len(failed)} of {of_all} could not be classified, such as {failed[0]}")


def _files(videos: tuple[Path, ...]) -> tuple[list[str], dict[str, str]]:
    """The names of files, with those in folders: each once; and why folders have none."""
    from vimpac.data.video import find_videos, path_of

    named: list[str] = []
    refused: dict[str, str] = {}
    for video in videos:
        try:
            found = [path_of(name, video) for name in find_videos(video).names] if video.is_dir() else [video]
        except InputError as error:  # a folder without videos does not end the others' work
            refused[str(video)] = str(error).removeprefix(f"{video} ")
            continue
        named += (os.fsencode(path).decode("utf-8", "surrogateescape") for path in found)
    return list(dict.fromkeys(named)), refused


def _print(name: str, found: np.ndarray | str, trained: TrainedModel, config: PredictConfig) -> None:
    names = trained.training.class_names
    if isinstance(found, str):
        say(json.dumps({"video": name, "error": found}) if config.as_json else f"{name}: {found}")
        return
    order = (-found).argsort(kind="stable")[: config.top].tolist()
    listed = [(names[i] if names else f"class {i}", float(found[i])) for i in order]
    if config.as_json:
        classes = [{"class": label, "probability": probability} for label, probability in listed]
        say(json.dumps({"video": name, "classes": classes}))
        return
    say(name)
    for label, probability in listed:
        say(f"  {probability:.4f}  {label}")
