"""Every single-bit flip of every kind of file that is read back, opened as a user would.

python tests/soak/flips.py [--every N]

noticed     an InputError, which names what is wrong
harmless    what is read is the same to the bit
unchecked   something else is read, where nothing promises otherwise: in files of an earlier version, which have no checksum,
            and in metrics.jsonl, whose lines have none (nothing is computed from them)
silent      something else is read
other       any other exception

Exit status 0 if nothing is silent and there is no other exception. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vimpac import weights
from vimpac.checkpoint import list_checkpoints, load_checkpoint
from vimpac.config import ModelConfig, PretrainConfig
from vimpac.data.format import StoreSettings
from vimpac.data.patch_vq import PatchVQ
from vimpac.data.shards import check_listed
from vimpac.data.store import StoreWriter, TokenStore, finish_store
from vimpac.data.tokenizer_file import describe
from vimpac.data.tokenizers import check_tokenizer_file, load_tokenizer
from vimpac.errors import InputError
from vimpac.figures.curves import read_metrics
from vimpac.files.checked import typed
from vimpac.training.metrics import read_lines
from vimpac.training.pretrain import pretrain
from vimpac.training.run import check_same_run, read_description
from vimpac.training.run import describe as describe_run

OUTCOMES = ("noticed", "harmless", "unchecked", "silent", "other")
EARLIER = ", earlier version"
OLD = Path(__file__).resolve().parents[1] / "old"
SIZES = {"layers": 1, "width": 4, "heads": 2, "layout": "TxHxW", "grid": (3, 2, 2), "mlp_width": 4}
HEADS = {"head_layers": 1, "head_width": 4, "head_out": 2}


def make_store(folder: Path) -> Path:
    """A store of two shards with a tokenizer of its own, some hundred bytes a file."""
    rng = np.random.default_rng(0)
    tokenizer = PatchVQ(rng.integers(0, 256, (5, 192), dtype=np.uint8), 11, 0)
    folder.mkdir(parents=True)
    tokenizer.save(folder / "tokenizer.safetensors")
    writer = StoreWriter(folder, StoreSettings(describe(tokenizer), 2.0, 16), shard_bytes=100)
    for number, frames in enumerate((3, 4, 5, 6, 9)):
        writer.add(f"{number}.mp4", rng.integers(0, 5, (1, frames, 2, 2)), 1000 + number)
    writer.close()
    finish_store(folder, {"bad.avi": "is an empty file"})
    return folder


def make_run(store: Path, folder: Path) -> None:
    """Two updates of a model of some hundred parameters."""
    config = PretrainConfig(
        model=ModelConfig(**SIZES, **HEADS),
        data=str(store),
        output=str(folder),
        steps=2,
        batch_size=2,
        contrastive_videos=2,
        keep_checkpoints=1,
        eval_batches=1,
        held_out=0.25,
        precision="fp32",
    )
    pretrain(config)


def cases(store: Path, run: Path) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """Name of a kind of file → one of it, and what opens it and returns all that is read."""
    model, metrics, config = run / "model.safetensors", run / "metrics.jsonl", run / "config.json"
    checkpoint, tokenizer = list_checkpoints(run)[-1], store / "tokenizer.safetensors"
    shard = min(store.glob("shard-*.bin"))
    whole, resumed = partial(store_contents, store), resumption(store, config)
    return {
        "shard-*.bin": (shard, whole),
        "store.json": (store / "store.json", whole),
        "shard-*.json": (shard.with_suffix(".json"), whole),
        "tokenizer.safetensors": (tokenizer, partial(tokenizer_contents, tokenizer)),
        "tokenizer.safetensors in its store": (tokenizer, whole),
        "model.safetensors": (model, lambda: plain(model_contents(model))),
        "checkpoints/step-*.pt": (checkpoint, lambda: plain(load_checkpoint(checkpoint))),
        "config.json": (config, resumed),
        "metrics.jsonl": (metrics, partial(log_contents, metrics)),
    }


def store_contents(folder: Path) -> tuple:
    """All that `vimpac verify` checks and all that training reads."""
    store = TokenStore(folder, verify=True)
    check_listed(folder)
    check_tokenizer_file(folder, store.tokenizer)
    ids = [store.read(video, view=view).tobytes() for video in range(len(store)) for view in range(len(store.views))]
    store.close()
    contents = (repr(store.settings), store.names, store.frames.tolist(), store.failed, ids)
    return *contents, tokenizer_contents(folder)


def tokenizer_contents(path: Path) -> tuple:
    tokenizer = load_tokenizer(path)
    return tokenizer.digest, tokenizer.codebook.tobytes(), tokenizer.requested, tokenizer.seed


def model_contents(path: Path) -> tuple:
    model = weights.load(path)
    return dataclasses.asdict(model.config), weights.read_model_file(path)[0], dict(model.state_dict())


def resumption(store: Path, path: Path) -> Callable[[], str]:
    """What --resume reads of config.json, with the configuration that it says now."""
    tokens = TokenStore(store)
    config = typed(PretrainConfig, read_description(path)["config"])

    def read() -> str:
        saved = read_description(path)
        check_same_run(saved, describe_run(config, tokens), tokens, path, torch.device("cpu"))
        return json.dumps(saved, sort_keys=True)

    return read


def log_contents(path: Path) -> tuple[int, str]:
    """How many lines a resumed run sees, and what it and the figures see."""
    lines = read_lines(path)
    series, final = read_metrics(path)
    return len(lines), json.dumps([lines, {name: points.tolist() for name, points in series.items()}, final])


def plain(value: Any) -> Any:
    """The same with tensors as their bytes, so that == compares everything, NaN too."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return [(repr(key), plain(x)) for key, x in value.items()]
    return [plain(x) for x in value] if isinstance(value, list | tuple) else repr(value)


