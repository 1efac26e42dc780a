"""The attentive probe against torch's attention; what it can learn; that a run repeats itself."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from runs import VOCABULARY, tiny_model
from vimpac.evaluation.attentive import AttentiveTraining, States, attentive_probe
from vimpac.evaluation.features import Look
from vimpac.model import PretrainModel
from vimpac.model.attentive import AttentiveProbe

PAD = VOCABULARY + 1


@pytest.fixture
def probe():
    torch.manual_seed(0)
    module = AttentiveProbe(16, 4, 3).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


def test_forward_by_torchs_attention(probe):
    """V-JEPA, section E.1: query + attention(query, norm(states)), + MLP(norm), then the classifier."""
    states, pad = torch.randn(5, 7, 16, dtype=torch.float64), torch.rand(5, 7) < 0.3
    pad[:, 0] = False
    x = probe.states_norm(states)
    k, v = probe.kv(x).split(16, -1)
    heads = [y.unflatten(-1, (4, 4)).transpose(1, 2) for y in (probe.q(probe.query).expand(5, 1, 16), k, v)]
    seen = F.scaled_dot_product_attention(*heads, attn_mask=~pad[:, None, None]).transpose(1, 2).flatten(1)
    y = probe.query + probe.project(seen)
    y = y + probe.contract(F.gelu(probe.expand(probe.mlp_norm(y))))
    torch.testing.assert_close(probe(states, pad), probe.classifier(probe.norm(y)))


def test_pad_is_not_seen(probe):
    states, pad = torch.randn(2, 6, 16, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.bool)
    pad[:, 4:] = True
    changed = states.clone()
    changed[:, 4:] = 100.0
    assert torch.equal(probe(states, pad), probe(changed, pad))
    torch.testing.assert_close(probe(states, pad), probe(states[:, :4], pad[:, :4]))


def test_every_parameter_learns(probe):
    probe(torch.randn(2, 6, 16, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.bool)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in probe.parameters())


class SomeTokens:
    """Clips of random ids without 0 and, if the label says so, with zeros at up to ten of 96 places."""

    def __init__(self, n, seed):
        rng = np.random.default_rng(seed)
        self.labels = np.arange(n) % 2
        self.tokens = rng.integers(1, VOCABULARY, (n, 2, 1, 3, 4, 4))
        self.tokens[n // 2, 1, 0, 2] = PAD
        for clip, label in zip(self.tokens, self.labels, strict=True):
            if label:
                clip[0, 0, rng.integers(3, size=10), rng.integers(4, size=10), rng.integers(4, size=10)] = 0
        self.reads = 0

    def __len__(self):
        return len(self.labels)

    def read(self, first, count):
        self.reads += count
        return self.tokens[first : first + count]


@pytest.fixture
def backbone(wide):
    torch.manual_seed(0)
    return PretrainModel(tiny_model(dropout=0.1)).eval()


TRAINING = AttentiveTraining(epochs=20, learning_rate=3e-3, weight_decay=0.01, batch_videos=16, seed=0)


def states(backbone, clips, most_bytes=1 << 30, **look):
    return States(backbone, clips, np.arange(len(clips)), Look(**look), most_bytes)


def test_finds_few_tokens_among_many(backbone):
    train, test = SomeTokens(128, 0), SomeTokens(64, 1)
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    guesses = attentive_probe(states(backbone, train), train.labels, states(backbone, test), 2, TRAINING)
    assert (guesses == test.labels).mean() > 0.9
    assert train.reads == 128  # its states are kept
    assert all(torch.equal(x, before[name]) for name, x in backbone.state_dict().items())


def test_the_same_again(backbone):
    """Whatever was drawn before, and without states kept; another seed draws otherwise."""
    train, test, short = SomeTokens(48, 0), SomeTokens(40, 1), TRAINING._replace(epochs=2)
    runs = []
    for kept, seed in ((1 << 30, 0), (0, 0), (20_000, 0), (0, 1)):
        torch.rand(3)
        state = torch.get_rng_state()
        clips = states(backbone, train, kept), train.labels, states(backbone, test, 0), 2
        logits = []
        probe_forward = AttentiveProbe.forward

        def noting(self, *inputs, logits=logits, forward=probe_forward):
            logits.append(forward(self, *inputs))
            return logits[-1]

        AttentiveProbe.forward = noting
        try:
            attentive_probe(*clips, short._replace(seed=seed))
        finally:
            AttentiveProbe.forward = probe_forward
        runs.append(torch.cat(logits[-3:]))
        assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-4)  # states computed in other batches, through 6 updates
    torch.testing.assert_close(runs[0], runs[2], rtol=1e-4, atol=1e-4)
    assert (runs[0] - runs[3]).abs().max() > 1e-2


def test_the_seed_draws_the_weights(backbone, monkeypatch):
    clips, seen = SomeTokens(8, 0), []
    forward = AttentiveProbe.forward
    monkeypatch.setattr(
        AttentiveProbe, "forward", lambda self, *x: seen.append(self.query.detach().clone()) or forward(self, *x)
    )
    for seed in (0, 1, 0):
        attentive_probe(
            states(backbone, clips), clips.labels, states(backbone, clips), 2, TRAINING._replace(epochs=1, seed=seed)
        )
    assert torch.equal(seen[0], seen[4]) and not torch.equal(seen[0], seen[2])


def test_states_are_the_backbones(backbone):
    clips = SomeTokens(6, 0)
    x, pad = States(backbone, clips, np.array([5, 1, 3]), Look(batch=5)).batch(np.array([2, 1]))
    with torch.no_grad():
        expected = backbone.backbone(torch.from_numpy(clips.tokens[[3, 1]]).flatten(0, 2))[1].reshape(2, 96, 16)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)  # other batch sizes
    assert torch.equal(pad, torch.from_numpy(clips.tokens[[3, 1]] == PAD).flatten(1)) and pad.any()


def test_rate_rises_and_falls(backbone, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    clips = SomeTokens(40, 0)
    attentive_probe(states(backbone, clips), clips.labels, states(backbone, clips), 2, TRAINING._replace(epochs=10))
    assert len(rates) == 30 and rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert rates[3:] == pytest.approx([3e-3 * 0.5 * (1 + math.cos(math.pi * i / 27)) for i in range(27)])
