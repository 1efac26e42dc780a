"""Writes the tables of README.md and docs/ that hold measured numbers, from benchmarks/results/DEVICE/BENCHMARK.json.

A table is between `<!-- table: NAME -->` and `<!-- end -->`; TABLES has a function for each NAME. What was not measured has no
row, and a table without rows is a sentence that says how to measure it. A file that was made with --quick, or has no row that a
line of LINES asks for, is an error.

    python benchmarks/render.py            # rewrite the files
    python benchmarks/render.py --check    # exit status 1, and the names, if a table is not what the results say
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from documents import fill, number, table

ROOT = Path(__file__).resolve().parents[1]
CPU, H100 = "cpu", "nvidia-h100-80gb-hbm3"
NO_GPU = "No GPU has been measured for this project. `make gpu` on a machine that has a GPU measures it."
NO_CPU = "Not measured yet: `python benchmarks/{}.py` on a machine without a GPU measures it."
BOTH = "forward+backward"
OPS = ("axial_attention", "block_mask", "info_nce", "masked_cross_entropy", "dropout_add")
Row = dict[str, Any]


class Results:
    """The results in a folder: FOLDER/DEVICE/BENCHMARK.json."""

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, device: str, benchmark: str) -> dict[str, Any] | None:
        path = self.folder / device / f"{benchmark}.json"
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        if result.get("quick"):
            raise ValueError(f"{path} was made with --quick, whose numbers measure nothing: run the benchmark without it")
        return result

    def rows(self, device: str, benchmark: str, wanted: Row | None = None) -> list[Row]:
        """The rows of a file with these values; none where there is no file."""
        result = self.load(device, benchmark)
        rows = [row for row in result["rows"] if (wanted or {}).items() <= row.items()] if result else []
        if result and wanted and not rows:
            raise ValueError(
                f"{self.folder / device / benchmark}.json has no row with {wanted}: render.py asks for another name"
            )
        return rows

    def machines(self, device: str, benchmarks: Iterable[str], note: str = "medians") -> list[str]:
        """Where the numbers of these benchmarks come from. note: what else to say of them."""
        made: dict[str, list[str]] = {}
        for name in benchmarks:
            if result := self.load(device, name):
                threads = result.get("threads")
                where = [result["device"] if threads is None else result.get("processor", result["device"])]
                where += [f"{threads} thread{'s' * (threads > 1)}"] if threads else []
                made.setdefault(", ".join([*where, f"torch {result['torch']}"]), []).append(f"`{name}`")
        each = "; ".join(f"{machine} ({', '.join(names)})" for machine, names in made.items())
        return ["", f"Measured on {next(iter(made)) if len(made) == 1 else each}; {note}."]


def shown(x: float | None, write: Callable[[float], str] = number) -> str:
    return "–" if x is None else write(x)


def mib(size: float) -> str:
    return number(size / 2**20)


def is_ours(row: Row) -> bool:
    return row["impl"] == "ours" or row["impl"].startswith("ours ")  # "ours compiled"; "ours:triton" is not the default


def column(row: Row) -> str:
    """Its implementation; torch's scaled_dot_product_attention has one column, its fastest backend's."""
    return "fastest sdpa" if row["impl"].startswith("sdpa") else row["impl"]


def best(rows: Iterable[Row], key: str) -> Row | None:
    """The fastest: of "ms" the least, of all else the most."""
    timed = [row for row in rows if row.get(key)]
    return (min if key == "ms" else max)(timed, key=lambda row: row[key], default=None)


def faster(ours: Row, other: Row, key: str) -> str:
    """How many times faster ours is."""
    return number(other[key] / ours[key] if key == "ms" else ours[key] / other[key]) + "×"


def pivot(rows: Sequence[Row], by: Callable[[Row], tuple[str, ...]], key: str) -> tuple[list[str], list[list[str]]]:
    """Implementations that were measured, ours first, and a line for each value of by(row): that, then a cell for each
    implementation. Beside a peer's number it says how many times faster the fastest of ours is."""
    impls = list(dict.fromkeys(column(row) for row in sorted(rows, key=is_ours, reverse=True) if row.get(key)))
    lines = []
    for title in dict.fromkeys(by(row) for row in rows if row.get(key)):
        of_line = [row for row in rows if by(row) == title]
        ours, line = best(filter(is_ours, of_line), key), [*title]
        for impl in impls:
            found = [row for row in of_line if column(row) == impl]
            fastest = best(found, key)
            text = number(fastest[key]) if fastest else found[0]["status"] if found else "–"
            line.append(f"{text} ({faster(ours, fastest, key)})" if ours and fastest and not is_ours(fastest) else text)
        lines.append(line)
    return impls, lines


