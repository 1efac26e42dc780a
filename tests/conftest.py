"""Fixtures that several test files share."""

import gc

import pytest
import torch
import torch.distributed as dist

from runs import arguments, run, train_main, write_store


def pytest_addoption(parser):
    parser.addoption("--shard", default="1/1", metavar="I/N", help="only every N-th test from the I-th on")


SLOW = ("_triton", "_cuda", "_compiled", "test_long_runs", "test_run_folders", "test_train_command", "test_benchmarks")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    """Files that compile, interpret or train begin first, so that none of them is left to one process at the end; and parts of
    a file that is slow to compile run side by side (benchmarks/gpu.py)."""
    items.sort(key=lambda item: next((i for i, name in enumerate(SLOW) if name in item.path.stem), len(SLOW)))
    index, count = map(int, config.getoption("shard").split("/"))
    if not 1 <= index <= count:
        raise pytest.UsageError(f"--shard {index}/{count}: expected I/N with I from 1 to N")
    if count > 1:
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != index - 1])
        items[:] = items[index - 1 :: count]


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Garbage is not looked for while test files are imported, nor ever among what that makes, most of what a process holds."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every device that tests of numbers run on; the GPU's are skipped, with the reason, where there is none."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture
def one_thread():
    """One torch thread, as in the processes of `runs.Run`: with many short ops more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def wide(monkeypatch):
    """Weights start ten times wider: see runs.wide_start."""
    monkeypatch.setattr("vimpac.model.backbone.INIT_STD", 0.2)


@pytest.fixture
def undrawn(monkeypatch):
    """Without curves.png, which takes longer than training here."""
    monkeypatch.setattr("vimpac.figures.curves.plot_curves", lambda *paths: None)


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory):
    """A token store of 25 videos of 3 to 9 frames, 4×4 tokens each, 11 ids."""
    return write_store(tmp_path_factory.mktemp("store") / "tokens")


@pytest.fixture(scope="session")
def finished_run(store_folder, tmp_path_factory):
    """The run folder of the tiny run: 6 updates in one process, dropout 0.1, never interrupted."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    run(arguments(store_folder, folder), folder.with_name("log"))
    return folder


@pytest.fixture
def first_of():
    """first_of(n): this process is the first of a process group of n, in which nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    yield lambda size: dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    dist.destroy_process_group()


@pytest.fixture
def main(capsys):
    """main(words) → (exit status, standard error); nothing goes to standard output."""

    def call(words):
        status = train_main()(words)
        captured = capsys.readouterr()
        assert captured.out == ""
        return status, captured.err

    return call


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run"
