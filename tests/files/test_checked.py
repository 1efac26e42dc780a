"""Files that are read back: regular ones only, JSON with a checksum, every type compared with its annotation."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from safetensors.numpy import save_file

from vimpac.config import ModelConfig
from vimpac.errors import InputError
from vimpac.files.checked import check_regular, load_json, typed, unsealed, write_json
from vimpac.files.tensorfile import UNSEALED, read_tensors, seal

FIELDS = {"name": 'a "checksum": "00000000" b', "sizes": [1, 2.5, None], "nested": {"é": True}}


def read(path):
    return unsealed(*load_json(path), set(FIELDS))


@pytest.mark.parametrize("indent", [None, 2])
def test_what_is_written_is_read(tmp_path, indent):
    path = tmp_path / "a.json"
    write_json(path, FIELDS, indent)
    assert read(path) == FIELDS
    write_json(tmp_path / "b.json", FIELDS, indent)
    assert path.read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads(path.read_text()).keys() == {*FIELDS, "checksum"}


def test_every_flipped_bit_is_noticed(tmp_path):
    """In a byte of white space, of the checksum and of its name as well."""
    path = tmp_path / "a.json"
    write_json(path, FIELDS, 1)
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        with pytest.raises(InputError):
            read(path)


def test_a_file_without_checksum_is_an_earlier_versions(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(FIELDS))
    assert read(path) == FIELDS
    path.write_text(json.dumps({**FIELDS, "checksun": "0" * 8}))
    with pytest.raises(InputError, match="holds checksun, which no version of this file has"):
        read(path)
    path.write_text("{}")
    with pytest.raises(InputError, match="lacks name, nested, sizes"):
        read(path)


@pytest.mark.parametrize("text", ["", "[1]", "7", "{", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"])
def test_what_is_no_json_object(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"not JSON|expected an object"):
        load_json(tmp_path / "a.json")


def test_bytes_that_are_no_text_and_a_file_without_end(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="not JSON"):
        load_json(tmp_path / "a.json")
    os.truncate(tmp_path / "a.json", 1 << 40)  # takes no room on the disk
    with pytest.raises(InputError, match="1099511627776 bytes, expected at most"):
        load_json(tmp_path / "a.json")


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (
        (tmp_path / "pipe", "pipe"),
        (tmp_path, "folder"),
        ("/dev/zero", "device"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(InputError, match=kind):
            check_regular(Path(path))
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").touch()
    check_regular(tmp_path / "link")
    with pytest.raises(InputError, match="null"):
        check_regular(tmp_path / "a\0b")


@dataclass(frozen=True)
class Inner:
    flag: bool
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    count: int
    rate: float
    inner: Inner
    many: tuple[Inner, ...] = ()
    pair: tuple[int, int] = (0, 0)
    maybe: int | None = None
    text: str = ""


WHOLE = {"count": 1, "rate": 2, "inner": {"flag": True, "kind": "b"}, "many": [{"flag": False}], "pair": [3, 4], "maybe": 5}


def test_dataclasses_from_json():
    assert typed(Outer, WHOLE) == Outer(1, 2, Inner(True, "b"), (Inner(False),), (3, 4), 5)
    assert typed(Outer, {**WHOLE, "maybe": None}).maybe is None


@pytest.mark.parametrize(
    "change, said",
    [
        ({"count": True}, "count is True, expected a whole number"),
        ({"count": 1.0}, "count is 1.0, expected a whole number"),
        ({"rate": "2"}, "rate is '2', expected a number"),
        ({"rate": False}, "rate is False"),
        ({"inner": 7}, "inner is 7, expected the fields of Inner"),
        ({"inner": {}}, "inner.flag is missing"),
        ({"inner": {"flag": 1}}, "inner.flag is 1, expected true or false"),
        ({"inner": {"flag": True, "kind": "c"}}, "inner.kind is 'c', expected 'a' or 'b'"),
        ({"inner": {"flag": True, "kind": []}}, r"inner.kind is \[\]"),
        ({"inner": {"flag": True, 7: 1}}, "inner has no field 7"),
        ({"many": [{"flag": True}, 1]}, r"many\[1\] is 1"),
        ({"many": {}}, "many is {}, expected a list"),
        ({"pair": [1]}, "pair has 1 entries, expected 2"),
        ({"maybe": "x"}, "maybe is 'x', expected a whole number"),
        ({"text": None}, "text is None, expected text"),
        ({"more": 1}, "Outer has no field 'more'"),
    ],
)
def test_other_types(change, said):
    with pytest.raises(InputError, match=said):
        typed(Outer, {**WHOLE, **change})


def test_ranges_are_the_dataclass_own():
    with pytest.raises(InputError, match=r"model\.width must be at least 1, got 0"):
        typed(ModelConfig, {"width": 0})


def test_equal_tensors_and_metadata_are_equal_bytes(tmp_path):
    """safetensors writes metadata in an order that differs from one call to the next."""
    metadata = {name: f'"{name}" \\ \n\x01 é \U0001f600' for name in "hgfedcba"}
    tensors = {name: np.full(3, 7.0, np.float32) for name in ("b", "a é")}
    files = set()
    for number in range(8):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, {**metadata, **UNSEALED})
        size = path.stat().st_size
        seal(path)
        assert path.stat().st_size == size
        files.add(path.read_bytes())
        read_metadata, read = read_tensors(path, "numpy")
        assert read_metadata == metadata and all((read[name] == x).all() for name, x in tensors.items())
    assert len(files) == 1


def test_tensors_with_a_checksum(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": np.arange(6, dtype=np.float32)}, path, {"format": '"crc32":"00000000"', **UNSEALED})
    seal(path)
    metadata, tensors = read_tensors(path, "numpy")
    assert metadata == {"format": '"crc32":"00000000"'} and tensors["x"].tolist() == [0, 1, 2, 3, 4, 5]
    data = path.read_bytes()
    for bit in range(8 * (len(data) - 24), 8 * len(data)):
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
        with pytest.raises(InputError, match="is damaged, its checksum is"):
            read_tensors(path, "numpy")
    for digits in (b"0000000g", b"00000000"):
        path.write_bytes(re.sub(rb'"crc32":"[0-9a-f]{8}"', b'"crc32":"%b"' % digits, data, count=1))
        with pytest.raises(InputError, match="checksum"):
            read_tensors(path, "numpy")
