"""Progress of commands that work through the videos of a store."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vimpac.distributed import World


@contextmanager
def ticking(videos: int, title: str, world: World) -> Iterator[Callable[[int], None]]:
    """Yields tick(n), to call when this rank has finished n more videos; the first rank reports its share on standard error."""
    from vimpac.data.report import Report

    with closing(Report(math.ceil(videos / world.size), title, "videos", world.is_first)) as report:

        def tick(finished: int) -> None:
            for _ in range(finished):
                report(1)

        yield tick
