"""Every way to make an update is the same update: in parts, compiled, replayed, weights cast once, batches made ahead."""

import collections
import dataclasses
import subprocess
import sys
import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from extension import needs_compiler, needs_cpu
from runs import arguments, make_trainer, metrics, run, tiny_config, undrawn, wide_start
from vimpac.config import ModelConfig, TrainConfig
from vimpac.errors import InputError
from vimpac.training import machine
from vimpac.training.batch import ROWS, Batch
from vimpac.training.distributed import BatchPlan, World, plan_batches
from vimpac.training.graphs import GraphedStep, _Capture, row_multiple
from vimpac.training.loader import BatchLoader
from vimpac.training.profile import start, table, waits
from vimpac.training.seeds import seed_dropout

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MODEL = {"dropout": 0.0, "layers": 2, "width": 32, "head_layers": 3, "head_width": 32, "grid": (3, 4, 4)}
OPTIONS = {
    "batch_size": 8,
    "contrastive_videos": 8,
    "learning_rate": 1e-3,
    "grad_clip": 1e9,
}  # so that gradients stay as they are
# Float32 sums in another order. (Batch norm of 16 rows magnifies rounding of [CLS]: see runs.wide_start.)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr("vimpac.model.backbone.INIT_STD", 0.2)


def trainer_of(store_folder, model=None, compiled=False, **options):
    trainer = make_trainer(
        store_folder, "unused", model={**MODEL, **(model or {})}, compiled=compiled, **{**OPTIONS, **options}
    )
    trainer.module.train()
    return trainer


def update(store_folder, updates=1, **options):
    """Metrics of each update and the last one's gradients."""
    trainer = trainer_of(store_folder, **options)
    lines = []
    for _ in range(updates):
        lines.append({name: float(x) for name, x in trainer.update().items()})
        trainer.step += 1
    trainer.close()
    return lines, {name: p.grad.clone() for name, p in trainer.module.named_parameters() if p.grad is not None}


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


# --- contrastive batches in parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.5, "temperature": 0.3},
        {"contrastive_masked": False},
        {"mask_task": False},
        {"mask_task": False, "contrastive_masked": False},
        {"alpha": 0.0},
        {"noisy_mask": True, "model": {"norm": "pre", "layout": "T,HxW"}},
        {"batch_size": 16},
        {"activation_checkpointing": "full"},
    ],
    ids=str,
)
@pytest.mark.parametrize("micro_batch", [4, 1])
def test_in_parts(store_folder, options, micro_batch):
    """Two passes over parts of a contrastive batch are one pass over all of it, batch norm and mean over tokens included."""
    assert_same(update(store_folder, micro_batch=micro_batch, **options), update(store_folder, **options))


def test_parts_have_the_same_dropout_in_both_passes(store_folder):
    """Compared with one graph over all parts, each with the dropout that its place seeds."""
    for options in ({}, {"contrastive_masked": False}):
        actual = update(store_folder, micro_batch=2, model={"dropout": 0.2}, **options)
        trainer = trainer_of(store_folder, micro_batch=2, model={"dropout": 0.2}, **options)
        step, batches = trainer.module, [trainer.make_batch(first) for first in (0, 2, 4, 6)]
        states, mask_losses = [], []
        for i, batch in enumerate(batches):
            seed_dropout(CPU, trainer.config.seed, 0, i, 0)
            out = step(batch, False)
            states.append(out["cls"])
            mask_losses.append(out["loss"] * batch.count / sum(b.count for b in batches))
        cls = torch.stack(states).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)
        loss = sum(mask_losses) + 0.2 * step.contrast(cls)
        loss.backward()
        gradients = {name: p.grad for name, p in step.named_parameters() if p.grad is not None}
        assert actual[0][0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert_same((actual[0], actual[1]), (actual[0], gradients))
        without = update(store_folder, micro_batch=2, **options)
        assert without[0][0]["loss"] != actual[0][0]["loss"]


def test_first_pass_keeps_no_graph(store_folder):
    """The memory of a part, not of the batch: what autograd keeps after the first pass is one [CLS] row a clip."""
    trainer = trainer_of(store_folder, micro_batch=2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.shape), x)[1], lambda x: x):
        trainer.contrast_ahead(0, [trainer.make_batch(first) for first in (0, 2, 4, 6)])
    clips, rows = 2 * 8, 2 * 2 * (3 * 4 * 4 + 1)  # of the batch, and rows of the backbone's states in a part
    assert any(shape[:1] == (clips,) for shape in kept) and not any(shape[:1] == (rows,) for shape in kept)