ATTENTION = {"shape": "5x16x16 N=8 D=64 axes=H B=8 dropout=0"}
LINES: list[tuple[str, str, Row, str]] = [  # of README.md: title, benchmark, its rows, key
    ("`axial_attention` of 8 clips along H, forward, ms", "axial_attention", ATTENTION | {"pass": "forward"}, "ms"),
    ("the same, forward + backward, ms", "axial_attention", ATTENTION | {"pass": BOTH}, "ms"),
    ("`info_nce` of 4096 videos, forward + backward, ms", "info_nce", {"shape": "n=4096 d=256", "pass": BOTH}, "ms"),
    ("`block_mask` of 512 clips, ms", "block_mask", {"shape": "5x16x16 B=512 blocks=5"}, "ms"),
    ("pairs of clips read a second, cold cache", "data", {"shape": "5x16x16 n=128 cold", "pass": "batch"}, "pairs_per_s"),
    ("training step of Small, float32, videos/s", "train_step", {"preset": "small 5x128", "dtype": "float32"}, "videos_per_s"),
    (
        "training step of Small, bfloat16, videos/s",
        "train_step",
        {"preset": "small 5x128", "dtype": "bfloat16"},
        "videos_per_s",
    ),
]


def summary(results: Results) -> list[str]:
    """LINES of a CPU."""
    benchmarks = dict.fromkeys(benchmark for _, benchmark, _, _ in LINES if results.load(CPU, benchmark))
    lines = []
    for title, benchmark, wanted, key in LINES:
        if benchmark in benchmarks:
            impls, (cells,) = pivot(results.rows(CPU, benchmark, wanted), lambda _: (), key)
            named = {impl: cell for impl, cell in zip(impls, cells, strict=True) if ":" not in impl}
            lines.append([title, named.pop("ours", "–"), "; ".join(f"{impl} {cell}" for impl, cell in named.items())])
    head = ["clips of 5×16×16 tokens", "ours", "peers (how many times faster ours is)"]
    return [*table(head, lines), *results.machines(CPU, benchmarks)] if lines else [NO_CPU.format("axial_attention")]


def kernels(results: Results, device: str) -> list[str]:
    """A table for each op: ms of each implementation, by shape and pass."""

    def by(row: Row) -> tuple[str, ...]:
        return row["shape"], row["dtype"], row["pass"]

    lines: list[str] = []
    for op in OPS:
        rows = [row for row in results.rows(device, op) if row["pass"] != "backward"]
        impls, cells = pivot(rows, by, "ms")
        for line in cells:
            ours = best((row for row in rows if is_ours(row) and by(row) == tuple(line[:3])), "ms") or {}
            line += [shown(ours.get("copy_share"), "{:.0%}".format), shown(ours.get("peak_bytes"), mib)]
        head = [f"`{op}`, ms", "dtype", "pass", *impls, "ours, of a copy's speed", "ours, MiB above the inputs"]
        lines += [*table(head, cells), ""] if rows else []
    return [*lines[:-1], *results.machines(device, OPS)] if lines else []


def steps(results: Results, device: str) -> list[str]:
    """Each preset and implementation of the training step."""
    rows = [row for row in results.rows(device, "train_step") if row.get("videos_per_s")]
    lines = []
    for row in rows:
        same = [
            other for other in rows if is_ours(other) and (other["preset"], other["dtype"]) == (row["preset"], row["dtype"])
        ]
        ours = best(same, "videos_per_s")
        cells = [faster(ours, row, "videos_per_s") if ours and not is_ours(row) else "–"]
        cells += [shown(row.get("matrix_peak_share"), "{:.0%}".format), shown(row.get("peak_bytes"), mib)]
        cells += [shown(row.get("syncs"), "{:g}".format), shown(row.get("data_wait_share"), "{:.2%}".format)]
        cells += [shown(row.get("paper_videos_per_s"))]
        lines.append([row["preset"], row["dtype"], row["impl"], number(row["videos_per_s"]), *cells])
    head = [
        "preset",
        "dtype",
        "",
        "videos/s",
        "ours is faster by",
        "of the matrix peak",
        "peak MiB beyond weights and optimizer",
    ]
    head += ["waits for the device a micro-step", "waiting for data", "the paper on one V100"]
    return [*table(head, lines), *results.machines(device, ["train_step"])] if lines else []


def layouts(results: Results, device: str) -> list[str]:
    rows = [row for row in results.rows(device, "attn_layouts") if row["pass"] == "step"]

    def by(row: Row) -> tuple[str, ...]:
        return f"`{row['layout']}`, {row['norm']}", f"{row['parameters'] / 1e6:.1f}"

    impls, lines = pivot(rows, by, "samples_per_s")
    head = ["layout, norm", "M parameters", *(f"{impl}, videos/s" for impl in impls)]
    return [*table(head, lines), *results.machines(device, ["attn_layouts"])] if lines else []


