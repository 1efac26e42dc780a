"""residual_norm with the Triton kernels: on a GPU, in the interpreter, and compiled for three architectures."""

from functools import partial

import pytest
import torch
from test_dropout_add import kept
from test_residual_norm import (
    BRAIN,
    FORMS,
    HALF,
    SEED,
    SINGLE,
    apply,
    check_one_column,
    check_zero_weights,
    inputs,
    is_exact,
    outputs_and_gradients,
)
from test_residual_norm_exact import check_exact
from torch.testing import assert_close

from kernel_checks import (
    ARCHITECTURES,
    DEVICE,
    NATIVE,
    check_all,
    check_binary,
    compile_kernel,
    count_kernel_bytes,
    not_interpreted,
    poison_new_tensors,
    run_in_interpreter,
    runs_in_interpreter,
    runs_kernels,
)
from vimpac.ops import dispatch, dropout_add, residual_norm
from vimpac.ops.dropout_add import dropout_keep
from vimpac.ops.philox import seed_tensor

pytest.importorskip("triton", reason="triton is not installed")

MIXED = [(SINGLE, SINGLE), (HALF, HALF), (SINGLE, HALF)]
if NATIVE:  # the interpreter's bfloat16 arithmetic is wrong
    MIXED += [(BRAIN, BRAIN), (SINGLE, BRAIN)]
WIDTHS = [7, 64, 130, 512, 768, 1024]


def test_in_the_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    poison_new_tensors(monkeypatch)


@runs_kernels
@pytest.mark.parametrize("keeps", ["sum", "output"])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_exact_rows(p, keeps):
    check_exact("triton", p, keeps, DEVICE, HALF)


@runs_kernels
@pytest.mark.parametrize("dtypes", MIXED)
@pytest.mark.parametrize("columns", WIDTHS)
def test_is_as_exact_as_plain_pytorch(columns, dtypes):
    """Rows that fill no tile; with dropout and without."""
    for form in FORMS:
        p = 0.0 if form == "sum" and columns % 3 else 0.1
        is_exact(form, inputs(5, columns, dtypes, DEVICE), "triton", p)


@runs_kernels
def test_many_rows(monkeypatch):
    """Programs of backward with several tiles each, the last of them short, and more parts than are added at once."""
    from vimpac.kernels import residual_norm as kernels

    monkeypatch.setattr(kernels, "TILE", 64)
    monkeypatch.setattr(kernels, "SHARES", 20)
    for rows in (37, 77):  # tiles of 4 rows: one a program, and two
        is_exact("both", inputs(rows, 13, device=DEVICE), "triton")


@runs_kernels
@pytest.mark.parametrize("form", FORMS)
def test_one_column(form):
    check_one_column(form, inputs(9, 1, device=DEVICE), "triton")


@runs_kernels
@pytest.mark.parametrize("value", [0.0, 1e-40])
def test_a_weight_of_zero(value):
    call = inputs(33, 130, device=DEVICE)
    with torch.no_grad():
        call[3][5], call[3][64:70] = value, value
    is_exact("sum", call, "triton")
    check_zero_weights(call, "triton")


@runs_kernels
@pytest.mark.parametrize("columns", [1, 7, 64, 130, 192])
def test_the_mask_is_dropout_adds(columns):
    for seed, p in ((0, 0.1), (SEED, 0.5)):
        x, y, _, weight, norm_bias = inputs(21, columns, device=DEVICE)
        keep = dropout_keep(y.shape, p, torch.tensor(seed, device=DEVICE))
        call = (torch.zeros_like(x), y, None, weight, norm_bias)
        total, _ = apply("both", call, p, seed, backend="triton")
        assert torch.equal(total != 0, keep)
        assert_close(total, dropout_add(torch.zeros_like(x), y, p, seed, "triton"), rtol=1e-6, atol=0)
        assert torch.equal(torch.autograd.grad(total, y, torch.ones_like(total))[0] != 0, keep)


