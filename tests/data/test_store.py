"""Token store: what goes in comes out, runs resume, and the fast path equals plain slicing."""

import multiprocessing
import os
import pickle
import resource
import threading
import tracemalloc
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from stores import SETTINGS, VIEWS, random_videos, read_all, write

from runs import files_of_at_most
from vimpac.data import store as store_module
from vimpac.data.format import StoreSettings, TokenizerInfo, View
from vimpac.data.shards import check_shards
from vimpac.data.store import StoreWriter, TokenStore, finish_store
from vimpac.errors import InputError
from vimpac.files.atomic import TEMPORARY

FILL = 8193


@pytest.fixture
def videos():
    return random_videos()


@pytest.fixture
def folder(tmp_path, videos):
    write(tmp_path / "store", videos, shard_bytes=200)
    finish_store(tmp_path / "store", {"bad.mp4": "is an empty file"})
    return tmp_path / "store"


def test_reads_what_was_written(folder, videos):
    store = TokenStore(folder)
    assert store.names == sorted(videos) and len(store) == len(videos)
    assert store.frames.dtype == np.int32
    assert (store.tokenizer, store.fps, store.frame_size, store.grid) == (SETTINGS.tokenizer, 2.0, 24, (3, 3))
    assert store.views == VIEWS and store.failed == {"bad.mp4": "is an empty file"}
    assert len(list(folder.glob("*.bin"))) > 2
    for number, name in enumerate(store.names):
        assert store.frames[number] == videos[name].shape[1]
        for view in range(2):
            np.testing.assert_array_equal(store.read(number, view=view), videos[name][view])
    assert store.read(3, 0, 1).shape == (1, 3, 3)


def test_order_does_not_depend_on_shards_or_ranks(tmp_path, folder, videos):
    items = list(videos.items())
    for rank in range(2):
        write(tmp_path / "ranks", dict(items[rank::2]), rank, shard_seconds=0.0)
    finish_store(tmp_path / "ranks")
    one, two = TokenStore(folder), TokenStore(tmp_path / "ranks")
    assert one.names == two.names
    for number in range(len(one)):
        np.testing.assert_array_equal(one.read(number), two.read(number))


@pytest.mark.parametrize("length", [1, 3, 12])
def test_clips_equal_slices(folder, videos, length):
    store = TokenStore(folder)
    generator = np.random.default_rng(1)
    chosen = generator.integers(0, len(store), 64)
    starts = generator.integers(0, store.frames[chosen])
    views = generator.integers(0, 2, 64)
    out = np.full((64, length, 3, 3), 7777, np.uint16)
    assert store.read_clips(chosen, starts, length, views, out=out, fill=FILL) is out
    for row, video, start, view in zip(out, chosen, starts, views, strict=True):
        expected = videos[store.names[video]][view, start : start + length]
        np.testing.assert_array_equal(row[: len(expected)], expected)
        assert (row[len(expected) :] == FILL).all()


def test_memory_of_the_index(tmp_path):
    """A little more than the names is kept, and opening takes little more than that: a process a GPU opens the store."""
    count = 20_000
    write(tmp_path, {f"video-{i:05d}.mp4": np.zeros((2, 1, 3, 3), np.uint16) for i in range(count)}, shard_bytes=36_000)
    finish_store(tmp_path)
    tracemalloc.start()
    try:
        store = TokenStore(tmp_path, verify=False)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(store) == count and kept < 110 * count and peak < 300 * count


def test_no_clips(folder):
    assert TokenStore(folder).read_clips([], [], 5).shape == (0, 5, 3, 3)


@pytest.mark.parametrize(
    "video, start, length, view, message",
    [
        (7, 0, 1, 0, "video 7"),
        (-1, 0, 1, 0, "video -1"),
        (0, -1, 1, 0, "start frame -1"),
        (0, 9, 1, 0, "start frame 9"),
        (0, 0, 10, 0, "end frame 9"),
        (0, 0, 0, 0, "length 0"),
        (0, 0, 1, 2, "view 2"),
        (0, 0, 1, -1, "view -1"),
    ],
)
def test_bounds(folder, video, start, length, view, message):
    with pytest.raises(IndexError, match=message):
        TokenStore(folder).read_clips([video], [start], length, view)


