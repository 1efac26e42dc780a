import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vimpac.commands import main as cli
from vimpac.errors import InputError
from vimpac.figures import curves as figures
from vimpac.figures.curves import plot_curves, read_metrics

FINAL = {
    "final": True,
    "step": 60,
    "mask_accuracy": 0.45,
    "most_frequent_accuracy": 0.01,
    "nearest_copy_accuracy": 0.15,
    "retrieval_accuracy": 0.9,
    "histogram_retrieval_accuracy": 0.4,
    "retrieval_chance": 0.03,
}


def metrics(step: int) -> dict:
    return {
        "step": step,
        "loss": 6.0 - step / 20,
        "mask_loss": 5.5 - step / 20,
        "contrastive_loss": 2.5,
        "mask_accuracy": step / 100,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "videos_per_second": 60.0,
    }


def write(path: Path, lines: list) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    write(tmp_path / "metrics.jsonl", [*(metrics(step) for step in range(1, 61)), FINAL])
    return tmp_path


def panels(path: Path) -> dict:
    """Title → axes of each panel in use."""
    figure = figures._draw(*read_metrics(path))
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_panels_and_their_labels(run):
    drawn = panels(run / "metrics.jsonl")
    assert list(drawn) == [
        "Loss",
        "Mask accuracy",
        "Partner retrieval, held out",
        "Learning rate",
        "Gradient norm, before clipping",
        "Videos per second",
    ]
    assert sorted(texts(drawn["Loss"])) == ["contrastive", "mask", "total"]
    assert texts(drawn["Mask accuracy"]) == ["most frequent 0.010", "nearest copy 0.150", "held out 0.450", "training"]
    assert texts(drawn["Partner retrieval, held out"]) == ["0.900", "model", "0.400", "histogram", "0.030", "chance"]


def test_lines_hold_the_values(run):
    drawn = panels(run / "metrics.jsonl")
    raw = drawn["Mask accuracy"].lines[0]
    np.testing.assert_allclose(raw.get_xydata(), [(step, step / 100) for step in range(1, 61)])
    references = {line.get_ydata()[0] for line in drawn["Mask accuracy"].lines if line.is_dashed()}
    assert references == {0.45, 0.01, 0.15}
    np.testing.assert_allclose(drawn["Learning rate"].lines[0].get_xydata(), [(s, 1e-3) for s in range(1, 61)])
    assert len(drawn["Learning rate"].lines) == 1  # not smoothed


def test_png_is_written_whole_and_replaces_the_old_one(run):
    from matplotlib.image import imread

    (run / "curves.png").write_text("old")
    plot_curves(run / "metrics.jsonl", run / "curves.png")
    picture = imread(run / "curves.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 1000 and picture.std() > 0.05
    assert sorted(path.name for path in run.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_failed_drawing_keeps_the_old_picture(run, monkeypatch):
    from matplotlib.figure import Figure

    def fail(self, file, **options):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    (run / "curves.png").write_text("old")
    with pytest.raises(OSError, match="disk full"):
        plot_curves(run / "metrics.jsonl", run / "curves.png")
    assert (run / "curves.png").read_text() == "old"
    assert sorted(path.name for path in run.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_missing_null_and_infinite_values_are_left_out(tmp_path):
    lines = [
        {"step": 1, "loss": 2.0, "contrastive_loss": None, "grad_norm": float("inf")},
        {"step": 2, "loss": float("nan"), "contrastive_loss": None, "grad_norm": 3.0},
        {"step": 3, "loss": 1.0},
    ]
    path = write(tmp_path / "metrics.jsonl", lines)
    series, final = read_metrics(path)
    assert {name: points.tolist() for name, points in series.items()} == {
        "loss": [[1, 2.0], [3, 1.0]],
        "grad_norm": [[2, 3.0]],
    }
    assert final == {}
    drawn = panels(path)
    assert list(drawn) == ["Loss", "Gradient norm, before clipping"] and texts(drawn["Loss"]) == ["total"]
    plot_curves(path, tmp_path / "curves.png")


def test_steps_written_again_count_once_and_a_cut_line_is_ignored(tmp_path):
    lines = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}, {"step": 1, "loss": 1.0}, '{"step": 3, "lo']
    series, _ = read_metrics(write(tmp_path / "metrics.jsonl", lines))
    assert series["loss"].tolist() == [[1, 1.0], [2, 8.0]]


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "has no line with a step"),
        ([FINAL], "has no line with a step"),
        ([{"step": 1, "loss": None}], "has no values"),
        ([{"step": 1, "loss": 1.0}, "oops\n", {"step": 2, "loss": 1.0}], "line 2 is 'oops', expected JSON"),
    ],
)
def test_nothing_to_draw_is_one_clear_error(tmp_path, lines, message):
    path = write(tmp_path / "metrics.jsonl", lines)
    with pytest.raises(InputError, match=message):
        plot_curves(path, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_bytes_that_are_no_text_and_numbers_without_bound(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0, "grad_norm": 1%b}\n\xff{"step"\n{"step": 2}\n' % (b"0" * 400))
    with pytest.raises(InputError, match=r"line 2 is .*expected JSON; remove that line"):
        read_metrics(path)
    path.write_bytes(path.read_bytes().replace(b'\xff{"step"\n', b"[]\n7\n") + b"\xff")
    series, final = read_metrics(path)
    assert {name: points.tolist() for name, points in series.items()} == {"loss": [[1, 2.0]]} and final == {}


def test_missing_file_and_missing_folder(run):
    with pytest.raises(InputError, match="cannot read"):
        plot_curves(run / "nothing.jsonl", run / "curves.png")
    with pytest.raises(InputError, match="cannot write"):
        plot_curves(run / "metrics.jsonl", run / "missing" / "curves.png")


def test_missing_matplotlib_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="needs matplotlib: pip install matplotlib"):
        plot_curves(run / "metrics.jsonl", run / "curves.png")


def test_import_and_drawing_leave_pyplot_alone(run):
    code = (
        "import sys; from pathlib import Path; import vimpac.figures.curves as f; assert 'matplotlib' not in sys.modules;"
        f"f.plot_curves(Path({str(run)!r}) / 'metrics.jsonl', Path({str(run)!r}) / 'curves.png');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_command_draws_a_run_folder(run, capsys):
    assert cli.main(["figures", "curves", str(run)]) == 0
    assert (run / "curves.png").exists() and capsys.readouterr().out == f"{run / 'curves.png'}\n"
    assert cli.main(["figures", "curves", str(run / "nothing")]) == 1
    assert capsys.readouterr().err.startswith("vimpac figures curves: error: cannot read")


def test_a_backend_that_does_not_exist(run):
    """A picture in a file needs no backend, but matplotlib cannot even be imported with MPLBACKEND=junk."""
    command = [sys.executable, "-m", "vimpac", "figures", "curves", str(run)]
    ended = subprocess.run(command, env={**os.environ, "MPLBACKEND": "junk"}, capture_output=True, text=True)
    assert ended.returncode == 0 and (run / "curves.png").exists(), ended.stderr


def test_running_mean():
    np.testing.assert_allclose(figures.running_mean(np.array([1.0, 2.0, 6.0, 3.0]), 1), [1.5, 3.0, 11 / 3, 4.5])


@pytest.mark.parametrize(
    "heights, expected",
    [([0.1, 0.5], [0.1, 0.5]), ([0.1, 0.11, 0.9], [0.1, 0.2, 0.9]), ([0.97, 0.98, 0.99], [0.8, 0.9, 1.0])],
)
def test_labels_keep_their_distance(heights, expected):
    assert figures.spread(heights, 0.1) == pytest.approx(expected)
