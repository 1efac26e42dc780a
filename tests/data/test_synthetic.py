import csv
import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vimpac.config import SynthesizeConfig
from vimpac.data import synthetic
from vimpac.data.synthetic import CELLS, MOTIONS, PAIRS, RADIUS, SHAPES, TEXTURES, draw_scene, render, synthesize
from vimpac.errors import InputError

SMALL = SynthesizeConfig(videos=6, seconds=1.5, fps=8.0, size=48, seed=5)


def read_labels(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def decode(path: Path) -> tuple[np.ndarray, float]:
    import av

    with av.open(str(path)) as file:
        rate = float(file.streams.video[0].average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]), rate


@pytest.mark.parametrize("first, second", PAIRS)
def test_second_of_a_pair_is_the_first_played_backwards(first, second):
    for index in range(4):
        frames, _ = render(3, index, size=48, motion=first)
        np.testing.assert_array_equal(frames[::-1], render(3, index, size=48, motion=second)[0])
        assert np.ptp(frames.astype(int), 0).max() > 100  # something moves


def test_all_motions_start_from_the_same_frame():
    for index in range(6):
        starts = [render(3, index, seconds=0.5, motion=first)[0][0] for first, _ in PAIRS]
        for frame in starts[1:]:
            np.testing.assert_array_equal(frame, starts[0])


@pytest.mark.parametrize("motion", [first for first, _ in PAIRS])
@pytest.mark.parametrize("seconds", [0.0, 1.3, 7.9])
def test_position_angle_and_size_have_one_distribution_at_all_times(motion, seconds):
    scenes = [draw_scene(0, index, motion) for index in range(2000)]
    states = [synthetic.trajectory(scene, np.array([seconds])) for scene in scenes]
    centre = np.concatenate([s[0] for s in states])  # [2000, 2]
    angle = np.concatenate([s[1] for s in states])
    radius = np.concatenate([s[2] for s in states])
    assert RADIUS[0] <= radius.min() and radius.max() <= RADIUS[1]
    assert_uniform(centre[:, 0] / CELLS)
    assert_uniform(centre[:, 1] / CELLS)
    assert_uniform(angle / (2 * np.pi) % 1)
    assert_uniform(np.log(radius / RADIUS[0]) / np.log(RADIUS[1] / RADIUS[0]))


def assert_uniform(values: np.ndarray):
    """Kolmogorov–Smirnov at about one false alarm in 30,000."""
    gap = np.abs(np.sort(values) - np.linspace(0, 1, len(values))).max()
    assert gap < 2.3 / np.sqrt(len(values))


@pytest.mark.parametrize("start", [0.0, 0.5, 1.0, 2.5, 5.0])
@pytest.mark.parametrize("motion", [first for first, _ in PAIRS])
def test_every_two_seconds_at_two_frames_a_second_show_the_motion(motion, start):
    """The five frames of a clip, any clip, move the way the motion says at every step but a restart."""
    times = start + np.arange(5) / 2
    for index in range(20):
        scene = draw_scene(1, index, motion)
        centre, angle, radius = synthetic.trajectory(scene, times)
        step = (np.diff(centre, axis=0) + CELLS / 2) % CELLS - CELLS / 2  # [4, 2]
        match motion:
            case "right":
                np.testing.assert_allclose(step, [[1, 0]] * 4, atol=1e-9)
            case "down":
                np.testing.assert_allclose(step, [[0, 1]] * 4, atol=1e-9)
            case "clockwise":
                np.testing.assert_allclose(np.diff(angle), np.pi / 4)
            case "grow":
                grown = np.diff(np.log(radius))
                assert (grown > 0.08).sum() >= 3 and grown[grown > 0].sum() > 0.25
            case "forward":
                speed = np.linalg.norm(step * scene.heading, axis=1)
                faster = np.diff(np.append(speed, speed[0])) > 0.5  # a clip is one burst, from some point of it on
                assert faster.sum() >= 2


def test_one_frame_tells_shape_texture_and_colours_not_the_motion():
    scene = draw_scene(0, 4)
    others = {name: dataclasses.replace(scene, shape=name) for name in SHAPES}
    pictures = {name: synthetic._paint(other, np.zeros(1), 96) for name, other in others.items()}
    for first in SHAPES:
        for second in SHAPES:
            changed = (pictures[first] != pictures[second]).any(-1).mean()
            assert (changed == 0) if first == second else (changed > 0.01)
    textured = [synthetic._paint(dataclasses.replace(scene, texture=name), np.zeros(1), 96) for name in TEXTURES]
    assert all((a != b).any(-1).mean() > 0.01 for i, a in enumerate(textured) for b in textured[:i])


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_have_equal_area(shape):
    grid = np.linspace(-2, 2, 801)
    inside = synthetic._distance(shape, grid[None, :], grid[:, None]) > 0
    assert inside.mean() * 16 == pytest.approx(np.pi, rel=0.01)


