"""Checkpoint files: written whole or not at all, and damage is noticed."""

import errno
import os
import zipfile

import pytest
import torch

from runs import files_of_at_most
from vimpac import checkpoint
from vimpac.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from vimpac.errors import InputError


def state(step):
    torch.manual_seed(step)
    parts = {"tokenizer": {"digest": "d"}, "optimizer": {"m": torch.randn(2)}, "scaler": {}}
    return {"step": step, "model": {"w": torch.randn(5, 3)}, "config": {"a": [1, None]}, **parts}


def same_tensors(a, b):
    return all(torch.equal(a[part][name], b[part][name]) for part, name in (("model", "w"), ("optimizer", "m")))


def test_round_trip(tmp_path):
    path = save_checkpoint(tmp_path, state(7), keep=2)
    assert path == tmp_path / "checkpoints" / "step-00000007.pt"
    read, written = load_checkpoint(path), state(7)
    assert same_tensors(read, written)
    assert read["step"] == 7 and read["config"] == {"a": [1, None]}


def test_keeps_the_newest(tmp_path):
    for step in (2, 9, 10, 100):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert [path.stem for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000100"]


def test_leftovers_are_no_checkpoints_and_go(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step-00000009.pt.tmp", "step-9.pt", "notes.txt"):
        (folder / name).write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []
    path = save_checkpoint(tmp_path, state(1), keep=1)
    assert list_checkpoints(tmp_path) == [path] and not list(folder.glob("*.tmp"))


def test_a_failed_write_leaves_the_old_one(tmp_path, monkeypatch):
    old = save_checkpoint(tmp_path, state(1), keep=1)

    def full_disk(_state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*checkpoints/step-00000002.pt'"):
        save_checkpoint(tmp_path, state(2), keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [old] and load_checkpoint(old)["step"] == 1


@pytest.mark.parametrize("share", [0, 0.0001, 0.3, 0.9, 0.9999])
def test_a_full_disk_is_an_os_error(tmp_path, share):
    """Wherever it comes: torch's own error is of the archive that it then cannot close, and names neither cause nor file."""
    old = save_checkpoint(tmp_path, state(1), keep=1)
    large = {**state(2), "model": {"w": torch.zeros(3, 100_000)}}
    with files_of_at_most(int(share * 1_200_000)), pytest.raises(OSError) as error:
        save_checkpoint(tmp_path, large, keep=1)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(old.with_name("step-00000002.pt"))
    assert list(old.parent.iterdir()) == [old] and load_checkpoint(old)["step"] == 1


def test_other_errors_of_torch_stay(tmp_path, monkeypatch):
    def bug(_state, file):
        raise RuntimeError("of another kind")

    monkeypatch.setattr(checkpoint.torch, "save", bug)
    with pytest.raises(RuntimeError, match="of another kind"):
        save_checkpoint(tmp_path, state(1), keep=1)


def test_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (done.append("fsync"), fsync(n)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    save_checkpoint(tmp_path, state(1), keep=1)
    assert done == ["fsync", "rename", "fsync"]


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.999])
def test_cut_short(tmp_path, share):
    path = save_checkpoint(tmp_path, state(1), keep=1)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=r"cannot read checkpoint .*step-00000001.pt .*truncated, damaged or not a checkpoint"):
        load_checkpoint(path)


def test_a_flipped_bit_is_noticed_or_harmless(tmp_path):
    """Any one bit of the file: InputError, or the very same contents (bits that only pad or name the program)."""
    path = save_checkpoint(tmp_path, state(1), keep=1)
    data, expected = path.read_bytes(), load_checkpoint(path)
    noticed = 0
    rng = torch.Generator().manual_seed(0)
    places = torch.randint(len(data), (400,), generator=rng).tolist() + list(range(len(data) - 100, len(data)))
    for place in places:
        bit = int(torch.randint(8, (), generator=rng))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        try:
            read = load_checkpoint(path)
        except InputError:
            noticed += 1
            continue
        assert same_tensors(read, expected)
        assert (read["step"], read["config"]) == (expected["step"], expected["config"])
    assert noticed > 100


def test_a_flipped_weight_is_noticed(tmp_path):
    path = save_checkpoint(tmp_path, state(1), keep=1)
    data, weight = path.read_bytes(), state(1)["model"]["w"].numpy().tobytes()
    place = data.index(weight) + 7
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(InputError, match=r"checksum of .* is wrong"):
        load_checkpoint(path)


def without_checksum(path):
    """As an earlier version wrote it."""
    data = path.read_bytes()
    comment = len(b"vimpac crc32 ") + 8
    assert data[-comment:].startswith(b"vimpac crc32 ")
    path.write_bytes(data[: -comment - 2] + b"\0\0")
    return path


def test_a_checkpoint_without_a_checksum_is_an_earlier_versions(tmp_path):
    path = without_checksum(save_checkpoint(tmp_path, state(1), keep=1))
    assert same_tensors(load_checkpoint(path), state(1))
    data, weight = path.read_bytes(), state(1)["model"]["w"].numpy().tobytes()
    place = data.index(weight) + 7
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(InputError, match=r"checksum of archive/data/\d is wrong"):
        load_checkpoint(path)


def test_a_damaged_checksum_is_not_a_missing_one(tmp_path):
    path = save_checkpoint(tmp_path, state(1), keep=1)
    data = path.read_bytes()
    for end in (1, 8, 9, 21, 22):
        path.write_bytes(data[:-end] + bytes([data[-end] ^ 1]) + data[len(data) - end + 1 :])
        with pytest.raises(InputError, match=r"checksum of the file is (wrong|missing)"):
            load_checkpoint(path)


def test_the_archive_stays_torchs(tmp_path):
    """Other programs read it: the checksum is a comment of the archive."""
    path = save_checkpoint(tmp_path, state(1), keep=1)
    assert same_tensors(torch.load(path, weights_only=True), state(1))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"vimpac crc32 ")


@pytest.mark.parametrize("earlier", [False, True])
def test_an_entry_marked_as_a_folder(tmp_path, earlier):
    """One bit: torch reads nothing for it, and gives memory as it was."""
    path = without_checksum(save_checkpoint(tmp_path, state(1), keep=1))
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"archive/data/0") - 46  # its record in the central directory
    assert data[entry : entry + 4] == b"PK\1\2"
    data[entry + 38] ^= 0x10  # external attributes
    path.write_bytes(data)
    if not earlier:  # with a right checksum
        with path.open("r+b") as file:
            file.seek(0, 2)
            checkpoint._seal(file)
    with pytest.raises(InputError, match=r"archive/data/0 is not a plain file in the archive"):
        load_checkpoint(path)


