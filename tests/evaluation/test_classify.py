"""Scores of videos: a plain reference, one read and few forward passes a video, and NaN is an error."""

import numpy as np
import pytest
import torch

from labelled_stores import CODES, classifier, write_labelled_store
from runs import VOCABULARY
from vimpac.data.store import TokenStore
from vimpac.data.test_clips import TestClips
from vimpac.data.views import test_views as views_of
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.evaluation.classify import score_videos

PAD = VOCABULARY + 1
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return TokenStore(write_labelled_store(tmp_path_factory.mktemp("labelled") / "store"))


@pytest.fixture(scope="module")
def model():
    return classifier()


def clips_of(store, clips=10, videos=None, every=1):
    videos = np.arange(len(store)) if videos is None else np.array(videos)
    return TestClips(store, videos, clips, views_of(store), 3, CODES + 1, every)


def reference(model, store, video, k, every):
    """Softmax averaged over k clips × all views of one video, a clip at a time."""
    frames, scores = int(store.frames[video]), []
    last = max(0, frames - 2 * every - 1)
    for clip in range(k):
        start = round(clip * last / (k - 1)) if k > 1 else last // 2
        for view in range(len(store.views)):
            ids = store.read(video, view=view).astype(np.int64)[start::every][:3]
            ids = np.concatenate([ids, np.full((3 - len(ids), 4, 4), PAD)])
            scores.append(model(torch.from_numpy(ids)[None])[0].double().softmax(-1))
    return torch.stack(scores).mean(0)


@torch.no_grad()
@pytest.mark.parametrize("k, every", [(1, 1), (2, 1), (10, 1), (10, 2), (3, 4)])
def test_averages_agree_with_a_plain_reference(store, model, k, every):
    scores = score_videos(model, clips_of(store, k, every=every), ALONE, 64)
    assert scores.shape == (len(store), k, 4) and scores.dtype == np.float32
    expected = torch.stack([reference(model, store, video, k, every) for video in range(len(store))])
    assert expected.std(0).min() > 0.02  # videos differ
    torch.testing.assert_close(torch.from_numpy(scores).double().mean(1), expected, rtol=0, atol=2e-6)  # float32 of one layer


@pytest.mark.parametrize("batch", [1, 7, 29, 30, 31, 60, 100_000])
def test_any_batch(store, model, batch):
    clips = clips_of(store)
    expected = score_videos(model, clips, ALONE, 30)
    # products of other shapes sum in another order
    np.testing.assert_allclose(score_videos(model, clips, ALONE, batch), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "batch, shapes", [(30, [30] * 14), (7, [6] * 70), (1, [1] * 420), (64, [60] * 7), (150, [150, 150, 120])]
)
def test_forward_passes_and_reads(store, model, monkeypatch, batch, shapes):
    """A video's 30 clips take at most 30 passes and one read, and all passes have one shape but for the last chunk's."""
    clips, seen, read = clips_of(store), [], []
    handle = model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    original = store.read_clips
    monkeypatch.setattr(
        store, "read_clips", lambda videos, *rest, **more: read.append(set(videos)) or original(videos, *rest, **more)
    )
    reported = []
    score_videos(model, clips, ALONE, batch, report=reported.append)
    handle.remove()
    assert seen == shapes and read == [{i} for i in range(14)] and reported == [30] * 14


def test_videos_stay_in_order(store, model):
    order = [5, 0, 9, 3]
    all_scores = score_videos(model, clips_of(store), ALONE, 30)
    assert np.array_equal(score_videos(model, clips_of(store, videos=order), ALONE, 30), all_scores[order])


@pytest.mark.parametrize("training", [True, False])
def test_leaves_no_trace(store, model, training):
    model.train(training)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = score_videos(model, clips_of(store, 2), ALONE, 30)
    assert torch.equal(torch.get_rng_state(), state) and all(module.training == training for module in model.modules())
    assert all(x.grad is None and not x.is_inference() for x in model.parameters())
    assert np.array_equal(score_videos(model, clips_of(store, 2), ALONE, 30), first)  # without dropout
    model.eval()


def test_mixed_precision(store, model):
    exact = score_videos(model, clips_of(store, 2), ALONE, 30)
    mixed = score_videos(model, clips_of(store, 2), ALONE, 30, autocast=torch.bfloat16)
    assert mixed.dtype == np.float32 and not np.array_equal(mixed, exact)
    np.testing.assert_allclose(mixed, exact, atol=0.05)  # bfloat16 has 8 bits
    np.testing.assert_allclose(mixed.sum(-1), 1, atol=1e-5)  # the softmax is float32


@pytest.mark.parametrize("videos, named", [([4, 6, 2], "v02.mp4"), ([2], "v02.mp4")])
@pytest.mark.parametrize("autocast, way_out", [(None, "its weights are damaged"), (torch.bfloat16, "--precision fp32")])
def test_nan_is_an_error_that_names_the_video(store, videos, named, autocast, way_out):
    """A token that only video 2 has makes the model's answer NaN."""
    model = classifier()
    clips = clips_of(store, 2, videos)
    read = clips.read
    clips.read = (
        lambda first, count: np.where(  # the special id after PAD, in video 2 alone
            (np.array(videos)[first : first + count] == 2).reshape(-1, 1, 1, 1, 1, 1), CODES + 2, read(first, count)
        )
    )
    with torch.no_grad():
        model.backbone.embedding.weight[CODES + 2] = torch.nan
    with pytest.raises(InputError, match=f"scores of {named} are not finite.*{way_out}"):
        score_videos(model, clips, ALONE, 6, autocast)


def test_a_batch_of_none(store, model):
    with pytest.raises(InputError, match="batch is 0, expected at least 1"):
        score_videos(model, clips_of(store), ALONE, 0)