@runs_in_interpreter
@pytest.mark.parametrize("columns", [64, 65])
def test_elements_past_32_bits(columns):
    """Row 2^32 of 64 columns begins at element 2^38, whose counter has a second word."""
    import triton
    import triton.language as tl

    from vimpac.kernels import residual_norm as kernels

    @triton.jit
    def mask(out, seed, row, BC: tl.constexpr, CONST: tl.constexpr, draw: tl.constexpr):
        rows, column = tl.zeros((1,), tl.int64) + row, tl.arange(0, BC)
        keep = draw(rows, column, tl.load(seed), CONST)
        tl.store(out + column[None, :], keep.to(tl.int32), mask=column[None, :] < CONST.C)

    row, out = 2**32, torch.zeros(columns, dtype=torch.int32)
    const = kernels.constants(columns, 0.5)._replace(ROWS=1)
    mask[(1,)](out, torch.tensor(9), row, const.BC, const, kernels._keep)
    assert out.tolist() == [kept(row * columns + i, 0.5, 9) for i in range(columns)]


@runs_kernels
@pytest.mark.parametrize("form", FORMS)
def test_no_rows(form):
    results = outputs_and_gradients(partial(apply, form, backend="triton"), inputs(0, 5, device=DEVICE))
    assert all(v.shape == (0, 5) for v in results[:-3]) and not any(v.any() for v in results[-3:])


@runs_kernels
def test_strides_repeated():
    """Inputs that are transposed, start anywhere or repeat; and the same call twice has the same bits."""
    x, y, *vectors = (v.detach() for v in inputs(12, 20, device=DEVICE))
    shifted = torch.zeros(241, device=DEVICE)[1:].view(12, 20).copy_(x)
    run = partial(outputs_and_gradients, partial(apply, "both", backend="triton"))
    expected = run([v.clone().requires_grad_() for v in (x, y, *vectors)])
    for a, b in ((x.t().contiguous().t(), y), (shifted, y), (x, y.t().contiguous().t()), (x, y)):
        assert all(map(torch.equal, run([v.detach().requires_grad_() for v in (a, b, *vectors)]), expected))
    once = (x[:1].expand(12, 20), y, *vectors)
    assert all(
        map(torch.equal, apply("both", once, backend="triton"), apply("both", (once[0].clone(), *once[1:]), backend="triton"))
    )


@runs_kernels
def test_what_is_not_finite_stays_so():
    call = [v.detach() for v in inputs(6, 70, device=DEVICE)]
    dropped = int((~dropout_keep((6, 70), 0.5, torch.tensor(SEED, device=DEVICE))[2]).nonzero()[0])
    call[1][2, dropped] = float("nan")
    total, out = apply("both", call, p=0.5, backend="triton")
    assert total[2, dropped].isnan() and out[2].isnan().all() and out[[0, 1, 3, 4, 5]].isfinite().all()


@runs_kernels
def test_opcheck():
    forward, backward = (dispatch.overload(f"residual_norm{name}", "triton") for name in ("", "_backward"))
    for dtypes, p, one in ((MIXED[0], 0.0, True), (MIXED[2], 0.3, False)):
        x, y, bias, weight, norm_bias = (v.detach() for v in inputs(5, 13, dtypes, DEVICE))
        seed = seed_tensor(7, DEVICE) if p > 0 else None
        torch.library.opcheck(forward, (x, y, bias if one else None, weight, norm_bias, p, seed, 1e-12, one))
        statistics = torch.rand(2, 5, device=DEVICE)
        torch.library.opcheck(backward, (x, x if one else None, x, statistics, weight, norm_bias, p, seed, one, y.dtype))


@runs_kernels
def test_traces_whole_with_any_number_of_rows():
    torch.compiler.reset()
    run = partial(apply, "both", backend="triton")
    compiled = torch.compile(lambda call: run(call[:5], 0.3, call[5]), fullgraph=True, backend="aot_eager")
    for rows, seed in ((20, 5), (30, -(2**62))):
        with torch.compiler.set_stance("default" if rows == 20 else "fail_on_recompile"):
            call = [*inputs(rows, 3, device=DEVICE), seed_tensor(seed, DEVICE)]
            for v in call[:2]:
                torch._dynamo.mark_dynamic(v, 0)
            got = outputs_and_gradients(compiled, call)
        expected = outputs_and_gradients(lambda call: run(call[:5], 0.3, call[5]), call)
        assert all(map(torch.equal, got, expected))


