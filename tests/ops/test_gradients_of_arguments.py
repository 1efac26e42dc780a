"""Every op × every argument that may require a gradient × every backend: the definition's gradient, or an error; never None."""

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import vimpac.ops as ops
from kernel_checks import DEVICE, not_interpreted, run_in_interpreter, runs_kernels
from vimpac.ops import dispatch

GRID = (2, 3, 2)
PAD = torch.zeros(2, *GRID, dtype=torch.bool)
PAD[0, :, 1], PAD[1, 1] = True, True

# op → its arguments that may require a gradient, by shape; what else a call has. γ is the only number among them.
ARGUMENTS = {
    "axial_attention": {"qkv": (2, *GRID, 3, 2, 16), "cls_qkv": (2, 3, 2, 16)},
    "axial_attention_packed": {"qkv": (2 * 12 + 2, 3, 2, 16)},
    "dropout": {"y": (5, 13)},
    "dropout_add": {"x": (5, 13), "y": (5, 13)},
    "info_nce": {"z1": (5, 8), "z2": (5, 8), "temperature": ()},
    "masked_cross_entropy": {"hidden": (6, 8), "weight": (11, 8), "bias": (11,)},
}
REST = {
    "axial_attention": [
        {"axes": ("H", "W"), "pad": pad, "dropout_p": p, "seed": 3, "cls_in_context": context}
        for pad, p, context in [(None, 0.0, True), (PAD, 0.0, True), (PAD, 0.3, False)]
    ],
    "axial_attention_packed": [{"grid": GRID, "axes": ("T",), "pad": PAD, "dropout_p": p, "seed": 3} for p in (0.0, 0.3)],
    "dropout": [{"p": p, "seed": 3} for p in (0.0, 0.3)],
    "dropout_add": [{"p": p, "seed": 3} for p in (0.0, 0.3)],
    "info_nce": [{}],
    "masked_cross_entropy": [{"target": torch.tensor([3, -1, 0, 10, -1, 3])}],
}
WITHOUT = {"pad", "seed", "target", "tokens", "sample_ids"}  # tensors of integers
ELSEWHERE = {("axial_attention_packed", "bias")}  # test_axial_attention_bias.py: its value is in qkv already
NUMBERS = {"axial_attention": "dropout_p", "axial_attention_packed": "dropout_p", "dropout": "p", "dropout_add": "p"}


def test_in_the_interpreter():
    run_in_interpreter(__file__)


def of_device(options):
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def made(op, wanted):
    """The op's arguments, of which those wanted require a gradient."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in ARGUMENTS[op].items()}
    if "temperature" in values:
        values["temperature"] = torch.tensor(0.3)
    return {name: x.to(DEVICE).requires_grad_(name in wanted) for name, x in values.items()}


def gradients(op, wanted, options, backend):
    """Of the first output, or of both of attention's, by each argument that is wanted."""
    torch.manual_seed(7)
    arguments = made(op, wanted)
    out = getattr(ops, op)(**arguments, **of_device(options), backend=backend)
    outputs = out if op == "axial_attention" else out[:1] if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    return torch.autograd.grad(outputs, [arguments[name] for name in wanted], upstream)


def expected(op, wanted, options, backend):
    """The definition's; of backends that draw from torch's generator, what their docstring says."""
    if op.startswith("dropout") and backend == "torch" and options["p"] > 0:
        torch.manual_seed(7)
        arguments = made(op, wanted)
        out = F.dropout(arguments["y"], options["p"]) + arguments.get("x", 0)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        return torch.autograd.grad(out, [arguments[name] for name in wanted], upstream)
    return gradients(op, wanted, options, "reference")


