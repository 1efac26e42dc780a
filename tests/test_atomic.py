"""Files that appear whole or not at all."""

import os

import pytest
import torch
from safetensors.torch import save_file

from vimpac.atomic import TEMPORARY, replacing, write_text


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
