"""A small store with labels that can be learned, and command lines that fine-tune on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runs import VOCABULARY
from vimpac.data.format import StoreSettings, TokenizerInfo, View
from vimpac.data.store import StoreWriter, finish_store

CLASSES = ("fall", "jump", "run")
TUNE = {
    "epochs": 4,
    "batch_size": 6,
    "save_every": 2,
    "eval_clips": 2,
    "learning_rate": 3e-2,
    "precision": "fp32",
    "model.layers": 1,
    "model.width": 16,
    "model.heads": 2,
    "model.dropout": 0.1,
    "frames": 3,
}


def write_labelled(
    folder: Path, videos: int = 24, views: Sequence[View] = (View(),), fps: float = 2.0, digest: str = "d" * 64, side: int = 4
) -> Path:
    """FOLDER/tokens and FOLDER/labels.csv: each class prefers ids of its own; a quarter of the videos is for validation."""
    rng = np.random.default_rng(0)
    writer = StoreWriter(
        folder / "tokens", StoreSettings(TokenizerInfo("patch-vq", VOCABULARY, 8, digest), fps, 8 * side, views)
    )
    lines = ["video,label,split"]
    for i in range(videos):
        label, frames = i % len(CLASSES), 3 + i % 4
        ids = rng.integers(0, VOCABULARY, (len(views), frames, side, side))
        ids[rng.random(ids.shape) < 0.5] = label
        name = f"{CLASSES[label]}/video-{i:03d}.mp4"
        writer.add(name, ids)
        lines.append(f"{name},{CLASSES[label]},{'validation' if i // 3 % 4 == 3 else 'train'}")
    writer.close()
    finish_store(folder / "tokens")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


def tuning(folder: Path, output: Path | str, start: Path | str = "none", resume: bool = False, **options) -> list[str]:
    """Command line of train.py for a small fine-tuning run; None leaves an option out."""
    words = ["finetune-hmdb51", "--data", str(folder / "tokens"), "--labels", str(folder / "labels.csv")]
    words += ["--from", str(start), "--output", str(output), *(["--resume"] if resume else [])]
    given = {**TUNE, "fps": 2.0, "scratch-epochs": 1.0, **options}
    if str(start) != "none":
        given = {name: x for name, x in given.items() if not name.startswith("model.") or name == "model.dropout"}
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None:
            words += [flag, str(value)]
    return words
