"""What the runs of all tasks share, from checking the machine to the end of training."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

from vimpac import distributed
from vimpac.checkpoint import list_checkpoints
from vimpac.config import RunConfig, SynthesizeConfig, TokenizeConfig
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.processes.meeting import GONE
from vimpac.training.device import Call, check_backends, check_graphs, device_masks, op_calls_of
from vimpac.training.facts import end_facts
from vimpac.training.loop import Loop
from vimpac.training.memory import MemoryUse
from vimpac.training.metrics import MetricsLog
from vimpac.training.plan import BatchPlan
from vimpac.training.progress import Progress
from vimpac.training.signals import handling_signals


def check_machine(config: RunConfig, memory: MemoryUse, plan: BatchPlan, world: World) -> list[Call]:
    """Raises InputError for what this machine cannot do. Returns the run's op calls."""
    calls = op_calls_of(config.model, config.precision, world.device, device_masks(config, world.device))
    check_backends(calls)
    memory.check_fits()
    check_graphs(config, plan, world)
    return calls


def train_to_end(loop: Loop, log: MetricsLog, progress: Progress, memory: MemoryUse, notes: Sequence[str | None]) -> None:
    """Say the notes and train. A signal, a lost process and too little memory end it with an explanation."""
    for note in filter(None, notes):
        progress.note(note)
    with (
        handling_signals(loop.stop.handle),
        memory.explaining(),
        distributed.explaining_lost_peers(lambda: lost_peers(loop.run)),
    ):
        loop.train(log, progress)


def end_run(run: Path, log: MetricsLog, progress: Progress, result: dict) -> None:
    """Write the last line of the metrics, draw the curves, and say the result and where everything is."""
    log.write([result])
    log.note_failure(progress)
    if importlib.util.find_spec("matplotlib"):
        from vimpac.figures import curves

        curves.plot_curves(log.path, run / "curves.png")
    else:
        progress.note("curves.png is not drawn: matplotlib is missing (pip install matplotlib)")
    progress.summary(result)
    progress.note(end_facts(run))


def lost_peers(run: Path) -> str:
    kept = list_checkpoints(run)
    return f"{GONE}; the last checkpoint is {kept[-1] if kept else 'not written yet'}: {distributed.AGAIN}"


def check_data(config: RunConfig) -> None:
    """Raises InputError if the run has no videos."""
    if config.data is None and not config.synthetic_videos:
        raise InputError(
            "--data is missing: expected a token store; make one with `vimpac tokenize VIDEOS STORE`, then --data STORE"
        )


def synthetic_store(output: str, videos: int, grid: tuple[int, int, int], world: World) -> tuple[Path, Path]:
    """A store of generated videos next to the run folder, and their labels.csv.

    The first rank makes it unless it exists already.
    """
    from vimpac.data.build import tokenize_videos
    from vimpac.data.synthetic import synthesize

    size, folder = 8 * grid[1], Path(output).parent / "synthetic"
    files, store = folder / f"videos-{videos}", folder / f"tokens-{videos}-{size}px"
    tokens = TokenizeConfig(frame_size=size)

    def make() -> None:
        if not (files / "labels.csv").exists():  # written last
            shutil.rmtree(files, ignore_errors=True)  # left by a run that was interrupted while drawing
            shown = min(max(size, 32), 96)  # no more pixels than the tokenizer keeps
            synthesize(files, SynthesizeConfig(videos=videos, fps=tokens.fps, size=shown))
        if not (store / "store.json").exists():
            tokenize_videos(files, store, tokens)

    distributed.on_first_rank(make, world)
    return store, files / "labels.csv"
