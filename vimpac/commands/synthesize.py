"""`vimpac synthesize`: labelled videos without a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from vimpac.config import SynthesizeConfig
from vimpac.console import count, say


def synthesize(
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    config: Annotated[SynthesizeConfig, tyro.conf.arg(name="")],
) -> None:
    """Write labelled videos of textured shapes in motion, to try everything without a data set.

    Example: vimpac synthesize videos/ --videos 256

    Args:
        out: Folder to write the videos and their labels to.
    """
    from rich.console import Console
    from rich.progress import Progress

    from vimpac.data import synthetic

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("drawing videos", total=config.videos)
        synthetic.synthesize(out, config, lambda done, _: progress.update(bar, completed=done))
    say(f"{out}: {count(config.videos, 'video')} of {config.seconds:g} s and labels.csv")
