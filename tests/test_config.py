"""Options: the layout grammar, the presets, bad values."""

import dataclasses

import pytest

from vimpac.config import PRESETS, ModelConfig, TrainConfig
from vimpac.errors import InputError
from vimpac.layouts import axis_dimensions, parse_layout


@pytest.mark.parametrize(
    "layout, blocks",
    [
        ("T,H|W", (("T",), ("H", "W"))),
        ("T,H,W", (("T",), ("H",), ("W",))),
        ("T|H|W", (("T", "H", "W"),)),
        ("H|W,T", (("H", "W"), ("T",))),
        ("T,HxW", (("T",), ("HxW",))),
        ("TxHxW", (("TxHxW",),)),
        ("T", (("T",),)),
        (" T , H | W ", (("T",), ("H", "W"))),
    ],
)
def test_grammar(layout, blocks):
    assert parse_layout(layout, heads=6) == blocks


@pytest.mark.parametrize("layout", ["", "T,", "T,,H", "T|", "X", "TH", "TxT", "t", "HxWx", "T;H"])
def test_bad_layout_shows_the_grammar(layout):
    with pytest.raises(InputError, match=r"(?s)bad layout .*separated by ','.*T,H\|W"):
        ModelConfig(layout=layout)


def test_axis_dimensions_are_in_grid_order():
    assert axis_dimensions("WxH") == axis_dimensions("HxW") == (2, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layout": "T|H|W"}, "cannot split 8 heads evenly over the 3 axes"),
        ({"heads": 7}, "attention width 512 must be a multiple of the 7 heads"),
        ({"grid": (5, 16)}, r"T H W, got \(5, 16\)"),
        ({"grid": (5, 0, 16)}, r"got \(5, 0, 16\)"),
        ({"norm": "middle"}, "'post' or 'pre', got 'middle'"),
        ({"dropout": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"dropout": float("nan")}, "got nan"),
        ({"layers": 0}, "model.layers must be at least 1, got 0"),
        ({"mlp_width": 0}, "mlp_width must be at least 1"),
        ({"mlp_width": 10**30}, r"model.mlp_width must be below 2\^31, got 1000"),
        ({"head_layers": 0}, "model.head_layers must be at least 1, got 0"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_bad_model(options, message):
    with pytest.raises(InputError, match=message):
        ModelConfig(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"alpha": -1.0}, "alpha must be 0 or a positive number, got -1.0"),
        ({"alpha": float("nan")}, "alpha"),
        ({"temperature": 0.0}, "temperature must be a positive number"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"data": ""}, r"data must be a path \(is a variable of the shell unset\?\), got ''"),
        ({"output": ""}, "output must be a path"),
        ({"init_from": ""}, "init_from must be a path"),
        ({"seed": -1}, "seed must be 0 to 2⁶³ - 2, got -1"),
        ({"seed": 2**63 - 1}, "seed must be"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\)"),
        ({"held_out": 0.0}, "held_out must be above 0"),
        ({"mask": "iid", "mask_ratio": 0.0}, "mask_ratio must be above 0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"d_max": -1.0}, "d_max must be 0 or more seconds"),
        ({"d_max": float("inf")}, "d_max must be 0 or more seconds, got inf"),
        ({"learning_rate": float("nan")}, "learning_rate must be a positive number, got nan"),
        ({"seed": 2**63}, "seed must be"),
        ({"synthetic_videos": -5}, "synthetic_videos must be 0 or more, got -5"),
        ({"n_blocks": 1281}, "n_blocks must be at most the 1280 tokens of a clip, got 1281"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"save_every": 0}, "save_every must be at least 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
        ({"epochs": 1.0, "schedule_epochs": float("inf")}, "schedule_epochs must be at least epochs=1.0, and finite, got inf"),
        ({"mask_task": False, "alpha": 0.0}, "nothing is learned"),
        ({"epochs": 10.0, "schedule_epochs": 5.0}, "schedule_epochs must be at least epochs=10.0, and finite, got 5.0"),
    ],
)
def test_bad_training(options, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**options)


def test_prediction_alone_contrasts_nothing():
    assert TrainConfig(alpha=0.0, contrastive_videos=1).contrastive_videos == 1


def test_presets_are_table_4():
    small, first, second = (PRESETS[name][1] for name in ("small", "large-half", "large-half-256"))
    for config in (small, first, second):
        assert (config.batch_size, config.weight_decay, config.betas, config.eps) == (1024, 0.05, (0.9, 0.98), 1e-8)
        assert (config.grad_clip, config.model.dropout, config.temperature, config.alpha) == (1.0, 0.1, 0.2, 1.0)
    assert (small.epochs, small.learning_rate, small.warmup, small.contrastive_videos) == (10, 1e-3, 0.1, 128)
    assert (first.epochs, first.schedule_epochs, first.learning_rate, first.warmup) == (90, 100, 3e-4, 0.05)
    assert (second.epochs, second.schedule_epochs, second.learning_rate, second.warmup) == (100, 100, 3e-4, 0.05)
    assert (first.contrastive_videos, second.contrastive_videos) == (256, 128)
    assert (first.model.grid, second.model.grid) == ((5, 16, 16), (5, 32, 32))
    assert second.continue_from == first.output
    assert dataclasses.replace(first.model, grid=second.model.grid) == second.model


def test_special_ids_are_the_released_ones():
    assert (ModelConfig().pad_id, ModelConfig().mask_id) == (8193, 8196)
