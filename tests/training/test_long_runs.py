"""Many updates: nothing leaks, and every backend learns the same."""

import gc
import os

import pytest
import torch

from extension import needs_cpu
from runs import make_loop, write_store

pytestmark = pytest.mark.usefixtures("one_thread")
DEMO = {"layers": 2, "width": 64, "heads": 4, "grid": (5, 4, 4), "head_width": 64, "head_out": 64, "dropout": 0.1}


def resident():
    """Bytes of memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def loop_of(store_folder, **options):
    loop = make_loop(store_folder, "unused", **options)
    loop.module.train()
    return loop


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="no /proc/self/statm")
@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}], ids=["one pass", "gradient caching"])
def test_memory_stays(store_folder, options):
    """500 updates with changing numbers of masked tokens: resident memory of the last 400 is flat to 2 %, or 4 MB."""
    loop = loop_of(store_folder, **options)
    sizes = []
    for i in range(500):
        loop.update()
        loop.step += 1
        if i % 50 == 49:
            gc.collect()
            sizes.append(resident())
    growth = sizes[-1] - sizes[1]
    assert growth < max(4 << 20, 0.02 * sizes[1]), sizes


@pytest.fixture(scope="module")
def demo_store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("demo") / "tokens", frames=(8,) * 64, side=4)


def curve(store_folder, monkeypatch, backend, updates):
    monkeypatch.setenv("VIMPAC_BACKEND", backend)
    options = {"batch_size": 8, "contrastive_videos": 8, "learning_rate": 1e-3, "warmup": 0.1, "steps": 200, "eps": 1e-6}
    loop = loop_of(store_folder, model=DEMO, **options)
    lines = []
    for _ in range(updates):
        out = loop.update()
        lines.append([float(out[name]) for name in ("mask_loss", "contrastive_loss", "mask_accuracy")])
        loop.step += 1
    return torch.tensor(lines)


@needs_cpu
def test_backends_learn_the_same(demo_store, monkeypatch):
    """200 updates of a small demo, dropout and all: the same masks and dropped elements, so the same curves.

    Rounding grows along the way (batch norm magnifies it, and Adam takes signs of gradients near zero): single updates agree to
    1e-4 at first and to some percent at the end, their means over 20 updates to 1 %.
    """
    ours, reference = (curve(demo_store, monkeypatch, backend, 200) for backend in ("", "reference"))
    torch.testing.assert_close(ours[:5], reference[:5], rtol=1e-4, atol=1e-4)
    means, expected = (x.unflatten(0, (10, 20)).mean(1) for x in (ours, reference))
    torch.testing.assert_close(means[:, 0], expected[:, 0], rtol=0.01, atol=0)
    assert expected[-1, 0] < expected[0, 0] - 0.05  # it learns
    torch.testing.assert_close(means[:, 1], expected[:, 1], rtol=0.05, atol=0.02)