def test_wrong_output_array(folder):
    with pytest.raises(ValueError, match="contiguous uint16"):
        TokenStore(folder).read_clips([0], [0], 1, out=np.empty((1, 1, 3, 3), np.int64))


def test_survives_pickle_fork_and_threads(folder, monkeypatch):
    monkeypatch.setattr(store_module, "OPEN_SHARDS", 1)  # every read evicts what another thread reads from
    store = TokenStore(folder)
    expected = read_all(store)
    assert read_all(pickle.loads(pickle.dumps(store))) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(read_all, [store, store]) == [expected, expected]
    results = []
    threads = [threading.Thread(target=lambda: results.append([read_all(store) for _ in range(50)])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[expected] * 50] * 4
    store.close()
    assert read_all(store) == expected


def test_resumes_behind_finished_shards(tmp_path, folder, videos):
    items = list(videos.items())
    killed = StoreWriter(tmp_path / "killed", SETTINGS, shard_bytes=sum(ids.nbytes for _, ids in items[:3]))
    for name, ids in items[:4]:
        killed.add(name, ids)
    (tmp_path / "killed" / "shard-00000-00098.bin.tmp").write_bytes(b"the process is gone before the shard was full")
    (tmp_path / "killed" / "shard-00000-00099.bin").write_bytes(b"renamed, but its list was never written")
    with pytest.raises(InputError, match="unfinished store"):
        TokenStore(tmp_path / "killed")

    writer = StoreWriter(tmp_path / "killed", SETTINGS, shard_bytes=200)
    assert writer.done == {name for name, _ in items[:3]}
    for name, ids in items:
        if name not in writer.done:
            writer.add(name, ids)
    writer.close()
    finish_store(tmp_path / "killed")
    assert read_all(TokenStore(tmp_path / "killed")) == read_all(TokenStore(folder))
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert "shard-00000-00099.bin" not in left and not any(name.endswith(".tmp") for name in left)


def test_failures_stay_until_they_are_mended(folder):
    finish_store(folder, {"worse.mp4": "is not a video"})
    assert TokenStore(folder).failed == {"bad.mp4": "is an empty file", "worse.mp4": "is not a video"}
    write(folder, {"bad.mp4": np.zeros((2, 1, 3, 3), np.uint16)})
    finish_store(folder, {"worse.mp4": "is truncated"})
    assert TokenStore(folder).failed == {"worse.mp4": "is truncated"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fps": 4.0}, "fps 2.0, not 4.0"),
        ({"frame_size": 32}, "frame size 24, not 32"),
        ({"views": (View(),)}, "views ×1 center; ×1 center flipped, not ×1 center"),
        ({"tokenizer": TokenizerInfo("patch-vq", 512, 8, "cd" * 32)}, "tokenizer digest abab"),
    ],
)
def test_refuses_to_resume_with_other_settings(folder, change, message):
    fields = {"tokenizer": SETTINGS.tokenizer, "fps": 2.0, "frame_size": 24, "views": VIEWS} | change
    with pytest.raises(InputError, match=message):
        StoreWriter(folder, StoreSettings(**fields))


@pytest.mark.parametrize("ids", [np.zeros((1, 2, 3, 3)), np.zeros((2, 0, 3, 3)), np.full((2, 1, 3, 3), 512)])
def test_writer_refuses_wrong_ids(tmp_path, ids):
    with pytest.raises(ValueError, match=r"ids of a\.mp4"):
        StoreWriter(tmp_path, SETTINGS).add("a.mp4", ids.astype(np.uint16))


def test_writer_refuses_a_video_twice(folder):
    with pytest.raises(ValueError, match="already"):
        StoreWriter(folder, SETTINGS).add("class0/00.mp4", np.zeros((2, 1, 3, 3), np.uint16))


