"""Hostile stores: whatever the JSON files claim, opening gives one InputError, before memory is allocated for it."""

import json

import numpy as np
import pytest
from stores import edit

from vimpac.data.format import StoreSettings, TokenizerInfo
from vimpac.data.shards import check_listed
from vimpac.data.store import StoreWriter, TokenStore, finish_store
from vimpac.errors import InputError


def short(value):
    return str(value)[:40]


@pytest.fixture
def store(tmp_path):
    """A store of three shards, each a video."""
    settings = StoreSettings(TokenizerInfo("patch-vq", 9, 8, "ab" * 32), fps=2.0, frame_size=16)
    writer = StoreWriter(tmp_path / "store", settings, shard_bytes=1)
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        writer.add(name, np.ones((1, 2, 2, 2), np.uint16))
    writer.close()
    finish_store(tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize(
    "shards",
    [
        ["../outside/shard-00000-00000"],
        ["/dev/zero"],
        ["shard-00000-00000/../shard-00000-00000"],
        ["shard-00000-00000\n"],
        ["shard-00000-٠٠٠٠٠"],
        ["shard-00000-00000.bin"],
        ["shard-00000-00000", 7],
        "shard-00000-00000",
        {"shard-00000-00000": 1},
    ],
    ids=short,
)
def test_shards_outside_the_folder(store, shards):
    edit(store / "store.json", shards=shards)
    with pytest.raises(InputError, match=r"store\.json is damaged.*expected names such as shard-00000-00000, without a folder"):
        TokenStore(store)


def test_a_shard_may_be_a_link_to_a_file_but_to_nothing_else(store, tmp_path):
    """Large stores are spread over disks with links."""
    shard = store / "shard-00000-00000.bin"
    shard.rename(tmp_path / "elsewhere.bin")
    shard.symlink_to(tmp_path / "elsewhere.bin")
    assert len(TokenStore(store)) == 3
    shard.unlink()
    shard.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"shard-00000-00000\.bin is missing from the store, or no regular file"):
        TokenStore(store)


def test_parts_of_a_store_that_do_not_fit_each_other(store):
    """Each with a right checksum: one of them is another store's."""
    index, first = store / "store.json", store / "shard-00000-00000.json"
    before = index.read_bytes(), first.read_bytes()
    edit(index, fps=6.0)
    with pytest.raises(InputError, match=r"shard-00000-00000\.bin does not fit store\.json, which says fps 6\.0, not 2\.0"):
        TokenStore(store, verify=False)
    edit(index, fps=2.0, shards=["shard-00000-00000", "shard-00000-00000", "shard-00000-00001"])
    with pytest.raises(InputError, match="shards name one shard twice"):
        TokenStore(store, verify=False)
    edit(index, shards=["shard-00000-00000", "shard-00000-00002"], videos=2)
    TokenStore(store)
    with pytest.raises(InputError, match=r"has shard-00000-00001 \(1 in all\), which store\.json does not list"):
        check_listed(store)
    index.write_bytes(before[0])
    check_listed(store)
    edit(first, videos=[{"name": "b.mp4", "offset": 0, "frames": 2}])
    with pytest.raises(InputError, match=r"holds the video 'b\.mp4' twice"):
        TokenStore(store, verify=False)
    first.write_bytes(before[1])
    TokenStore(store, verify=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"videos": True},
        {"videos": -3},
        {"videos": 2**70},
        {"failed": None},
        {"failed": [{"name": "x"}]},
        {"failed": [{"name": "x", "reason": 7}]},
        {"views": []},
        {"views": [{"resize": "1"}]},
        {"views": [{"resize": float("inf"), "crop": "center", "flip": False}]},
        {"fps": 0},
        {"fps": float("nan")},
        {"fps": "2"},
        {"frame_size": 2**40},
        {"frame_size": 4},
        {"frame_size": 16.0},
        {"tokenizer": {"name": "patch-vq", "vocab_size": 9, "stride": 0, "digest": "x"}},
        {"tokenizer": {"name": "patch-vq", "vocab_size": 70_000, "stride": 8, "digest": "x"}},
        {"version": True},
    ],
    ids=short,
)
def test_values_of_an_index(store, changes):
    edit(store / "store.json", **changes)
    with pytest.raises(InputError, match=r"store\.json is damaged|is a store of version True"):
        TokenStore(store)


VIDEO = {"name": "a.mp4", "offset": 0, "frames": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"videos": [VIDEO | {"frames": 2**62}]},
        {"videos": [VIDEO | {"frames": 0}, VIDEO | {"name": "z"}]},
        {"videos": [VIDEO | {"frames": 2.0}]},
        {"videos": [VIDEO | {"offset": -8}]},
        {"videos": [VIDEO | {"offset": 2**64}]},
        {"videos": [VIDEO | {"name": 7}]},
        {"videos": [VIDEO | {"file_bytes": -1}]},
        {"videos": {"name": 1}},
        {"bytes": "16"},
        {"crc32": None},
        {"crc32": -1},
        {"settings": []},
    ],
    ids=short,
)
def test_values_of_a_shards_list(store, changes):
    edit(store / "shard-00000-00000.json", **changes)
    with pytest.raises(InputError, match=r"shard-00000-00000\.json is damaged"):
        TokenStore(store)


def test_frames_whose_product_leaves_64_bits(store):
    """2⁶³ ids a frame of all views."""
    views = [{"resize": 1.0, "crop": "center", "flip": False}] * 512
    for path in (store / "store.json", *store.glob("shard-*.json")):
        settings, size = json.loads(path.read_text()).get("settings"), {"frame_size": 2**30, "views": views}
        edit(path, **({"settings": settings | size} if settings else size))
    with pytest.raises(InputError, match="the video list beside it does not fit it"):
        TokenStore(store)


def test_a_vocabulary_that_16_bits_do_not_hold():
    with pytest.raises(InputError, match="a tokenizer has 65531 codes, expected 1 to 65530"):
        TokenizerInfo("mine", 65_531, 8, "x")
    TokenizerInfo("mine", 65_530, 8, "x")