@pytest.mark.parametrize(
    "options",
    [{"micro_batch": 2}, {"micro_batch": 1, "batch_size": 16}, {"micro_batch": 2, "contrastive_masked": False}],
    ids=str,
)
def test_in_parts_in_two_processes(store_folder, tmp_path, options):
    """A group of two ranks, each with two parts or more, follows one process that holds the whole batch."""
    common = {"steps": 5, "save_every": 100, "eps": 1e-2, "contrastive_videos": 8, "batch_size": 8, "learning_rate": 1e-3}
    for name, ranks, changed in (("one", 1, {**options, "micro_batch": 8}), ("two", 2, options)):
        words = arguments(store_folder, tmp_path / name, MODEL, **{**common, **changed})
        run(words, tmp_path / f"log-{name}", ranks, hook=start_wide_and_undrawn)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for line, other in zip(two[:-1], one[:-1], strict=True):
        for key, x in line.items():
            rtol = 1e-4 if key == "grad_norm" else 1e-5  # a norm has a term for every weight, a loss averages its rounding
            torch.testing.assert_close(x, other[key], rtol=rtol, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def start_wide_and_undrawn():
    undrawn()
    wide_start()


# --- compiled -------------------------------------------------------------------------------------------------------------


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
    trainer = trainer_of(store_folder, model={"dropout": 0.1, "layers": 1})
    original, whole = torch.compile, {"fullgraph": True, "backend": "aot_eager"}
    monkeypatch.setattr(torch, "compile", lambda f, **options: original(f, **{**options, **whole}))
    trainer.module.model.compile_parts()
    trainer.update()


@needs_compiler
def test_the_token_head_compiles_once_for_any_number_of_rows(store_folder):
    torch.compiler.reset()
    trainer = trainer_of(store_folder, compiled=True)
    head = trainer.module.model.token_head
    for rows in (256, 512, 768, 2048):
        with torch.compiler.set_stance("default" if rows == 256 else "fail_on_recompile"):
            head.transform(torch.randn(rows, 32, requires_grad=True)).sum().backward()


def test_compile_that_does_not_work(store_folder, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler\nin sight")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        InputError, match=r"--compile on: torch.compile does not work here \(RuntimeError: no C\+\+ compiler in sight\)"
    ):
        machine.resolve_compile("on", CPU)
    assert machine.resolve_compile("off", CPU) == (False, None)
    assert machine.resolve_compile("auto", CPU) == (False, None)  # compiling for a CPU is the user's choice


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
    trainer = trainer_of(store_folder, precision="bf16", batch_size=32, micro_batch=micro_batch)
    expand = trainer.module.model.backbone.layers[0].mlp.expand.weight
    with Casts() as casts:
        trainer.update()
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


# --- batches made ahead ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_loader(ahead):
    made = []

    def make(first):
        made.append((first, threading.current_thread().name))
        return Batch(torch.tensor(first), None, None, None, None, first)

    loader = BatchLoader(make, iter(range(5)), CPU, ahead)
    assert [batch.count for batch in loader] == [0, 1, 2, 3, 4]
    assert [first for first, _ in made] == [0, 1, 2, 3, 4] and loader.waited > 0
    assert all((name == threading.current_thread().name) == (ahead == 0) for _, name in made)
    loader.close()


def test_loader_works_ahead_but_not_further():
    made = []
    loader = BatchLoader(lambda first: made.append(first) or Batch(*[None] * 5, first), iter(range(100)), CPU, 2)
    next(loader)
    loader._thread.submit(lambda: None).result()  # all that was asked for is made
    assert made == [0, 1, 2]
    loader.close()


def test_the_loaders_thread_makes_no_context_on_another_gpu(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append((device, threading.current_thread())))
    loader = BatchLoader(lambda first: Batch(*[None] * 5, first), iter(range(3)), torch.device("cuda", 3))
    next(loader)
    loader.close()
    ((device, thread),) = seen
    assert device == torch.device("cuda", 3) and thread is not threading.main_thread()


def test_fillers_are_rows_of_their_own(store_folder):
    """Rows whose gradients meet are added one after another on a GPU."""
    batch = trainer_of(store_folder).make_batch(0)
    filler = batch.rows[batch.count :]
    assert len(filler) > 100 and len(filler.unique()) == len(filler) and bool((batch.targets[batch.count :] == -1).all())
    assert int(filler.max()) < batch.tokens.numel() and len(batch.rows) % ROWS == 0


def test_loader_raises_what_making_a_batch_raises():
    def make(first):
        raise InputError("shard is cut short")

    loader = BatchLoader(make, iter(range(3)), CPU, 2)
    with pytest.raises(InputError, match="cut short"):
        next(loader)
    loader.close()
    assert not any(thread.name.startswith("batches") and thread.is_alive() for thread in threading.enumerate())


@pytest.mark.parametrize("named", ["triton", "cuda", "block_mask=cuda", "reference"])
def test_batches_are_made_on_the_host_whatever_backend_is_named(store_folder, monkeypatch, named):
    """A name that is meant for the GPU's tensors does not stop the host from drawing masks, which are the same bits anyway."""
    trainer = trainer_of(store_folder)
    expected = trainer.make_batch(0)
    monkeypatch.setenv("VIMPAC_BACKEND", named)
    assert all(torch.equal(x, y) for x, y in zip(trainer.make_batch(0).tensors, expected.tensors, strict=True))


def test_batches_made_ahead_change_nothing(store_folder, monkeypatch):
    inline = update(store_folder, updates=3, micro_batch=4)
    monkeypatch.setattr("vimpac.training.trainer.BatchLoader", lambda *call: BatchLoader(*call, ahead=2))
    ahead = update(store_folder, updates=3, micro_batch=4)
    assert inline[0] == ahead[0] and all(torch.equal(g, ahead[1][name]) for name, g in inline[1].items())


# --- nothing waits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}, {"contrastive_masked": False}, {"batch_size": 16}], ids=str)
def test_an_update_waits_for_nothing(store_folder, options):
    """No op in it that would make the host wait for a GPU; making batches, which is the host's own work, aside."""
    trainer = trainer_of(store_folder, model={"dropout": 0.1}, **options)
    trainer.update()
    trainer.step += 1
    profiler = start()
    trainer.update()
    profiler.stop()
    assert waits(profiler, CPU) == []


def test_what_waits_is_counted():
    profiler = start()
    float(torch.ones(3).sum())
    torch.ones(3).nonzero()
    with torch.profiler.record_function("data"):
        float(torch.ones(3).sum())
    profiler.stop()
    assert sorted(waits(profiler, CPU)) == ["aten::_local_scalar_dense", "aten::nonzero"]


def test_what_a_profile_waits_for_itself_is_not_counted():
    profiler = start()
    for _ in range(2):
        with torch.profiler.record_function("update"):
            float(torch.ones(3).sum())
    torch.ones(3).nonzero()  # between or behind updates
    profiler.stop()
    assert waits(profiler, CPU) == ["aten::_local_scalar_dense"] * 2


def test_a_gpus_profile_counts_kernels_once(monkeypatch):
    """A span has an event on the host and one on the device, an op's time is that of its kernels, and only the host waits."""
    host, gpu = DeviceType.CPU, DeviceType.CUDA

    def averaged(key, device, total=0.0, own=0.0):
        times = {"cpu_time_total": total if device == host else 0.0, "device_time_total": total}
        return SimpleNamespace(key=key, device_type=device, count=2, self_device_time_total=own, **times)

    def event(name, device, start, end):
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(start=start, end=end), cpu_parent=None)

    class Profiler:
        def key_averages(self):
            return [
                averaged("forward", host, 6000.0),
                averaged("aten::mm", host, 5000.0, own=4000.0),
                averaged("gemm", gpu, 4000.0, own=4000.0),
                averaged("copy", gpu, 1000.0, own=1000.0),
                averaged("forward", gpu, 7000.0, own=7000.0),
            ]

        def events(self):
            spans = [event("update", host, 0, 10), event("update", gpu, 2, 30)]
            return [*spans, event("cudaStreamSynchronize", host, 5, 6), event("cudaDeviceSynchronize", host, 12, 30)]

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**32))
    lines = [line.split() for line in table(Profiler(), 2, torch.device("cuda"))]
    assert ["forward", "3.00", "3.00"] in lines
    assert ["gemm", "2.00", "80.0%", "1"] in lines and ["copy", "0.50", "20.0%", "1"] in lines
    assert not any(line[0] == "aten::mm" for line in lines)
    assert lines[-1][-5:] == ["0.5", "times", "an", "update:", "['cudaStreamSynchronize']"]


