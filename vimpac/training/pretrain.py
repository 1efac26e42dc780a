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
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from vimpac import convert
from vimpac.atomic import TEMPORARY, write_text
from vimpac.config import ModelConfig, SynthesizeConfig, TokenizeConfig, TrainConfig
from vimpac.data.clips import ClipPairs, split_videos
from vimpac.data.store import TokenStore
from vimpac.errors import InputError
from vimpac.evaluation.held_out import evaluate, most_frequent_token
from vimpac.model import PretrainModel
from vimpac.model.positions import interpolate_state
from vimpac.training import distributed
from vimpac.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from vimpac.training.distributed import BatchPlan, World
from vimpac.training.metrics import MetricsLog
from vimpac.training.optim import adamw, learning_rate
from vimpac.training.progress import Progress
from vimpac.training.step import PretrainStep

MAY_CHANGE = frozenset({"data", "output", "resume", "log_every", "save_every", "keep_checkpoints", "eval_batches", "compile"})
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stopped(Exception):
    """A signal asked the run to end; its checkpoint is written. `signal` is its number."""

    def __init__(self, number: int, checkpoint: Path):
        super().__init__(f"stopped by {signal.Signals(number).name}; {checkpoint} is written, go on with --resume")
        self.signal = number


def pretrain(config: TrainConfig) -> dict | None:
    """Run `config` to its end and return the evaluation (None on ranks other than the first).

    Raises InputError for anything the user can mend, Stopped after SIGTERM or SIGINT.
    """
    with distributed.join_world() as world:
        return _pretrain(config, world)


def _pretrain(config: TrainConfig, world: World) -> dict | None:
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
    checkpoint = open_run(run, config, store)
    trainer = Trainer(config, pairs, plan, schedule, world, run, store, checkpoint)
    start_run(run, config, store, world, trainer.step)
    log = MetricsLog(run, world, trainer.step)
    with Progress(schedule.steps, trainer.step, enabled=world.is_first) as progress:
        if len(trained_on) < config.contrastive_videos:
            progress.note(
                f"{len(trained_on)} training videos are fewer than contrastive_videos={config.contrastive_videos}: "
                "batches repeat videos, and clips of one video count as each other's negatives"
            )
        with handling_signals(trainer.note_signal):
            trainer.train(log, progress)
        trainer.distributed = None  # it refers to the process group, which ends here:
        distributed.leave_world()  # the evaluation is the first rank's alone
        if not world.is_first:
            return None
        with handling_signals(trainer.stop_now):
            return trainer.finish(held_pairs, contrasted, log, progress)


@dataclasses.dataclass(frozen=True)
class Schedule:
    steps: int  # updates at which the run ends
    decay_steps: int  # updates at which the learning rate reaches 0


def plan_steps(config: TrainConfig, videos: int) -> Schedule:
    """Updates of the run and of its learning-rate schedule, which stages of one schedule share."""
    schedule_epochs = config.schedule_epochs or config.epochs
    if config.steps is not None:
        return Schedule(config.steps, round(schedule_epochs / config.epochs * config.steps))
    steps, decay_steps = (max(1, round(n * videos / config.batch_size)) for n in (config.epochs, schedule_epochs))
    return Schedule(steps, decay_steps)


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
    from vimpac.data.synthetic import synthesize
    from vimpac.data.tokenize import tokenize_videos

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


def open_run(run: Path, config: TrainConfig, store: TokenStore) -> dict | None:
    """The checkpoint to go on from, if there is one. Writes nothing; raises InputError when this run may not go there."""
    path = run / "config.json"
    if path.exists():
        if not config.resume:
            raise InputError(f"run folder {run} exists: add --resume to go on with it, or give another --output")
        check_same_run(read_description(path), config, store, path)
        checkpoints = list_checkpoints(run)
        return load_checkpoint(checkpoints[-1]) if checkpoints else None
    if run.exists() and not (run.is_dir() and all(entry.name.endswith(TEMPORARY) for entry in run.iterdir())):
        raise InputError(f"{run} is not a run folder, and there is something there: give another --output")
    return None


