"""Updates of the tiny run one by one, for tests that compare ways to make them."""

import torch

from runs import make_loop
from vimpac.training.graphs import GraphedStep

MODEL = {"dropout": 0.0, "layers": 2, "width": 32, "head_layers": 3, "head_width": 32, "grid": (3, 4, 4)}
OPTIONS = {
    "batch_size": 8,
    "contrastive_videos": 8,
    "learning_rate": 1e-3,
    "grad_clip": 1e9,
}  # so that gradients stay as they are
# Float32 sums in another order. (Batch norm of 16 rows magnifies rounding of [CLS]: see runs.wide_start.)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def loop_of(store_folder, model=None, compiled=False, **options):
    loop = make_loop(store_folder, "unused", model={**MODEL, **(model or {})}, compiled=compiled, **{**OPTIONS, **options})
    loop.module.train()
    return loop


def fake_capture(function):
    """What a CUDA graph does, without one: warm-up runs, then a replay is the same work on the same tensors."""
    for _ in range(4):
        function()
    return function


def graphed_loop(store_folder, **options):
    loop = loop_of(store_folder, **options)
    loop.graphed = GraphedStep(loop.forward_backward, loop.module, fake_capture)
    return loop


def update(store_folder, updates=1, **options):
    """Metrics of each update and the last one's gradients."""
    loop = loop_of(store_folder, **options)
    lines = []
    for _ in range(updates):
        lines.append({name: float(x) for name, x in loop.update().items()})
        loop.step += 1
    loop.close()
    return lines, {name: p.grad.clone() for name, p in loop.module.named_parameters() if p.grad is not None}


def assert_same(actual, expected, rtol=1e-5, atol=1e-5):
    """atol is of the largest gradient: biases in front of a batch norm have none but rounding."""
    for line, other in zip(actual[0], expected[0], strict=True):
        assert line.keys() == other.keys()
        for name, x in line.items():
            torch.testing.assert_close(x, other[name], rtol=rtol, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert actual[1].keys() == expected[1].keys()
    largest = max(g.abs().max().item() for g in expected[1].values())
    for name, g in expected[1].items():
        torch.testing.assert_close(actual[1][name], g, rtol=rtol, atol=atol * largest, msg=lambda m, n=name: f"{n}: {m}")