def flip_all(name: str, path: Path, read: Callable[[], Any], every: int, most: int | None = None) -> tuple[Counter, list[str]]:
    """How often each outcome came, and where the bad ones. every: an odd number, so that it meets all eight bits of bytes."""
    data, expected = path.read_bytes(), read()
    bits = 8 * len(data)
    step = max(every, bits // most if most else 1) | 1
    counts, bad = Counter({outcome: 0 for outcome in OUTCOMES}), []
    with open(path, "r+b", buffering=0) as file:
        for bit in range(0, bits, step):
            place = bit // 8
            os.pwrite(file.fileno(), bytes([data[place] ^ 1 << bit % 8]), place)
            outcome, what = outcome_of(name, read, expected)
            counts[outcome] += 1
            if outcome in ("silent", "other"):
                bad.append(f"{path.name}, byte {place}, bit {bit % 8}: {outcome} {what}")
            os.pwrite(file.fileno(), data[place : place + 1], place)
    assert path.read_bytes() == data
    return counts, bad


def outcome_of(name: str, read: Callable[[], Any], expected: Any) -> tuple[str, str]:
    try:
        found = read()
    except InputError:
        return "noticed", ""
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # what else may be raised is the question; safetensors' panics are no Exception
        return "other", f"{type(error).__name__}: {error}"
    if found == expected:
        return "harmless", ""
    if name.startswith("metrics.jsonl") and found[0] < expected[0]:
        return "noticed", ""  # the line is left out, and a resumed run says which one it lacks
    return ("unchecked" if name.startswith("metrics.jsonl") or name.endswith(EARLIER) else "silent"), ""


def campaign(
    folder: Path, every: int = 1, most: int | None = None, earlier: int = 10_000
) -> tuple[dict[str, Counter], list[str]]:
    """Flips each `every`th bit of a file of each kind, at most about `most` of them; makes the files in `folder`.

    earlier: the same for files of an earlier version, which are not spared by a checksum what comes after it.
    """
    store = make_store(folder / "store")
    make_run(store, folder / "run")
    old = Path(shutil.copytree(OLD, folder / "old"))
    kinds = {name: (*case, most) for name, case in cases(store, folder / "run").items()}
    kinds |= {
        name + EARLIER: (*case, min(most or earlier, earlier)) for name, case in cases(old / "store", old / "run").items()
    }
    counts, bad = {}, []
    for name, (path, read, limit) in kinds.items():
        counts[name], worst = flip_all(name, path, read, every, limit)
        bad += worst
    return counts, bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th bit")
    every, started = parser.parse_args().every, time.monotonic()
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        counts, bad = campaign(Path(folder), every)
    print(f"| file | flips | {' | '.join(OUTCOMES)} |\n|---|{'---|' * (len(OUTCOMES) + 1)}")
    for name, found in counts.items():
        print(f"| {name} | {found.total()} | {' | '.join(str(found[outcome]) for outcome in OUTCOMES)} |")
    for line in bad[:20]:
        print(line)
    silent, other = (sum(found[outcome] for found in counts.values()) for outcome in ("silent", "other"))
    files = {name: dict(found) for name, found in counts.items()}
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"soak": "flips", "files": files, "silent": silent, "other": other, "seconds": seconds}))
    return 1 if silent or other else 0


if __name__ == "__main__":
    sys.exit(main())
