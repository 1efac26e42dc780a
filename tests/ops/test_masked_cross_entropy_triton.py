"""masked_cross_entropy with the Triton kernel: on a GPU, in the interpreter, and compiled for three architectures."""

import pytest
import torch
import torch.nn.functional as F
from test_masked_cross_entropy import FLOAT32, Largest, inputs, rows_that_do_not_count_reach_nothing, values_and_gradients
from torch.testing import assert_close

from kernel_checks import (
    ARCHITECTURES,
    DEVICE,
    NATIVE,
    check_binary,
    compile_kernel,
    not_interpreted,
    poison_new_tensors,
    run_in_interpreter,
    runs_kernels,
)
from vimpac.ops import dispatch, masked_cross_entropy, masked_cross_entropy_reference

pytest.importorskip("triton", reason="triton is not installed")

SIZES = [(1, 1, 1), (4, 5, 5), (7, 8, 64), (6, 8, 1025), (9, 16, 8197)]
HALF = [torch.float16, *([torch.bfloat16] if NATIVE else [])]  # the interpreter's bfloat16 arithmetic is wrong


def test_in_the_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture
def kernels(monkeypatch):
    """The kernel's module, with chunks of 3 rows at 8197 classes in float32 and new memory full of NaN."""
    from vimpac.kernels import masked_cross_entropy as module

    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 8256 * 4 + 5)
    monkeypatch.setattr(module, "CHUNK_STEP", 1)
    poison_new_tensors(monkeypatch)
    return module


@runs_kernels
@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("M, C, V", [(0, 4, 5), *SIZES])
def test_float32_is_the_reference(M, C, V, ignored, kernels):
    call = inputs(M, C, V, DEVICE, ignored=ignored)
    actual = values_and_gradients(masked_cross_entropy, *call, backend="triton")
    assert actual[0].dtype == actual[1].dtype == torch.float32
    for ours, expected in zip(actual, values_and_gradients(masked_cross_entropy_reference, *call), strict=True):
        assert_close(ours, expected, **FLOAT32)


@runs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_that_do_not_count_reach_nothing(value, kernels):
    rows_that_do_not_count_reach_nothing(value, "triton", DEVICE)


@runs_kernels
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("M, C, V", SIZES)
def test_half_errors(M, C, V, dtype, kernels):
    """At most twice the error of plain PyTorch at that dtype, against float64."""
    hidden, weight, bias, target = inputs(M, C, V, DEVICE, dtype, ignored=0.3)

    def plain(hidden, weight, bias, target):
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), target, ignore_index=-100)

    def run(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        loss = function(*leaves, target)
        return [x.double() for x in (loss, *torch.autograd.grad(loss, leaves))]

    exact = run(lambda *x: masked_cross_entropy_reference(*x)[0], torch.float64)
    ours = run(lambda *x: masked_cross_entropy(*x, backend="triton")[0], dtype)
    for mine, theirs, true in zip(ours, run(plain, dtype), exact, strict=True):
        # + one rounding of the value itself: where the usual error is smaller, it is luck
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + torch.finfo(dtype).eps / 2 * true.norm()


@runs_kernels
@pytest.mark.parametrize("where", [(0, 1), (1, 0), (1030, 5), (1024, 1026), (7, 2055)])
def test_the_first_of_equal_logits_counts(where, kernels):
    """Two largest logits, in one block of columns or two: only the row labelled with the smaller index is right."""
    V = 2060
    bias = torch.zeros(V, device=DEVICE)
    bias[list(where)] = 3.0
    target = torch.tensor([*where, 9], device=DEVICE)
    zeros = torch.zeros(3, 2, device=DEVICE), torch.zeros(V, 2, device=DEVICE)
    for labels, right in ((target, 1), (torch.full_like(target, min(where)), 3), (torch.full_like(target, max(where)), 0)):
        assert masked_cross_entropy(*zeros, bias, labels, backend="triton")[1].item() == pytest.approx(right / 3)


@runs_kernels
@pytest.mark.parametrize("M", [1, 7])
def test_no_row_counts(M, kernels):
    hidden, weight, bias, target = inputs(M, 5, 11, DEVICE)
    target.fill_(-1)
    for value in values_and_gradients(masked_cross_entropy, hidden, weight, bias, target, backend="triton"):
        assert_close(value, torch.zeros_like(value), rtol=0, atol=0)


@runs_kernels
@pytest.mark.parametrize("label", [11, 63, 64, 5000])
def test_a_class_that_is_none_gives_nan(label, kernels):
    """Targets are not read before the launch; a wrong one is seen in the loss, wherever past V it points."""
    hidden, weight, bias, target = inputs(7, 5, 11, DEVICE)
    target[3] = label
    assert masked_cross_entropy(hidden, weight, bias, target, backend="triton")[0].isnan()


@runs_kernels
def test_large_logits_and_impossible_classes(kernels):
    """Sums of exponentials that would overflow, and classes whose bias is -inf."""
    hidden, weight, bias, target = (x.detach() for x in inputs(5, 4, 1030, DEVICE))
    weight, bias = 300 * weight, bias.clone()
    bias[1:1000] = float("-inf")
    target = target.clamp(min=1000)
    call = [x.requires_grad_() for x in (hidden, weight, bias)]
    actual = values_and_gradients(masked_cross_entropy, *call, target, backend="triton")
    for ours, expected in zip(actual, values_and_gradients(masked_cross_entropy_reference, *call, target), strict=True):
        # logits of up to 2000: one rounding of one is 6e-5, and that much of its exponential
        assert_close(ours, expected, rtol=3e-4, atol=1e-4)


@runs_kernels
def test_values_alone(kernels):
    """Without gradients there is one product, and nothing of the weight's size is made."""
    hidden, weight, bias, target = (x.detach() for x in inputs(7, 5, 300, DEVICE, ignored=0.3))
    with Largest() as ops:
        loss, hits, *grads = kernels.sums(hidden, weight, bias, target, False)
    assert [len(x) for x in grads] == [0, 0, 0]
    assert sum(name.startswith("aten.mm") for name, _ in ops.calls) == 1 and not any("addmm" in name for name, _ in ops.calls)
    counts = (target >= 0).sum()
    assert_close((loss / counts, hits / counts), masked_cross_entropy_reference(hidden, weight, bias, target), **FLOAT32)


@runs_kernels
def test_logits_in_memory(monkeypatch):
    from vimpac.kernels import masked_cross_entropy as kernels

    monkeypatch.setattr(kernels, "CHUNK_BYTES", 16000)
    monkeypatch.setattr(kernels, "CHUNK_STEP", 4)
    hidden, weight, bias, target = (x.detach() for x in inputs(200, 8, 301, DEVICE))
    with Largest() as largest:
        kernels.sums(hidden, weight, bias, target, True)
    # 12 rows padded to 320 logits of the 60,200, weight and its gradient have 2408; the interpreter copies tensors as bytes
    assert largest.elements <= (4000 if NATIVE else 16000)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("M", [0, 7])
def test_opcheck(M, gradients, dtype):
    call = inputs(M, 5, 11, DEVICE, dtype, ignored=0.3)
    arguments = (*(x.detach() for x in call), gradients)
    torch.library.opcheck(dispatch.overload("masked_cross_entropy", "triton"), arguments)


@runs_kernels
def test_compiles_whole():
    def both(*call):
        return masked_cross_entropy(*call, backend="triton")

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (5, 9):
        call = inputs(M, 6, 13, DEVICE, ignored=0.3)
        expected = values_and_gradients(masked_cross_entropy_reference, *call)
        for ours, true in zip(values_and_gradients(compiled, *call), expected, strict=True):
            assert_close(ours, true, **FLOAT32)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="no CUDA device")