def start_run(run: Path, config: TrainConfig, store: TokenStore, world: World, step: int) -> None:
    """Make the run folder, once every rank is ready to train from the same step."""
    steps = [int(x) for x in distributed.gather_rows(torch.tensor(step), world)]
    if len(set(steps)) > 1:
        raise InputError(
            f"processes would go on from different steps {steps}: {run} must be one folder on a file system that all machines "
            "share"
        )
    if world.is_first and not (run / "config.json").exists():
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "config.json", json.dumps(describe(config, store), indent=2) + "\n")


def describe(config: TrainConfig, store: TokenStore) -> dict:
    """What config.json says."""
    contents = {"videos": len(store), "frames": int(store.frames.sum()), "fps": store.fps}
    return {
        "config": dataclasses.asdict(config),
        "tokenizer": dataclasses.asdict(store.tokenizer),
        "store": contents,
    }


def read_description(path: Path) -> dict:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {name: saved[name] for name in ("config", "tokenizer", "store")}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}): give another --output") from None


def check_same_run(saved: dict, config: TrainConfig, store: TokenStore, path: Path) -> None:
    """Raises InputError when a run would be resumed with other settings, or on another store's videos."""
    check_tokenizer(saved["tokenizer"], store, path)
    now = json.loads(json.dumps(describe(config, store)))
    elsewhere = "or give another --output"
    if changed := differences(saved["config"], now["config"], MAY_CHANGE):
        raise InputError(
            f"cannot resume {path.parent} with other settings: {changed}. Resume with those of {path}, {elsewhere}"
        )
    if changed := differences(saved["store"], now["store"]):
        raise InputError(
            f"cannot resume {path.parent} on other videos: {changed} in {store.folder}. Give --data the first one, {elsewhere}"
        )


def differences(before: dict, now: dict, ignored: frozenset[str] = frozenset()) -> str:
    names = [name for name in now if name not in ignored and before.get(name) != now[name]]
    return "; ".join(f"{name} was {before.get(name)}, now {now[name]}" for name in names)


def check_tokenizer(saved: dict, store: TokenStore, where: Path) -> None:
    if saved["digest"] != store.tokenizer.digest:
        raise InputError(
            f"{where} was trained on ids of tokenizer {saved['name']} {saved['digest'][:12]}…, store {store.folder} holds ids "
            f"of {store.tokenizer.name} {store.tokenizer.digest[:12]}…: tokenize the videos with the first store's tokenizer "
            "(`vimpac tokenize --tokenizer-path STORE`)"
        )


