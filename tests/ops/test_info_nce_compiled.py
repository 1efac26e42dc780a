"""info_nce's Triton kernels without a GPU: float32 through tf32 products, how work is split, and what they are compiled to."""

import re

import pytest
import torch
import torch.nn.functional as F

from kernel_checks import ARCHITECTURES, check_binary, compile_kernel, not_interpreted, resident_programs

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = not_interpreted

# --- float32 through tf32 tensor cores --------------------------------------------------------------------------------


def tf32(x, nearest):
    """float32 with 10 bits after the point, rounded as the kernel does or cut off as a tensor core may."""
    return ((x.view(torch.int32) + (0x1000 if nearest else 0)) & -0x2000).view(torch.float32)


def cut_off(x):
    """float64 to float32 towards zero, as tensor cores keep their sums."""
    near = x.float()
    return torch.where(near.double().abs() > x.abs(), torch.nextafter(near, torch.zeros(())), near)


def on_tensor_cores(products, total):
    """Sums of products of matrices, 8 terms a step, each step cut off."""
    for a, b in products:
        for k in range(0, a.shape[1], 8):
            total = cut_off(total.double() + a[:, k : k + 8].double() @ b[:, k : k + 8].double().T)
    return total


@pytest.mark.parametrize("d", [64, 256, 768])
def test_three_tf32_products_are_as_exact_as_float32(d):
    """Scores of features that agree, lower parts and sums cut off by the tensor core: at most twice float32's error."""
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(100, d, generator=g)
    f, h = (F.normalize(shared + 0.5 * torch.randn(100, d, generator=g), dim=1) for _ in range(2))
    exact = f.double() @ h.double().T
    (f_high, f_low), (h_high, h_low) = ((tf32(x, True), tf32(x - tf32(x, True), False)) for x in (f, h))
    triples = [(f_low, h_high), (f_high, h_low), (f_high, h_high)]
    three, running = torch.zeros(100, 100), torch.zeros(100, 100)
    for k in range(0, d, 32):  # BK of every launch, or half of it
        steps = [(a[:, k : k + 32], b[:, k : k + 32]) for a, b in triples]
        three += on_tensor_cores(steps, torch.zeros(100, 100))
        running = on_tensor_cores(steps, running)
    plain, ours, one, naive = ((x.double() - exact).norm() for x in (f @ h.T, three, f_high @ h_high.T, running))
    assert ours <= 2 * plain
    assert one > 100 * plain  # a single product is another thing
    assert naive > 2 * plain or d == 64  # and so is a sum that never leaves the tensor core


def test_parts_of_long_sums():
    from vimpac.kernels.info_nce import ranges

    assert ranges(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert ranges(6, 6) == [(0, 6)]
    assert ranges(3, 0) == [(0, 1), (1, 2), (2, 3)]


def test_torch_allows_tf32():
    """The switch is torch's, old or new, and asking never warns or raises."""
    from vimpac.kernels import info_nce as kernels

    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        for name, value, allowed in (
            ("fp32_precision", "tf32", True),
            ("fp32_precision", "ieee", False),
            ("allow_tf32", True, True),
            ("allow_tf32", False, False),
        ):
            setattr(switch, name, value)
            assert kernels.allows_tf32() is allowed
    finally:
        switch.allow_tf32 = False
        switch.fp32_precision = before


def test_splits_fill_the_gpu():
    """132 multiprocessors, two programs each or one: 1024 videos are 16 tiles of 128 rows. Every split has a column tile."""
    from vimpac.kernels.info_nce import count_splits

    assert count_splits(16, 32, 264) == 16
    assert count_splits(16, 64, 132) == 8
    assert count_splits(2048, 4096, 132) == 1
    assert count_splits(1, 2, 132) == 2
    assert count_splits(1, 1, 132) == 1


# --- compiled without a GPU -------------------------------------------------------------------------------------------

MATRIX = r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.\S*(tf32|bf16|kind::f16)"


def compiled(kernel, architecture, dtype, d, allow_tf32=False, group=False):
    from vimpac.kernels import info_nce as kernels

    function = getattr(kernels, kernel)
    launch = (kernels.FORWARD if kernel == "_forward" else kernels.BACKWARD)[architecture // 10, dtype.itemsize]
    constants = {"TILE": kernels.tile(launch, d)._replace(TF32=allow_tf32)}
    if kernel == "_backward":
        constants["GROUP"] = group
    integers = ("N", "rows", "offset", "splits", "begin", "end")
    types = {name: "*fp32" for name in function.arg_names} | dict.fromkeys(integers, "i32")
    types |= {"features": "*bf16" if dtype == torch.bfloat16 else "*fp32", "scale": "fp32"}
    return compile_kernel(function, architecture, types, constants, kernels.options(launch))


def products(binary):
    """Matrix instructions by type."""
    found = [match[1] for match in re.findall(MATRIX, binary.ptx)]
    return {kind: found.count(kind) for kind in set(found)}


@pytest.mark.parametrize(
    "kernel, dtype, d",
    [
        ("_forward", torch.float32, 256),  # d is a loop there
        ("_forward", torch.bfloat16, 256),
        ("_backward", torch.float32, 64),
        ("_backward", torch.float32, 128),
        ("_backward", torch.float32, 256),
        ("_backward", torch.bfloat16, 256),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_to_tensor_cores_without_spills(architecture, kernel, dtype, d):
    binary = compiled(kernel, architecture, dtype, d)
    check_binary(binary, architecture, matrix=True)
    expected = {"tf32"} if dtype == torch.float32 else {"kind::f16"} if architecture == 100 else {"bf16"}
    assert products(binary).keys() == expected
    from vimpac.kernels import info_nce as kernels

    launch = (kernels.FORWARD if kernel == "_forward" else kernels.BACKWARD)[architecture // 10, dtype.itemsize]
    assert launch.resident <= resident_programs(binary, architecture, launch.num_warps)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_are_read_after_those_of_all_programs(architecture):
    """The counter's atomic acquires and releases over the whole GPU; what the last program adds up comes from the L2 cache."""
    from vimpac.kernels import info_nce as kernels

    types = {name: "*fp32" for name in kernels._combine.arg_names} | {"count": "*i32", "rows": "i32", "splits": "i32"}
    constants = {"R": kernels.ROWS_COMBINED, "SPLITS": kernels.MAX_SPLITS, "BS": 256}
    binary = compile_kernel(kernels._combine, architecture, types, constants, {"num_warps": 4})
    check_binary(binary, architecture, matrix=False, wide_loads=False)  # a row of parts need not be aligned
    assert "atom.global.gpu.acq_rel" in binary.ptx or "atom.acq_rel.gpu.global" in binary.ptx
    assert "ld.global.cg" in binary.ptx.split("atom.")[1]


def test_group_form_does_not_spill():
    check_binary(compiled("_backward", 90, torch.float32, 256, group=True), 90, matrix=True)


def test_three_products_where_torch_allows_one():
    one, three = (products(compiled("_forward", 90, torch.float32, 256, x))["tf32"] for x in (True, False))
    assert three == 3 * one