def test_cuda_graph():
    """Forward and backward captured once, replayed on other values, with another number of rows that count."""
    call = inputs(3000, 64, 8197, DEVICE, torch.bfloat16, ignored=0.2)
    static = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in call]
    values_and_gradients(masked_cross_entropy, *static, backend="triton")  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = values_and_gradients(masked_cross_entropy, *static, backend="triton")
    for seed in (1, 2):
        for x, new in zip(static, inputs(3000, 64, 8197, DEVICE, torch.bfloat16, ignored=0.3 * seed, seed=seed), strict=True):
            x.detach().copy_(new.detach())
        graph.replay()
        for a, b in zip(results, values_and_gradients(masked_cross_entropy, *static, backend="triton"), strict=True):
            assert torch.equal(a, b)  # the same kernels on the same values


# --- without a GPU ----------------------------------------------------------------------------------------------------


@not_interpreted
def test_chunks_fit_the_cache_in_whole_tiles():
    from vimpac.kernels import masked_cross_entropy as kernels

    assert kernels.chunk_rows(8256, 2) == 2048 and kernels.chunk_rows(8256, 4) == 1024
    assert kernels.chunk_rows(1 << 18, 4) == 36 and kernels.chunk_rows(1 << 24, 4) == 1


@not_interpreted
def test_says_why_it_cannot_run():
    call = inputs(2, 3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"on cpu, it needs a CUDA device; torch.float64, it takes float32, float16, bfloat16"):
        masked_cross_entropy(*call, backend="triton")


@not_interpreted
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dtype", ["*bf16", "*fp32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_to_wide_accesses_without_spills(architecture, dtype, gradients):
    from vimpac.kernels import masked_cross_entropy as kernels

    types = {"logits": dtype, "bias": "*fp32", "target": "*i64", "loss": "*fp32", "hits": "*fp32", "V": "i32"}
    options = {"s_target": 1, "PITCH": 8256, "BLOCK": kernels.BLOCK, "GRADIENTS": gradients}
    binary = compile_kernel(kernels._cross_entropy, architecture, types, options, kernels.OPTIONS)
    check_binary(binary, architecture, matrix=False)
    narrow = [x for x in binary.listing.splitlines() if ("LDG" in x or "STG" in x) and ".128" not in x]
    assert len(narrow) == 3  # target, loss and hits; rows and bias go in 16 bytes
    assert any("STG" in x and ".128" in x for x in binary.listing.splitlines()) == gradients
