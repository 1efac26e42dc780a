"""Tiny training runs for tests: a store of random ids, a configuration, processes that run train.py and may be killed."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import socket
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

from vimpac.config import ModelConfig, PretrainConfig
from vimpac.data.format import StoreSettings, TokenizerInfo
from vimpac.data.store import StoreWriter, finish_store

PRELOADED = ["vimpac.training.pretrain", "torch._dynamo", "torch.utils.tensorboard", "matplotlib.backends.backend_agg", "tyro"]
ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 11
MODEL = {
    "layers": 1,
    "width": 16,
    "heads": 2,
    "grid": (3, 4, 4),
    "dropout": 0.1,
    "head_layers": 2,
    "head_width": 8,
    "head_out": 8,
    "vocab_size": VOCABULARY,
}
TRAIN = {
    "steps": 6,
    "batch_size": 4,
    "contrastive_videos": 4,
    "save_every": 2,
    "eval_batches": 1,
    "held_out": 0.25,
    "learning_rate": 1e-2,
    "precision": "fp32",
}


def write_store(folder: Path, frames=(3, 4, 5, 6, 9) * 5, side: int = 4, digest: str = "d" * 64, seed: int = 0) -> Path:
    """A store of random ids with videos of these lengths, `side` × `side` tokens a frame, 2 frames a second."""
    rng = np.random.default_rng(seed)
    settings = StoreSettings(TokenizerInfo("patch-vq", VOCABULARY, 8, digest), fps=2.0, frame_size=8 * side)
    writer = StoreWriter(folder, settings)
    for i, n in enumerate(frames):
        writer.add(f"video-{i:03d}.mp4", rng.integers(0, VOCABULARY, (1, n, side, side)))
    writer.close()
    finish_store(folder)
    return folder


def tiny_model(**options) -> ModelConfig:
    return ModelConfig(**{**MODEL, **options})


def tiny_config(model: dict | None = None, **options) -> PretrainConfig:
    return PretrainConfig(model=tiny_model(**(model or {})), **{**TRAIN, **options})


def arguments(store: Path | str, output: Path | str, model: dict | None = None, resume: bool = False, **options) -> list[str]:
    """Command line of train.py for the tiny run with these options; None leaves one out."""
    model = {**MODEL, **(model or {})}
    model.pop("vocab_size")  # the store says it
    words = ["small", "--data", str(store), "--output", str(output), *(["--resume"] if resume else [])]
    for name, value in {**{f"model.{name}": x for name, x in model.items()}, **TRAIN, **options}.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(
                flag if value else "--" + ".".join([*name.split(".")[:-1], "no-" + name.split(".")[-1]]).replace("_", "-")
            )
        elif value is not None:
            words += [flag, *(str(x) for x in (value if isinstance(value, tuple) else (value,)))]
    return words


def make_loop(store_folder: Path, folder: Path | str, world=None, compiled: bool = False, **options):
    """The tiny run's Loop, for tests that call its updates one by one."""
    import torch

    from vimpac.data.clips import ClipPairs, split_videos
    from vimpac.data.store import TokenStore
    from vimpac.distributed import World
    from vimpac.training.plan import plan_batches, plan_steps
    from vimpac.training.pretrain_task import pretraining_loop

    config = tiny_config(data=str(store_folder), output=str(folder), **options)
    store = TokenStore(store_folder)
    videos, _ = split_videos(store, config.held_out)
    pairs = ClipPairs(store, videos, config.model.grid[0], config.model.pad_id, config.seed, config.contrastive_videos)
    plan = plan_batches(config.batch_size, config.contrastive_videos, config.micro_batch, 1)
    schedule = plan_steps(config.steps, config.epochs, config.schedule_epochs, config.batch_size, len(videos))
    world = world or World(0, 1, torch.device("cpu"))
    return pretraining_loop(config, store, pairs, plan, schedule, world, None, compiled)


def make_step(config: PretrainConfig, padded: bool = False, autocast=None, model=None):
    """The module that a run with this configuration trains; model: a PretrainModel, None = a fresh one."""
    from vimpac.model import PretrainModel
    from vimpac.model.losses import Objective
    from vimpac.model.masking import Masking
    from vimpac.training.step import PretrainStep

    model = model or PretrainModel(config.model)
    return PretrainStep(model, Objective.from_config(config), Masking.from_config(config), padded, autocast=autocast)


def restore(loop, checkpoint: dict) -> None:
    """Loads a checkpoint of this run into the loop."""
    from vimpac.training import start

    loop.step = start.restore(checkpoint, loop.run, loop.module, loop.optimizer, loop.scaler)


def continue_stage(loop, run: Path, store) -> None:
    """Loads the last checkpoint of an earlier stage into the loop."""
    from vimpac.training import start

    loop.step = start.continue_stage(run, store, loop.schedule.steps, loop.module, loop.optimizer)


def train_main():
    """train.py's main, wherever the tests run from."""
    spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


