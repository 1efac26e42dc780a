"""CUDA graphs: an update that is replayed is the same update, and nothing in it waits."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from updates import graphed_loop, loop_of
from vimpac.distributed import World
from vimpac.training.batch import ROWS, map_tensors
from vimpac.training.graphs import _Capture, row_multiple
from vimpac.training.profile import start, table, waits

pytestmark = pytest.mark.usefixtures("one_thread", "wide")
CPU = torch.device("cpu")


@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}, {"contrastive_masked": False}, {"batch_size": 16}], ids=str)
@pytest.mark.parametrize("masks", ["host", "device"])
def test_an_update_waits_for_nothing(store_folder, options, masks):
    """No op in it that would make the host wait for a GPU; making batches, which is the host's own work, aside."""
    loop = loop_of(store_folder, masks=masks, model={"dropout": 0.1}, **options)
    loop.update()
    loop.step += 1
    profiler = start()
    loop.update()
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
    assert lines[-1][-5:] == ["0.5", "times", "per", "update:", "['cudaStreamSynchronize']"]


@pytest.mark.parametrize("options", [{}, {"contrastive_masked": False}, {"masks": "device"}], ids=str)
def test_a_step_asks_for_no_value(store_folder, options):
    """On tensors without values: whatever had to know one would raise."""
    loop = loop_of(store_folder, model={"dropout": 0.1}, **options)
    batch = map_tensors(loop.make_batch(0), lambda x: x.to("meta"))
    step = loop.module.to("meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIMPAC_BACKEND", "reference")
        step(batch)["loss"].backward()
    assert all(p.grad.device.type == "meta" for p in step.parameters() if p.grad is not None)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_graphed(store_folder, dropout):
    """Captures leave no trace: gradients, batch norm's statistics and dropout are the plain updates'. New shapes come twice."""
    options = {"batch_size": 16, "model": {"dropout": dropout}}
    plain, graphed = loop_of(store_folder, **options), graphed_loop(store_folder, **options)
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
    loop = graphed_loop(store_folder)
    batch = loop.make_batch(0)
    for rows in (batch, batch, batch._replace(rows=batch.rows.repeat(2), targets=batch.targets.repeat(2)), batch):
        loop.graphed(rows)
    assert len(loop.graphed.graphs) == 2


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
    loop = loop_of(store_folder, activation_checkpointing="full")
    batch = loop.make_batch(0)
    monkeypatch.setattr(torch, "get_rng_state", None)
    loop.forward_backward(batch)


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
        loop = loop_of(store_folder, world=world, graphs=graphs, precision="fp32", model={"dropout": 0.1})
        losses = []
        for _ in range(20):
            losses.append({name: float(x) for name, x in loop.update().items()})
            loop.step += 1
        loop.close()
        lines.append(losses)
    for plain, graphed in zip(*lines, strict=True):
        for name, x in plain.items():
            assert graphed[name] == pytest.approx(x, rel=1e-4), name  # atomics of the embedding's gradient, through 20 updates


@pytest.mark.gpu
def test_an_update_on_a_gpu_waits_for_nothing(store_folder):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    loop = loop_of(store_folder, world=World(0, 1, torch.device("cuda", 0)), model={"dropout": 0.1}, precision="bf16")
    for _ in range(3):
        loop.update()
        loop.step += 1
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        loop.close()
