"""Clip pairs: what sample k is, what a batch holds, which videos are held out."""

import math
import sys
from collections import Counter

import numpy as np
import pytest

from runs import VOCABULARY, write_store
from vimpac.data.clips import ClipPairs, split_videos
from vimpac.data.store import TokenStore
from vimpac.errors import InputError

PAD = VOCABULARY + 1


@pytest.fixture(scope="module")
def store(store_folder):
    return TokenStore(store_folder)


@pytest.fixture(scope="module")
def long_store(tmp_path_factory):
    """8 videos of 12 frames: 10 starts for a clip of 3."""
    return TokenStore(write_store(tmp_path_factory.mktemp("long") / "tokens", frames=(12,) * 8))


def clip_pairs(store, videos=None, clip_frames=3, seed=0, **options):
    videos = np.arange(len(store)) if videos is None else videos
    return ClipPairs(store, videos, clip_frames, PAD, seed, **options)


def starts(pairs, count):
    """Video [n] and starts [n, 2] of the first samples."""
    return pairs._draw(np.arange(count))[:2]


@pytest.mark.parametrize("d_max", [None, 1.0])
def test_sample_depends_on_seed_and_number_alone(store, d_max):
    whole = clip_pairs(store, distinct=4, d_max=d_max).batch(0, 60)  # 25 videos: three epochs of 24 samples
    for sizes in ([1] * 60, [7, 13, 40], [59, 1]):
        pairs, first = clip_pairs(store, distinct=4, d_max=d_max), 0
        parts = []
        for size in sizes:
            parts.append(pairs.batch(first, size))
            first += size
        videos = np.concatenate([part.videos for part in parts])
        clips = [np.concatenate([part.tokens[: len(part.videos)] for part in parts])]
        clips += [np.concatenate([part.tokens[len(part.videos) :] for part in parts])]
        assert np.array_equal(videos, whole.videos) and np.array_equal(np.concatenate(clips), whole.tokens)
    # backwards, and after another epoch: no state but the number
    pairs = clip_pairs(store, distinct=4, d_max=d_max)
    for first in (50, 0, 24):
        assert np.array_equal(pairs.batch(first, 5).videos, whole.videos[first : first + 5])


def test_seed_matters(store):
    a, b = (clip_pairs(store, seed=seed).batch(0, 25) for seed in (0, 1))
    assert not np.array_equal(a.videos, b.videos)


def test_ids_name_the_clip(store):
    batch = clip_pairs(store).batch(5, 3)
    assert batch.sample_ids.tolist() == [10, 12, 14, 11, 13, 15] and batch.sample_ids.dtype == np.int64


def test_contents_equal_the_store(store):
    pairs = clip_pairs(store, clip_frames=5)
    videos, first = starts(pairs, 50)
    batch = pairs.batch(0, 50)
    for i, (video, begin) in enumerate(zip(np.tile(videos, 2), first.T.reshape(-1), strict=True)):
        expected = np.full((5, 4, 4), PAD)
        frames = store.read(video, begin, min(5, store.frames[video] - begin))
        expected[: len(frames)] = frames
        assert np.array_equal(batch.tokens[i], expected)
    assert batch.tokens.dtype == np.int64


def test_pad_only_past_the_end_of_short_videos(store):
    pairs = clip_pairs(store, clip_frames=5)
    batch = pairs.batch(0, 25)
    lengths = store.frames[np.tile(batch.videos, 2)]
    padded = (batch.tokens == PAD).all((2, 3)).sum(1)
    assert np.array_equal(padded, np.maximum(5 - lengths, 0)) and pairs.padded
    assert not clip_pairs(store).padded  # no video is shorter than 3