@pytest.mark.parametrize("change", [{"format": "else"}, {"version": 99}])
def test_another_version(tmp_path, change, monkeypatch):
    monkeypatch.setattr(checkpoint, next(iter(change)).upper(), next(iter(change.values())))
    path = save_checkpoint(tmp_path, state(1), keep=1)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"expected 'vimpac-checkpoint' version 2; use the program that wrote it"):
        load_checkpoint(path)


@pytest.mark.parametrize("part", ["step", "model", "optimizer"])
def test_a_part_is_missing(tmp_path, part):
    """A run that went on without it would not be the same run."""
    path = save_checkpoint(tmp_path, state(1), keep=1)
    torch.save({name: x for name, x in torch.load(path).items() if name != part}, path)
    with pytest.raises(InputError, match=rf"step-00000001.pt lacks {part}, so a run cannot resume from it"):
        load_checkpoint(path)


def test_missing_or_foreign(tmp_path):
    with pytest.raises(InputError, match=r"step-00000001.pt: No such file or directory; expected RUN/checkpoints/"):
        load_checkpoint(tmp_path / "step-00000001.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match=r"list.pt"):
        load_checkpoint(tmp_path / "list.pt")


def test_no_code_runs(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"step": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(InputError, match=r"trap.pt"):
        load_checkpoint(tmp_path / "trap.pt")
    assert not (tmp_path / "ran").exists()
