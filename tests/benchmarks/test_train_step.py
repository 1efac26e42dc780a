"""benchmarks/train_step.py: how many operations a step needs, what is measured in which order, and time between steps."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import harness
import naive
import timing
import train_step
import training
from vimpac.config import ModelConfig

TINY, VIDEOS = training.TINY, 4


def test_operations_by_hand():
    """Two layers of a block along T and one along H|W, on 2×3×3 tokens."""
    sizes = {"layers": 2, "width": 6, "heads": 2, "attention_width": 4, "mlp_width": 10, "grid": (2, 3, 3), "vocab_size": 7}
    config = ModelConfig(**sizes, head_layers=2, head_width=5, head_out=3)
    rows = 2 * 3 * (18 + 1)  # 3 videos
    linear = 2 * (6 * 12 + 4 * 6) + 2 * 6 * 10  # two attention blocks: to q, k and v, and back; the MLP
    along_t, along_h = 9 * 3 * 3, 6 * 4 * 4  # lines × (length + 1)²; along W as along H
    attention = 2 * (2 * 2 * along_t) + 2 * (2 * along_h + 2 * along_h)  # Q·K and P·V; two heads of width 2, then one an axis
    masked = 0.25 * 6 * 18
    head = masked * (6 * 6 + 6 * (7 + 5)) + 6 * (6 * 5 + 5 * 3)
    assert train_step.operations(config, 3, 0.25) == 6 * (2 * (rows * linear + 6 * attention) + head)


def test_cls_as_no_key_saves_its_column():
    with_cls, without = (ModelConfig(**TINY, layout="TxHxW", cls_in_context=x) for x in (True, False))
    saved = train_step.operations(with_cls, 1, 0) - train_step.operations(without, 1, 0)
    assert saved == 6 * 2 * 49 * 2 * 16  # 2 clips, 48 tokens and [CLS] as queries, two products of 16 in all heads


@pytest.mark.parametrize("layout", ["T,H|W", "T,H,W", "T|H|W", "T,HxW", "TxHxW"])
def test_operations_are_those_of_the_naive_model(layout):
    """It computes logits of every position, so that the share is 1; its dropout and softmax are no products; forward and
    backward of the whole model, without the scores of InfoNCE."""
    config = ModelConfig(**{**TINY, "heads": 6, "width": 24, "layers": 2, "layout": layout})
    model = naive.NaiveModel(config).train()
    tokens = torch.randint(config.vocab_size, (2 * VIDEOS, *config.grid))
    with FlopCounterMode(display=False) as counter:
        logits, features = model(tokens, padded=False)
        (logits.sum() + features.sum()).backward()
    assert counter.get_total_flops() == train_step.operations(config, VIDEOS, mask_share=1.0)


def options(*words):
    return harness.arguments(
        "",
        ["--device", "cpu", "--quick", "--no-write", *words],
        presets={"nargs": "+"},
        impls={"nargs": "+"},
        graphs={"action": "store_true"},
    )


def test_order():
    def plan(device, *words):
        chosen = options(*words)
        chosen.device = device
        return train_step.plan(chosen)

    assert plan("cpu") == [("small 5x128", ("ours", "naive eager"))]
    order = plan("cuda")
    assert order[0] == ("small 5x128", ("ours compiled", "ours", "naive eager", "naive compiled"))
    assert order[1] == ("large-half 5x128", ("ours compiled",))
    every = [(preset, impl) for preset, impls in order for impl in impls]
    assert len(every) == len(set(every)) == 4 * len(train_step.PRESETS)
    assert ("small 5x128", "ours graphs") in [(p, i) for p, impls in plan("cuda", "--graphs") for i in impls]
    assert plan("cuda", "--presets", "base 5x128", "--impls", "ours") == [("base 5x128", ("ours",))]
    graphs = plan("cuda", "--presets", "base 5x128", "--impls", "ours graphs", "--graphs")
    assert graphs == [("base 5x128", ("ours graphs",))]


def test_presets_are_the_papers():
    """Backbones of Table 3 and 6; resolutions of Table 14."""
    sizes = {"small 5x128": 29.4, "6x768 5x128": None, "base 5x128": 119.7, "large-half 5x128": 210.1}
    for name, millions in sizes.items():
        with torch.device("meta"):
            model = training.PretrainModel(train_step.PRESETS[name].model).backbone
        if millions:
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.3)
    for name, preset in train_step.PRESETS.items():
        frames, pixels = name.split()[-1].split("x")
        assert preset.model.grid == (int(frames), int(pixels) // 8, int(pixels) // 8)


def test_time_between_steps_on_a_device(monkeypatch):
    """Events in a row on a clock that moves 7 ms a step and 1000 ms before the first and at each synchronisation."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = clock[0]

        def elapsed_time(self, other):
            return other.ms - self.ms

    def move(ms):
        clock[0] += ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: move(1000.0))

    class Trained:
        waited = 0.0

        def step(self):
            move(100.0)
            self.waited += 0.25

    ms, waited = train_step.device_ms(Trained())
    assert ms == [100.0] * int(train_step.GPU_SECONDS * 10) and waited == 0.25 * len(ms)  # not that of the steps before


def test_matrix_peak():
    peak = timing.matrix_peak(torch.device("cpu"), torch.float32, quick=True)
    assert 1e-4 < peak < 1e2  # TFLOP/s
