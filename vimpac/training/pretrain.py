"""Pre-training from a token store to a run folder (sections 3, B, C).

RUN/config.json        the configuration and the tokenizer
RUN/metrics.jsonl      one line an update; last, the evaluation on held-out videos
RUN/checkpoints/       the newest checkpoints
RUN/tensorboard/       the same metrics as events, where tensorboard is installed
RUN/model.safetensors  the trained model
RUN/curves.png         the metrics drawn, where matplotlib is installed
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from vimpac import weights
from vimpac.checkpoint import FOLDER, check_tokenizer, list_checkpoints, load_checkpoint
from vimpac.config import SynthesizeConfig, TokenizeConfig, TrainConfig
from vimpac.data.clips import ClipPairs, split_videos
from vimpac.data.format import TokenizerInfo
from vimpac.data.store import TokenStore
from vimpac.errors import InputError
from vimpac.evaluation.pretraining import evaluate, most_frequent_token
from vimpac.files.atomic import LOCK, TEMPORARY, locked
from vimpac.files.checked import load_json, typed, unsealed, write_json
from vimpac.training import distributed
from vimpac.training.distributed import World
from vimpac.training.machine import (
    check_options,
    explained_memory,
    explained_model_size,
    keep_freed_memory,
    plain_ops,
    resolve_compile,
    resolve_precision,
)
from vimpac.training.metrics import MetricsLog, read_lines
from vimpac.training.progress import Progress
from vimpac.training.schedule import plan_steps
from vimpac.training.trainer import Trainer

# What changes neither samples nor masks, nor losses beyond rounding and the draws of dropout. (A micro-batch of several
# contrastive groups is also what batch norm spans, and what the mask loss is a mean over the masked tokens of; restarts with
# another number of processes may need another one.)
MAY_CHANGE = frozenset(
    {
        *("data", "output", "resume", "log_every", "save_every", "keep_checkpoints", "eval_batches", "profile"),
        *("compile", "graphs", "activation_checkpointing", "shard_optimizer", "micro_batch"),
    }
)


def pretrain(config: TrainConfig) -> dict | None:
    """Run `config` to its end and return the evaluation (None on ranks other than the first).

    Raises InputError for anything the user can mend, Stopped after SIGTERM or SIGINT.
    """
    with distributed.join_world() as world, ExitStack() as held:
        return _pretrain(config, world, held)


def _pretrain(config: TrainConfig, world: World, held: ExitStack) -> dict | None:
    if config.data is None:
        config = dataclasses.replace(config, data=str(synthetic_store(config, world)))
    store = TokenStore(config.data)
    config = fit_to_store(config, store)
    plan = distributed.plan_batches(config.batch_size, config.contrastive_videos, config.micro_batch, world.size)
    trained_on, held_out = split_videos(store, config.held_out)
    contrasted = min(config.contrastive_videos, len(held_out))
    options = {"clip_frames": config.model.grid[0], "pad_id": config.model.pad_id, "d_max": config.d_max}
    pairs = ClipPairs(store, trained_on, seed=config.seed, distinct=config.contrastive_videos, **options)
    held_pairs = ClipPairs(store, held_out, seed=config.seed + 1, distinct=contrasted, **options)
    schedule = plan_steps(config, len(trained_on))
    run = Path(config.output)
    check_options(config, plan, world)
    if world.device.type == "cpu":
        keep_freed_memory()
    checkpoint = open_run(run, config, store, world.device)
    compiled, why_not = resolve_compile(config.compile, world.device)
    with explained_model_size(world.device):
        trainer = Trainer(config, pairs, plan, schedule, world, run, store, checkpoint, compiled)
    start_run(run, config, store, world, trainer.step, held)
    log = MetricsLog(run, world, trainer.step)
    with Progress(schedule.steps, trainer.step, enabled=world.is_first) as progress:
        if len(trained_on) < config.contrastive_videos:
            progress.note(
                f"{len(trained_on)} training videos are fewer than contrastive_videos={config.contrastive_videos}: "
                "batches repeat videos, and clips of one video count as each other's negatives"
            )
        if plain := plain_ops(config, world.device):
            progress.note(plain)
        if checkpoint is None and log.dropped:
            progress.note(f"{run} has no checkpoint yet: its {log.dropped} updates are made again")
        if checkpoint is not None and (gap := log.gap(1 if config.continue_from is None else None)):
            progress.note(gap)
        if why_not:
            progress.note(f"nothing is compiled, since torch.compile does not work here: {why_not}")
        if plan.parts > 1 and config.alpha > 0:
            progress.note(
                f"contrastive_videos={config.contrastive_videos} in {plan.parts} parts of {plan.micro_batch * world.size}: "
                "each clip goes forward twice; a larger --micro-batch, where memory allows, saves that"
            )
        with (
            handling_signals(trainer.note_signal),
            explained_memory(config, plan, world.device),
            distributed.explained_loss(run, world),
        ):
            trainer.train(log, progress)
        trainer.distributed = None  # it refers to the process group, which ends here:
        distributed.leave_world()  # the evaluation is the first rank's alone
        if not world.is_first:
            return None
        with handling_signals(trainer.stop_now):
            return finish(trainer, held_pairs, contrasted, log, progress)


def finish(trainer: Trainer, held_out: ClipPairs, videos: int, log: MetricsLog, progress: Progress) -> dict:
    """Write the model, evaluate it on batches of `videos` held-out videos, draw the curves."""
    if trainer.signal is not None:  # during the last update
        trainer.stop_now(*trainer.signal)
    config, step = trainer.config, trainer.module
    weights.save(step.model, trainer.run / "model.safetensors", trainer.tokenizer)
    step.padded |= held_out.padded
    most_frequent = most_frequent_token(trainer.pairs, config.model.vocab_size)
    with torch.compiler.set_stance("force_eager"):  # not worth compiling once more
        found = evaluate(step, held_out, config.eval_batches, videos, trainer.plan.micro_batch, most_frequent)
    result = {"final": True, "step": trainer.step, **found, "held_out_videos": len(held_out.videos)}
    log.write([result])
    log.note_failure(progress)
    if importlib.util.find_spec("matplotlib"):
        from vimpac.figures.curves import plot_curves

        plot_curves(log.path, trainer.run / "curves.png")
    else:
        progress.note("curves.png is not drawn: matplotlib is missing (pip install matplotlib)")
    progress.summary(result)
    return result


def fit_to_store(config: TrainConfig, store: TokenStore) -> TrainConfig:
    """The configuration with the store's vocabulary, and frame size if asked. Raises InputError for another frame size."""
    grid = config.model.grid
    if config.fit_frame_size:
        grid = (grid[0], *store.grid)
    if store.grid != grid[1:]:
        raise InputError(
            f"store {store.folder} has frames of {store.frame_size} px, which is {store.grid[0]}×{store.grid[1]} tokens, but "
            f"model.grid is {grid}: tokenize with --frame-size {8 * grid[1]}, or train with "
            f"--model.grid {grid[0]} {store.grid[0]} {store.grid[1]}"
        )
    model = dataclasses.replace(config.model, grid=grid, vocab_size=store.tokenizer.vocab_size)
    return dataclasses.replace(config, model=model)


