"""The Triton kernels of axial_attention, compiled for GPUs that are not there: registers, shared memory, instructions."""

import itertools

import pytest
import torch

from divergence import divergent
from kernel_checks import (
    ARCHITECTURES,
    SHARED_BYTES,
    check_all,
    check_binary,
    compile_attention,
    not_interpreted,
    uneven_sums,
)

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = not_interpreted

GRIDS = [(5, 16, 16), (5, 32, 32), (10, 16, 16), (10, 32, 32)]  # Table 2
HEADS = [(8, 64), (12, 64), (16, 32)]  # Table 3: Small, Base, Large-Half


@pytest.mark.parametrize(
    "third, found",
    [
        ("FFMA R4, R2, R3, R5", 1),  # R2 · R3, unrounded, to what another lane made of its own R2 · R3
        ("FFMA.FTZ R4, -R3.reuse, R2, R5", 1),
        ("FFMA R4, R2, R6, R5", 0),  # another product
        ("FADD R4, R0, R5", 0),
        ("IMAD.MOV.U32 R5, RZ, RZ, R7 ;\n        /*0130*/                   FFMA R4, R2, R3, R5", 0),  # R5 is another number
        ("IMAD.MOV.U32 R2, RZ, RZ, R7 ;\n        /*0130*/                   FFMA R4, R2, R3, R5", 0),  # so is R2
    ],
)
def test_sums_that_differ_by_lane_are_found(third, found):
    sass = f"""
        /*0100*/                   FMUL R0, R2, R3 ;
        /*0110*/              @!P0 SHFL.BFLY PT, R5, R0, 0x10, 0x1f ;
        /*0120*/                   {third} ;
    """
    assert len(uneven_sums(sass)) == found


def check_compiled(architecture, *kind):
    binary, launch = compile_attention(architecture, *kind, torch.bfloat16)
    check_binary(binary, architecture, matrix=True)
    assert not divergent(binary.listing)
    programs = 8 // launch["num_warps"]  # 8 warps on a multiprocessor at 255 registers: shared memory allows them
    assert programs * (binary.shared + 1024) <= SHARED_BYTES[architecture]


def test_compiles_to_tensor_cores_without_spills():
    jobs = []
    for architecture in sorted(
        ARCHITECTURES, key=lambda x: x != 90
    ):  # tests/tools/test_predicted.py finds these in Triton's cache
        heads = HEADS if architecture == 90 else HEADS[::2]  # Base differs from Small in a constant only; minutes
        kinds = itertools.product(("_forward", "_backward"), GRIDS, heads, (("T",), ("H", "W")))
        jobs += [(architecture, kernel, grid, *shape, axes) for kernel, grid, shape, axes in kinds]
    check_all(check_compiled, jobs)


def check_padded(kernel, grid, heads, width, axes):
    """Where there is PAD the code is longer, and 10×32×32 backward may spill as much as before that."""
    binary, launch = compile_attention(90, kernel, grid, heads, width, axes, torch.bfloat16, padded=True)
    assert int(binary.usage.split("STACK:")[1].split()[0]) <= (16 if grid == (10, 32, 32) else 0)
    assert 8 // launch["num_warps"] * (binary.shared + 1024) <= SHARED_BYTES[90]


def test_padding_does_not_spill():
    kinds = itertools.product(("_forward", "_backward"), [(GRIDS[0], *HEADS[0]), (GRIDS[3], *HEADS[2])], (("T",), ("H", "W")))
    check_all(check_padded, [(kernel, *shape, axes) for kernel, shape, axes in kinds])


def check_float32(architecture, kernel, width, axes):
    """tf32 products, and a little local memory is all that is left of its registers."""
    binary, _ = compile_attention(architecture, kernel, (5, 16, 16), 512 // width, width, axes, torch.float32)
    assert ".tf32" in binary.ptx or "kind::tf32" in binary.ptx
    stack = int(binary.usage.split("STACK:")[1].split()[0])
    assert stack <= (0 if kernel == "_forward" else 256), f"{stack} bytes of stack"
    assert binary.shared <= 99 << 10  # what sm_86 and sm_120 have


def test_float32_runs_on_tensor_cores():
    check_all(check_float32, list(itertools.product((90,), ("_forward", "_backward"), (64, 32), (("T",), ("H",)))))


def check_shared(architecture, dtype, width, length=64, padded=False):
    """What is said of lines of 33 to 64 tokens, and where there is PAD, holds, and all else fits into the smallest GPU."""
    from vimpac.ops.axial_attention import TRITON_SHARED, TRITON_SHARED_PADDED

    table = TRITON_SHARED if length > 32 else TRITON_SHARED_PADDED if padded else {}
    for kernel in ("_forward", "_backward"):
        binary, _ = compile_attention(architecture, kernel, (2, length, 3), 1, width, ("H",), dtype, padded=padded)
        assert binary.shared <= table.get((dtype.itemsize, width), 99 << 10)


def test_shared_memory_of_long_lines():
    jobs = [(90, torch.bfloat16, 64), (90, torch.bfloat16, 128), (90, torch.float32, 32)]
    with_pad = [(90, torch.bfloat16, 64, 64, True), (90, torch.float32, 128, 32, True)]
    check_all(check_shared, jobs + with_pad)
