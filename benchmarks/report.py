"""What a benchmark prints and writes: the table's lines, JSON, CSV and PNG."""

from __future__ import annotations

import csv
import json
import math
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0]}"[:200]


def finite(x: float) -> float | None:
    """x, or None where JSON has no word for it."""
    return x if math.isfinite(x) else None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def processor() -> str:
    """The host's, by the name that it gives itself."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


COLUMNS = {  # key → (title, width, how to write it)
    "impl": ("", 26, str),
    "pass": ("pass", 17, str),
    "ms": ("ms", 10, "{:.4g}".format),
    "ms_p20": ("p20", 10, "{:.4g}".format),
    "ms_p80": ("p80", 10, "{:.4g}".format),
    "gb_per_s": ("GB/s", 8, "{:.4g}".format),
    "copy_share": ("of copy", 8, "{:.1%}".format),
    "tflop_per_s": ("TFLOP/s", 8, "{:.3g}".format),
    "peak_bytes": ("peak MiB", 9, lambda x: f"{x / 2**20:.1f}"),
    "error": ("error", 9, "{:.1e}".format),
}


def header() -> str:
    return " ".join(f"{title:{'<' if key in ('impl', 'pass') else '>'}{width}}" for key, (title, width, _) in COLUMNS.items())


def lines(rows: Sequence[dict]) -> list[str]:
    """A row's line of the table; rows that only say why they have no numbers share one."""
    return [line(row) for row in rows] if any(row["error"] is not None for row in rows) else [line({**rows[0], "pass": "all"})]


def line(row: dict) -> str:
    cells = []
    for key, (_, width, write_cell) in COLUMNS.items():
        text = "-" if row[key] is None else write_cell(row[key])
        cells.append(f"{text:{'<' if key in ('impl', 'pass') else '>'}{width}}")
    status = "" if row["status"] == "ok" else f"{row['status']}: "
    return " ".join([*cells, status + (row["note"] or "")]).rstrip()


def write(folder: Path, result: dict) -> None:
    """TITLE.json, TITLE.csv and, where matplotlib is installed, TITLE.png."""
    path = write_json(folder, result)
    with path.with_suffix(".csv").open("w", newline="") as file:
        keys = list(dict.fromkeys(key for row in result["rows"] for key in row))
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(result["rows"])
    try:
        draw(path.with_suffix(".png"), result)
    except ImportError:
        print("no figure: matplotlib is not installed")
    print(f"\nwrote {path}.csv, .json")


def write_json(folder: Path, result: dict) -> Path:
    """FOLDER/TITLE.json, whole or not at all; returns it without the suffix."""
    from vimpac.files.atomic import write_text  # not above: the path was not set yet

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / result["benchmark"]
    write_text(path.with_suffix(".json"), json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def draw(path: Path, result: dict) -> None:
    """Bars of the median, one panel a shape, whiskers from the 20th to the 80th percentile."""
    from matplotlib.figure import Figure

    shapes: dict[str, list[dict]] = {}
    for row in result["rows"]:
        if row["ms"] is not None:
            shapes.setdefault(f"{row['op']} {row['shape']} {row['dtype']}", []).append(row)
    if not shapes:
        return
    heights = [len(rows) + 2 for rows in shapes.values()]
    figure = Figure(figsize=(9, 0.2 * sum(heights) + 1), layout="constrained")
    panels = figure.subplots(len(shapes), squeeze=False, height_ratios=heights)[:, 0]
    for panel, (title, rows) in zip(panels, shapes.items(), strict=True):
        ms = [row["ms"] for row in rows]
        whiskers = [[row["ms"] - row["ms_p20"] for row in rows], [row["ms_p80"] - row["ms"] for row in rows]]
        colors = ["tab:blue" if row["impl"].startswith("ours") else "tab:gray" for row in rows]
        panel.barh(range(len(rows)), ms, xerr=whiskers, color=colors)
        panel.set_yticks(range(len(rows)), [f"{row['impl']}, {row['pass']}" for row in rows], fontsize=7)
        panel.invert_yaxis()
        if max(ms) > 50 * min(ms):  # the shortest bar would not be seen
            panel.set_xscale("log")
        panel.set_title(title, fontsize=8, loc="left")
    panels[-1].set_xlabel("milliseconds")
    figure.suptitle(f"{result['benchmark']}, {result['device']}, torch {result['torch']}", fontsize=9)
    figure.savefig(path, dpi=100)
