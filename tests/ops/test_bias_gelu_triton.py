"""bias_gelu with the Triton kernels: on a GPU, in the interpreter, and compiled for three architectures."""

from functools import partial

import pytest
import torch
from test_bias_gelu import (
    BRAIN,
    DOUBLE,
    FORMS,
    HALF,
    SINGLE,
    WIDTHS,
    apply,
    check_no_rows,
    check_not_finite,
    check_opcheck,
    check_range,
    check_traces,
    inputs,
    is_exact,
    output_and_gradients,
)

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
from vimpac.ops import bias_gelu

pytest.importorskip("triton", reason="triton is not installed")

DTYPES = [SINGLE, HALF, *[BRAIN] * NATIVE]  # the interpreter's bfloat16 arithmetic is wrong


def test_in_the_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    poison_new_tensors(monkeypatch)


@runs_kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", WIDTHS)
def test_values_and_gradients(columns, dtype, form):
    """37 rows: the last of a program's tiles is short, and so is its last block of columns."""
    is_exact(form, inputs(37, columns, dtype, DEVICE, form), "triton")


@runs_kernels
def test_many_rows(monkeypatch):
    """Programs of backward with several tiles each, and more parts than are added at once."""
    from vimpac.kernels import bias_gelu as kernels

    monkeypatch.setattr(kernels, "SHARES", 20)
    for rows in (77, 203):  # shares of 4 and of 12 rows
        is_exact("again", inputs(rows, 13, device=DEVICE, form="again"), "triton")


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_range_and_beyond(dtype):
    check_range(dtype, "triton", DEVICE)
    check_not_finite(dtype, "triton", DEVICE)


@runs_kernels
@pytest.mark.parametrize("form", FORMS)
def test_no_rows(form):
    check_no_rows(form, "triton", DEVICE)


@runs_kernels
def test_strides_repeated():
    """Inputs that are transposed, start anywhere or repeat; and the same call twice has the same bits."""
    h, bias = (v.detach() for v in inputs(12, 20, device=DEVICE))
    shifted = torch.zeros(241, device=DEVICE)[1:].view(12, 20).copy_(h)
    run = partial(output_and_gradients, partial(apply, "gelu", backend="triton"))
    expected = run([v.clone().requires_grad_() for v in (h, bias)])
    for same in (h.t().contiguous().t(), shifted, h):
        assert all(map(torch.equal, run([v.detach().requires_grad_() for v in (same, bias)]), expected))
    once = h[:1].expand(12, 20)
    assert torch.equal(bias_gelu(once, bias, "triton"), bias_gelu(once.clone(), bias, "triton"))


@runs_kernels
def test_opcheck():
    for dtype in DTYPES:
        check_opcheck(dtype, "triton", DEVICE)


@runs_kernels
def test_traces_whole_with_any_number_of_rows():
    check_traces("again", "triton", DEVICE)


@runs_in_interpreter
@pytest.mark.parametrize("columns", [512, 300])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_bytes(dtype, columns):
    """What the kernels ask of memory. Forward: h and the output. Backward: the gradient, h and its gradient, and the output
    if it is made again; and parts. The bias once a program."""
    from vimpac.kernels import bias_gelu as kernels

    rows = 40
    h, vector, programs = dtype.itemsize * rows * columns, 4 * columns, rows // kernels.ROWS
    parts = vector * (2 * programs + 1)  # written, read, and their sum written
    for form, again in (("gelu", 0), ("saved", 0), ("again", 1)):
        call = inputs(rows, columns, dtype, form=form)
        with count_kernel_bytes() as counted:
            out = apply(form, call, "triton")
            forward, _ = sum(counted), counted.clear()
            torch.autograd.grad(out, call, torch.ones_like(out))
        assert forward == 2 * h + vector * programs
        assert sum(counted) == (3 + again) * h + vector * programs + parts


@runs_kernels
def test_what_it_does_not_take():
    with pytest.raises(ValueError, match=r"torch.float64, it takes float32, float16, bfloat16"):
        bias_gelu(*inputs(2, 3, DOUBLE, DEVICE), backend="triton")


@not_interpreted
def test_says_what_it_needs():
    with pytest.raises(ValueError, match="tensors are on cpu, it needs a CUDA device"):
        apply("gelu", inputs(2, 3), "triton")


# --- machine code -----------------------------------------------------------------------------------------------------

TYPES = {"bias": "*fp32", "parts": "*fp32", "rows": "i32", "share": "i32"}


def compiled(architecture, function, columns, kind, **constants):
    """A kernel of tensors of a Triton type."""
    from vimpac.kernels import bias_gelu as kernels

    kernel = getattr(kernels, function)
    constants |= {"F": columns, "ROWS": kernels.ROWS, "COLUMNS": kernels.COLUMNS}
    types = dict.fromkeys(kernel.arg_names, kind) | TYPES
    return compile_kernel(kernel, architecture, types, constants, {"num_warps": kernels.WARPS})


def has_no_spills(architecture, columns, kind):
    wide = columns % 16 == 0
    for function, options in (("_forward", {}), ("_backward", {"OUTPUT": True}), ("_backward", {"OUTPUT": False})):
        binary = compiled(architecture, function, columns, kind, **options)
        check_binary(binary, architecture, matrix=False, wide_loads=wide)


@not_interpreted
def test_compiles_without_spills():
    """Wide accesses where every row is aligned."""
    jobs = [(architecture, 2048, "*bf16") for architecture in ARCHITECTURES]
    check_all(has_no_spills, [*jobs, (80, 7, "*fp32"), (90, 130, "*fp16"), (100, 4096, "*fp32")])