class Trainer:
    """The state of a run and its loop."""

    def __init__(
        self,
        config: TrainConfig,
        pairs: ClipPairs,
        plan: BatchPlan,
        schedule: Schedule,
        world: World,
        run: Path,
        store: TokenStore,
        checkpoint: dict | None,
    ):
        self.config, self.pairs, self.plan, self.schedule = config, pairs, plan, schedule
        self.world, self.run, self.tokenizer = world, run, dataclasses.asdict(store.tokenizer)
        autocast = PRECISIONS[resolve_precision(config.precision, world.device)]
        torch.manual_seed(config.seed)
        model = initial_model(config, store).to(world.device)
        model.backbone.activation_checkpointing = config.activation_checkpointing
        group = distributed.contrastive_group(world, plan.group_ranks)
        self.module = PretrainStep(model, config, pairs.padded, group, autocast)
        self.optimizer = adamw(self.module, config.weight_decay, config.betas, config.eps)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=autocast == torch.float16)
        torch.manual_seed(rank_seed(config.seed, world.rank))  # from here on ranks draw their own dropout
        self.step = 0
        self.signal: tuple[int, float] | None = None  # number and time of the signal that asks the run to end
        if checkpoint is not None:
            self.restore(checkpoint)
        elif config.continue_from is not None:
            self.continue_from(Path(config.continue_from), store)
        if config.compile:
            model.backbone.compile(dynamic=False)
        self.distributed = self.module
        if world.size > 1:
            devices = [world.device] if world.device.type == "cuda" else None
            self.distributed = DistributedDataParallel(self.module, devices, gradient_as_bucket_view=True)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self, log: MetricsLog, progress: Progress) -> None:
        config = self.config
        look_every = config.log_every if self.world.device.type == "cuda" else 1  # looking makes a GPU wait
        self.module.train()
        while self.step < self.schedule.steps:
            log.add(self.update())
            self.step += 1
            last = self.step == self.schedule.steps
            stop = distributed.any_rank(self.signal is not None, self.world) and not last
            save = last or stop or self.step % config.save_every == 0
            if save or self.step % look_every == 0:
                log.flush(progress, config.batch_size, self.may_overflow)
            if save:
                path = self.save()
            if stop:
                raise Stopped(self.signal[0] if self.signal else signal.SIGTERM, path)

    def update(self) -> dict[str, Tensor]:
        """One update of the weights; metrics as scalars on the device."""
        config, plan, world = self.config, self.plan, self.world
        rate = learning_rate(self.step, self.schedule.decay_steps, config.warmup, config.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for i in range(plan.micro_steps):
            first = self.step * config.batch_size + (i * world.size + world.rank) * plan.micro_batch
            batch = self.pairs.batch(first, plan.micro_batch)
            tokens, ids = (torch.from_numpy(x).to(world.device) for x in (batch.tokens, batch.sample_ids))
            with self.synchronised(i == plan.micro_steps - 1):
                out = self.distributed(tokens, ids)
                self.scaler.scale(out["loss"] / plan.micro_steps).backward()
            for name, x in out.items():
                sums[name] = sums.get(name, 0) + x.detach() / plan.micro_steps
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return {"step": self.step + 1, "learning_rate": rate, "grad_norm": norm, **sums}

    def synchronised(self, last: bool):
        """Gradients are averaged over ranks in the last micro-step of an update only."""
        return nullcontext() if last or self.world.size == 1 else self.distributed.no_sync()

    @property
    def may_overflow(self) -> bool:
        """Whether float16 gradients that are not finite are only scaled too much: the scaler skips the update."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    # --- signals ------------------------------------------------------------------------------------------------------

    def note_signal(self, number: int, _frame) -> None:
        """The run ends after this update. A second Ctrl-C ends it at once; torchrun passes each on, so it comes twice."""
        now = time.monotonic()
        if self.signal is None:
            self.signal = number, now
        elif number == signal.SIGINT and now - self.signal[1] > 2:
            raise KeyboardInterrupt

    def stop_now(self, number: int, _frame) -> None:
        """After the last update its checkpoint is there."""
        raise Stopped(number, list_checkpoints(self.run)[-1])

    # --- state --------------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint (first rank); every rank's generator state is in it."""
        rng = distributed.gather_rows(rng_state(self.world.device), self.world)
        path = self.run
        if self.world.is_first:
            state = {
                "step": self.step,
                "config": dataclasses.asdict(self.config),
                "tokenizer": self.tokenizer,
                "world_size": self.world.size,
                "model": self.module.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "rng": rng,
            }
            path = save_checkpoint(self.run, state, self.config.keep_checkpoints)
        distributed.barrier(self.world)
        return path

    def restore(self, state: dict) -> None:
        """Go on exactly where a checkpoint of this run was written."""
        self.module.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if state["world_size"] == self.world.size:
            set_rng_state(state["rng"][self.world.rank], self.world.device)
        else:  # another number of ranks has no states of its own: same samples and masks, new dropout
            torch.manual_seed(rank_seed(self.config.seed + state["step"], self.world.rank))
        self.step = state["step"]

    def continue_from(self, run: Path, store: TokenStore) -> None:
        """Go on from an earlier stage: weights, moments and step; positions (and moments) at this grid."""
        checkpoints = list_checkpoints(run)
        if not checkpoints:
            raise InputError(f"continue_from={run} has no checkpoint: expected the run folder of the earlier stage")
        state = load_checkpoint(checkpoints[-1])
        check_tokenizer(state["tokenizer"], store, checkpoints[-1])
        grid = self.config.model.grid
        own = [{name: x for name, x in group.items() if name != "params"} for group in self.optimizer.param_groups]
        try:
            self.module.model.load_state_dict(interpolate_state(state["model"], grid, convert.POSITIONS))
            self.optimizer.load_state_dict(interpolate_moments(state["optimizer"], grid))
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{checkpoints[-1]} does not fit this model: {reason[:300]}") from None
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)  # this stage's weight decay and betas, not the earlier one's
        self.step = state["step"]
        if self.step >= self.schedule.steps:
            raise InputError(
                f"{checkpoints[-1]} is at step {self.step}, this run would end at {self.schedule.steps}: raise --epochs or "
                "--steps, which count from the first stage's start"
            )

    # --- the end ------------------------------------------------------------------------------------------------------

    def finish(self, held_out: ClipPairs, videos: int, log: MetricsLog, progress: Progress) -> dict:
        """Write the model, evaluate it on batches of `videos` held-out videos, draw the curves."""
        if self.signal is not None:  # during the last update
            self.stop_now(*self.signal)
        config, micro_batch = self.config, self.plan.micro_batch
        convert.save(self.module.model, self.run / "model.safetensors", self.tokenizer)
        self.module.padded |= held_out.padded
        most_frequent = most_frequent_token(self.pairs, config.model.vocab_size)
        result = {
            "final": True,
            "step": self.step,
            **evaluate(self.module, held_out, config.eval_batches, videos, micro_batch, most_frequent),
            "held_out_videos": len(held_out.videos),
        }
        log.write([result])
        if importlib.util.find_spec("matplotlib"):
            from vimpac.figures import plot_curves

            plot_curves(log.path, self.run / "curves.png")
        else:
            progress.note('curves.png is not drawn: matplotlib is missing (pip install "vimpac[figures]")')
        progress.summary(result)
        return result


