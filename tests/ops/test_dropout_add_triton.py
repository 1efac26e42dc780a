"""dropout_add with the Triton kernel: on a GPU, in the interpreter, and compiled for three architectures."""

import pytest
import torch
from test_dropout_add import SEEDS, inputs, kept, upstream, value_and_gradients
from torch.testing import assert_close

from kernel_checks import (
    ARCHITECTURES,
    DEVICE,
    NATIVE,
    check_binary,
    compile_kernel,
    count_kernel_bytes,
    not_interpreted,
    poison_new_tensors,
    run_in_interpreter,
    runs_in_interpreter,
    runs_kernels,
)
from vimpac.ops import dispatch, dropout_add, dropout_add_reference
from vimpac.ops.philox import seed_tensor

pytest.importorskip("triton", reason="triton is not installed")

SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
MIXED = [(SINGLE, SINGLE), (HALF, HALF), (SINGLE, HALF), (HALF, SINGLE)]
if NATIVE:  # the interpreter's bfloat16 arithmetic is wrong
    MIXED += [(BRAIN, BRAIN), (SINGLE, BRAIN), (BRAIN, HALF)]
BLOCK = 64 * 64  # elements of a program
SIZES = [0, 1, 15, 16, 63, 64, 65, 1000, BLOCK - 16, BLOCK, BLOCK + 1, 2 * BLOCK + 48]


def test_in_the_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    poison_new_tensors(monkeypatch)


@runs_kernels
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("elements", [1, 16, 65, 200])
def test_is_the_docstring(elements, seed):
    x, y = inputs(elements, device=DEVICE)
    out, _, grad_y = value_and_gradients(dropout_add, x, y, 0.3, seed, "triton")
    keep = torch.tensor([kept(i, 0.3, seed) for i in range(elements)], device=DEVICE)
    assert_close(out, x + keep * y / 0.7, rtol=1e-6, atol=1e-6)  # float32, a product and a sum
    assert torch.equal(grad_y != 0, keep)


@runs_kernels
@pytest.mark.parametrize("dtypes", MIXED)
@pytest.mark.parametrize("elements", SIZES)
def test_is_the_reference(elements, dtypes):
    """The same elements, in every pair of dtypes: gradients bit for bit, sums to one rounding, since product and sum are one
    instruction on a GPU."""
    x, y = (z.detach().to(dtype).requires_grad_() for z, dtype in zip(inputs(elements, device=DEVICE), dtypes, strict=True))
    got = value_and_gradients(dropout_add, x, y, 0.1, 5, "triton")
    expected = value_and_gradients(dropout_add, x, y, 0.1, 5, "reference")
    assert [z.dtype for z in got] == [torch.promote_types(*dtypes), *dtypes]
    assert all(torch.equal(a, b) for a, b in zip(got[1:], expected[1:], strict=True))
    assert_close(got[0], expected[0], rtol=torch.finfo(expected[0].dtype).eps, atol=1e-6)


@runs_kernels
@pytest.mark.parametrize("p, all_of", [(1e-11, True), (0.5, None), (1 - 1e-12, False)])
def test_rates(p, all_of):
    x, y = inputs(3000, device=DEVICE)
    out = dropout_add(x, y, p, 1, "triton")
    assert_close(out, dropout_add(x, y, p, 1, "reference"), rtol=1e-6, atol=1e-6)
    if all_of is not None:
        assert_close(out, x + y if all_of else x, rtol=1e-6, atol=1e-6)


@runs_kernels
def test_strides_and_offsets():
    """Inputs that are transposed, start anywhere in memory, or repeat."""
    x, y = inputs(40, 24, device=DEVICE)
    shifted = torch.zeros(961, device=DEVICE)
    for a, b in ((x.T, y.T), (x[:, ::2], y[:, 1::2]), (shifted[1:].view(40, 24), y), (x[:1].expand(40, 24), y)):
        out = dropout_add(a, b, 0.2, 3, "triton")
        assert_close(out, dropout_add(a, b, 0.2, 3, "reference"), rtol=1e-6, atol=1e-6)


@runs_in_interpreter
def test_counters_past_32_bits(monkeypatch):
    """Element 2^34 has counter 2^32, whose carry is the second word. Only the program of that element's group runs, moved to
    the beginning of the tensors."""
    from triton.runtime.interpreter import InterpreterBuilder

    from vimpac.kernels import dropout_add as kernels

    def far(builder, axis, place=InterpreterBuilder.create_get_program_id):
        program = place(builder, axis)
        program.data = program.data + 2**28
        return program

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", far)
    y, out = torch.ones(64), torch.zeros(64)
    options = kernels.constants(0.5, False, 64) | {"GROUPS": 1, "GROUP": 0}
    kernels._dropout_add[(1,)](y, y, out, torch.tensor(9), 64, **options)
    assert (out != 0).tolist() == [kept(2**34 + i, 0.5, 9) for i in range(64)]