@pytest.mark.parametrize("distinct", [1, 4, 25])
def test_epochs_and_distinct_runs(store, distinct):
    pairs = clip_pairs(store, distinct=distinct)
    assert pairs.epoch_samples == 25 // distinct * distinct
    videos = pairs.batch(0, 3 * pairs.epoch_samples).videos
    epochs = videos.reshape(3, -1)
    assert all(len(set(epoch)) == pairs.epoch_samples for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert all(len(set(run)) == distinct for run in videos.reshape(-1, distinct))


def test_few_videos_repeat(store):
    pairs = clip_pairs(store, videos=np.array([3, 7, 9]), distinct=8)
    batch = pairs.batch(0, 8)
    assert Counter(Counter(batch.videos.tolist()).values()) == {3: 2, 2: 1} and set(batch.videos) == {3, 7, 9}


def test_starts_are_uniform_and_independent(long_store):
    n = 8000
    _, first = starts(clip_pairs(long_store), n)
    assert first.min() == 0 and first.max() == 9  # every start, and no other
    # chi-square with k - 1 degrees of freedom stays below its mean + 5 standard deviations (fixed seed: no flakes)
    for counts in (np.bincount(first[:, 0]), np.bincount(first[:, 1]), np.bincount(first[:, 0] * 10 + first[:, 1])):
        expected, degrees = n / len(counts), len(counts) - 1
        assert ((counts - expected) ** 2 / expected).sum() < degrees + 5 * math.sqrt(2 * degrees)
    correlation = np.corrcoef(first.T)[0, 1]
    assert abs(correlation) < 5 / math.sqrt(n)  # 5 standard errors


@pytest.mark.parametrize("d_max, frames", [(0, 0), (0.4, 0), (0.5, 1), (1.2, 2), (1.5, 3), (100, 9)])
def test_d_max_bounds_the_distance(long_store, d_max, frames):
    pairs = clip_pairs(long_store, d_max=d_max)  # 2 frames a second
    _, first = starts(pairs, 4000)
    distance = first[:, 1] - first[:, 0]
    assert distance.max() == frames and distance.min() == -frames  # reached, both ways, never passed
    assert first.min() == 0 and first.max() == 9
    if frames == 0:
        tokens = pairs.batch(0, 16).tokens
        assert np.array_equal(tokens[:16], tokens[16:])
        assert len(set(first[:, 0])) == 10  # at one place, but anywhere


def test_a_clip_longer_than_every_video(store):
    assert clip_pairs(store, clip_frames=9)
    message = "a clip of 10 frames is longer than every video in .*: the longest has 9 frames, 2 a second"
    with pytest.raises(InputError, match=message):
        clip_pairs(store, clip_frames=10)
    short = np.flatnonzero(store.frames == 3)  # held-out videos may all be shorter than the store's longest
    assert clip_pairs(store, videos=short, clip_frames=5).padded


def test_no_video(store):
    with pytest.raises(InputError, match="no video"):
        clip_pairs(store, videos=np.array([], int))


@pytest.mark.parametrize("share, count", [(0.25, 6), (0.001, 2), (0.999, 24), (0.5, 12)])
def test_split(store, share, count):
    trained_on, held_out = split_videos(store, share)
    assert len(held_out) == count
    assert sorted([*trained_on, *held_out]) == list(range(25))
    assert np.array_equal(trained_on, np.sort(trained_on)) and np.array_equal(held_out, np.sort(held_out))


class Named:
    """What split_videos asks of a store."""

    folder = "store"

    def __init__(self, videos):
        self.names = [f"{i}.mp4" for i in range(videos)]

    def __len__(self):
        return len(self.names)


@pytest.mark.parametrize(
    "videos, held_out, count", [(40_000, 0.0625, 2048), (30_000, 0.0625, 1875), (5000, 3000, 3000), (9, 1, 1)]
)
def test_a_share_is_capped_and_a_number_is_taken(videos, held_out, count):
    """HowTo100M's 1.2 million videos would lose 77,000 to a share of 1/16, of which the evaluation looks at 2,048."""
    trained_on, held = split_videos(Named(videos), held_out)
    assert (len(held), len(trained_on)) == (count, videos - count)


def test_all_videos_held_out():
    with pytest.raises(InputError, match="held_out=25 videos leave nothing to train on: store holds 25"):
        split_videos(Named(25), 25)


def test_split_follows_names(store, tmp_path):
    def held_names(store):
        return {store.names[i] for i in split_videos(store, 0.25)[1]}

    assert held_names(store) == held_names(TokenStore(write_store(tmp_path / "same", seed=1)))
    grown = TokenStore(write_store(tmp_path / "grown", frames=(4,) * 40))  # 15 more names
    moved = held_names(store) ^ (held_names(grown) & set(store.names))
    before, after = held_names(store), held_names(grown) & set(store.names)
    assert before <= after or after <= before  # one order of all names, cut at the share
    assert len(moved) <= 3 < len(before)


@pytest.mark.parametrize("videos, count", [(2, 1), (3, 1), (4, 2), (20, 2)])
def test_split_of_few_videos(tmp_path, videos, count):
    """With one video a clip's only candidate would be its partner."""
    trained_on, held_out = split_videos(TokenStore(write_store(tmp_path / "few", frames=(5,) * videos)), 0.0625)
    assert (len(trained_on), len(held_out)) == (videos - count, count)


def test_split_takes_names_that_are_no_text(store, monkeypatch):
    """As on a disk whose names are in Latin-1."""
    monkeypatch.setattr(store, "names", [f"{name}\udcff" for name in store.names])
    assert len(split_videos(store, 0.25)[1]) == 6


def test_split_needs_two_videos(tmp_path):
    with pytest.raises(InputError, match="holds 1 video, expected at least 2"):
        split_videos(TokenStore(write_store(tmp_path / "one", frames=(5,))), 0.5)


def test_a_batch_costs_no_python_a_sample(long_store):
    """Python calls of a batch do not grow with it: the only loop is the store's over its reads."""

    def python_calls(count):
        calls = 0

        def count_calls(frame, event, argument):
            nonlocal calls
            calls += event == "call"

        pairs.batch(0, 8)  # open files, load the epoch
        sys.setprofile(count_calls)
        try:
            pairs.batch(0, count)
        finally:
            sys.setprofile(None)
        return calls

    pairs = clip_pairs(long_store, videos=np.arange(8).repeat(200))
    assert python_calls(1024) == python_calls(16) < 100