def many_frames(count=40):
    return np.random.default_rng(count).integers(0, 512, (2, count, 3, 3), dtype=np.uint16)


def half_written(folder, interrupt):
    """A writer whose second video was interrupted half way, and which was then closed, as every run closes its writer."""
    writer = StoreWriter(folder, SETTINGS)
    writer.add("first.mp4", many_frames())
    with interrupt():
        writer.add("second.mp4", many_frames(60))
    writer.close()


@contextmanager
def full_disk():
    with files_of_at_most(2 * 2 * 60 * 9), pytest.raises(OSError, match="File too large") as raised:
        yield
    assert raised.value.filename.endswith("shard-00000-00000.bin")


@contextmanager
def ctrl_c(monkeypatch):
    def pwrite(descriptor, data, offset):
        original(descriptor, data[: len(data) // 2], offset)
        raise KeyboardInterrupt

    original = os.pwrite
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "pwrite", pwrite)
        yield


@pytest.mark.parametrize("kind", ["full disk", "Ctrl-C"])
def test_a_shard_is_what_was_written(tmp_path, monkeypatch, kind):
    half_written(tmp_path, full_disk if kind == "full disk" else lambda: ctrl_c(monkeypatch))
    check_shards(tmp_path)
    write(tmp_path, {"second.mp4": many_frames(60)})
    finish_store(tmp_path)
    store = TokenStore(tmp_path)
    assert store.names == ["first.mp4", "second.mp4"]
    for number, frames in enumerate((40, 60)):
        np.testing.assert_array_equal(store.read(number, view=1), many_frames(frames)[1])


def test_a_write_that_failed_may_be_tried_again(tmp_path):
    """What it left behind what is written is written over, and a shard without a video is no shard."""
    writer = StoreWriter(tmp_path, SETTINGS)
    with full_disk():
        writer.add("second.mp4", many_frames(70))
    writer.close()
    assert not list(tmp_path.iterdir())
    writer = StoreWriter(tmp_path, SETTINGS)
    writer.add("first.mp4", many_frames())
    with full_disk():
        writer.add("second.mp4", many_frames(60))
    writer.add("third.mp4", many_frames(7))
    writer.close()
    finish_store(tmp_path)
    store = TokenStore(tmp_path)
    assert store.names == ["first.mp4", "third.mp4"]
    np.testing.assert_array_equal(store.read(1), many_frames(7)[0])


def test_a_planted_link_is_not_followed(tmp_path, videos):
    target = tmp_path / "precious"
    target.write_text("precious")
    folder = tmp_path / "store"
    folder.mkdir()
    for name in ("shard-00000-00000.bin", "shard-00000-00000.json", "store.json"):
        (folder / (name + TEMPORARY)).symlink_to(target)
    write(folder, videos)
    finish_store(folder)
    assert target.read_text() == "precious" and TokenStore(folder).names == sorted(videos)
    assert not [path for path in folder.iterdir() if path.is_symlink()]


def test_more_shards_than_files_may_be_open(tmp_path):
    videos = {f"{i:02d}.mp4": (many_frames(2) + i) % 512 for i in range(40)}
    write(tmp_path, videos, shard_bytes=1)
    finish_store(tmp_path)
    store, every = TokenStore(tmp_path), np.arange(40)
    expected = store.read_clips(every, 0 * every, 2)
    store.close()
    held = []
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 10, before[1]))  # fewer than a quarter of these are shards'
        np.testing.assert_array_equal(store.read_clips(every, 0 * every, 2), expected)
        assert len(store._open) <= max(1, (opened + 10) // 4)
        store.close()
        held += [os.open("/dev/null", os.O_RDONLY) for _ in range(7)]
        np.testing.assert_array_equal(store.read_clips(every, 0 * every, 2), expected)
        store.close()
        with suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(InputError, match=rf"Too many open files; allow this process more than {opened + 10} open files"):
            store.read_clips(every, 0 * every, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in held:
            os.close(descriptor)