def synthetic_store(config: TrainConfig, world: World) -> Path:
    """A store of generated videos beside the run folder, made by the first rank unless it is there already."""
    from vimpac.data.build import tokenize_videos
    from vimpac.data.synthetic import synthesize

    if not config.synthetic_videos:
        raise InputError(
            "--data is missing: expected a token store; make one with `vimpac tokenize VIDEOS STORE`, then --data STORE"
        )
    size, folder = 8 * config.model.grid[1], Path(config.output).parent / "synthetic"
    videos = folder / f"videos-{config.synthetic_videos}"
    store = folder / f"tokens-{config.synthetic_videos}-{size}px"

    def make() -> None:
        if not (videos / "labels.csv").exists():  # written last
            shutil.rmtree(videos, ignore_errors=True)  # of a run that was interrupted while it drew
            synthesize(videos, SynthesizeConfig(videos=config.synthetic_videos))
        if not (store / "store.json").exists():
            tokenize_videos(videos, store, TokenizeConfig(frame_size=size))

    distributed.on_first_rank(make, world)
    return store


def open_run(run: Path, config: TrainConfig, store: TokenStore, device: torch.device) -> dict | None:
    """The checkpoint to go on from, if there is one. Writes nothing; raises InputError when this run may not go there."""
    path = run / "config.json"
    if path.exists():
        if not config.resume:
            raise InputError(f"run folder {run} exists: add --resume to go on with it, or give another --output")
        check_same_run(read_description(path), config, store, path, device)
        checkpoints = list_checkpoints(run)
        return load_checkpoint(checkpoints[-1]) if checkpoints else None
    ours = (TEMPORARY, LOCK)  # of a run that was killed before it wrote config.json
    if run.exists() and not (run.is_dir() and all(entry.name.endswith(ours) for entry in run.iterdir())):
        raise InputError(f"{run} is not a run folder, and there is something there: give another --output")
    return None


