"""Writes the tables of README.md and docs/ that measured numbers stand in, from the JSON files of the benchmarks.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; TABLES has a function for each NAME, from results to lines of
markdown. Results are benchmarks/results/DEVICE/BENCHMARK.json, as harness.py writes them. A cell whose file is not there says
"not measured yet", one whose row has no time says why; a file that lacks the row asked for, or was made with --quick, is an
error.

    python benchmarks/render.py            # rewrite the files
    python benchmarks/render.py --check    # exit status 1, and the names, if a table is not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
CPU, H100 = "cpu", "nvidia-h100-80gb-hbm3"
NOT_YET = "not measured yet"
START, END = re.compile(r"<!-- table: (\S+) -->"), "<!-- end -->"
BOTH = "forward+backward"
Row = dict


class Results:
    """The results below a folder: device, benchmark → what the benchmark wrote, or None."""

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, device: str, benchmark: str) -> dict | None:
        path = self.folder / device / f"{benchmark}.json"
        if not path.exists():
            return None
        result = json.loads(path.read_text())
        if result.get("quick"):
            raise ValueError(f"{path} was made with --quick, whose numbers measure nothing: run the benchmark without it")
        return result

    def rows(self, device: str, benchmark: str, **wanted: str) -> list[Row] | None:
        """Rows with these values, at least one, in the file's order; None if there is no file. A key's _ stands for what
        Python takes for itself (pass_)."""
        result = self.load(device, benchmark)
        if result is None:
            return None
        wanted = {key.rstrip("_"): value for key, value in wanted.items()}
        found = [row for row in result["rows"] if all(row.get(key) == value for key, value in wanted.items())]
        if not found:
            raise ValueError(
                f"{self.folder / device / benchmark}.json has no row with {wanted}: render.py asks for another name"
            )
        return found

    def row(self, device: str, benchmark: str, **wanted: str) -> Row | None:
        rows = self.rows(device, benchmark, **wanted)
        return rows and rows[0]


# --- cells ------------------------------------------------------------------------------------------------------------


def number(x: float) -> str:
    return f"{x:,.{0 if x >= 100 or x == 0 else 1 if x >= 1 else 2}f}"


def cell(rows: Row | Sequence[Row] | None, key: str = "ms", unit: str = "", scale: float = 1.0) -> str:
    """One or several rows' numbers."""
    if rows is None:
        return NOT_YET
    rows = [rows] if isinstance(rows, dict) else rows
    missing = [row for row in rows if row[key] is None]
    if missing:
        return missing[0].get("status") or NOT_YET
    return ", ".join(number(scale * row[key]) for row in rows) + unit


def times(ours: Sequence[Row], others: Sequence[Row], key: str = "ms") -> float | None:
    """How many times faster ours is: the median over pairs of rows. Of "ms" less is faster, of all else more."""
    if any(row[key] is None for row in (*ours, *others)):
        return None
    pairs = [(b[key], a[key]) if key == "ms" else (a[key], b[key]) for a, b in zip(ours, others, strict=True)]
    return median(x / y for x, y in pairs)


def against(
    ours: Sequence[Row] | None, others: Sequence[Row] | None, key: str = "ms", unit: str = " ms", name: str = ""
) -> str:
    """A peer's numbers, and how many times faster ours is."""
    if ours is None or others is None:
        return NOT_YET
    factor = times(ours, others, key)
    title = f"{name}: " if name else ""
    return title + cell(others, key, unit) + ("" if factor is None else f" ({number(factor)}×)")


def goal(text: str, measured: float | None, met: Callable[[float], bool], show: Callable[[float], str]) -> list[str]:
    """A goal, and what was measured with a word where that misses it."""
    return [text, NOT_YET if measured is None else show(measured) + ("" if met(measured) else ", missed")]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [[text.replace("|", "\\|") for text in line] for line in (head, ["---"] * len(head), *rows)]
    return ["|" + "|".join(f" {text} " if text else " " for text in line) + "|" for line in lines]


def machines(results: Results, device: str, benchmarks: Sequence[str]) -> str:
    """Where the numbers come from, one sentence."""
    made: dict[str, list[str]] = {}
    for name in benchmarks:
        if result := results.load(device, name):
            where = result["device"] if result.get("threads") is None else result.get("processor", result["device"])
            threads = result.get("threads") and f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
            made.setdefault(", ".join(filter(None, [where, threads, f"torch {result['torch']}"])), []).append(f"`{name}`")
    if not made:
        return f"{device}: {NOT_YET}."
    if len(made) == 1:
        return f"Measured on {next(iter(made))}; medians."
    return "Measured on " + "; ".join(f"{machine} ({', '.join(names)})" for machine, names in made.items()) + "; medians."


