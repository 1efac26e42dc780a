"""The pictures of an evaluation: what is drawn where, any names, many classes, and writing them."""

import sys
import warnings
from itertools import pairwise

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from vimpac.errors import InputError
from vimpac.figures import confusion as figures
from vimpac.figures.confusion import MOST_NAMES, plot_confusion, shortened
from vimpac.figures.mistakes import GAP, Mistake, film_strip, plot_mistakes

STEERING = "a\x1b]0;owned\x07\n$x$ 跑步"


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written."""
    kept, save = [], Figure.savefig

    def savefig(figure, *arguments, **options):
        kept.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return kept


def mistake(shade, **names):
    frames = np.full((2, 3, 8, 8), shade, np.uint8)
    values = {"video": "v.mp4", "label": "jump", "prediction": "run", "label_score": 0.05, "score": 0.9} | names
    return Mistake(frames, **values)


def test_cells(tmp_path, drawn):
    counts = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    plot_confusion(counts, ["jump", "run", "sit"], "test: 8 videos", tmp_path / "c.png")
    axes = drawn[0].axes[0]
    assert axes.get_title(loc="left") == "test: 8 videos"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["jump", "run", "sit"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["jump", "run", "sit"]
    expected = np.sqrt([[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])  # rows sum to 1; a class without videos has none
    np.testing.assert_allclose(axes.images[0].get_array(), expected)
    assert {(int(x.get_position()[1]), int(x.get_position()[0])): x.get_text() for x in axes.texts} == {
        (0, 0): "3", (0, 1): "1", (1, 1): "4",
    }  # fmt: skip
    assert matplotlib.image.imread(tmp_path / "c.png").ndim == 3


@pytest.mark.parametrize("classes, every", [(1, 1), (60, 1), (61, 2), (400, 7)])
def test_many_classes(tmp_path, drawn, classes, every):
    names = [f"class number {i}" for i in range(classes)]
    plot_confusion(np.eye(classes, dtype=int), names, "", tmp_path / "c.png")
    axes = drawn[0].axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == names[::every] and len(shown) <= MOST_NAMES
    assert (f"one in {every} is named" in axes.get_xlabel()) == (every > 1)
    height, width, _ = matplotlib.image.imread(tmp_path / "c.png").shape
    assert max(height, width) < 2200 and bool(axes.texts) == (classes <= figures.MOST_COUNTED)


def test_names_do_not_overlap(tmp_path, drawn):
    names = [f"Pretending to put something {'very ' * (i % 4)}{i}" for i in range(MOST_NAMES)]
    plot_confusion(np.eye(MOST_NAMES, dtype=int), names, "", tmp_path / "c.png")
    drawn[0].canvas.draw()  # at the figure's own resolution, which extents are in
    boxes = [label.get_window_extent() for label in drawn[0].axes[0].get_yticklabels()]
    tops = sorted((box.y0, box.y1) for box in boxes)
    assert all(a[1] <= b[0] + 1 for a, b in pairwise(tops))
    assert min(box.x0 for box in boxes) >= 0


def test_long_names_keep_both_ends():
    name = "Pretending to put something behind something"
    assert shortened(name, 20).startswith("Pretending to") and shortened(name, 20).endswith("ething")
    assert len(shortened(name, 20)) <= 20 and shortened("jump", 4) == "jump" and shortened("a\nb", 9) == r"a\nb"


def test_any_names(tmp_path, drawn):
    """No mathematics, no line ends, and no warning for a script that the font lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_confusion(np.eye(2, dtype=int), [STEERING, "$b_"], "$t", tmp_path / "c.png")
        plot_mistakes([mistake(0, video=STEERING, label="$b_", prediction=STEERING)], "$t", tmp_path / "m.png")
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == [shortened(STEERING), "$b_"]


def test_film_strip():
    frames = np.zeros((3, 3, 4, 4), np.uint8)
    frames[1, 0], frames[2, :, 0] = 200, 7
    strip = film_strip(frames)
    assert strip.shape == (4, 12 + 2 * GAP, 3) and (strip[:, 4 : 4 + GAP] == 255).all() and not strip[:, :4].any()
    assert (strip[:, 4 + GAP : 8 + GAP] == (200, 0, 0)).all() and (strip[0, -4:] == 7).all() and not strip[1:, -4:].any()


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_contact_sheet(tmp_path, drawn, count):
    plot_mistakes([mistake(10 * i, video=f"{i}.mp4") for i in range(count)], "the worst", tmp_path / "m.png")
    panels = [axes for axes in drawn[0].axes if axes.images]
    assert len(panels) == count
    for i, panel in enumerate(panels):
        assert (panel.images[0].get_array()[:, :8] == 10 * i).all()
        assert [text.get_text() for text in panel.texts] == [f"{i}.mp4", "is jump (5%)", "taken for run (90%)"]
    drawn[0].canvas.draw()
    page = drawn[0].get_window_extent()
    boxes = [text.get_window_extent() for panel in panels for text in panel.texts]
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and box.y1 <= page.y1 for box in boxes)


@pytest.mark.parametrize(
    "draw", [lambda path: plot_confusion(np.eye(2), "ab", "", path), lambda path: plot_mistakes([mistake(0)], "", path)]
)
def test_writing(tmp_path, monkeypatch, draw):
    with pytest.raises(InputError, match=r"cannot write .*: its folder does not exist"):
        draw(tmp_path / "missing" / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="needs matplotlib: pip install matplotlib"):
        draw(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
