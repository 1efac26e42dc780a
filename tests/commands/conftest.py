"""Videos and a store built from them."""

import pytest

from films import noise, write_video
from vimpac.commands import main as cli


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(videos, store)"""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "good.mp4", noise(50), codec="mpeg4")
    (folder / "videos" / "empty.mp4").touch()
    arguments = ["tokenize", str(folder / "videos"), str(folder / "store"), "--frame-size", "32", "--codes", "8"]
    assert cli.main(arguments) == 0
    return folder / "videos", folder / "store"