def calls(backends_of):
    """op, arguments that require a gradient (each alone, and all), other options, backend."""
    found = []
    for op, arguments in ARGUMENTS.items():
        wanted = [[name] for name in arguments] + ([list(arguments)] if len(arguments) > 1 else [])
        for which, options, backend in itertools.product(wanted, REST[op], backends_of(op)):
            numbers = [f"{name}={x}" for name, x in options.items() if name in ("dropout_p", "p", "cls_in_context")]
            found.append(pytest.param(op, which, options, backend, id=" ".join([op, *which, *numbers, str(backend)])))
    return found


def implementations(op):
    return dispatch.names(op.removesuffix("_packed") if op != "dropout" else "dropout_add")


def skip_what_cannot_run(op, arguments, options, backend):
    """With every reason why a named backend cannot run here; any other error is one."""
    try:
        return getattr(ops, op)(**arguments, **options, backend=backend)
    except ValueError as error:
        if backend in (None, "reference") or "cannot run this call" not in str(error):
            raise
        pytest.skip(str(error))


def is_the_definitions(op, wanted, options, backend):
    got = gradients(op, wanted, options, backend)
    assert all(x is not None for x in got)
    for ours, true in zip(got, expected(op, wanted, options, backend), strict=True):
        assert_close(ours, true, rtol=1e-4, atol=1e-5)  # float32, sums of a few dozen terms of order 1 to 10


@not_interpreted
@pytest.mark.parametrize("op, wanted, options, backend", calls(lambda op: [None, *implementations(op)]))
def test_gradient_is_the_definitions(op, wanted, options, backend):
    if backend == "sdpa" and options["dropout_p"] > 0:
        pytest.skip("its dropout is torch's generator's")
    skip_what_cannot_run(op, made(op, wanted), of_device(options), backend)
    is_the_definitions(op, wanted, options, backend)


@runs_kernels
@pytest.mark.parametrize("op, wanted, options, backend", calls(lambda op: ["triton"]))
def test_gradient_of_triton_is_the_definitions(op, wanted, options, backend):
    is_the_definitions(op, wanted, options, backend)


# --- what has no gradient ---------------------------------------------------------------------------------------------


@not_interpreted
def test_every_tensor_argument_is_looked_at():
    for op in ("block_mask", *ARGUMENTS):
        for name, parameter in inspect.signature(getattr(ops, op)).parameters.items():
            if "Tensor" in parameter.annotation:
                assert name in WITHOUT or name in ARGUMENTS[op] or (op, name) in ELSEWHERE, (
                    f"{op}'s {name}: does it have a gradient?"
                )
            elif "float" in parameter.annotation:
                assert name == NUMBERS.get(op, "ratio"), f"{op}'s {name}: what if it is a tensor?"


@not_interpreted
@pytest.mark.parametrize("backend", [None, "reference", "cpu"])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", NUMBERS)
def test_a_tensor_in_place_of_a_number_is_refused(op, requires_grad, backend):
    options = REST[op][0] | {NUMBERS[op]: torch.tensor(0.3, requires_grad=requires_grad)}
    with pytest.raises(ValueError, match=rf"^{NUMBERS[op]} must be a number, got a tensor, .* {NUMBERS[op]}\.item\(\)"):
        getattr(ops, op)(**made(op, []), **options, backend=backend)


@not_interpreted
@pytest.mark.parametrize("name", ["ratio", "n_blocks", "vocab_size"])
def test_masks_take_numbers_too(name):
    tokens, ids = torch.zeros(1, *GRID, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"^{name} must be a number, got a tensor"):
        ops.block_mask(tokens, ids, 3, **{name: torch.tensor(0.5, requires_grad=True)})


@not_interpreted
@pytest.mark.parametrize("backend", [None, *dispatch.names("masked_cross_entropy")])
def test_accuracy_has_no_gradient_and_says_so(backend):
    op = "masked_cross_entropy"
    arguments = made(op, ["hidden", "weight", "bias"])
    _, accuracy = skip_what_cannot_run(op, arguments, of_device(REST[op][0]), backend)
    assert not accuracy.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(accuracy, arguments["hidden"])
