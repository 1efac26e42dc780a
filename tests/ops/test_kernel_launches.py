"""Every launch as a GPU would get it, but for the run: real arguments, Triton's specialisation of them, the compilation.

Triton turns an integer that is 1 into a constant and looks at the alignment of every pointer; the interpreter does neither. So
the shapes here are odd ones: one clip, one token, heads of width 1, strides of 1, nothing aligned.
"""

import importlib
from pathlib import Path

import pytest
import torch

from kernel_checks import launches_compile_only, not_interpreted

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = not_interpreted
HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "B, grid, axes, heads, width, dtype, p, context, padded",
    [
        (1, (1, 1, 1), ("T",), 1, 16, SINGLE, 0.1, True, False),
        (1, (5, 16, 16), ("H", "W"), 8, 64, HALF, 0.1, True, True),
        (3, (2, 4, 3), ("T", "H", "W"), 3, 1, HALF, 0.0, True, False),  # the heads' stride is 1
        (2, (7, 2, 9), ("T",), 2, 20, torch.float16, 0.2, False, True),
        (1, (2, 64, 3), ("H",), 1, 128, HALF, 0.1, True, False),
    ],
)
def test_axial_attention(B, grid, axes, heads, width, dtype, p, context, padded):
    from vimpac.kernels import axial_attention as kernels

    rows = torch.zeros(B * (grid[0] * grid[1] * grid[2] + 1), heads, width, dtype=dtype)
    qkv, cls = torch.zeros(B, *grid, 3, heads, width, dtype=dtype), torch.zeros(B, 3, heads, width, dtype=dtype)
    pad = torch.zeros(B, *grid, dtype=torch.bool) if padded else None
    call = (qkv, cls, axes, pad, p, torch.tensor(1) if p else None, context)
    with launches_compile_only() as launched:
        kernels.forward(*call)
        kernels.backward(rows, *call)
    assert launched == ["_forward", "_add_parts", "_backward", "_add_parts"]


@pytest.mark.parametrize(
    "B, grid, dtype", [(1, (1, 1, 1), torch.int64), (5, (2, 7, 3), torch.int16), (9, (5, 16, 16), torch.uint8)]
)
@pytest.mark.parametrize("n_blocks, ratio, noisy", [(1, None, True), (40, None, False), (5, 0.15, False)])
def test_block_mask(B, grid, dtype, n_blocks, ratio, noisy):
    from vimpac.kernels import block_mask as kernels

    tokens = torch.zeros(B, *grid, dtype=dtype)
    with launches_compile_only() as launched:
        kernels.draw(tokens, torch.arange(B), torch.tensor(7), n_blocks, ratio, noisy, 100)
    assert launched == ["_draw"]


@pytest.mark.parametrize(
    "m, ranks, d, dtype", [(1, 1, 1, SINGLE), (33, 1, 256, HALF), (5, 3, 40, torch.float16), (64, 2, 300, SINGLE)]
)
def test_info_nce(m, ranks, d, dtype):
    from vimpac.kernels import info_nce as kernels

    with launches_compile_only() as launched:
        features, inverse = kernels.pack(torch.zeros(m, d, dtype=dtype), torch.zeros(m, d, dtype=dtype))
        features, inverse = features.repeat(ranks, 1), inverse.repeat(ranks)
        rows = 2 * m
        _, lse = kernels.forward(features, inverse, rows * (ranks - 1), rows, 0.2)
        kernels.backward(torch.ones(ranks), features, inverse, lse.repeat(ranks), rows * (ranks - 1), rows, 0.2)
    assert launched == ["_pack", "_forward", "_combine", "_backward", "_finish"]


@pytest.mark.parametrize("M, C, V, dtype", [(1, 1, 1, SINGLE), (7, 24, 8197, HALF), (3, 5, 11, torch.float16)])
@pytest.mark.parametrize("gradients", [True, False])
def test_masked_cross_entropy(M, C, V, dtype, gradients):
    from vimpac.kernels import masked_cross_entropy as kernels

    hidden, weight = torch.zeros(M, C, dtype=dtype), torch.zeros(V, C, dtype=dtype)
    with launches_compile_only() as launched:
        kernels.sums(hidden, weight, torch.zeros(V), torch.zeros(M, dtype=torch.int64), gradients)
    assert launched == ["_cross_entropy"]


@pytest.mark.parametrize("elements", [1, 16, 4100])
@pytest.mark.parametrize("x, y", [(SINGLE, HALF), (HALF, HALF), (SINGLE, SINGLE)])
def test_dropout_add(x, y, elements):
    from vimpac.kernels import dropout_add as kernels

    x, y = (torch.zeros(elements, dtype=dtype) for dtype in (x, y))
    with launches_compile_only() as launched:
        out = kernels.forward(x, y, 0.1, torch.tensor(1))
        kernels.backward(out, 0.1, torch.tensor(1), y.dtype)
    assert launched == ["_dropout_add"] * 2


def test_kernels_have_few_parameters():
    """Constants travel as one NamedTuple."""
    from triton import JITFunction

    folder = Path(__file__).parents[2] / "kernels"
    for module in (importlib.import_module(f"vimpac.kernels.{path.stem}") for path in folder.glob("*.py")):
        for name, function in vars(module).items():
            assert not isinstance(function, JITFunction) or len(function.arg_names) <= 16, f"{module.__name__}.{name}"


def test_seeds_of_any_alignment_share_a_compilation():
    """Every second seed of a table is aligned to 16 bytes."""
    from vimpac.kernels import axial_attention, block_mask, dropout_add

    seeds = torch.arange(4).view(2, 2)
    x, tokens = torch.zeros(64), torch.zeros(2, 2, 4, 4, dtype=torch.int64)
    qkv, cls = torch.zeros(1, 2, 4, 4, 3, 2, 16), torch.zeros(1, 3, 2, 16)
    rows = torch.zeros(33, 2, 16)
    kernels = (axial_attention._forward, axial_attention._backward, block_mask._draw, dropout_add._dropout_add)
    with launches_compile_only():
        counts = []
        for seed in seeds[1]:
            call = (qkv, cls, ("T",), None, 0.1, seed, True)
            axial_attention.forward(*call)
            axial_attention.backward(rows, *call)
            block_mask.draw(tokens, torch.arange(5)[int(seed) - 2 :][:2], seed, 5, None, False, 100)
            dropout_add.forward(x, x, 0.1, seed)
            counts.append([len(kernel.device_caches["absent sm_90"][0]) for kernel in kernels])
    assert seeds[1, 0].data_ptr() % 16 != seeds[1, 1].data_ptr() % 16
    assert counts[0] == counts[1]
