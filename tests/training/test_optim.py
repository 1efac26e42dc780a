"""AdamW's groups and the learning rate."""

from itertools import pairwise

import pytest
import torch

from runs import tiny_model
from vimpac.config import PRESETS, PretrainConfig
from vimpac.model import PretrainModel
from vimpac.training.optim import adamw, learning_rate
from vimpac.training.pretrain import plan_steps


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_what_decays(norm):
    model = PretrainModel(tiny_model(norm=norm, head_layers=3))
    optimizer = adamw(model, 0.05, (0.9, 0.98), 1e-8)
    decayed, undecayed = (set(group["param_names"]) for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert decayed | undecayed == {name for name, _ in model.named_parameters()} and not decayed & undecayed
    # written out, not by the rule of the program: in this model every vector but [CLS] and its position is a bias or a norm's
    vectors = {name for name, p in model.named_parameters() if p.ndim == 1} - {"backbone.cls", "backbone.positions.cls"}
    assert undecayed == vectors
    for name in ("backbone.embedding.weight", "backbone.cls", "backbone.positions.time", "cls_head.out.weight"):
        assert name in decayed
    outer = "embedding_norm" if norm == "post" else "final_norm"
    for name in ("token_head.bias", f"backbone.{outer}.weight", "cls_head.hidden.0.norm.weight"):
        assert name in undecayed
    assert all(group["betas"] == (0.9, 0.98) and group["eps"] == 1e-8 for group in optimizer.param_groups)


def test_frozen_parameters_are_left_out():
    model = PretrainModel(tiny_model())
    model.token_head.requires_grad_(False)
    names = {name for group in adamw(model, 0.1, (0.9, 0.98), 1e-8).param_groups for name in group["param_names"]}
    assert names == {name for name, _ in model.named_parameters() if not name.startswith("token_head")}


def test_schedule():
    rates = [learning_rate(step, 100, 0.1, 1.0) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0  # ten updates up, the first is not lost
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5)  # then 90 down
    assert rates[99] == pytest.approx(1 / 90) and rates[100] == 0.0
    assert max(rates) == 1.0 and all(a < b for a, b in pairwise(rates[:10]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    steps = [b - a for a, b in pairwise(rates[10:])]
    assert max(steps) - min(steps) < 1e-12  # linear, up to float64 rounding of numbers near 1
    assert learning_rate(150, 100, 0.1, 1.0) == 0.0  # past the end


@pytest.mark.parametrize("steps, warmup, expected", [(1, 0.0, [1.0]), (1, 0.9, [1.0]), (4, 0.0, [1.0, 1.0, 2 / 3, 1 / 3])])
def test_short_schedules(steps, warmup, expected):
    assert [learning_rate(step, steps, warmup, 1.0) for step in range(steps)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "options, videos, expected",
    [
        ({"epochs": 10.0, "batch_size": 100}, 1000, (100, 100)),
        ({"epochs": 1.0, "batch_size": 1000}, 10, (1, 1)),  # at least one update
        ({"epochs": 0.5, "batch_size": 100}, 1000, (5, 5)),
        ({"epochs": 90.0, "schedule_epochs": 100.0, "batch_size": 100}, 1000, (900, 1000)),
        ({"epochs": 90.0, "schedule_epochs": 100.0, "batch_size": 100, "steps": 45}, 1000, (45, 50)),
        ({"steps": 7}, 1000, (7, 7)),
    ],
)
def test_steps_of_a_run(options, videos, expected):
    schedule = planned(PretrainConfig(**options), videos)
    assert (schedule.steps, schedule.decay_steps) == expected


def test_two_stages_are_one_schedule():
    """The presets of the paper's results: the second stage starts where the first ends and ends where its schedule does."""
    first, second = (planned(PRESETS[name][1], 130_000) for name in ("large-half", "large-half-256"))
    assert first.decay_steps == second.decay_steps == second.steps
    assert first.steps == pytest.approx(0.9 * second.steps, abs=1)  # each stage rounds to whole updates
    rates = [
        learning_rate(first.steps, schedule.decay_steps, PRESETS[name][1].warmup, PRESETS[name][1].learning_rate)
        for schedule, name in ((first, "large-half"), (second, "large-half-256"))
    ]
    assert rates[0] == rates[1] > 0


def test_one_update_by_hand():
    """Decoupled decay, bias-corrected moments: torch's fused AdamW on the groups is AdamW."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, 0.5, (0.9, 0.98), 1e-8)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    model(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.5 if name == "0.weight" else 0.0
        expected = before[name] * (1 - 0.1 * decay) - 0.1 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)  # float64 rounding


def planned(config, videos):
    return plan_steps(config.steps, config.epochs, config.schedule_epochs, config.batch_size, videos)
