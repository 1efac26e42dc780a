"""Labels of a store's videos, the clips that are drawn from them, the views and rates that they are drawn at."""

import numpy as np
import pytest

from labelled import CLASSES, write_labelled
from vimpac.data.format import View, view_set
from vimpac.data.labelled import LabelSource, label_store
from vimpac.data.labelled_clips import LabelledClips
from vimpac.data.rates import frame_step
from vimpac.data.store import TokenStore
from vimpac.data.test_clips import TestClips
from vimpac.data.views import center_view, test_views, training_views
from vimpac.errors import InputError

PAD = 99


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled"), views=(View(flip=True), View(), View(crop="top-left")), fps=16.0)


@pytest.fixture(scope="module")
def store(folder):
    return TokenStore(folder / "tokens")


@pytest.fixture(scope="module")
def labels(folder, store):
    return label_store(store, LabelSource(str(folder / "labels.csv")))


def test_labels_by_split(store, labels):
    assert labels.classes == CLASSES and {name: len(x.videos) for name, x in labels.splits.items()} == {
        "train": 18,
        "validation": 6,
    }
    for found in labels.splits.values():
        assert [store.names[i].split("/")[0] for i in found.videos] == [CLASSES[i] for i in found.labels]
        assert (np.diff(found.videos) > 0).all()
    assert labels.divided(0.5) is labels
    with pytest.raises(InputError, match=r"the split 'test' of .* does not exist, expected one of train, validation"):
        labels.split("test")


@pytest.mark.parametrize("held_out, expected", [(0.25, 6), (6, 6), (0.01, 1)])
def test_division_of_labels_without_splits(folder, store, tmp_path, held_out, expected):
    """The same share of every class; a function of the names alone."""
    plain = tmp_path / "plain.csv"
    lines = (folder / "labels.csv").read_text().splitlines()
    plain.write_text("\n".join(line.rpartition(",")[0] for line in lines))
    found = label_store(store, LabelSource(str(plain)))
    assert list(found.splits) == ["all"]
    divided = found.divided(held_out)
    train, validation = divided.splits["train"], divided.splits["validation"]
    assert len(validation.videos) == expected and sorted([*train.videos, *validation.videos]) == list(range(24))
    if expected == 6:
        assert np.bincount(validation.labels).tolist() == [2, 2, 2]
    plain.write_text("\n".join([lines[0].rpartition(",")[0], *(x.rpartition(",")[0] for x in lines[:0:-1])]))
    again = label_store(store, LabelSource(str(plain))).divided(held_out)
    assert np.array_equal(again.splits["validation"].videos, validation.videos)
    with pytest.raises(InputError, match="held_out=24 leaves nothing to train on: 24 videos"):
        found.divided(24)
    few = found.first(found.splits["all"], 9)
    assert np.bincount(few.labels).tolist() == [3, 3, 3]
    assert not set(few.videos) & set(validation.videos) or expected > 15  # counted from the other end


def test_notes_tell_what_is_missing(folder, store, tmp_path):
    lines = (folder / "labels.csv").read_text().splitlines()
    path = tmp_path / "part.csv"
    path.write_text("\n".join([*lines[:-1], "elsewhere.mp4,run,train"]))
    notes = label_store(store, LabelSource(str(path))).notes
    assert notes[0] == "1 labelled video of 24 not in the store, such as elsewhere.mp4"
    assert notes[1] == f"1 video of the store without a label, such as {lines[-1].split(',')[0]}"


def test_drawn_clips(store, labels):
    """Every epoch has each video once; a clip is `every`-th frames of the view that it names, then PAD."""
    found = labels.split("train")
    clips = LabelledClips(store, found, [1, 2], 3, PAD, seed=5, every=2)
    assert clips.padded
    n = len(found.videos)
    whole = clips.batch(0, 2 * n)
    assert sorted(whole.videos[:n]) == sorted(whole.videos[n:]) == list(found.videos)
    assert not np.array_equal(whole.videos[:n], whole.videos[n:])
    label_of = dict(zip(found.videos, found.labels, strict=True))
    starts, views = set(), set()
    for video, label, clip in zip(whole.videos, whole.labels, whole.tokens, strict=True):
        assert label == label_of[video]
        possible = {}
        for view in (1, 2):
            frames = store.read(int(video), view=view)
            for start in range(max(1, len(frames) - 4)):
                cut = frames[start::2][:3]
                possible[view, start] = np.concatenate([cut, np.full((3 - len(cut), 4, 4), PAD)])
        view, start = next(key for key, x in possible.items() if np.array_equal(x, clip))
        views.add(view)
        starts.add((len(frames), start))
    assert views == {1, 2} and {(6, 0), (6, 1)} <= starts
    for first, count in ((0, 5), (n - 2, 4), (n + 3, 1)):  # however samples are divided
        part = clips.batch(first, count)
        assert np.array_equal(part.tokens, whole.tokens[first : first + count])
    assert not np.array_equal(LabelledClips(store, found, [1], 3, PAD, seed=6).batch(0, n).videos, whole.videos[:n])


