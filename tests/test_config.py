"""Options: the layout grammar, the presets, bad values."""

import dataclasses
import math
import typing

import pytest

from vimpac.config import PRESETS, FinetuneConfig, ModelConfig, PretrainConfig, SynthesizeConfig, TokenizeConfig
from vimpac.data import patch_vq as tokenizer
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
        ({"norm": "middle"}, "'post', 'pre' or 'pre-vit', got 'middle'"),
        ({"dropout": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"dropout": float("nan")}, "got nan"),
        ({"layers": 0}, "model.layers must be at least 1, got 0"),
        ({"mlp_width": 0}, "mlp_width must be at least 1"),
        ({"mlp_width": 10**30}, "model.mlp_width must be at most 1048576, got 1000"),
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
        ({"data": ""}, r"data must be a path \(is a shell variable unset\?\), got ''"),
        ({"output": ""}, "output must be a path"),
        ({"init_from": ""}, "init_from must be a path"),
        ({"seed": -1}, "seed must be 0 to 2⁶³ - 2, got -1"),
        ({"seed": 2**63 - 1}, "seed must be"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\)"),
        ({"held_out": 0.0}, "held_out must be above 0"),
        ({"steps": 9, "epochs": 10.0, "schedule_epochs": 5.0}, r"finite \(with --steps only the ratio of the two counts:"),
        ({"epochs": 10.0, "schedule_epochs": 5.0}, r"at least epochs=10.0, and finite, got 5.0"),
        ({"held_out": 2.5}, "held_out must be a share below 1, or a number of videos, got 2.5"),
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
        PretrainConfig(**options)


def test_prediction_alone_contrasts_nothing():
    assert PretrainConfig(alpha=0.0, contrastive_videos=1).contrastive_videos == 1


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


def test_fine_tuning_presets_are_table_4():
    presets = {name: PRESETS[f"finetune-{name}"][1] for name in ("ucf101", "hmdb51", "diving48", "ssv2", "kinetics400")}
    assert {name: config.epochs for name, config in presets.items()} == {
        **{"ucf101": 50, "hmdb51": 50, "diving48": 50},
        **{"ssv2": 22, "kinetics400": 30},
    }
    rates = {"ucf101": 2, "hmdb51": 4, "diving48": 4, "ssv2": 4, "kinetics400": 2}
    assert {name: config.fps for name, config in presets.items()} == rates
    assert {name for name, config in presets.items() if config.scratch_epochs == 1.5} == {"ssv2", "kinetics400"}
    assert {name for name, config in presets.items() if config.eval_views == "center"} == {"ssv2"}
    for config in presets.values():
        assert (config.batch_size, config.weight_decay, config.betas, config.eps) == (128, 0.01, (0.9, 0.999), 1e-8)
        assert (config.warmup, config.grad_clip, config.model.dropout, config.last_dropout) == (0.1, 1.0, 0.1, 0.0)
        assert (config.frames, config.eval_clips) == (10, 10)
        for size, rate in (("small", 1e-4), ("base", 1e-4), ("large_half", 5e-5)):
            assert dataclasses.replace(config, model=getattr(ModelConfig, size)()).peak_learning_rate == rate
        assert dataclasses.replace(config, learning_rate=3e-4).peak_learning_rate == 3e-4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"start": ""}, "start must be a path"),
        ({"start": "none", "compare_scratch": True}, "compare_scratch must be left out with --from none"),
        ({"start": "none", "freeze_backbone": True}, "freeze_backbone must be left out with --from none"),
        ({"split_number": 4}, "split_number must be 1, 2 or 3, got 4"),
        ({"layer_decay": 1.5}, "layer_decay must be from 0.001 to 1, got 1.5"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"held_out": 0.0}, "held_out must be above 0, since accuracy is measured on other videos"),
    ],
)
def test_bad_fine_tuning(options, message):
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**options)


def test_special_ids_are_the_released_ones():
    assert (ModelConfig().pad_id, ModelConfig().mask_id) == (8193, 8196)


# --- the ends of every range ----------------------------------------------------------------------------------------------