@runs_in_interpreter
@pytest.mark.parametrize("dtypes", [(SINGLE, HALF), (HALF, HALF)])
def test_bytes(dtypes):
    """What the kernels ask of memory. Forward: x, y and out, the sum if it is kept. Backward: the gradient, what was kept, two
    gradients; and parts. Two numbers a row, and vectors and the seed once a program."""
    from vimpac.kernels import residual_norm as kernels

    rows, columns = 40, 512
    x, y = (dtype.itemsize * rows * columns for dtype in dtypes)
    programs = rows * columns // kernels.TILE
    small = 8 * programs + 2 * 4 * rows  # seeds, statistics
    for form, writes, reads in (("sum", 1, 0), ("output", 0, 0), ("both", 1, 1)):
        call = inputs(rows, columns, dtypes)
        with count_kernel_bytes() as counted:
            outputs = apply(form, call, backend="triton")
            first, _ = sum(counted), counted.clear()
            torch.autograd.grad(outputs, call, [torch.ones_like(out) for out in outputs])
        assert first == 2 * x + y + writes * x + small + 3 * 4 * columns * programs
        statistics = 2 if writes else 1  # only rstd, where the norm is known
        parts = 3 * 4 * columns * (2 * programs + 1)  # written, read, and their sum written
        ours = (3 + reads) * x + y + 8 * programs + statistics * 4 * rows + 2 * 4 * columns * programs
        assert sum(counted) == ours + parts


@runs_kernels
def test_what_it_does_not_take():
    x = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"torch.float64, it takes float32, float16, bfloat16"):
        residual_norm(x, x, None, x[0], x[0], backend="triton")
    x = torch.zeros(1, 4097, device=DEVICE)
    with pytest.raises(ValueError, match=r"rows of 4097 elements, it takes at most 4096"):
        residual_norm(x, x, None, x[0], x[0], backend="triton")


@not_interpreted
def test_says_what_it_needs():
    with pytest.raises(ValueError, match="tensors are on cpu, it needs a CUDA device"):
        apply("sum", inputs(2, 3), backend="triton")


# --- machine code -----------------------------------------------------------------------------------------------------

TYPES = {name: "*fp32" for name in ("bias", "weight", "norm_bias", "statistics", "parts")} | {
    **{name: "*fp32" for name in ("exact", "out_exact", "grad_exact", "of_exact")},
    "first_exact": "i32",
    "seed": "*i64",
    "rows": "i32",
    "share": "i32",
    "eps": "fp32",
}


def compiled(architecture, function, columns, states, added, **options):
    """A kernel of tensors of x's and y's Triton types."""
    from vimpac.kernels import residual_norm as kernels

    kernel, const = getattr(kernels, function), kernels.constants(columns, 0.1, **options)
    types = dict.fromkeys(kernel.arg_names, states) | {"y": added, "of_y": added} | TYPES
    return compile_kernel(kernel, architecture, types, {"CONST": const}, kernels.shape(const))


def has_no_spills(architecture, columns, states, added):
    wide = columns % 64 == 0
    for function, options in (
        ("_forward", {"BIAS": True, "SUM": True}),
        ("_backward", {"SUM": True, "MORE": True}),
        ("_backward", {}),
        ("_forward", {"BIAS": True, "EXACT": True}),
        ("_backward", {"EXACT": True}),
    ):
        binary = compiled(architecture, function, columns, states, added, **options)
        check_binary(binary, architecture, matrix=False, wide_loads=wide)


@not_interpreted
def test_compiles_without_spills():
    """Wide accesses where a row is whole groups of 64 elements."""
    jobs = [(architecture, 512, "*bf16", "*bf16") for architecture in ARCHITECTURES]
    jobs += [(90, columns, "*bf16", "*bf16") for columns in (130, 768, 1024, 4096)]
    check_all(has_no_spills, [*jobs, (80, 7, "*fp32", "*bf16"), (100, 1024, "*fp32", "*fp32"), (80, 768, "*fp32", "*bf16")])