@pytest.mark.parametrize("options", [{}, {"contrastive_masked": False}], ids=str)
def test_a_step_asks_for_no_value(store_folder, options):
    """On tensors without values: whatever had to know one would raise."""
    trainer = trainer_of(store_folder, model={"dropout": 0.1}, **options)
    batch = trainer.make_batch(0).map(lambda x: x.to("meta"))
    step = trainer.module.to("meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIMPAC_BACKEND", "reference")
        step(batch)["loss"].backward()
    assert all(p.grad.device.type == "meta" for p in step.parameters() if p.grad is not None)


# --- graphs ---------------------------------------------------------------------------------------------------------------


def fake_capture(function):
    """What a CUDA graph does, without one: warm-up runs, then a replay is the same work on the same tensors."""
    for _ in range(4):
        function()
    return function


def graphed_trainer(store_folder, **options):
    trainer = trainer_of(store_folder, **options)
    trainer.graphed = GraphedStep(trainer.forward_backward, trainer.module, fake_capture)
    return trainer


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_graphed(store_folder, dropout):
    """Captures leave no trace: gradients, batch norm's statistics and dropout are the plain updates'. New shapes come twice."""
    options = {"batch_size": 16, "model": {"dropout": dropout}}
    plain, graphed = trainer_of(store_folder, **options), graphed_trainer(store_folder, **options)
    for _ in range(3):
        expected, line = plain.update(), graphed.update()
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(line[name])) for name, x in expected.items())
        plain.step += 1
        graphed.step += 1
    for (name, x), y in zip(plain.module.state_dict().items(), graphed.module.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    grads = [p.grad.data_ptr() for p in graphed.module.parameters()]
    graphed.update()
    assert grads == [p.grad.data_ptr() for p in graphed.module.parameters()]  # where a graph has them


def test_a_graph_for_each_number_of_rows(store_folder):
    trainer = graphed_trainer(store_folder)
    batch = trainer.make_batch(0)
    for rows in (batch, batch, batch._replace(rows=batch.rows.repeat(2), targets=batch.targets.repeat(2)), batch):
        trainer.graphed(rows)
    assert len(trainer.graphed.graphs) == 2


@pytest.fixture
def opened(monkeypatch):
    """What is open around a run, by name, where torch.cuda has contexts and nothing behind them."""
    opened = {}

    def context(name, given):
        @contextmanager
        def enter(*args, **options):
            opened[name] = given(*args, **options)
            try:
                yield
            finally:
                del opened[name]

        return enter

    class Stream:
        def wait_stream(self, _other):
            pass

    stand_ins = {
        **dict.fromkeys(("Stream", "current_stream"), Stream),
        **dict.fromkeys(("CUDAGraph", "empty_cache"), object),
        "get_allocator_backend": lambda: "native",
        "MemPool": lambda: SimpleNamespace(id=(0, 1)),
        "graph_pool_handle": lambda: (0, 2),
        "stream": context("stream", lambda stream: stream),
        "use_mem_pool": context("memory", lambda pool: pool.id),
        "graph": context("graph", lambda _graph, pool, stream, **_: (pool, stream)),
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return opened


def test_graphs_share_a_stream_and_its_memory(opened):
    """What warms up the first one takes memory elsewhere, what it keeps included."""
    capture, runs = _Capture(), []
    for _ in range(2):
        capture(lambda: runs.append(dict(opened)))
    outside, captured = {"stream": capture.stream}, {"graph": ((0, 1), capture.stream)}
    assert runs == [outside] * 3 + [captured] + [{**outside, "memory": (0, 1)}] * 3 + [captured]


def test_an_allocator_without_pools_still_captures(opened, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(torch.cuda, "MemPool", None)  # it raises
    capture, runs = _Capture(), []
    for _ in range(2):
        capture(lambda: runs.append(dict(opened)))
    assert runs == ([{"stream": capture.stream}] * 3 + [{"graph": ((0, 2), capture.stream)}]) * 2


def test_full_checkpointing_without_dropout_asks_no_generator(store_folder, monkeypatch):
    """Its state cannot be read while a graph is captured."""
    trainer = trainer_of(store_folder, activation_checkpointing="full")
    batch = trainer.make_batch(0)
    monkeypatch.setattr(torch, "get_rng_state", None)
    trainer.forward_backward(batch)


def test_rows_of_a_graph():
    """A few sizes serve a run: an eighth of the expected number apart, which is several standard deviations."""
    assert row_multiple(256 * 1280, 0.145) == 6144 and row_multiple(256 * 1280, 0.145) % ROWS == 0
    assert row_multiple(100, 0.1) == ROWS


@pytest.mark.gpu
def test_graphs_and_their_warm_ups_share_memory():
    """Backward's as well, and after one that failed; replays in any order give what plain runs give."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if torch.cuda.get_allocator_backend() != "native":
        pytest.skip("the allocator has no pools")
    weight = torch.linspace(0, 1, 1 << 20, device="cuda", requires_grad=True)
    weight.grad = torch.zeros_like(weight)

    def step(rows):
        loss = weight.expand(rows, -1).sin().sum()  # 4 MiB a row, twice that in backward
        loss.backward()
        return {"loss": loss.detach()}

    def fails():
        raise ArithmeticError(f"after {step(20)}")

    capture = _Capture()
    replays = {24: capture(lambda: step(24))}
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    with pytest.raises(ArithmeticError):
        capture(fails)
    replays |= {rows: capture(lambda rows=rows: step(rows)) for rows in (16, 20)}
    assert torch.cuda.max_memory_reserved() < reserved + (32 << 20)
    with torch.cuda.stream(capture.stream):
        outside = torch.empty(64 << 20, device="cuda")
    assert not any(s["address"] <= outside.data_ptr() < s["address"] + s["total_size"] for s in capture.memory.snapshot())
    for rows in (16, 24, 20, 24, 16):
        weight.grad.zero_()
        loss, grad = replays[rows]()["loss"].clone(), weight.grad.clone()
        weight.grad.zero_()
        torch.testing.assert_close(loss, step(rows)["loss"])
        torch.testing.assert_close(grad, weight.grad)


@pytest.mark.gpu
def test_graphed_on_a_gpu(store_folder):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    world = World(0, 1, torch.device("cuda", 0))
    lines = []
    for graphs in (False, True):
        trainer = trainer_of(store_folder, world=world, graphs=graphs, precision="fp32", model={"dropout": 0.1})
        losses = []
        for _ in range(20):
            losses.append({name: float(x) for name, x in trainer.update().items()})
            trainer.step += 1
        trainer.close()
        lines.append(losses)
    for plain, graphed in zip(*lines, strict=True):
        for name, x in plain.items():
            assert graphed[name] == pytest.approx(x, rel=1e-4), name  # atomics of the embedding's gradient, through 20 updates


@pytest.mark.gpu
def test_an_update_on_a_gpu_waits_for_nothing(store_folder):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    trainer = trainer_of(store_folder, world=World(0, 1, torch.device("cuda", 0)), model={"dropout": 0.1}, precision="bf16")
    for _ in range(3):
        trainer.update()
        trainer.step += 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.close()


# --- options that do not go together --------------------------------------------------------------------------------------

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    "options, plan, world, message",
    [
        ({}, BatchPlan(8, 1, 1), World(0, 1, CPU), "--graphs needs a CUDA device, training runs on cpu: leave it out"),
        ({}, BatchPlan(8, 1, 1), World(0, 4, CUDA), "--graphs replays the step of one process, 4 take part"),
        ({}, BatchPlan(4, 2, 1, 2), World(0, 1, CUDA), "or --micro-batch 8"),
        (
            {"activation_checkpointing": "full"},
            BatchPlan(8, 1, 1),
            World(0, 1, CUDA),
            "use --activation-checkpointing selective",
        ),
    ],
)
def test_refused(options, plan, world, message):
    with pytest.raises(InputError) as error:
        machine.check_options(tiny_config(graphs=True, **options), plan, world)
    assert message in str(error.value)
    machine.check_options(tiny_config(graphs=False, **options), plan, world)


def test_refused_before_anything_is_written(store_folder, tmp_path):
    words = arguments(store_folder, tmp_path / "run", graphs=True)
    output = run(words, tmp_path / "log", code=1)
    assert "train.py: error: --graphs needs a CUDA device" in output and not (tmp_path / "run").exists()


@pytest.mark.parametrize("named, op", [("turbo", "axial_attention"), ("info_nce=cuda", "info_nce")])
def test_backends_that_are_none_are_refused_at_start(monkeypatch, named, op):
    monkeypatch.setenv("VIMPAC_BACKEND", named)
    with pytest.raises(InputError, match=f"VIMPAC_BACKEND={named}: {op}: no backend '.*'; it has"):
        machine.check_options(tiny_config(), BatchPlan(4, 1, 1), World(0, 1, CPU))


@pytest.mark.parametrize(
    "named, options, refused",
    [
        ("axial_attention=triton", {}, "axial_attention: backend 'triton' cannot run this call: tensors are on cpu"),
        pytest.param(
            "axial_attention=cpu",
            {"grid": (2, 65, 3), "layout": "T,H"},
            "it takes lines of at most 64 tokens",
            marks=needs_cpu,
        ),
        pytest.param(
            "dropout_add=cpu",
            {"precision": "fp16"},
            "dropout_add: backend 'cpu' cannot run this call: x of torch.float32 and y",
            marks=needs_cpu,
        ),
        ("dropout_add=triton", {"dropout": 0.0}, None),  # there is none
        ("block_mask=triton", {}, None),  # masks are drawn where the batch is
    ],
)
def test_backends_that_cannot_run_the_model_are_refused_at_start(monkeypatch, named, options, refused):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("VIMPAC_BACKEND", named)
    precision = options.pop("precision", "fp32")
    config = tiny_config(precision=precision)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **{"dropout": 0.1} | options))
    refusal = nullcontext() if refused is None else pytest.raises(InputError, match=f"VIMPAC_BACKEND={named}: .*{refused}")
    with refusal:
        machine.check_options(config, BatchPlan(4, 1, 1), World(0, 1, CPU))


def test_ops_without_kernels_are_said(monkeypatch, tmp_path):
    """An installation without a compiler trains several times slower: not in silence."""
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("VIMPAC_LIBRARIES", str(tmp_path))
    said = machine.plain_ops(tiny_config(), CPU)
    assert said.startswith(
        "axial_attention, info_nce run as plain PyTorch, several times slower than their kernels: vimpac was"
    )
    assert "installed without _ops_cpu.so, which takes a C++ compiler, ninja" in said
    monkeypatch.setenv("VIMPAC_BACKEND", "axial_attention=reference")  # asked for
    assert machine.plain_ops(tiny_config(), CPU).startswith("info_nce run as plain PyTorch")
    monkeypatch.setenv("VIMPAC_BACKEND", "reference")
    assert machine.plain_ops(tiny_config(), CPU) is None


@needs_cpu
def test_nothing_is_said_where_all_ops_have_kernels(monkeypatch):
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    assert machine.plain_ops(tiny_config(), CPU) is None


SMALL = TrainConfig(model=ModelConfig.small(), batch_size=1024, contrastive_videos=128)


@pytest.mark.parametrize("precision, kept", [("auto", 1), ("bf16", 1 / 2)])
@pytest.mark.parametrize(
    "saving, compiled, units", [("none", "on", 22), ("selective", "off", 13), ("selective", "on", 16), ("full", "on", 1)]
)
def test_activations_are_those_of_the_table(saving, compiled, units, precision, kept):
    """docs/performance.md, whose numbers tests/model/test_recompute.py counts."""
    config = dataclasses.replace(SMALL, activation_checkpointing=saving, precision=precision, compile=compiled)
    assert machine.activation_bytes(config) == 6 * units * 2562 * 512 * 4 * kept


def test_what_does_not_fit_is_refused_on_a_cpu(monkeypatch):
    """The system would end the process without a word."""
    plan, world = plan_batches(1024, 128, None, 1), World(0, 1, CPU)
    monkeypatch.setattr(machine, "available_memory", lambda: 20 << 30)
    with pytest.raises(InputError) as raised:
        machine.check_options(SMALL, plan, world)
    said = str(raised.value)
    assert said.startswith("128 videos a forward pass keep some 49 GiB of activations for backward, 20 GiB are available here")
    assert "--micro-batch 32 takes about 25%" in said and "--activation-checkpointing full" in said  # 64 would take 24 GiB
    machine.check_options(SMALL, plan_batches(1024, 128, 32, 1), world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes share it
    with pytest.raises(InputError, match="--micro-batch 16 takes about 50%"):
        machine.check_options(SMALL, plan_batches(1024, 128, 32, 1), world)
    monkeypatch.setattr(machine, "available_memory", lambda: None)  # unknown
    machine.check_options(SMALL, plan, world)
    monkeypatch.setattr(machine, "available_memory", lambda: 1)  # a GPU's own is another one
    machine.check_options(SMALL, plan, World(0, 1, CUDA))


def test_available_memory():
    if sys.platform != "linux":
        assert machine.available_memory() is None
    else:
        assert 0 < machine.available_memory() < 1 << 50


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory(error):
    config = tiny_config(contrastive_videos=128, batch_size=128)
    with pytest.raises(InputError) as raised, machine.explained_memory(config, BatchPlan(128, 1, 1), CPU):
        raise error
    said = str(raised.value)
    assert "out of memory on cpu with 128 videos a forward pass" in said and "--micro-batch 64 takes about 50%" in said
    assert "--activation-checkpointing full" in said and str(error).split(". GPU")[0][:40] in said


def test_another_error_is_not_out_of_memory():
    with pytest.raises(RuntimeError, match="shape"), machine.explained_memory(tiny_config(), BatchPlan(4, 1, 1), CPU):
        raise RuntimeError("shape '[3]' is invalid")


def test_advice_follows_the_options():
    config = tiny_config(activation_checkpointing="full", alpha=0.0)
    with pytest.raises(InputError) as raised, machine.explained_memory(config, plan_batches(4, 4, 1, 1), CPU):
        raise torch.OutOfMemoryError("no")
    assert "a smaller model or grid" in str(raised.value) and "--micro-batch" not in str(raised.value)


FAULTS = """
import resource, torch
from vimpac.training.machine import keep_freed_memory
kept = keep_freed_memory() if {keep} else False
for _ in range(4):  # the heap grows once or twice
    torch.ones(16 << 20)  # 64 MB, each page of which is cleared when it is first written
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 << 20)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept():
    def faults(keep):
        command = [sys.executable, "-c", FAULTS.format(keep=keep)]
        return [int(x) for x in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]

    pytest.importorskip("resource")
    many = faults(False)[1]
    for _ in range(3):  # on a busy machine the system takes pages back now and then; without mallopt all are, every time
        kept, few = faults(True)
        if not kept:
            pytest.skip("this C library has no mallopt")
        if few * 10 < many:
            return
    assert few * 10 < many  # 10 × 64 MB are 160,000 pages of 4 KB, or 320 of 2 MB
