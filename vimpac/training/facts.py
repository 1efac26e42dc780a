"""What a run says of itself: what it trains and what that takes, at a resume from where, at its end what is where."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from vimpac.checkpoint import list_checkpoints
from vimpac.console import count
from vimpac.data.store import TokenStore
from vimpac.training.loop import Loop

FEW = 8
"""Held-out videos below which an evaluation says little."""
FILES = {
    "model.safetensors": "model",
    "best.safetensors": "best model",
    "evaluation-validation": "evaluation",
    "evaluation-test": "evaluation",
    "curves.png": "curves",
}


def start_facts(loop: Loop, store: TokenStore, videos: int, held_out: int) -> list[str]:
    """Sentences on the data, the model, the length and the disk space of a run. videos, held_out: their numbers."""
    size = checkpoint_bytes(loop.module.model)
    kept = min(loop.config.keep_checkpoints, max(1, loop.schedule.steps // loop.config.save_every))
    facts = [
        f"{loop.run}: {count(videos, 'training video')} of {store.folder}, {held_out} held out, "
        f"{rounded(parameters(loop.module.model))} parameters, {count(loop.schedule.steps, 'update')} of "
        f"{count(loop.config.batch_size, 'video')} on {loop.world.device}"
    ]
    if loop.step:
        own = list_checkpoints(loop.run)
        facts.append(f"continues after update {loop.step}, from {own[-1] if own else 'an earlier stage'}")
    # One more than are kept: a new checkpoint is complete before the oldest is removed.
    needed, free = (kept + 1) * size, shutil.disk_usage(existing_folder(loop.run)).free
    space = f"checkpoints take {megabytes(size)} each, {megabytes(kept * size)} in all"
    facts.append(space if needed <= free else f"{space}, but only {megabytes(free)} are free: use another disk for --output")
    if held_out < FEW:
        facts.append(
            f"{count(held_out, 'held-out video')}: too few for the evaluation to mean much, hold out more (--held-out)"
        )
    return facts


def end_facts(run: Path) -> str:
    """Where the run's results are."""
    return ", ".join(f"{what}: {run / name}" for name, what in FILES.items() if (run / name).exists())


def existing_folder(path: Path) -> Path:
    """`path`, or the closest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def rounded(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 100_000 else f"{number:,}"


def checkpoint_bytes(model: nn.Module) -> int:
    """Weights, and AdamW's two moments of those that are trained."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return sum(x.numel() * x.element_size() for x in model.state_dict().values()) + 2 * trained


def megabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(1, round(size / 1e6))} MB"
