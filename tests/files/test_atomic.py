"""Files that appear whole or not at all, folders with one writer."""

import errno
import multiprocessing
import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from vimpac.errors import InputError
from vimpac.files import atomic
from vimpac.files.atomic import LOCK, TEMPORARY, locked, replacing, write_text


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def write_tensors(path):
    with replacing(path) as temporary:
        save_file({"x": torch.zeros(1)}, temporary)  # through a temporary file of its own, mode 0600


@pytest.mark.parametrize("write", [write_tensors, lambda path: write_text(path, "text")])
def test_permissions_follow_the_umask(tmp_path, umask, write):
    leftover = tmp_path / ("file" + TEMPORARY)  # of a killed run
    leftover.touch(0o600)
    write(tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_body_that_raises_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "file").read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_planted_link_is_not_followed(tmp_path, dangling):
    target = tmp_path / "target"
    if not dangling:
        target.write_text("precious")
    (tmp_path / ("file" + TEMPORARY)).symlink_to(target)
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()
    assert not target.exists() if dangling else target.read_text() == "precious"
    (tmp_path / LOCK).symlink_to(target)
    with pytest.raises(InputError, match=r"\.lock is a link, .* remove it"), locked(tmp_path, "taken"):
        pass
    assert not target.exists() if dangling else target.read_text() == "precious"


HOLDER = """
import sys, time
from pathlib import Path
from vimpac.files.atomic import locked
with locked(Path(sys.argv[1]), "taken"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_locked_until_its_process_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="taken by another"), locked(tmp_path, "taken by another"):
        raise AssertionError("two hold it")
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]  # the holder's, though this one was refused
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with locked(tmp_path, "taken"):
        assert (tmp_path / LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_locked_removes_only_the_empty_folders_that_it_made(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "b", "taken"):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a" / "b", "taken"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine", "taken"):
        pass
    assert (tmp_path / "mine").is_dir()


def count_up(folder, times):
    """Adds one to FOLDER/count, which two processes at once would do wrongly, as often as it was not refused."""
    done = 0
    while done < times:
        with suppress(InputError), locked(folder, "taken"):
            number = int((folder / "count").read_text())
            (folder / "count").write_text(str(number + 1))
            done += 1


def test_a_lock_file_that_was_removed_locks_nothing(tmp_path):
    """The file goes when the folder is free, so a process may lock one that is no longer in the folder."""
    (tmp_path / "count").write_text("0")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(count_up, [(tmp_path, 300)] * 4)
    assert int((tmp_path / "count").read_text()) == 1200


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_goes_on_where_there_are_no_locks(tmp_path, monkeypatch, number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    with locked(tmp_path, "taken"), locked(tmp_path, "taken"):
        pass
