"""A few of the damaged videos of tests/soak/videos.py, and that it notices what must not happen."""

import itertools

import numpy as np
import pytest

from soak import videos


def test_damaged_videos():
    assert videos.soak(range(20), seed=1) == []


def test_a_number_is_always_the_same_video():
    data = bytes(range(256)) * 20
    first, second = (videos.damage(data, np.random.default_rng([0, 7])) for _ in range(2))
    assert first == second and first[1] != data


def chunks(shape, count=None):
    for _ in itertools.count() if count is None else range(count):
        yield np.empty(shape, np.uint8)


def raising(error):
    raise error


def allocating():
    yield np.empty((1, 2 * videos.MEMORY), np.uint8)


@pytest.mark.parametrize(
    "decode, line",
    [
        (
            lambda *_: raising(IndexError("list index")),
            "IndexError: list index; again: python tests/soak/videos.py --seed 0 --only 3",
        ),
        (lambda *_: chunks((1, 10**6, 0)), "000 frames, and no end"),
        (lambda *_: chunks((1, 0)), "not finished after 0.5 s"),
        (lambda *_: allocating(), "more than 2 GB of memory"),
        (lambda *_: raising(SystemExit(3)), "the process died with status 3"),
    ],
)
def test_what_it_notices(tmp_path, monkeypatch, decode, line):
    (tmp_path / "a.mp4").write_bytes(bytes(range(200)))
    monkeypatch.setattr(videos, "_sources", lambda _: [tmp_path / "a.mp4"])
    monkeypatch.setattr(videos, "decode", decode)
    monkeypatch.setattr(videos, "SECONDS", 0.5 if "finished" in line else 60)
    (found,) = videos.soak([3], seed=0)
    assert line in found