def test_ground_drifts_one_cell_per_half_second():
    """At 2 fps the ground's patches are the same patches, one place further on."""
    for index in range(12):
        scene = draw_scene(2, index)
        ground = synthetic._ground(scene, np.array([0.0, 0.5]), (np.arange(96) + 0.5) * CELLS / 96)
        moved = np.roll(ground[0], 12 * scene.ground_sign, axis=1 - scene.ground_axis)
        np.testing.assert_allclose(ground[1], moved, atol=1e-4)
        assert np.abs(ground[1] - ground[0]).mean() > 0.2


def test_frames_and_labels_are_a_function_of_seed_and_index():
    frames, label = render(7, 3, seconds=1, size=48)
    again, label_again = render(7, 3, seconds=1, size=48)
    assert frames.shape == (8, 48, 48, 3) and frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, again)
    assert label == label_again
    assert (frames != render(8, 3, seconds=1, size=48)[0]).mean() > 0.3
    assert (frames != render(7, 4, seconds=1, size=48)[0]).mean() > 0.3
    longer, _ = render(7, 3, seconds=3, size=48, motion="clockwise")
    np.testing.assert_array_equal(longer[:8], render(7, 3, seconds=1, size=48, motion="clockwise")[0])


def test_motions_are_balanced_and_independent_of_shape_and_texture():
    labels = [draw_scene(0, index) for index in range(2000)]
    for start in range(0, 2000, len(MOTIONS)):
        assert {label.motion for label in labels[start : start + len(MOTIONS)]} == set(MOTIONS)
    for names, field in ((SHAPES, "shape"), (TEXTURES, "texture")):
        pairs = Counter((label.motion, getattr(label, field)) for label in labels)
        counts = np.array([[pairs[motion, name] for name in names] for motion in MOTIONS])
        expected = counts.sum(0) / len(MOTIONS)
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < 63  # 27 degrees of freedom: one in 10,000


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_files_decode_to_the_rendered_frames(tmp_path, monkeypatch, codec):
    if codec == "libx264" and synthetic._codec() != codec:
        pytest.skip("this build of PyAV has no libx264")
    monkeypatch.setattr(synthetic, "_codec", lambda: codec)
    labels = synthesize(tmp_path / "videos", SMALL)
    assert [row["video"] for row in read_labels(tmp_path / "videos")] == [f"{i:05d}.mp4" for i in range(6)]
    for index, label in enumerate(labels):
        frames, expected = render(SMALL.seed, index, SMALL.seconds, SMALL.fps, SMALL.size)
        decoded, rate = decode(tmp_path / "videos" / label.video)
        assert label == expected and rate == SMALL.fps and decoded.shape == frames.shape
        error = np.abs(decoded.astype(int) - frames)
        assert error.mean() < 8  # chroma subsampling at this size; brightness below is what the encoder adds
        weights = np.array([0.299, 0.587, 0.114])
        assert np.abs((decoded - frames.astype(float)) @ weights).mean() < 2


def test_folder_holds_videos_and_labels_only_whatever_the_threads(tmp_path, monkeypatch):
    done = []
    labels = synthesize(tmp_path / "one", SMALL, lambda *progress: done.append(progress))
    monkeypatch.setattr(synthetic, "THREAD_FRAMES", 1)
    assert synthesize(tmp_path / "threads", dataclasses.replace(SMALL, videos=4)) == labels[:4]
    assert done == [(i + 1, 6) for i in range(6)]
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [label.video for label in labels] + ["labels.csv"]
    assert [tuple(row.values()) for row in read_labels(tmp_path / "one")] == [tuple(label) for label in labels]
    for label in labels[:4]:
        np.testing.assert_array_equal(decode(tmp_path / "one" / label.video)[0], decode(tmp_path / "threads" / label.video)[0])


@pytest.mark.parametrize("threads_from", [1, 10**9])
def test_interrupted_run_leaves_no_labels(tmp_path, monkeypatch, threads_from):
    monkeypatch.setattr(synthetic, "THREAD_FRAMES", threads_from)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path, SMALL, interrupt)
    assert not (tmp_path / "labels.csv").exists()
    with pytest.raises(InputError, match=r"not empty.*choose another OUT"):
        synthesize(tmp_path, SMALL)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"videos": 0}, "videos is 0, expected at least 1"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"fps": -1.0}, "fps is -1.0"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"seconds": 0.01}, "hold no frame"),
        ({"size": 47}, "size is 47, expected an even"),
        ({"size": 30}, "size is 30, expected an even"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_options_write_nothing(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        synthesize(tmp_path / "out", dataclasses.replace(SMALL, **change))
    assert not (tmp_path / "out").exists()


def test_occupied_or_impossible_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        synthesize(tmp_path, SMALL)
    with pytest.raises(InputError, match="cannot make the folder"):
        synthesize(tmp_path / "file", SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"
