"""Every way to make an update is the same update: compiled, in low precision with weights cast once."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from extension import needs_compiler
from updates import assert_same, loop_of, update

pytestmark = pytest.mark.usefixtures("one_thread", "wide")
CPU = torch.device("cpu")


@needs_compiler
def test_compiled(store_folder):
    """One graph for each part of the model, none of them broken, and the plain update's numbers."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    options = {"micro_batch": 4, "batch_size": 16, "model": {"layers": 3}}
    compiled = update(store_folder, compiled=True, **options)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 8  # embedding, layer, token head: with and without gradients, rows once more
    assert_same(compiled, update(store_folder, **options))


def test_every_part_compiles_whole(store_folder, monkeypatch):
    """As graphs of their own with fullgraph=True, which a break anywhere would fail; code is generated in the test above."""
    torch.compiler.reset()
    loop = loop_of(store_folder, model={"dropout": 0.1, "layers": 1})
    original, whole = torch.compile, {"fullgraph": True, "backend": "aot_eager"}
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, **{**options, **whole}))
    loop.module.model.compile_parts()
    loop.update()


@needs_compiler
def test_the_token_head_compiles_once_for_any_number_of_rows(store_folder):
    torch.compiler.reset()
    loop = loop_of(store_folder, compiled=True)
    head = loop.module.model.token_head
    for rows in (256, 512, 768, 2048):
        with torch.compiler.set_stance("default" if rows == 256 else "fail_on_recompile"):
            head.transform(torch.randn(rows, 32, requires_grad=True)).sum().backward()


# --- weights in low precision ---------------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """Counts casts to bfloat16 by shape."""

    def __init__(self):
        self.shapes = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.shapes[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("micro_batch", [8, 4])
def test_weights_are_cast_once_an_update(store_folder, micro_batch):
    """Not once a micro-step; with the second pass over parts, once for each (the first has no gradient to share)."""
    loop = loop_of(store_folder, precision="bf16", batch_size=32, micro_batch=micro_batch)
    expand = loop.module.model.backbone.layers[0].mlp.expand.weight
    with Casts() as casts:
        loop.update()
    assert casts.shapes[tuple(expand.shape)] == 2 * (1 + (0 if micro_batch == 8 else 8))  # two layers


def test_cached_weights_change_nothing(store_folder, monkeypatch):
    """Two updates, so that a copy that outlived its weights would show. The same operations: the same bits."""
    options = {"precision": "bf16", "batch_size": 32, "updates": 2}
    cached = update(store_folder, **options)
    real = torch.autocast

    def uncached(device, *args, **kwargs):
        return real(device, *args, **{**kwargs, "cache_enabled": False})

    monkeypatch.setattr(torch, "autocast", uncached)
    plain = update(store_folder, **options)
    assert cached[0] == plain[0]
    assert all(torch.equal(g, plain[1][name]) for name, g in cached[1].items())
