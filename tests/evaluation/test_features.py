"""Vectors of clips and videos against plain indexing and single forward passes; layers; ranks; videos that overflow."""

import numpy as np
import pytest
import torch

from runs import VOCABULARY, tiny_model
from vimpac.data.store import TokenStore
from vimpac.data.test_clips import TestClips
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.evaluation import features
from vimpac.evaluation.features import (
    Look,
    all_vectors,
    check_finite,
    check_layer,
    chunk_histograms,
    chunk_vectors,
    chunks_of,
    clip_vectors,
    mean_pooled,
    read_ahead,
    vectors_of,
)
from vimpac.model import ClassificationModel, PretrainModel

PAD = VOCABULARY + 1
CPU = torch.device("cpu")
# Matrix products of other batch sizes, in float32: seen 2e-7 of values near 1.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture
def model(wide):
    torch.manual_seed(0)
    return PretrainModel(tiny_model(layers=3, dropout=0.1)).eval()


@pytest.fixture
def clips(store_folder):
    """2 clips of 3 frames of each video; some videos have just as many."""
    store = TokenStore(store_folder)
    return TestClips(store, np.arange(len(store)), 2, [0], 3, PAD)


def test_mean_pooled_by_hand():
    torch.manual_seed(0)
    hidden, pad = torch.randn(3, 2, 2, 2, 5), torch.rand(3, 2, 2, 2) < 0.5
    pad[2] = True
    found = mean_pooled(hidden, pad)
    for clip in range(2):
        torch.testing.assert_close(found[clip], hidden[clip][~pad[clip]].mean(0))
    assert torch.equal(found[2], torch.zeros(5))


def test_mean_pooled_adds_up_in_float32():
    """4096 ones in bfloat16 would come to 256."""
    ones = torch.ones(1, 1, 64, 64, 2, dtype=torch.bfloat16)
    assert torch.equal(mean_pooled(ones, torch.zeros(1, 1, 64, 64, dtype=torch.bool)), torch.ones(1, 2))


@pytest.mark.parametrize("norm", ["post", "pre", "pre-vit"])
def test_layers_are_what_hooks_see(norm, wide):
    torch.manual_seed(0)
    backbone = PretrainModel(tiny_model(layers=3, norm=norm)).eval().backbone
    seen = []
    for layer in backbone.layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    tokens = torch.randint(VOCABULARY, (2, 3, 4, 4))
    with torch.no_grad():
        backbone(tokens)
        for layers in (0, 1, 2, 3, None):
            rows = seen[0][0] if layers == 0 else seen[2 if layers is None else layers - 1][1]
            assert torch.equal(backbone.rows(tokens, layers=layers)[0], backbone.final_norm(rows))
            cls, hidden = backbone(tokens, layers=layers)
            assert torch.equal(torch.cat([hidden.flatten(0, 3), cls]), backbone.rows(tokens, layers=layers)[0])


def test_vectors_of_a_clip(model):
    tokens = torch.randint(VOCABULARY, (4, 3, 4, 4))
    tokens[1, 2] = PAD
    with torch.no_grad():
        found, (cls, hidden) = clip_vectors(model, tokens), model.backbone(tokens)
        assert torch.equal(found["cls"], cls) and torch.equal(found["contrastive"], model.cls_head(cls))
        torch.testing.assert_close(found["mean"][1], hidden[1, :2].flatten(0, 2).mean(0))
        early = clip_vectors(model, tokens, layer=1)
        assert early.keys() == {"cls", "mean"} and not torch.equal(early["cls"], cls)
        assert clip_vectors(model, tokens, layer=3).keys() == {"cls", "mean", "contrastive"}
    assert vectors_of(ClassificationModel(model.config, 2), None) == ("cls", "mean")


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_video_is_the_mean_of_its_clips_and_views(model, batch):
    tokens = torch.randint(VOCABULARY, (3, 2, 2, 3, 4, 4))
    found = chunk_vectors(model, tokens.numpy(), Look(batch=batch))
    with torch.no_grad():
        one_by_one = [[clip_vectors(model, tokens[n, k, v][None])["mean"] for k in (0, 1) for v in (0, 1)] for n in range(3)]
    expected = torch.stack([torch.cat(mine).mean(0) for mine in one_by_one])
    torch.testing.assert_close(found["mean"], expected, **ROUNDING)
    assert {name: x.shape for name, x in found.items()} == {"cls": (3, 16), "mean": (3, 16), "contrastive": (3, 8)}
    assert not any(x.requires_grad for x in found.values())


