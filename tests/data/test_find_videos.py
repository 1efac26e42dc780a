"""Finding the videos of a folder: names, links, and folders that cannot be listed."""

import pytest

from films import (
    close_folder,
)
from vimpac.data.video import count_extensions, find_videos
from vimpac.errors import InputError


def test_find_videos(tmp_path):
    for name in ("b.mp4", "a/c.AVI", "a/b/d.webm", "a/notes.TXT", "b.txt", "z.MKV", ".x/e.mpg", "README"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names, others, unlisted = find_videos(tmp_path)
    assert not unlisted and names == [".x/e.mpg", "a/b/d.webm", "a/c.AVI", "b.mp4", "z.MKV"] and others == {".txt": 2, "": 1}
    assert count_extensions(others) == "2 .txt, 1 without an extension"
    assert count_extensions(others, 1) == "2 .txt and 1 more"


def test_links_do_not_multiply_videos(tmp_path):
    """Each folder counts once: under its own path if it has one, else under that of the first link to it."""
    for name in ("videos/a.mp4", "videos/sub/deep/b.mp4", "elsewhere/c.mp4", "elsewhere/more/d.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    videos = tmp_path / "videos"
    (videos / "sub" / "deep" / "up").symlink_to(videos)
    (videos / "sub" / "self").symlink_to(".")
    (videos / "a-link-to-sub").symlink_to("sub")
    (videos / "linked").symlink_to(tmp_path / "elsewhere")
    (videos / "linked-too").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path)
    assert find_videos(videos) == (["a.mp4", "linked/c.mp4", "linked/more/d.mp4", "sub/deep/b.mp4"], {}, {})
    (tmp_path / "link").symlink_to(videos)
    assert find_videos(tmp_path / "link") == find_videos(videos)


def test_find_videos_says_what_it_cannot_look_into(tmp_path, monkeypatch):
    for name in ("a/b.mp4", "c/d/e.mp4", "c/f.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    close_folder(monkeypatch, tmp_path / "c" / "d")
    assert find_videos(tmp_path) == (["a/b.mp4", "c/f.mp4"], {}, {"c/d": "Permission denied"})
    close_folder(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=f"; {tmp_path} cannot be listed: Permission denied$"):
        find_videos(tmp_path)


def test_find_videos_bad_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        find_videos(tmp_path / "missing")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="is a file, expected a folder"):
        find_videos(tmp_path / "notes.txt")
    with pytest.raises(InputError, match=r"holds 1 \.txt, but no video file; expected files that end in one of: \.mp4"):
        find_videos(tmp_path)