# --- README: a CPU ----------------------------------------------------------------------------------------------------


def axial(results: Results, impl: str, which: str, heads: str = "N=8 D=64") -> list[Row] | None:
    """Rows along T, H and W; impl "sdpa": of the fastest of torch's scaled_dot_product_attention on each."""
    shapes = [f"5x16x16 {heads} axes={axis} B=8 dropout=0" for axis in "THW"]
    if results.load(CPU, "axial_attention") is None:
        return None
    if impl != "sdpa":
        return [results.row(CPU, "axial_attention", impl=impl, shape=shape, pass_=which) for shape in shapes]
    return [fastest(results.rows(CPU, "axial_attention", shape=shape, pass_=which), "sdpa ") for shape in shapes]


def fastest(rows: Sequence[Row], prefix: str) -> Row:
    """Of the rows whose implementation's name begins so."""
    rows = [row for row in rows if row["impl"].startswith(prefix)]
    return min(rows, key=lambda row: row["ms"] or float("inf"))


def one(row: Row | None) -> list[Row] | None:
    return row and [row]


def cpu(results: Results) -> list[str]:
    rows = [
        *cpu_axial(results),
        *cpu_ops(results),
        *cpu_data(results),
        *cpu_train_step(results),
        *cpu_layouts(results),
    ]
    names = ("axial_attention", "info_nce", "block_mask", "data", "train_step", "attn_layouts")
    return [*table(["", "ours", "straightforward", "other", "goal"], rows), "", machines(results, CPU, names)]


def cpu_axial(results: Results) -> list[list[str]]:
    rows = []
    for which, target in (("forward", "≥ 2.5× the other"), (BOTH, "≥ 4× eager")):
        ours, eager, sdpa = (axial(results, impl, which) for impl in ("ours", "reference eager", "sdpa"))
        title = f"`axial_attention`, {words(which)}, 8 clips of 5×16×16, width 512, along T, H, W"
        best = against(ours, sdpa, name="scaled_dot_product_attention")
        rows.append([title, cell(ours, unit=" ms"), against(ours, eager, name="eager"), best, target])
    return rows


def words(which: str) -> str:
    return which.replace("+", " + ")


def cpu_ops(results: Results) -> list[list[str]]:
    ours, eager, compiled = (
        one(results.row(CPU, "info_nce", impl=impl, shape="n=4096 d=256", pass_=BOTH))
        for impl in ("ours", "reference eager", "reference compiled")
    )
    title = f"`info_nce`, {words(BOTH)}, 4096 videos, width 256"
    rows = [[title, cell(ours, unit=" ms"), against(ours, eager, name="eager"), against(ours, compiled, name="compiled"), ""]]
    memory = [cell(x, "peak_bytes", " MiB", 2**-20) for x in (ours, eager, compiled)]
    rows.append(["its memory above the inputs", *memory, ""])
    for grid, n_blocks in (("5x16x16", 5), ("10x32x32", 7)):
        shape = f"{grid} B=512 blocks={n_blocks}"
        ours, loop, eager = (
            one(results.row(CPU, "block_mask", impl=impl, shape=shape)) for impl in ("ours", "python loop", "reference eager")
        )
        title, loop = f"`block_mask`, 512 clips of {grid.replace('x', '×')}", against(ours, loop, name="a loop in Python")
        rows.append([title, cell(ours, unit=" ms"), loop, against(ours, eager, name="reference, eager"), ""])
    return rows


def cpu_data(results: Results) -> list[list[str]]:
    def pairs(impl: str, which: str, cache: str = "warm") -> list[Row] | None:
        return one(results.row(CPU, "data", impl=impl, shape=f"5x16x16 n=128 {cache}", pass_=which))

    unit, key, rows = "/s", "pairs_per_s", []
    for cache in ("warm", "cold"):
        ours, loaded, mapped = (pairs(x, "batch", cache) for x in ("ours", "np.load of a file a video", "np.memmap"))
        title = f"clip pairs of 5×16×16 on one core, {cache} page cache"
        peers = [against(ours, loaded, key, unit, "`np.load`, a file a video"), against(ours, mapped, key, unit, "`np.memmap`")]
        rows.append([title, cell(ours, key, unit), *peers, ""])
    return [*rows, ["the same, warm, with block masks", cell(pairs("ours", "batch+masks"), key, unit), "", "", "≥ 5,000/s"]]


