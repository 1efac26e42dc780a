"""Progress of commands that look at the videos of a store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager


@contextmanager
def ticking(title: str, videos: int, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields tick(n), to call when n more of `videos` videos are finished. Reported on standard error, if shown."""
    from vimpac.data.report import Report

    with closing(Report(videos, title, "videos", shown)) as report:

        def tick(finished: int) -> None:
            for _ in range(finished):
                report(1)

        yield tick
