"""Checkpoints: one file a step with everything that the rest of the run depends on, written whole or not at all.

A file holds {format, version, step, config, tokenizer, world_size, model, optimizer, scaler}: tensors and plain values, read
back with weights_only=True. The state of the sampler and of every generator is the step: what a sample is, its mask and a
micro-step's dropout are functions of the run's seed and their number. So a checkpoint fits any number of processes.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch

from vimpac.atomic import TEMPORARY, replacing
from vimpac.data.store import TokenStore
from vimpac.errors import InputError

FORMAT = "vimpac-checkpoint"
VERSION = 2
FOLDER = "checkpoints"
PARTS = frozenset({"step", "config", "tokenizer", "model", "optimizer", "scaler"})


def save_checkpoint(run: Path, state: dict, keep: int) -> Path:
    """Write RUN/checkpoints/step-########.pt and remove all but the newest `keep`. Raises OSError, as of a full disk."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state['step']:08d}.pt"
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save({"format": FORMAT, "version": VERSION, **state}, file)
        except RuntimeError as error:  # after a failed write torch closes its archive, and says only that this fails, too
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    for old in list_checkpoints(run)[:-keep]:
        old.unlink()
    for leftover in folder.glob("*" + TEMPORARY):  # of a run that was killed while it wrote
        leftover.unlink()
    return path


def list_checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(p for p in (run / FOLDER).glob("step-*.pt") if re.fullmatch(r"step-\d{8,}\.pt", p.name))


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint, onto the CPU. Raises InputError for a file that is missing, cut short, damaged or foreign."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            if bad := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {bad} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"cannot read checkpoint {path}: {error.strerror}; expected RUN/{FOLDER}/step-########.pt") from None
    except Exception as error:  # a damaged file makes zipfile and torch.load raise nearly anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"cannot read checkpoint {path} ({reason}): it was cut short or damaged; copy it again, or delete it to resume "
            "from the one before"
        ) from None
    kind = (state.get("format"), state.get("version")) if isinstance(state, dict) else (None, None)
    if kind != (FORMAT, VERSION):
        raise InputError(
            f"{path} has format {kind[0]!r} version {kind[1]!r}, expected {FORMAT!r} version {VERSION}; "
            "use the program that wrote it"
        )
    if missing := sorted(PARTS - state.keys()):
        raise InputError(f"{path} lacks {', '.join(missing)}, so a run cannot go on from it: delete it, or start anew")
    return state


def check_tokenizer(saved: dict, store: TokenStore, where: Path) -> None:
    """Raises InputError when a run's ids are not the store's."""
    if saved["digest"] != store.tokenizer.digest:
        raise InputError(
            f"{where} was trained on ids of tokenizer {saved['name']} {saved['digest'][:12]}…, store {store.folder} holds ids "
            f"of {store.tokenizer.name} {store.tokenizer.digest[:12]}…: tokenize the videos with the first store's tokenizer "
            "(`vimpac tokenize --tokenizer-path STORE`)"
        )