@runs_kernels
def test_opcheck():
    for dtypes in MIXED:
        x, y = (z.detach().to(dtype) for z, dtype in zip(inputs(5, 13, device=DEVICE), dtypes, strict=True))
        seed = seed_tensor(7, x.device)
        torch.library.opcheck(dispatch.overload("dropout_add", "triton"), (x, y, 0.3, seed))
        torch.library.opcheck(dispatch.overload("dropout_add_backward", "triton"), (x, 0.3, seed, y.dtype))


@runs_kernels
def test_traces_whole_with_any_size():
    torch.compiler.reset()
    backend = "inductor" if NATIVE else "aot_eager"
    run = torch.compile(
        lambda *call: dropout_add(*call[:2], 0.3, call[2], "triton"), fullgraph=True, dynamic=True, backend=backend
    )
    for rows, seed in ((50, 5), (70, -(2**62))):
        with torch.compiler.set_stance("default" if rows == 50 else "fail_on_recompile"):
            x, y = inputs(rows, 3, device=DEVICE)
            call = (x, y, seed_tensor(seed, x.device))
            got = value_and_gradients(run, *call)
        expected = value_and_gradients(lambda *call: dropout_add_reference(*call[:2], 0.3, call[2]), *call)
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, rtol=1e-6, atol=1e-6)


@runs_kernels
def test_graph_replays_with_other_seeds():
    if not NATIVE:
        pytest.skip("CUDA graphs need a GPU")
    x, y = (z.detach() for z in inputs(1000, device=DEVICE))
    seed = seed_tensor(1, x.device)
    dropout_add(x, y, 0.3, seed, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dropout_add(x, y, 0.3, seed, "triton")
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        assert_close(out, dropout_add(x, y, 0.3, value, "reference"), rtol=1e-6, atol=1e-6)


@runs_in_interpreter
@pytest.mark.parametrize("dtypes, forward, backward", [((SINGLE, HALF), 4 + 2 + 4, 4 + 2), ((HALF, HALF), 6, 4)])
def test_bytes(dtypes, forward, backward):
    """What a kernel asks of memory: x, y and the sum; the gradient in and out; the seed once a program."""
    n, programs = 2 * BLOCK + 64, 3
    x, y = (z.detach().to(dtype).requires_grad_() for z, dtype in zip(inputs(n), dtypes, strict=True))
    with count_kernel_bytes() as counted:
        out = dropout_add(x, y, 0.1, 1, "triton")
        first, _ = sum(counted), counted.clear()
        torch.autograd.grad(out, (x, y), upstream(out))
    assert first == forward * n + 8 * programs
    assert sum(counted) == backward * n + 8 * programs


@runs_kernels
def test_float64_is_refused():
    x, y = inputs(4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"torch.float64, it takes float32, float16, bfloat16"):
        dropout_add(x, y, 0.1, 1, "triton")
    with pytest.raises(ValueError, match=r"torch.float64, it takes"):
        dropout_add(x, y.float(), 0.1, 1, "triton")


@not_interpreted
def test_says_what_it_needs():
    x, y = inputs(4)
    with pytest.raises(ValueError, match="tensors are on cpu, it needs a CUDA device"):
        dropout_add(x, y, 0.1, 1, "triton")


@not_interpreted
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "x, y, out",
    [
        ("*fp32", "*bf16", "*fp32"),
        ("*bf16", "*bf16", "*bf16"),
        ("*fp32", "*fp32", "*fp32"),
        (None, "*fp32", "*bf16"),
        (None, "*bf16", "*bf16"),
    ],
)
def test_compiles_to_wide_accesses_without_spills(x, y, out, architecture):
    from vimpac.kernels import dropout_add as kernels

    types = {"x": x or y, "y": y, "out": out, "seed": "*i64", "elements": "i64"}
    constants = kernels.constants(0.1, x is not None, 64) | {"GROUP": 64}
    binary = compile_kernel(kernels._dropout_add, architecture, types, constants, {"num_warps": kernels.WARPS})
    check_binary(binary, architecture, matrix=False)
    accesses = [line for line in binary.listing.splitlines() if "LDG" in line or "STG" in line]
    assert sum(".128" not in line for line in accesses) == 1  # the seed
