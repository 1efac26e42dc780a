"""`vimpac similar`: the videos of a store that are nearest to one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from vimpac.config.probe import SimilarConfig
from vimpac.console import say
from vimpac.errors import InputError


def similar(
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    store: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="STORE")],
    video: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME|VIDEO")],
    config: Annotated[SimilarConfig, tyro.conf.arg(name="")],
) -> None:
    """List the videos of a store that are nearest to one, with their cosines, which lie between -1 and 1.

    Every video is compared, so that the list is exact. A video that is not in the store is tokenized first.

    Example: vimpac similar runs/mine store/ sports/0042.mp4 --features features/

    Args:
        model: A run folder, a model.safetensors or a checkpoint.
        store: Folder that `vimpac tokenize` wrote, with the model's tokenizer.
        video: The name of a video in the store, or a video file.
    """
    from vimpac.commands.looking import ticking
    from vimpac.distributed import join_world
    from vimpac.evaluation.features import Look
    from vimpac.evaluation.search import Search, find_query
    from vimpac.evaluation.subject import open_subject
    from vimpac.training.device import autocast_dtype, resolve_precision

    with join_world() as world:
        if world.size > 1:
            raise InputError(f"`vimpac similar` is one process, {world.size} were started: leave out torchrun")
        subject = open_subject(model, store, config)
        clips = subject.clips(clips=config.clips)
        look = Look(config.layer, config.batch, clips.padded, autocast_dtype(config.precision, world.device))
        search = Search(subject, config, look, resolve_precision(config.precision, world.device), world)
        query = find_query(subject.store, video, subject.view)
        for note in subject.notes():
            say(f"note: {note}")
        with ticking("features", len(clips)) as tick:
            vectors = search.vectors(tick)
        for name, score in search.nearest(vectors, query):
            say(f"{score:7.4f}  {name}")