def initial_model(config: TrainConfig, store: TokenStore) -> PretrainModel:
    """A fresh model, or `init_from`'s weights at this grid."""
    if config.init_from is None:
        return PretrainModel(config.model)
    model = convert.load(config.init_from, config.model.grid, store.tokenizer.digest)
    if not isinstance(model, PretrainModel) or shape_of(model.config) != shape_of(config.model):
        raise InputError(
            f"init_from={config.init_from} holds a {type(model).__name__} of shape {shape_of(model.config)}, expected a "
            f"PretrainModel of {shape_of(config.model)}"
        )
    fresh = PretrainModel(config.model)  # the configuration's dropout, not the file's
    fresh.load_state_dict(model.state_dict())
    return fresh


def shape_of(config: ModelConfig) -> dict:
    """What decides the names and shapes of a model's parameters."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name != "dropout"}


def interpolate_moments(state: dict, grid: tuple[int, int, int]) -> dict:
    """An AdamW state dict with the moments of the position tables resampled to another grid, like the positions."""
    names = {i: name for group in state["param_groups"] for i, name in zip(group["params"], group["param_names"], strict=True)}
    moments = dict(state["state"])
    for key in ("exp_avg", "exp_avg_sq"):
        tables = {names[i]: s[key] for i, s in moments.items() if f"model.{convert.POSITIONS}" in names[i]}
        tables = interpolate_state(tables, grid, f"model.{convert.POSITIONS}")
        moments = {i: {**s, key: tables.get(names[i], s[key])} for i, s in moments.items()}
    return {**state, "state": moments}


def resolve_precision(precision: str, device: torch.device) -> str:
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def rank_seed(seed: int, rank: int) -> int:
    """Seed of a rank's generator: initialisation uses `seed` itself on every rank."""
    return (seed + 0x9E3779B97F4A7C15 * (rank + 1)) % 2**63


def rng_state(device: torch.device) -> Tensor:
    """torch's generator state (bytes) of this rank: what draws its dropout."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextmanager
def handling_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Have `handler` called on SIGTERM and SIGINT, instead of the process ending there."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
