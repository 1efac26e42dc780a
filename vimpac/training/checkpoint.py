"""Checkpoints: one file a step with everything that the rest of the run depends on, written whole or not at all.

A file holds {format, version, step, config, tokenizer, world_size, model, optimizer, scaler, rng}: tensors and plain values,
read back with weights_only=True. The sampler's state is the step: what a sample is depends on its number alone.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch

from vimpac.atomic import TEMPORARY, replacing
from vimpac.errors import InputError

FORMAT = "vimpac-checkpoint"
VERSION = 1
FOLDER = "checkpoints"


def save_checkpoint(run: Path, state: dict, keep: int) -> Path:
    """Write RUN/checkpoints/step-########.pt and remove all but the newest `keep`."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state['step']:08d}.pt"
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, "version": VERSION, **state}, temporary)
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
    return state