ENDS = (0, -1, 1, 2**31, 2**32, 2**63, 2**64, 10**400, math.nan, math.inf, -math.inf, 1e-300, 1e-6, 1e6, 1e30, 1e300)
# What the code behind can take: the largest number that each field lets through, and the least above 0 of those with a floor.
RUN = (
    dict.fromkeys(("batch_size", "micro_batch", "synthetic_videos"), 1e6)
    | dict.fromkeys(("steps", "log_every", "save_every", "keep_checkpoints"), 2**31 - 1)
    | dict.fromkeys(("learning_rate", "eps", "grad_clip"), 1e30)
    | dict.fromkeys(("epochs", "weight_decay"), 1e6)
    | dict.fromkeys(("warmup", "betas"), 1)
    | {"seed": 2**63 - 2, "held_out": 2**31, "fps": 1e3, "split_number": 3}
)
MOST = {
    SynthesizeConfig: {"videos": 1e6, "seconds": 1e8, "fps": 240, "size": 4096, "seed": 2**63 - 1},
    TokenizeConfig: {"codes": 8192, "frame_size": 4096, "fps": 1000, "seed": 2**32 - 1, "video_timeout": 1e9},
    ModelConfig: dict.fromkeys(("layers", "head_layers"), 1024)
    | dict.fromkeys(("width", "heads", "attention_width", "mlp_width", "head_width", "head_out"), 2**20)
    | {"grid": 4096, "vocab_size": 2**16, "dropout": 1},
    PretrainConfig: RUN
    | dict.fromkeys(("contrastive_videos", "eval_batches"), 1e6)
    | dict.fromkeys(("schedule_epochs", "temperature", "alpha"), 1e6)
    | {"mask_ratio": 1, "probe_every": 2**31 - 1, "d_max": 1e9, "n_blocks": 5 * 16 * 16},
    FinetuneConfig: RUN
    | dict.fromkeys(("train_videos", "eval_clips", "validate_every"), 1e6)
    | dict.fromkeys(("last_dropout", "label_smoothing", "layer_decay"), 1)
    | {"scratch_epochs": 1e3, "frames": 4096},
}
LEAST = dict.fromkeys(("learning_rate", "eps", "grad_clip"), 1e-30) | {"epochs": 1e-6, "temperature": 1e-6, "fps": 1e-3}
LEAST_OF = {TokenizeConfig: {"fps": 0.001, "video_timeout": 1}, SynthesizeConfig: {"fps": 0.1, "seconds": 0.01}}


def numbers(cls):
    """Name and number of values of each field that is one or several numbers."""
    for name, kind in typing.get_type_hints(cls).items():
        kinds = {*typing.get_args(kind), kind}
        if typing.get_origin(kind) is not typing.Literal and kinds & {int, float}:
            yield name, len(typing.get_args(kind)) if typing.get_origin(kind) is tuple else 1


@pytest.mark.parametrize("cls, name, count", [(cls, *field) for cls in MOST for field in numbers(cls)])
def test_ends_of_ranges(cls, name, count):
    """Refused in one line that names the field, or within what the code behind can take."""
    accepted = 0
    for value in ENDS:
        try:
            cls(**{name: value if count == 1 else (value,) * count})
        except InputError as error:
            said = str(error).replace(" ", "_")
            assert name in said and "\n" not in said, said
            continue
        accepted += 1
        assert math.isfinite(value) and 0 <= value <= MOST[cls][name], value
        assert value == 0 or value >= LEAST_OF.get(cls, LEAST).get(name, 0), value
    assert accepted or name in ("codes", "frame_size", "size", "heads", "width", "attention_width")  # multiples of something


def test_every_number_has_a_range():
    for cls, most in MOST.items():
        assert {name for name, _ in numbers(cls)} == most.keys()


def test_tokenize_options_are_the_tokenizers():
    assert TokenizeConfig(codes=tokenizer.MAX_CODES, frame_size=tokenizer.STRIDE)
    with pytest.raises(InputError):
        TokenizeConfig(codes=tokenizer.MAX_CODES + 1)