class Run:
    """train.py in `ranks` processes. They are forked from a server that has torch imported, so that a start is cheap."""

    def __init__(self, words: list[str], log: Path, ranks: int = 1, hook: Callable[[], None] | None = None):
        self.logs = [log.with_name(f"{log.name}-{rank}.log") for rank in range(ranks)]
        port = free_port() if ranks > 1 else 0
        for path in self.logs:
            path.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.processes = [
            context.Process(target=_child, args=(words, str(path), rank, ranks, port, hook), daemon=True)
            for rank, path in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 60) -> list[int]:
        """Exit codes by rank, -n after signal n. A run that hangs is killed and fails the test."""
        for process in self.processes:
            process.join(timeout)
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
            process.join()
        assert not hanging, f"still running after {timeout} s:\n{self.output}"
        return [process.exitcode for process in self.processes]

    def signal(self, number: int) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):  # it has ended: `wait` tells how
                os.kill(process.pid, number)

    @property
    def output(self) -> str:
        return "".join(path.read_text() for path in self.logs if path.exists())


def run(words: list[str], log: Path, ranks: int = 1, hook: Callable[[], None] | None = None, code: int = 0) -> str:
    """Run to the end, expect this exit code of every rank, return what was printed."""
    started = Run(words, log, ranks, hook)
    codes = started.wait()
    assert codes == [code] * ranks, f"{codes}\n{started.output}"
    return started.output


def _child(words: list[str], log: str, rank: int, ranks: int, port: int, hook: Callable[[], None] | None) -> None:
    import sys

    import torch

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)

    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if hook is not None:
        hook()
    sys.exit(train_main()(words))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# --- hooks: what happens to a process -------------------------------------------------------------------------------------


def on_call(place: str, number: int, what: str) -> Callable[[], None]:
    """A hook: at call `number` (from 1) of `module:function` or `module:Class.method`, do `what`."""
    return partial(_patch, place, number, what)


def _patch(place: str, number: int, what: str) -> None:
    module, _, names = place.partition(":")
    *owners, name = names.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def patched(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number:
            return EVENTS[what](original, *args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def hooks(*parts: Callable[[], None]) -> Callable[[], None]:
    """One hook that is all of these."""
    return partial(_each, parts)


def _each(parts) -> None:
    for part in parts:
        part()


def on_rank(rank: int, hook: Callable[[], None]) -> Callable[[], None]:
    """The hook, in one rank only."""
    return partial(_on_rank, rank, hook)


def _on_rank(rank: int, hook) -> None:
    if os.environ.get("RANK", "0") == str(rank):
        hook()


def undrawn() -> None:
    """A hook: no curves.png, which takes longer than training here."""
    from vimpac.figures import curves as figures

    figures.plot_curves = lambda *paths: None


def wide_start() -> None:
    """A hook: weights start ten times wider. From the usual ones [CLS] of so small a model varies by a thousandth of its size
    between clips, which batch norm divides by: one process is then 1e-4 from float64 itself; from these, about 1e-6."""
    from vimpac.model import backbone

    backbone.INIT_STD = 0.2


def keep_weights(folder: Path) -> Callable[[], None]:
    """A hook: every rank leaves its weights of the last checkpoint in FOLDER/rank-R.pt."""
    return partial(_keep_weights, str(folder))


def _keep_weights(folder: str) -> None:
    import torch

    from vimpac.training.loop import Loop

    save = Loop.save

    def patched(loop):
        torch.save(loop.module.model.state_dict(), f"{folder}/rank-{loop.world.rank}.pt")
        return save(loop)

    Loop.save = patched


def moments_kept(folder: Path) -> Callable[[], None]:
    """A hook: every rank writes of how many parameters it keeps AdamW's state to FOLDER/moments-R."""
    return partial(_moments_kept, str(folder))


def _moments_kept(folder: str) -> None:
    from vimpac.training.loop import Loop

    save = Loop.save

    def patched(loop):
        inner = getattr(loop.optimizer, "optim", loop.optimizer)
        Path(f"{folder}/moments-{loop.world.rank}").write_text(str(len(inner.state)))
        return save(loop)

    Loop.save = patched


def kill(original, *args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(original, *args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return original(*args, **kwargs)


def half_a_checkpoint(original, state, file):
    """torch.save that is killed in the middle of the file."""
    original(state, file)
    file.truncate(file.tell() // 2)
    kill(original)


def half_a_line(original, log, lines):
    """MetricsLog.write that is killed in the middle of the line."""
    text = json.dumps(lines[0])
    with open(log.path, "a", encoding="utf-8") as file:
        file.write(text[: len(text) // 2])
    kill(original)


def nan_loss(original, *args):
    out = original(*args)
    return {**out, "loss": out["loss"] * float("nan"), "mask_loss": out["mask_loss"] * float("nan")}


def input_error(original, *args, **kwargs):
    from vimpac.errors import InputError

    raise InputError("made up by a test")


def nothing(original, *args, **kwargs):
    return []


def only_without_reducers(original, *args, **kwargs):
    """destroy_process_group that fails while a DistributedDataParallel is alive: see distributed.leave_world."""
    import gc

    from torch.nn.parallel import DistributedDataParallel

    alive = [x for x in gc.get_objects() if type(x) is DistributedDataParallel]
    assert not alive, "a reducer outlives its process group"
    return original(*args, **kwargs)


EVENTS = {
    f.__name__: f
    for f in (kill, terminate, half_a_checkpoint, half_a_line, nan_loss, input_error, nothing, only_without_reducers)
}


@contextmanager
def files_of_at_most(size: int):
    """No process can tell it from a full disk, but for the number: a write beyond `size` bytes of a file fails with EFBIG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# --- what a run left ------------------------------------------------------------------------------------------------------


def metrics(folder: Path) -> list[dict]:
    """Lines of metrics.jsonl without what was timed, which no two runs share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in ("videos_per_second", "data_wait_share")} for line in lines]


def model_bytes(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()
