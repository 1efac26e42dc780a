"""A small store with the three test views, labels of its videos, and a classifier of them that is right now and then."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
from runs import tiny_model
from vimpac import weights
from vimpac.data.format import TOKENIZER, StoreSettings, view_set
from vimpac.data.patch_vq import PatchVQ
from vimpac.data.store import StoreWriter, finish_store
from vimpac.data.tokenizer_file import describe
from vimpac.data.tokenizers import load_tokenizer
from vimpac.model import ClassificationModel

CODES = 11
CLASSES = ("jump", "run", "sit", "walk")
FRAMES = (3, 4, 5, 6, 9, 12, 2)  # of videos in turn; a clip of the tiny model has 3


def write_labelled_store(folder: Path, videos: int = 14, views: str = "test", fps: float = 2.0, seed: int = 0) -> Path:
    """Random ids of a tokenizer that lies in the folder, 4 × 4 a frame; labels in FOLDER.csv: even videos are tests."""
    rng = np.random.default_rng(seed)
    tokenizer = PatchVQ(rng.integers(0, 256, (CODES, 192), dtype=np.uint8))
    writer = StoreWriter(folder, StoreSettings(describe(tokenizer), fps, 32, view_set(views)))
    tokenizer.save(folder / TOKENIZER)
    lines = ["video,label,split"]
    for i in range(videos):
        shape = len(view_set(views)), FRAMES[i % len(FRAMES)], 4, 4
        writer.add(f"v{i:02d}.mp4", rng.integers(0, CODES, shape))
        lines.append(f"v{i:02d}.mp4,{CLASSES[i // 2 % 4]},{'train' if i % 2 else 'test'}")
    writer.close()
    finish_store(folder)
    folder.with_suffix(".csv").write_text("\n".join(lines) + "\n")
    return folder


def classifier(classes: int = len(CLASSES), seed: int = 2, **options) -> ClassificationModel:
    """A model whose scores differ from clip to clip. (A fresh classifier is zero, and [CLS] nearly the same for all clips.)"""
    torch.manual_seed(seed)
    model = ClassificationModel(tiny_model(vocab_size=CODES, **options), classes).eval()
    with torch.no_grad():
        for name, x in model.backbone.named_parameters():
            if "norm" not in name:
                x.copy_((1 if "embedding" in name else 0.5) * torch.randn_like(x))
        cls = model.backbone(torch.randint(CODES, (64, *model.config.grid)))[0]
        weight = torch.randn_like(model.classifier.weight)
        weight *= 4 / (cls @ weight.T).std(0)[:, None]
        model.classifier.weight.copy_(weight)
        model.classifier.bias.copy_(-weight @ cls.mean(0))
    return model


def save_run(folder: Path, store: Path, model: ClassificationModel | None = None, names=CLASSES) -> Path:
    """A folder with a model of the store's tokenizer, and with that tokenizer."""
    folder.mkdir()
    tokenizer = load_tokenizer(store)
    tokenizer.save(folder / TOKENIZER)
    info = dataclasses.asdict(describe(tokenizer))
    weights.save(model or classifier(), folder / "model.safetensors", info, fps=2.0, class_names=names)
    return folder


def run_command(words: list[str], log: Path, ranks: int, hook=None, code: int = 0) -> str:
    """`vimpac WORDS` in several processes, each with this exit code. Returns what they printed."""
    return runs.run([], log, ranks, partial(_command, words, hook), code)


def _command(words: list[str], hook) -> None:
    from vimpac.commands import main as cli

    if hook is not None:
        hook()
    sys.exit(cli.main(words))


@pytest.fixture
def labelled(tmp_path, monkeypatch) -> Path:
    """The current folder: `store` with `store.csv`, and `run` with a model and the tokenizer."""
    monkeypatch.chdir(tmp_path)
    store = write_labelled_store(Path("store"))
    save_run(Path("run"), store)
    return tmp_path