def cpu_train_step(results: Results) -> list[list[str]]:
    result = results.load(CPU, "train_step")
    if result is None:
        return [["training step", NOT_YET, NOT_YET, NOT_YET, ""]]
    key, rows = "videos_per_s", []
    for preset, dtype in dict.fromkeys((row["preset"], row["dtype"]) for row in result["rows"]):
        ours, compiled, *peers = (step(results, CPU, impl, preset, dtype) for impl in IMPLS)
        text = cell(ours, key, " videos/s") + (f", compiled {cell(compiled, key)}" if compiled else "")
        best = one(best_step(results, CPU, preset, dtype))
        cells = [
            against(best, one(peer), key, " videos/s", how) for peer, how in zip(peers, ("eager", "compiled"), strict=True)
        ]
        rows.append([f"training step, {preset}, {dtype}", text, *cells, ""])
    return rows


def cpu_layouts(results: Results) -> list[list[str]]:
    key, unit, rows = "samples_per_s", " videos/s", []
    for layout in ("T,H|W", "T,H,W", "T,HxW", "TxHxW"):
        ours, eager, compiled = (
            one(results.row(CPU, "attn_layouts", impl=impl, layout=layout, norm="post", pass_="step"))
            for impl in ("ours", "naive eager", "naive compiled")
        )
        peers = [
            against(ours, peer, key, unit, how if ours else "") for peer, how in ((eager, "eager"), (compiled, "compiled"))
        ]
        rows.append([f"training step of a cut-down `{layout}` (`attn_layouts`)", cell(ours, key, unit), *peers, ""])
    return rows


# --- README: an H100 --------------------------------------------------------------------------------------------------

IMPLS = ("ours", "ours compiled", "naive eager", "naive compiled")


def step(results: Results, device: str, impl: str, preset: str, dtype: str) -> Row | None:
    """A preset that did not fit in the time is as one that was not measured."""
    wanted, result = (impl, preset, dtype), results.load(device, "train_step")
    rows = [row for row in (result["rows"] if result else []) if row.get("videos_per_s")]
    return next((row for row in rows if (row["impl"], row.get("preset"), row["dtype"]) == wanted), None)


def best_step(results: Results, device: str, preset: str, dtype: str) -> Row | None:
    """The faster of ours."""
    found = [row for row in (step(results, device, impl, preset, dtype) for impl in IMPLS[:2]) if row]
    return max(found, key=lambda row: row["videos_per_s"], default=None)


