"""Videos and a store built from them."""

import pytest
from stores import build

from films import greys, noise, write_video


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sub").mkdir()
    for number, name in enumerate(["a.mp4", "b.avi", "c.mkv", "sub/d.mp4", "sub/e.mp4"]):
        pictures = noise(20 + 5 * number) if number % 2 else greys(30)
        write_video(folder / name, pictures, codec="mpeg4")
    return folder


@pytest.fixture(scope="session")
def whole(videos, tmp_path_factory):
    """The store of an uninterrupted run. Do not change it."""
    out = tmp_path_factory.mktemp("whole") / "store"
    build(videos, out)
    return out