def test_as_many_forward_passes_as_clips(model, clips):
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    chunk_vectors(model, clips.read(0, 10), Look(batch=8))
    assert seen == [8, 8, 4]


def test_histograms_are_shares_without_pad():
    tokens = np.full((2, 2, 1, 1, 2, 2), PAD)
    tokens[0, 0] = [[0, 0], [3, 3]]
    tokens[0, 1, 0, 0, 0] = [0, 1]
    assert chunk_histograms(tokens, 4).tolist() == [[0.5, pytest.approx(1 / 6), 0, pytest.approx(1 / 3)], [0, 0, 0, 0]]


def test_chunks_cover_all_videos(monkeypatch):
    monkeypatch.setattr(features, "CHUNK_VIDEOS", 4)
    assert chunks_of(9) == [(0, 0, 4), (1, 4, 4), (2, 8, 1)] and chunks_of(0) == []


def test_reads_ahead_in_order(clips):
    chunks = chunks_of(len(clips))
    for (chunk, tokens), expected in zip(read_ahead(clips, chunks), chunks, strict=True):
        assert chunk == expected and np.array_equal(tokens, clips.read(chunk.first, chunk.videos))
    assert list(read_ahead(clips, [])) == []


@pytest.mark.parametrize("ranks", [1, 3, 30])
def test_ranks_share_the_videos(model, clips, ranks, monkeypatch):
    """Bit for bit what one process computes, also for ranks without any."""
    monkeypatch.setattr(features, "CHUNK_VIDEOS", 4)
    names, finished = clips.store.names, []
    whole = all_vectors(model, clips, names, Look(), World(0, 1, CPU), tick=finished.append)
    assert sum(finished) == len(clips)
    monkeypatch.setattr(features, "sum_over_ranks", lambda x, world: x)
    parts = [all_vectors(model, clips, names, Look(), World(rank, ranks, CPU)) for rank in range(ranks)]
    for name, x in whole.items():
        assert np.array_equal(sum(part[name] for part in parts), x) and x.std(0).min() > 0
    direct = chunk_vectors(model, clips.read(4, 4), Look())
    assert all(np.array_equal(whole[name][4:8], x) for name, x in direct.items())


def test_vectors_without_a_model(clips):
    found = all_vectors(None, clips, clips.store.names, Look(), World(0, 1, CPU), codes=VOCABULARY)
    assert found.keys() == {"histogram"}
    counts = np.bincount(clips.read(7, 1).ravel(), minlength=VOCABULARY)[:VOCABULARY]
    np.testing.assert_allclose(found["histogram"][7], counts / counts.sum(), rtol=1e-6)  # one float32 division


def test_a_video_that_overflows_is_named(model, clips):
    with torch.no_grad():
        model.backbone.embedding.weight[3] = torch.inf  # whichever videos hold it
    with pytest.raises(InputError, match=r"the cls vector of video-000\.mp4 is not finite: use --precision fp32"):
        all_vectors(model, clips, clips.store.names, Look(), World(0, 1, CPU))
    check_finite({"a": torch.zeros(2, 3)}, ["x", "y"])
    with pytest.raises(InputError, match="the a vector of y "):
        check_finite({"a": torch.tensor([[0.0], [torch.nan]])}, ["x", "y"])


@pytest.mark.parametrize("layer", [-1, 4])
def test_layers_that_are_not_there(layer):
    with pytest.raises(InputError, match=f"layer is {layer}, expected 1 to 3, the last, or 0"):
        check_layer(tiny_model(layers=3), layer)
    check_layer(tiny_model(layers=3), 0)
    check_layer(tiny_model(layers=3), 3)