def gpu(results: Results) -> list[str]:
    def best(preset: str) -> Row | None:
        return best_step(results, H100, preset, "bfloat16")

    def value(key: str, row: Row | None) -> float | None:
        return row and row.get(key)

    def ratio(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a / b

    def memory(row: Row | None) -> float | None:
        return ratio(value("peak_bytes", row), value("videos", row))

    def at_least(text: str, measured: float | None, least: float, show: Callable[[float], str]) -> list[str]:
        return goal(text, measured, lambda x: x >= least, show)

    speed, percent = "videos_per_s", "{:.1%}".format
    small = best("small 5x128")
    eager, compiled = (step(results, H100, f"naive {how}", "small 5x128", "bfloat16") for how in ("eager", "compiled"))
    rows = [
        ["Small, 5 frames of 128 px, videos/s", *at_least("≥ 1,000", value(speed, small), 1000, number), "32.0"],
        ["against the straightforward model, eager", *factor(3.0, ratio(value(speed, small), value(speed, eager))), ""],
        ["against the same compiled", *factor(1.5, ratio(value(speed, small), value(speed, compiled))), ""],
        ["share of the measured matrix peak", *at_least("≥ 45 %", value("matrix_peak_share", small), 0.45, percent), ""],
        ["Large-Half, 5×128, videos/s", *at_least("≥ 120", value(speed, best("large-half 5x128")), 120, number), ""],
    ]
    for frames, pixels, least, paper in ((10, 128, 500, "16.5"), (5, 256, 240, "8.4"), (10, 256, 120, "4.4")):
        measured = value(speed, best(f"small {frames}x{pixels}"))
        rows.append([f"Small, {frames}×{pixels}, videos/s", *at_least(f"≥ {least}", measured, least, number), paper])
    share = ratio(memory(small), memory(eager))
    rows += [
        ["peak memory a video, of eager's", *goal("≤ 1/3", share, lambda x: x <= 1 / 3, "{:.2f}".format), ""],
        ["syncs with the GPU a micro-step", *goal("0", value("syncs", small), lambda x: x == 0, "{:g}".format), ""],
        ["time spent waiting for data", *goal("< 1 %", value("data_wait_share", small), lambda x: x < 0.01, percent), ""],
    ]
    head = ["pre-training on one H100", "goal", "measured", "the paper, one V100"]
    return [*table(head, rows), "", machines(results, H100, ["train_step"])]


def factor(least: float, measured: float | None) -> list[str]:
    return goal(f"≥ {least:g}×", measured, lambda x: x >= least, "{:.1f}×".format)


# --- docs/kernels.md --------------------------------------------------------------------------------------------------


def axial_attention_cpu(results: Results) -> list[str]:
    impls = {
        "ours": "ours",
        "reference, eager": "reference eager",
        "reference, compiled": "reference compiled",
        "fastest scaled_dot_product_attention, with its transposes": "sdpa",
    }
    lines = []
    for heads in ("N=8 D=64", "N=16 D=32"):
        ours = [axial(results, "ours", which, heads) for which in ("forward", BOTH)]
        for title, impl in impls.items():
            rows = [axial(results, impl, which, heads) for which in ("forward", BOTH)]
            cells = [cell(x) if impl == "ours" else against(a, x, unit="") for a, x in zip(ours, rows, strict=True)]
            lines.append([heads.replace("=", " = ").replace(" D", ", D"), title, *cells])
        share = ["", "ours, of a copy's speed", *(cell(rows, "copy_share", " %", 100) for rows in ours)]
        lines.append(share)
    head = ["heads", "ms along T, H, W (times as long as ours, median)", "forward", "forward + backward"]
    return [*table(head, lines), "", machines(results, CPU, ["axial_attention"])]


def small_ops_cpu(results: Results) -> list[str]:
    lines = []
    for n in (1024, 4096):
        rows = {
            impl: one(results.row(CPU, "info_nce", impl=impl, shape=f"n={n} d=256", pass_=BOTH))
            for impl in ("ours", "reference eager", "reference compiled")
        }
        others = [against(rows["ours"], rows[f"reference {how}"], unit="") for how in ("eager", "compiled")]
        lines.append([f"`info_nce`, n = {n}, d = 256, forward + backward", cell(rows["ours"]), *others, ""])
    for grid, n_blocks in (("5x16x16", 5), ("10x32x32", 7)):
        impls = ("ours", "reference eager", "reference compiled", "python loop")
        ours, *others = (one(results.row(CPU, "block_mask", impl=x, shape=f"{grid} B=512 blocks={n_blocks}")) for x in impls)
        others = [against(ours, other, unit="") for other in others]
        lines.append([f"`block_mask`, 512 clips of {grid.replace('x', '×')}", cell(ours), *others])
    head = ["ms (times as long as ours)", "ours", "reference, eager", "compiled", "a Python loop over clips and blocks"]
    return [*table(head, lines), "", machines(results, CPU, ["info_nce", "block_mask"])]


# --- docs/performance.md ----------------------------------------------------------------------------------------------


def train_step_cpu(results: Results) -> list[str]:
    impls, dtypes = ("ours", "naive eager"), ("float32", "bfloat16")
    columns = {
        "ms a step": ("ms", 1.0, "≥ 1.3× as fast", lambda x: x >= 1.3),
        "videos/s": ("videos_per_s", 1.0, "", None),
        "of the measured matrix peak, %": ("matrix_peak_share", 100.0, "", None),
        "peak memory beyond weights and optimizer, MiB": ("peak_bytes", 2**-20, "≤ 1/2", lambda x: x >= 2),
        "waits for the device a micro-step": ("syncs", 1.0, "0", None),
        "of the time waiting for data, %": ("data_wait_share", 100.0, "< 1", None),
    }
    lines = []
    for title, (key, scale, wanted, met) in columns.items():
        line = [title]
        for dtype in dtypes:
            pair = [step(results, CPU, impl, "small 5x128", dtype) for impl in impls]
            cells = [NOT_YET if row is None or row[key] is None else number(scale * row[key]) for row in pair]
            ratio = pair[1][key] / pair[0][key] if met and NOT_YET not in cells else None
            missed = dtype == "float32" and ratio is not None and not met(ratio)
            line += [*cells, "" if ratio is None else f"{ratio:.2f}×" + ", missed" * missed]
        lines.append([*line, wanted])
    titles = [f"{title}, {dtype}" for dtype in dtypes for title in (*impls, "naive / ours")]
    return [*table(["", *titles, "goal, float32"], lines), "", machines(results, CPU, ["train_step"])]


def layouts_cpu(results: Results) -> list[str]:
    result = results.load(CPU, "attn_layouts")
    lines = [] if result else [["all", "", "", *[NOT_YET] * 6]]
    for first in (row for row in (result["rows"] if result else []) if row["pass"] == "step"):
        same = {key: first[key] for key in ("layout", "norm", "impl")}
        passes = [results.row(CPU, "attn_layouts", pass_=which, **same) for which in ("forward", BOTH, "step")]
        peak = NOT_YET if first["peak_bytes"] is None else number(first["peak_bytes"] / 2**20)
        paper = [first["paper_samples_per_s"], first["paper_accuracy"]]
        lines.append(
            [
                f"`{first['layout']}`, {first['norm']}",
                first["impl"],
                f"{first['parameters'] / 1e6:.1f}",
                *(cell(one(row), unit="") for row in passes),
                cell(one(first), "samples_per_s", ""),
                peak,
                ", ".join("-" if x is None else f"{x:.1f}" for x in paper),
            ]
        )
    head = ["layout, norm", "", "M parameters", "forward, ms", "and backward", "step", "videos/s", "peak MiB"]
    return [*table([*head, "paper: samples/s, UCF101"], lines), "", machines(results, CPU, ["attn_layouts"])]


def dropout_add_cpu(results: Results) -> list[str]:
    result = results.load(CPU, "dropout_add")
    names = {"ours": "ours", "ours:torch": "torch's, eager", "torch compiled": "torch's, compiled"}
    names |= {"reference eager": "reference, eager", "reference compiled": "reference, compiled"}
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in result["rows"]) if result else [""]:
        for impl, title in names.items():
            rows = [
                one(results.row(CPU, "dropout_add", impl=impl, shape=shape, pass_=which)) if shape else None
                for which in ("forward", "backward", BOTH)
            ]
            title += ", of a bfloat16 y" * (" x=" in shape)
            lines.append([title, *(cell(row, unit="") for row in rows), cell(rows[-1], "peak_bytes", "", 2**-20)])
    head = ["ms", "forward", "backward", "both", "MiB above the inputs"]
    return [*table(head, lines), "", machines(results, CPU, ["dropout_add"])]


