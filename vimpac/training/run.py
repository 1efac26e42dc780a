"""The run folder: which run may write there, and whether it is the run that created the folder.

RUN/config.json            the configuration, the tokenizer, the size of the store, the labels of fine-tuning
RUN/tokenizer.safetensors  a copy of the store's tokenizer, so that the run goes from a video file to the model's answer
RUN/metrics.jsonl          one line per update, then one with the evaluation
RUN/checkpoints/           the newest checkpoints
RUN/tensorboard/           the same metrics as events, if tensorboard is installed
RUN/model.safetensors      the trained model
RUN/curves.png             a plot of the metrics, if matplotlib is installed
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch

from vimpac import distributed
from vimpac.checkpoint import FOLDER, check_tokenizer, list_checkpoints, load_checkpoint
from vimpac.config import FinetuneConfig, PretrainConfig, RunConfig
from vimpac.data.format import TOKENIZER, TokenizerInfo
from vimpac.data.store import TokenStore
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.files.atomic import LOCK, TEMPORARY, locked, replacing
from vimpac.files.checked import load_json, typed, unsealed, write_json
from vimpac.training.device import resolve_precision
from vimpac.training.metrics import read_lines

NAMES = {"config", "tokenizer", "store"}  # of config.json; that of fine-tuning also has labels
WRITTEN_LAST = ("model.safetensors", "curves.png", "profile.json")

# Options that change neither samples nor masks, and losses only by rounding and the draws of dropout. (micro_batch is an
# exception if it spans several contrastive groups, since batch norm and the mean of the mask loss then span them as well. It
# may change nevertheless: a restart with another number of processes may need another one.)
MAY_CHANGE = frozenset(
    {
        *("data", "output", "resume", "log_every", "save_every", "keep_checkpoints", "eval_batches", "profile"),
        *("compile", "graphs", "masks", "residual", "activation_checkpointing", "shard_optimizer", "micro_batch"),
        *("labels", "classes", "validation_data"),  # files; fine-tuning compares their contents
        "probe_every",
        *("validate_every", "keep_best", "eval_clips", "eval_views", "compare_scratch"),
    }
)


def describe(config: RunConfig, store: TokenStore, **more: dict) -> dict:
    """The contents of config.json for a run with this configuration on this store. more: what else a resume must not change."""
    contents = {"videos": len(store), "frames": int(store.frames.sum()), "fps": store.fps}
    return {"config": asdict(config), "tokenizer": asdict(store.tokenizer), "store": contents, **more}


def open_run(run: Path, description: dict, resume: bool, store: TokenStore, device: torch.device) -> dict | None:
    """The checkpoint to resume from, if there is one. Writes nothing. Raises InputError if this run must not use the folder."""
    path = run / "config.json"
    for name in WRITTEN_LAST:
        if (run / name).is_dir():
            raise InputError(f"{run / name} is a folder, where the run writes a file: move it, or give another --output")
    if path.exists():
        if not resume:
            raise InputError(f"run folder {run} exists: add --resume to continue it, or give another --output")
        check_same_run(read_description(path), description, store, path, device)
        checkpoints = list_checkpoints(run)
        return load_checkpoint(checkpoints[-1]) if checkpoints else None
    ours = (TEMPORARY, LOCK)  # left by a run that was killed before it wrote config.json
    if run.exists() and not (run.is_dir() and all(entry.name.endswith(ours) for entry in run.iterdir())):
        raise InputError(f"{run} exists and is not a run folder: give another --output")
    return None


def start_run(run: Path, description: dict, store: TokenStore, world: World, step: int, held: ExitStack) -> None:
    """Create and lock the run folder, once every rank is ready to train. The lock lasts until `held` closes.

    Raises InputError on all ranks if another run holds the lock, if the ranks' steps differ, or if checkpoints are missing.
    """
    steps = [int(x) for x in distributed.gather_rows(torch.tensor(step), world)]
    if len(set(steps)) > 1:
        raise InputError(
            f"processes would continue from different steps {steps}: {run} must be one folder on a file system that all "
            "machines share"
        )

    def make() -> None:
        held.enter_context(locked(run, f"another run is writing to {run}: wait for its end, or give another --output"))
        if not (run / "config.json").exists():
            write_json(run / "config.json", description, indent=2)
        elif not list_checkpoints(run):
            check_none_is_missing(run, description["config"]["save_every"])
        if (store.folder / TOKENIZER).is_file() and not (run / TOKENIZER).exists():
            with replacing(run / TOKENIZER) as temporary:
                shutil.copyfile(store.folder / TOKENIZER, temporary)

    distributed.on_first_rank(make, world)


def check_none_is_missing(run: Path, save_every: int) -> None:
    """Raises InputError if a run has no checkpoint although its metrics go beyond the first: a restart would lose all of it."""
    saved = read_description(run / "config.json")["config"].get("save_every")
    save_every = max(saved if type(saved) is int else 1, save_every)  # a restart may have raised it
    lines = read_lines(run / "metrics.jsonl")
    first, last = (extreme((line["step"] for line in lines), default=0) for extreme in (min, max))
    saves = (last - 1) // save_every - (first - 1) // save_every  # multiples of save_every from first to last - 1
    if lines and (lines[-1].get("final") or (last > first and saves > 0)):
        raise InputError(
            f"{run} has no checkpoint, although its metrics reach step {last}: put {run / FOLDER} back, or delete "
            f"{run / 'metrics.jsonl'} to train from the beginning"
        )


def read_description(path: Path) -> dict:
    """The contents of config.json. Raises InputError if it is damaged."""
    try:
        fields, data = load_json(path)
        saved = unsealed(fields, data, NAMES | ({"labels"} & fields.keys()))
        typed(TokenizerInfo, saved["tokenizer"], "tokenizer")
        if not all(isinstance(saved[name], dict) for name in saved):
            raise InputError("its config, store or labels are not an object")
    except InputError as error:
        raise InputError(f"{path} is damaged ({error}): give another --output") from None
    return saved


def check_same_run(saved: dict, description: dict, store: TokenStore, path: Path, device: torch.device) -> None:
    """Raises InputError if a run would be resumed with other settings, or on another store's videos.

    "auto" as a precision is compared as what it means on this device, since the run's first device is not known.
    """
    check_tokenizer(saved["tokenizer"], store, path)
    now = json.loads(json.dumps(description))
    saved = {**saved, "config": with_later_options(saved["config"], now["config"])}
    before, after = (
        {**x, "precision": resolve_precision(x.get("precision"), device)} for x in (saved["config"], now["config"])
    )
    elsewhere = "or give another --output"
    if changed := differences(before, after, MAY_CHANGE):
        longer = f" (--continue-from {path.parent} starts another stage with its weights and moments)"
        if "scratch_epochs" in after:
            changed, longer = (
                re.sub(r"\bstart was", "from was", changed),
                f" (--from {path.parent} fine-tunes its model further)",
            )
        raise InputError(
            f"cannot resume {path.parent} with other settings: {changed}. Resume with those of {path}, {elsewhere}{longer}"
        )
    others = now.keys() - {"config", "tokenizer", "store"}
    if changed := "; ".join(filter(None, (differences(saved.get(name) or {}, now[name]) for name in sorted(others)))):
        raise InputError(f"cannot resume {path.parent} with other labels: {changed}. Give the first ones, {elsewhere}")
    if changed := differences(saved["store"], now["store"]):
        raise InputError(
            f"cannot resume {path.parent} on other videos: {changed} in {store.folder}. Give --data the first one, {elsewhere}"
        )


def with_later_options(before: dict, now: dict) -> dict:
    """A saved configuration with the defaults of options that did not exist when it was written."""
    kind = FinetuneConfig if "scratch_epochs" in now else PretrainConfig
    return {**{name: x for name, x in json.loads(json.dumps(asdict(kind()))).items() if name in now}, **before}


def differences(before: dict, now: dict, ignored: frozenset[str] = frozenset()) -> str:
    """`name was …, now …` for each value that differs, including values inside dictionaries."""
    names = [name for name in now if name not in ignored and before.get(name) != now[name]]
    return "; ".join(_difference(name, before.get(name), now[name]) for name in names)


def _difference(name: str, before: object, now: object) -> str:
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{name} was {before}, now {now}"
    before, now = ({f"{name}.{part}": x for part, x in values.items()} for values in (before, now))
    return differences(before, now)
