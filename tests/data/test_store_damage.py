"""A damaged token store: every damage is noticed, and the message names the file."""

import dataclasses
import json
import os

import pytest
from stores import SETTINGS, edit, random_videos, read_all, write

from vimpac.data import shards as shards_module
from vimpac.data.format import TokenizerInfo
from vimpac.data.shards import check_shards
from vimpac.data.store import StoreWriter, TokenStore, finish_store
from vimpac.errors import InputError
from vimpac.files.checked import write_json


@pytest.fixture
def videos():
    return random_videos()


@pytest.fixture
def folder(tmp_path, videos):
    write(tmp_path / "store", videos, shard_bytes=200)
    finish_store(tmp_path / "store", {"bad.mp4": "is an empty file"})
    return tmp_path / "store"


def first_shard(folder):
    return sorted(folder.glob("*.bin"))[0]


@pytest.mark.parametrize("gone", [[".json"], [".json", ".bin"], [".bin"]])
def test_a_listed_shard_that_is_gone_is_no_reason_to_forget_it(folder, videos, gone):
    """Neither a run that adds videos nor the end of one takes the store for a smaller one."""
    for suffix in gone:
        (folder / f"shard-00000-00001{suffix}").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for work in (lambda: StoreWriter(folder, SETTINGS), lambda: check_shards(folder), lambda: finish_store(folder)):
        with pytest.raises(InputError, match=r"shard-00000-00001\.\w+ is missing from the store"):
            work()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_an_index_that_is_no_file(folder, make):
    (folder / "store.json").unlink()
    make(folder / "store.json")
    for work in (lambda: TokenStore(folder), lambda: StoreWriter(folder, SETTINGS)):
        with pytest.raises(InputError, match=r"store\.json.* (folder|pipe)"):
            work()


def test_flipped_byte(folder):
    shard = first_shard(folder)
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=f"{shard.name} is damaged"):
        TokenStore(folder)
    store = TokenStore(folder, verify=False)
    with pytest.raises(InputError, match=shard.name):
        store.verify()


def test_ids_outside_the_vocabulary(folder):
    """With the right checksum: not written by this program, or `store.json` is another store's."""
    smaller = dataclasses.replace(SETTINGS, tokenizer=TokenizerInfo("patch-vq", 100, 8, "ab" * 32)).to_json()
    edit(folder / "store.json", **smaller)
    for sidecar in folder.glob("shard-*.json"):
        edit(sidecar, settings=smaller)
    with pytest.raises(InputError, match=r"shard.*bin holds the id \d+, expected ids below .* 100"):
        TokenStore(folder)


def test_large_store_is_not_verified_on_opening(folder, monkeypatch):
    monkeypatch.setattr(shards_module, "VERIFY_ON_OPEN_BYTES", 100)
    shard = first_shard(folder)
    shard.write_bytes(bytes(shard.stat().st_size))
    TokenStore(folder)
    with pytest.raises(InputError, match="damaged"):
        TokenStore(folder, verify=True)


def test_truncated_shard(folder):
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(InputError, match=rf"{shard.name} is truncated.* bytes"):
        TokenStore(folder, verify=False)


def test_shard_cut_after_opening(folder):
    store = TokenStore(folder)
    for shard in folder.glob("*.bin"):
        shard.write_bytes(b"")
    with pytest.raises(InputError, match="cut short"):
        read_all(store)


@pytest.mark.parametrize("suffix", [".bin", ".json"])
def test_missing_shard_file(folder, suffix):
    missing = first_shard(folder).with_suffix(suffix)
    missing.unlink()
    with pytest.raises(InputError, match=f"{missing.name} is missing"):
        TokenStore(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 2}, "version 2, this program reads version 1"),
        ({"format": "other"}, "format 'other'"),
        ({"videos": 8}, "counts 8 videos"),
        ({"frame_size": 32}, "does not fit"),
        ({"tokenizer": {"name": "patch-vq"}}, "damaged, its settings"),
    ],
)
def test_wrong_index(folder, changes, message):
    edit(folder / "store.json", **changes)
    with pytest.raises(InputError, match=message):
        TokenStore(folder)


def test_index_that_lacks_a_field(folder):
    (folder / "store.json").write_text('{"format": "vimpac-tokens", "version": 1}')
    with pytest.raises(InputError, match="lacks failed, fps"):
        TokenStore(folder)


@pytest.mark.parametrize("field", ["crc32", "bytes", "videos", "settings"])
def test_shard_list_that_lacks_a_field(folder, field):
    sidecar = first_shard(folder).with_suffix(".json")
    shard = json.loads(sidecar.read_text())
    del shard[field], shard["checksum"]
    write_json(sidecar, shard)
    for open_store in (TokenStore, check_shards):
        with pytest.raises(InputError, match=f"{sidecar.name} is damaged, it lacks {field}; copy"):
            open_store(folder)


@pytest.mark.parametrize(
    "changes", [{"videos": [{"name": "a.mp4", "frames": 1}]}, {"videos": [7]}, {"settings": {"fps": 2.0}}, {"videos": None}]
)
def test_shard_list_of_something_else(folder, changes):
    sidecar = first_shard(folder).with_suffix(".json")
    edit(sidecar, **changes)
    with pytest.raises(InputError, match=f"{sidecar.name} is damaged, its settings or its videos lack a field"):
        TokenStore(folder)


def test_index_cut_short(folder):
    text = (folder / "store.json").read_text()
    (folder / "store.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match="not JSON"):
        TokenStore(folder)


def test_video_list_that_does_not_fit(folder):
    sidecar = first_shard(folder).with_suffix(".json")
    videos = json.loads(sidecar.read_text())["videos"]
    videos[0]["frames"] += 1
    edit(sidecar, videos=videos)
    with pytest.raises(InputError, match="does not fit"):
        TokenStore(folder)


def test_not_a_store(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        TokenStore(tmp_path / "missing")
    with pytest.raises(InputError, match="not a token store"):
        TokenStore(tmp_path)
    with pytest.raises(InputError, match="no finished shard"):
        finish_store(tmp_path)
