"""How much memory a forward pass takes, and the advice where it is too much."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from runs import tiny_config
from vimpac.config import ModelConfig, PretrainConfig
from vimpac.errors import InputError
from vimpac.training import memory
from vimpac.training.memory import MemoryUse

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL = PretrainConfig(model=ModelConfig.small(), batch_size=1024, contrastive_videos=128)


def memory_of(config, videos, device):
    """Of pre-training, two clips a video."""
    return MemoryUse.of_run(config, videos, 2, config.contrastive_videos if config.alpha > 0 else 0, device)


@pytest.mark.parametrize("precision, kept", [("auto", 1), ("bf16", 1 / 2)])
@pytest.mark.parametrize(
    "saving, compiled, units", [("none", "on", 19), ("selective", "off", 13), ("selective", "on", 15), ("full", "on", 1)]
)
def test_activations_are_those_of_the_table(saving, compiled, units, precision, kept):
    """docs/performance.md, whose numbers tests/model/test_recompute.py counts."""
    config = dataclasses.replace(SMALL, activation_checkpointing=saving, precision=precision, compile=compiled)
    assert memory_of(config, 128, CPU).activation_bytes() == 6 * units * 2562 * 512 * 4 * kept


def test_what_does_not_fit_is_refused_on_a_cpu(monkeypatch):
    """The system would end the process without a word."""
    monkeypatch.setattr(memory, "available_memory", lambda: 20 << 30)
    with pytest.raises(InputError) as raised:
        memory_of(SMALL, 128, CPU).check_fits()
    said = str(raised.value)
    assert said.startswith("128 videos per forward pass need about 49 GiB of activations for backward, 20 GiB are available")
    assert "--micro-batch 32 takes about 25%" in said and "--activation-checkpointing full" in said  # 64 would take 24 GiB
    memory_of(SMALL, 32, CPU).check_fits()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes share it
    with pytest.raises(InputError, match="--micro-batch 16 takes about 50%"):
        memory_of(SMALL, 32, CPU).check_fits()
    monkeypatch.setattr(memory, "available_memory", lambda: None)  # unknown
    memory_of(SMALL, 128, CPU).check_fits()
    monkeypatch.setattr(memory, "available_memory", lambda: 1)  # a GPU's own is another one
    memory_of(SMALL, 128, CUDA).check_fits()


def test_available_memory():
    if sys.platform != "linux":
        assert memory.available_memory() is None
    else:
        assert 0 < memory.available_memory() < 1 << 50


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory(error):
    config = tiny_config(contrastive_videos=128, batch_size=128)
    with pytest.raises(InputError) as raised, memory_of(config, 128, CPU).explaining():
        raise error
    said = str(raised.value)
    assert "out of memory on cpu with 128 videos per forward pass" in said and "--micro-batch 64 takes about 50%" in said
    assert "--activation-checkpointing full" in said and str(error).split(". GPU")[0][:40] in said


def test_another_error_is_not_out_of_memory():
    with pytest.raises(RuntimeError, match="shape"), memory_of(tiny_config(), 4, CPU).explaining():
        raise RuntimeError("shape '[3]' is invalid")


def test_advice_follows_the_options():
    config = tiny_config(activation_checkpointing="full", alpha=0.0)
    with pytest.raises(InputError) as raised, memory_of(config, 1, CPU).explaining():
        raise torch.OutOfMemoryError("no")
    assert "a smaller model or grid" in str(raised.value) and "--micro-batch" not in str(raised.value)


FAULTS = """
import resource, torch
from vimpac.training.memory import keep_freed_memory
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