def data(results: Results, device: str) -> list[str]:
    rows = [row for row in results.rows(device, "data") if row["pass"] != "read"]
    impls, lines = pivot(rows, lambda row: (row["shape"], row["pass"]), "pairs_per_s")
    return [*table(["pairs of clips a second", "", *impls], lines), *results.machines(device, ["data"])] if lines else []


def demo(results: Results, device: str) -> list[str]:
    """What the demo's model predicts, and its fine-tuning beside a model from scratch."""
    rows = results.rows(device, "demo")
    if not rows:
        return []

    def of(key: str) -> str:
        """The mean over seeds, and how far they are apart."""
        values = [row[key] for row in rows]
        apart = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.2f}{apart}"

    copied = f"a copy of the nearest visible token {of('nearest_copy_accuracy')}"
    lines = [
        ["masked tokens of held-out videos", of("mask_accuracy"), copied],
        [
            f"motion of {rows[0]['videos']} other videos, fine-tuned",
            of("top1"),
            f"from scratch {of('from_scratch_top1')}, chance {rows[0]['chance']:.2f}",
        ],
    ]
    head = ["accuracy", f"mean of {len(rows)} seeds (range)", "beside it"]
    seconds = (min(row[f"{preset}_seconds"] for row in rows) for preset in ("demo", "finetune_demo"))
    took = "`demo` took {:.0f} s, the two models of `finetune-demo` {:.0f} s, the fastest of all seeds".format(*seconds)
    return [*table(head, lines), *results.machines(device, ["demo"], took)]


def traffic(results: Results, device: str) -> list[str]:
    """Units of a layer: ours in each mode of activation checkpointing, and naive."""
    rows = results.rows(device, "step_traffic")
    lines = []
    for row in rows:
        units = (shown(row[name], "{:.0f}".format) for name in ("forward", "backward", "all", "kept", "around"))
        bounds = (shown(row[name], "{:.2f}".format) for name in ("h100_ms", "h200_ms"))
        naive = next(
            other for other in rows if (other["preset"], other["norm"], other["impl"]) == (row["preset"], row["norm"], "naive")
        )
        share = "–" if row is naive else f"{row['all'] / naive['all']:.2f}"
        lines.append([row["preset"], row["norm"], f"{row['impl']}, {row['checkpointing']}", *units, share, *bounds])
    head = [
        "preset",
        "norm",
        "checkpointing",
        "forward",
        "backward",
        "all",
        "kept",
        "around",
        "of naive",
        "ms a video, H100 at best",
        "H200",
    ]
    return table(head, lines) if lines else []


def on_cpu(make: Callable[[Results, str], list[str]], benchmark: str, results: Results) -> list[str]:
    return make(results, CPU) or [NO_CPU.format(benchmark)]


def on_gpus(make: Callable[[Results, str], list[str]], results: Results) -> list[str]:
    """make's lines for each GPU that has results."""
    found = [make(results, path.name) for path in sorted(results.folder.glob("*/")) if path.name != CPU]
    lines = [line for one in found if one for line in ("", *one)]
    return lines[1:] or [NO_GPU]


TABLES: dict[str, Callable[[Results], list[str]]] = {
    "cpu": summary,
    "demo": partial(on_cpu, demo, "demo"),
    "gpu": partial(on_gpus, steps),
    "kernels-cpu": partial(on_cpu, kernels, OPS[0]),
    "kernels-gpu": partial(on_gpus, kernels),
    "step-cpu": partial(on_cpu, steps, "train_step"),
    "data-cpu": partial(on_cpu, data, "data"),
    "traffic": partial(on_cpu, traffic, "step_traffic"),
    "layouts-cpu": partial(on_cpu, layouts, "attn_layouts"),
}


def documents(root: Path = ROOT) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if a table is stale")
    check = parser.parse_args(argv).check
    results, changed = Results(root / "benchmarks" / "results"), []
    for path in documents(root):
        tables = {name: partial(make, results) for name, make in TABLES.items()}
        text, stale = fill(path.read_text(), "table", tables, path.relative_to(root).as_posix())
        changed += [f"{path.relative_to(root)}: table {name}" for name in stale]
        if stale and not check:
            path.write_text(text)
    if check and changed:
        print("\n".join(f"{each} is stale: python benchmarks/render.py" for each in changed))
        return 1
    print("\n".join(f"{each} rewritten" for each in changed) or "all tables are as the results say")
    return 0


if __name__ == "__main__":
    sys.exit(main())