@pytest.mark.parametrize("clips, starts", [(1, [1]), (2, [0, 3]), (3, [0, 2, 3]), (4, [0, 1, 2, 3])])
def test_starts_of_test_clips(store, clips, starts):
    """From the first to the last possible one; one clip is the middle one."""
    (longest, *_) = np.flatnonzero(store.frames == 6)
    assert TestClips(store, np.array([longest]), clips, [1], 3, PAD).starts(int(longest)).tolist() == starts


@pytest.mark.parametrize("every", [1, 2])
def test_test_clips_are_the_stores(store, every):
    videos = np.array([3, 0, 7])
    clips = TestClips(store, videos, 2, [2, 1], 3, PAD, every)
    found = clips.read(0, 3)
    assert found.shape == (3, 2, 2, 3, 4, 4)
    for row, video in zip(found, videos, strict=True):
        for clip, start in zip(row, clips.starts(int(video)), strict=True):
            for view, tokens in zip((2, 1), clip, strict=True):
                expected = store.read(int(video), view=view)[start::every][:3]
                assert np.array_equal(tokens[: len(expected)], expected) and (tokens[len(expected) :] == PAD).all()
    assert np.array_equal(clips.read(1, 1), found[1:2])


def test_a_video_is_read_once(store, monkeypatch):
    calls, read_clips = [], TokenStore.read_clips
    monkeypatch.setattr(TokenStore, "read_clips", lambda *x, **more: calls.append(x) or read_clips(*x, **more))
    TestClips(store, np.arange(4), 10, [1, 2], 3, PAD).read(0, 4)
    assert len(calls) == 4


def test_reading_every_kth_frame(store):
    """As slices of the whole video; past its end `fill`."""
    video, frames = 3, int(store.frames[3])
    whole = store.read(video, view=1)
    assert np.array_equal(store.read_clips([video], [0], 2, 1, every=frames - 1)[0], whole[:: frames - 1])
    out = np.empty((1, 5, 4, 4), np.uint16)
    assert store.read_clips([video], [1], 5, 1, out=out, fill=PAD, every=2) is out
    kept = len(whole[1::2])
    assert np.array_equal(out[0, :kept], whole[1::2]) and (out[0, kept:] == PAD).all()
    with pytest.raises(IndexError, match="end frame"):
        store.read_clips([video], [0], 2, 1, every=frames)


@pytest.mark.parametrize("fps, step", [(None, 1), (16.0, 1), (8.0, 2), (2.0, 8), (16 / 3, 3)])
def test_frame_steps(store, fps, step):
    assert frame_step(store, fps) == step


@pytest.mark.parametrize("fps, near", [(5.0, "4 or 5.33333"), (32.0, "8 or 16"), (3.0, "2.66667 or 3.2")])
def test_rates_that_do_not_divide(store, fps, near):
    with pytest.raises(InputError, match=rf"fps={fps:g} does not divide the 16 frames a second of .*: give --fps {near},"):
        frame_step(store, fps)


class Views:
    """What a store needs to have for its views to be chosen."""

    def __init__(self, *views):
        self.views, self.folder = views, "store"


@pytest.mark.parametrize(
    "views, center, test, train",
    [
        (view_set("center"), 0, [0], [0]),
        (view_set("test"), 0, [0, 1, 2], [0, 1, 2]),
        (view_set("train"), 0, [0, 2, 4], list(range(12))),
        (view_set("train", flip=False), 0, [0, 1, 2], list(range(6))),
        ((View(1.25), View(1.25, "top-left"), View(flip=True)), 0, [0, 1], [0, 1, 2]),
    ],
    ids=["center", "test", "train", "unflipped", "enlarged"],
)
def test_choice_of_views(views, center, test, train):
    store = Views(*views)
    assert (center_view(store), test_views(store), training_views(store)) == (center, test, train)


def test_no_view_to_choose():
    with pytest.raises(InputError, match="store has no centre view, it has top-left: tokenize the videos with --views center"):
        center_view(Views(View(crop="top-left")))
    flipped = Views(View(flip=True), View(1.25, flip=True))
    with pytest.raises(InputError, match=r"no view to evaluate on, all of center flipped, center ×1.25 flipped are flipped"):
        test_views(flipped)
    with pytest.raises(InputError, match="flipped views only"):
        training_views(flipped, flip=False)