def start_run(run: Path, config: TrainConfig, store: TokenStore, world: World, step: int, held: ExitStack) -> None:
    """Make the run folder, once every rank is ready to train from the same step. No other run writes there until `held` ends.

    Raises InputError on all ranks where another one does, where their steps differ, or where checkpoints are missing.
    """
    steps = [int(x) for x in distributed.gather_rows(torch.tensor(step), world)]
    if len(set(steps)) > 1:
        raise InputError(
            f"processes would go on from different steps {steps}: {run} must be one folder on a file system that all machines "
            "share"
        )

    def make() -> None:
        held.enter_context(locked(run, f"another run is writing to {run}: wait for its end, or give another --output"))
        if not (run / "config.json").exists():
            write_json(run / "config.json", describe(config, store), indent=2)
        elif not list_checkpoints(run):
            check_none_is_missing(run, config)

    distributed.on_first_rank(make, world)


def check_none_is_missing(run: Path, config: TrainConfig) -> None:
    """Raises InputError where a run without checkpoints has gone beyond its first: to begin again would lose it all."""
    before = read_description(run / "config.json")["config"]
    saved = before.get("save_every")
    save_every = max(saved if type(saved) is int else 1, config.save_every)  # it may have been raised at a restart
    lines = read_lines(run / "metrics.jsonl")
    first, last = (pick((line["step"] for line in lines), default=0) for pick in (min, max))
    saves = (last - 1) // save_every - (first - 1) // save_every  # multiples of save_every from first to last - 1
    if lines and (lines[-1].get("final") or (last > first and saves > 0)):
        raise InputError(
            f"{run} has no checkpoint, although its metrics reach step {last}: put {run / FOLDER} back, or delete "
            f"{run / 'metrics.jsonl'} to train from the beginning"
        )


def describe(config: TrainConfig, store: TokenStore) -> dict:
    """What config.json says."""
    contents = {"videos": len(store), "frames": int(store.frames.sum()), "fps": store.fps}
    return {
        "config": dataclasses.asdict(config),
        "tokenizer": dataclasses.asdict(store.tokenizer),
        "store": contents,
    }


def read_description(path: Path) -> dict:
    """What config.json holds. Raises InputError for one that is damaged."""
    try:
        saved = unsealed(*load_json(path), {"config", "tokenizer", "store"})
        typed(TokenizerInfo, saved["tokenizer"], "tokenizer")
        if not (isinstance(saved["config"], dict) and isinstance(saved["store"], dict)):
            raise InputError("its config or its store is no object")
    except InputError as error:
        raise InputError(f"{path} is damaged ({error}): give another --output") from None
    return saved


def check_same_run(saved: dict, config: TrainConfig, store: TokenStore, path: Path, device: torch.device) -> None:
    """Raises InputError when a run would be resumed with other settings, or on another store's videos.

    The precision is compared as it is on this device: what "auto" stood for where the run began is not known.
    """
    check_tokenizer(saved["tokenizer"], store, path)
    now = json.loads(json.dumps(describe(config, store)))
    before, after = (
        {**x, "precision": resolve_precision(x.get("precision"), device)} for x in (saved["config"], now["config"])
    )
    elsewhere = "or give another --output"
    if changed := differences(before, after, MAY_CHANGE):
        longer = f" (--continue-from {path.parent} begins another stage with its weights and moments)"
        raise InputError(
            f"cannot resume {path.parent} with other settings: {changed}. Resume with those of {path}, {elsewhere}{longer}"
        )
    if changed := differences(saved["store"], now["store"]):
        raise InputError(
            f"cannot resume {path.parent} on other videos: {changed} in {store.folder}. Give --data the first one, {elsewhere}"
        )


def differences(before: dict, now: dict, ignored: frozenset[str] = frozenset()) -> str:
    """`name was …, now …` of the values that differ, those within dictionaries too."""
    names = [name for name in now if name not in ignored and before.get(name) != now[name]]
    return "; ".join(_difference(name, before.get(name), now[name]) for name in names)


def _difference(name: str, before: object, now: object) -> str:
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{name} was {before}, now {now}"
    return differences(*({f"{name}.{part}": x for part, x in values.items()} for values in (before, now)))


@contextmanager
def handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Have `handler` called on SIGTERM and SIGINT, instead of the process ending there."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
