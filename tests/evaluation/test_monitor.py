"""RankMe against its formula, and a monitor that leaves a training model as it was."""

import numpy as np
import pytest
import torch

from runs import VOCABULARY, tiny_model
from vimpac.errors import InputError
from vimpac.evaluation.features import Look, chunk_vectors
from vimpac.evaluation.monitor import VECTOR, effective_rank, monitor
from vimpac.evaluation.neighbors import knn_leave_one_out
from vimpac.model import PretrainModel


@pytest.fixture
def model(wide):
    torch.manual_seed(0)
    return PretrainModel(tiny_model(layers=2, dropout=0.3)).train()


@pytest.fixture
def clips():
    return np.random.default_rng(0).integers(0, VOCABULARY, (30, 2, 1, 3, 4, 4))


def rotation(n, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def test_rank_by_the_formula():
    """Garrido et al., Eq. 1, of a matrix with chosen singular values."""
    values = np.array([5.0, 3.0, 1.0, 1.0])
    features = rotation(9)[:, :4] * values @ rotation(4, seed=1)
    p = values / values.sum()
    assert effective_rank(features) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_rank_of_extremes():
    assert effective_rank(rotation(8)) == pytest.approx(8)
    assert effective_rank(np.outer(np.arange(1, 9), np.ones(5))) == pytest.approx(1)
    assert effective_rank(np.zeros((4, 3))) == 0.0


def test_a_collapse_shows():
    """All features near one point: the published rank, of features as they are, is 1; that of the noise is not."""
    noise = np.random.default_rng(0).normal(size=(100, 16))
    collapsed = np.ones(16) + 1e-5 * noise
    assert effective_rank(collapsed) < 1.01 and effective_rank(collapsed - collapsed.mean(0)) > 10


def test_what_it_reports(model, clips):
    labels = np.arange(30) % 3
    found = monitor(model, clips, labels, batch=7)
    x = chunk_vectors(model.eval(), clips, Look(batch=7))[VECTOR].numpy()
    assert found == {
        "knn_accuracy": float((knn_leave_one_out(x, labels, 20) == labels).mean()),
        "effective_rank": effective_rank(x),
    }


def test_labels_that_features_show(model):
    """Videos of one id each; k is the 7 others, of which one has the right label and is the nearest."""
    clips = np.repeat(np.arange(4), 2)[:, None, None, None, None, None] * np.ones((1, 1, 1, 3, 4, 4), np.int64)
    clips[1::2, ..., 0, 0] = 9  # partners are not the same
    found = monitor(model, clips, np.repeat(np.arange(4), 2))
    assert found["knn_accuracy"] == 1.0 and 1 < found["effective_rank"] <= 8


@pytest.mark.parametrize("training", [True, False])
def test_leaves_no_trace(model, clips, training):
    model.train(training)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = monitor(model, clips, np.arange(30) % 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())
    assert monitor(model, clips, np.arange(30) % 2) == first  # without dropout


def test_the_mode_returns_after_an_error(model):
    with pytest.raises(ValueError, match="tokens must be"):
        monitor(model, np.zeros((2, 1, 1, 9, 9, 9), np.int64), np.arange(2))
    assert model.training


@pytest.mark.parametrize("labels", [np.zeros(5, int), np.zeros(1, int), np.zeros(0, int)])
def test_labels_that_show_nothing(model, labels):
    with pytest.raises(InputError, match=r"labelled videos of [01] class show nothing, expected at least two"):
        monitor(model, np.zeros((len(labels), 1, 1, 3, 4, 4), np.int64), labels)
