"""The demo and its fine-tuning, run as a user runs them: does pre-training teach something that labels alone do not?

For each seed, `vimpac train demo` pre-trains on generated videos, and `vimpac train finetune-demo` fine-tunes that model on
the motions of 768 of them. Beside it, it trains a new model of the same shape with the same options. Accuracy is on the other
256 videos (standard error 0.03 at most). Pre-training has seen most of these, without labels. All seeds share the videos.

The goals: motion accuracy at least 25 points above from scratch, the demo within 5 minutes and its fine-tuning within 3, on two
cores.

Runs are kept in --folder. The same command again continues them, after an interruption too.

    python benchmarks/demo.py [--folder runs/demo-benchmark] [--seeds 3] [--quick]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import harness
import report

PRETRAINING = ("mask_accuracy", "nearest_copy_accuracy", "retrieval_accuracy", "histogram_retrieval_accuracy")
FINETUNING = ("top1", "from_scratch_top1", "chance")
QUICK = {"demo": ("--steps", "2", "--synthetic-videos", "16"), "finetune-demo": ("--steps", "2", "--synthetic-videos", "16")}
GOALS = {"gap": 0.25, "demo": 300.0, "finetune-demo": 180.0}


def run(preset: str, output: Path, seed: int, extra: tuple[str, ...]) -> tuple[dict, float]:
    """The last line of a run's metrics, and its seconds, of all calls in sum."""
    taken = output.with_suffix(".seconds")
    seconds = float(taken.read_text()) if taken.exists() else 0.0
    if not finished(output):
        resume = ["--resume"] if output.exists() else []
        command = [sys.executable, str(harness.ROOT / "train.py"), preset, "--output", str(output), "--seed", str(seed)]
        started = time.perf_counter()
        try:
            subprocess.run([*command, *extra, *resume], check=True)
        finally:
            seconds += time.perf_counter() - started
            taken.write_text(f"{seconds}\n")
    result = finished(output)
    if result is None:
        raise RuntimeError(f"{output} ended without a result")
    return result, seconds


def finished(output: Path) -> dict | None:
    """The last line of its metrics, if that is a result."""
    metrics = output / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    return last if last.get("final") else None


def row(folder: Path, seed: int, quick: bool) -> dict:
    extra = QUICK if quick else {}
    trained, demo_seconds = run("demo", folder / f"demo-{seed}", seed, extra.get("demo", ()))
    start = ("--from", str(folder / f"demo-{seed}"))
    tuned, tuning_seconds = run("finetune-demo", folder / f"tuned-{seed}", seed, start + extra.get("finetune-demo", ()))
    values = {name: trained[name] for name in PRETRAINING} | {name: tuned[name] for name in FINETUNING}
    times = {"demo_seconds": round(demo_seconds, 1), "finetune_demo_seconds": round(tuning_seconds, 1)}
    return {"seed": seed, "videos": tuned["videos"], **values, "gap": tuned["top1"] - tuned["from_scratch_top1"], **times}


def summary(rows: list[dict]) -> list[str]:
    """Mean and range of each number, beside its goal."""
    mean = {name: statistics.fmean(r[name] for r in rows) for name in rows[0]}
    gaps = [r["gap"] for r in rows]
    return [
        f"motion: {mean['top1']:.3f} fine-tuned, {mean['from_scratch_top1']:.3f} from scratch, chance {mean['chance']:.2f}",
        f"apart: {mean['gap']:.3f}, from {min(gaps):.3f} to {max(gaps):.3f} (goal ≥ {GOALS['gap']})",
        f"seconds: demo {mean['demo_seconds']:.0f} (goal ≤ {GOALS['demo']:.0f}), "
        f"finetune-demo {mean['finetune_demo_seconds']:.0f} (goal ≤ {GOALS['finetune-demo']:.0f})",
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-benchmark"), help="of the runs; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="how many; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="two updates of each: measures nothing")
    parser.add_argument("--results", type=Path, help="folder for the JSON; default: benchmarks/results/DEVICE, --quick: none")
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = [row(options.folder, seed, options.quick) for seed in range(options.seeds)]
    result = {
        "benchmark": "demo",
        "device": report.device_name(device),
        "processor": report.processor(),
        "torch": torch.__version__,
        "threads": None if device.type == "cuda" else torch.get_num_threads(),
        "quick": options.quick,
        "rows": rows,
    }
    print("\n".join(summary(rows)))
    folder = options.results or (
        None if options.quick else harness.ROOT / "benchmarks" / "results" / report.slug(result["device"])
    )
    if folder is not None:
        report.write_json(folder, result)
    print(json.dumps(result, allow_nan=False), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
