"""What a device cannot give is refused before anything is written, and what it lacks is said."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch

from extension import needs_cpu
from runs import arguments, run, tiny_config
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.training.device import check_graphs, op_calls_of, plain_ops, resolve_compile
from vimpac.training.memory import MemoryUse
from vimpac.training.plan import BatchPlan
from vimpac.training.session import check_machine

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def machine(config):
    memory = MemoryUse.of_run(config, 4, 2, 4, CPU)
    return check_machine(config, memory, BatchPlan(4, 1, 1), World(0, 1, CPU))


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
        check_graphs(tiny_config(graphs=True, **options), plan, world)
    assert message in str(error.value)
    check_graphs(tiny_config(graphs=False, **options), plan, world)


def test_refused_before_anything_is_written(store_folder, tmp_path):
    words = arguments(store_folder, tmp_path / "run", graphs=True)
    output = run(words, tmp_path / "log", code=1)
    assert "train.py: error: --graphs needs a CUDA device" in output and not (tmp_path / "run").exists()


@pytest.mark.parametrize("named, op", [("turbo", "axial_attention"), ("info_nce=cuda", "info_nce")])
def test_backends_that_are_none_are_refused_at_start(monkeypatch, named, op):
    monkeypatch.setenv("VIMPAC_BACKEND", named)
    with pytest.raises(InputError, match=f"VIMPAC_BACKEND={named}: {op}: no backend '.*'; it has"):
        machine(tiny_config())


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
        ("block_mask=triton", {"masks": "host"}, None),  # a name for tensors on the GPU
        ("block_mask=triton", {"masks": "device"}, "block_mask: backend 'triton' cannot run this call: tensors are on cpu"),
    ],
)
def test_backends_that_cannot_run_the_model_are_refused_at_start(monkeypatch, named, options, refused):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("VIMPAC_BACKEND", named)
    run = {name: options.pop(name) for name in ("precision", "masks") if name in options}
    config = tiny_config(**run)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **{"dropout": 0.1} | options))
    refusal = nullcontext() if refused is None else pytest.raises(InputError, match=f"VIMPAC_BACKEND={named}: .*{refused}")
    with refusal:
        machine(config)


def test_ops_without_kernels_are_said(monkeypatch, tmp_path):
    """An installation without a compiler trains several times slower: not in silence."""
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("VIMPAC_LIBRARIES", str(tmp_path))
    said = plain_ops(op_calls_of(tiny_config().model, "fp32", CPU), CPU)
    assert said.startswith("axial_attention, bias_gelu, info_nce, residual_norm run as plain PyTorch, several times slower")
    assert "installed without _ops_cpu.so, which takes a C++ compiler, ninja" in said
    monkeypatch.setenv("VIMPAC_BACKEND", "axial_attention=reference")  # asked for
    assert plain_ops(op_calls_of(tiny_config().model, "fp32", CPU), CPU).startswith("bias_gelu, info_nce, residual_norm run as")
    monkeypatch.setenv("VIMPAC_BACKEND", "reference")
    assert plain_ops(op_calls_of(tiny_config().model, "fp32", CPU), CPU) is None


@needs_cpu
def test_nothing_is_said_where_all_ops_have_kernels(monkeypatch):
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    assert plain_ops(op_calls_of(tiny_config().model, "fp32", CPU), CPU) is None


def test_compile_that_does_not_work(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler\nin sight")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(
        InputError, match=r"--compile on: torch.compile does not work here \(RuntimeError: no C\+\+ compiler in sight\)"
    ):
        resolve_compile("on", CPU)
    assert resolve_compile("off", CPU) == (False, None)
    assert resolve_compile("auto", CPU) == (False, None)  # compiling for a CPU is the user's choice
