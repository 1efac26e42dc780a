"""`vimpac features`: a vector of each video of a store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import tyro

from vimpac.config.probe import FeaturesConfig
from vimpac.console import count, say
from vimpac.processes.ranks import begin_rank


def features(
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    config: Annotated[FeaturesConfig, tyro.conf.arg(name="")],
) -> None:
    """Write the [CLS] and mean-pooled states of every video, and a pre-training model's contrastive features.

    OUT/features.safetensors holds cls [n, C], mean [n, C] and contrastive [n, D] in float32, OUT/names.json the names of the n
    videos in the same order, the store's. A run that was stopped goes on where it was. Under torchrun processes share the work.

    Example: vimpac features runs/mine store/ features/ --normalize center

    Args:
        model: A run folder, a model.safetensors or a checkpoint.
        store: Folder that `vimpac tokenize` wrote, with the model's tokenizer.
        out: Folder to write: a new one, or that of an earlier run with the same settings.
    """
    begin_rank()
    from vimpac.commands.looking import ticking
    from vimpac.distributed import join_world
    from vimpac.evaluation.feature_file import check_folder, write_features
    from vimpac.evaluation.features import Look
    from vimpac.evaluation.subject import open_subject
    from vimpac.training.device import autocast_dtype, resolve_precision

    with join_world("run the same command again, which goes on with what is missing") as world:
        subject = open_subject(model, store, config)
        clips = subject.clips(clips=config.clips)
        settings = subject.settings(config, config.normalize, resolve_precision(config.precision, world.device))
        check_folder(out, settings)
        if world.is_first:
            for note in subject.notes():
                say(f"note: {note}")
        look = Look(config.layer, config.batch, clips.padded, autocast_dtype(config.precision, world.device))
        network = subject.trained.model.to(world.device)
        with ticking("features", math.ceil(len(clips) / world.size), world.is_first) as tick:
            written = write_features(out, settings, network, clips, subject.store.names, look, world, tick)
        if world.is_first:
            say(f"{out}: features of {count(len(clips), 'video')}{'' if written else ', complete already'}")