TABLES: dict[str, Callable[[Results], list[str]]] = {
    "cpu": cpu,
    "gpu": gpu,
    "axial_attention-cpu": axial_attention_cpu,
    "small-ops-cpu": small_ops_cpu,
    "dropout_add-cpu": dropout_add_cpu,
    "train_step-cpu": train_step_cpu,
    "layouts-cpu": layouts_cpu,
}


# --- files ------------------------------------------------------------------------------------------------------------


def documents(root: Path = ROOT) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def render(text: str, results: Results, where: str) -> tuple[str, list[str]]:
    """The text with its tables as the results say, and the names of those that change."""
    return fill(text, START, {name: partial(make, results) for name, make in TABLES.items()}, where)


def fill(text: str, start: re.Pattern, tables: Mapping[str, Callable[[], list[str]]], where: str) -> tuple[str, list[str]]:
    """The text with the lines between `start`, whose group is a table's name, and END as that table makes them; the names of
    tables that change."""
    lines, stale, inside = [], [], None
    for line in text.split("\n"):
        found = start.fullmatch(line)
        if found and inside is not None:
            raise ValueError(f"{where}: table {inside[0]} has no {END} before {line}")
        if found:
            if found[1] not in tables:
                raise ValueError(f"{where}: no table is called {found[1]!r}, expected one of {', '.join(tables)}")
            inside = found[1], []
            lines.append(line)
        elif inside is None:
            lines.append(line)
        elif line == END:
            made = tables[inside[0]]()
            stale += [inside[0]] * (made != inside[1])
            lines += [*made, line]
            inside = None
        else:
            inside[1].append(line)
    if inside is not None:
        raise ValueError(f"{where}: table {inside[0]} has no {END}")
    return "\n".join(lines), stale


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if a table is stale")
    check = parser.parse_args(argv).check
    results, changed = Results(root / "benchmarks" / "results"), []
    for path in documents(root):
        text, stale = render(path.read_text(), results, path.relative_to(root).as_posix())
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
