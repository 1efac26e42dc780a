"""residual_norm in C++ on a CPU: what test_residual_norm.py, which has the definition, does not reach."""

import itertools
import math
from functools import partial

import pytest
import torch
from test_residual_norm import BRAIN, DTYPES, FORMS, SINGLE, apply, inputs, is_exact, outputs_and_gradients

from extension import narrower_isas, needs_cpu, on_any_processor, python, run_with
from vimpac.ops import dispatch, residual_norm
from vimpac.ops.dropout_add import dropout_keep

pytestmark = needs_cpu

PAST_CACHES = 16 << 20  # bytes; results from there on are streamed


@pytest.fixture(autouse=True)
def poison():
    """New memory holds NaN, the library's too: an element that no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("isa", narrower_isas())
def test_narrower_instruction_sets(isa):
    """This file once more with what other processors would run."""
    run_with(__file__, VIMPAC_CPU_ISA=isa)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_every_width(dtypes):
    """Registers full, none, one element short and one beyond; rows that begin and end inside groups of 64 elements. eps is
    large: gradients of 2 or 3 columns would be differences of large numbers."""
    for columns in (2, 3, 5, 8, 15, 17, 31, 33, 63, 64, 65, 200):
        for form in FORMS:
            is_exact(form, inputs(7, columns, dtypes), "cpu", eps=0.5, times=3.0)  # a dozen numbers: errors vary more


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 129, 64 * 64 + 1, 64 * 65 + 3])
def test_every_number_of_rows(rows):
    """A chunk's column sums are added up, then the chunks'."""
    is_exact("both", inputs(rows, 12), "cpu")


@pytest.mark.parametrize("dtypes, columns", [((SINGLE, SINGLE), 512), ((SINGLE, SINGLE), 515), ((SINGLE, BRAIN), 512)])
def test_results_larger_than_the_caches(dtypes, columns):
    """They are written past them, where rows are aligned; a few of their rows are what they are alone."""
    rows = PAST_CACHES // (columns * torch.empty((), dtype=dtypes[1]).element_size()) + 1
    call = [v.detach() for v in inputs(rows, columns, dtypes)]
    few, some = [*(v[:5] for v in call[:2]), *call[2:]], partial(outputs_and_gradients, partial(apply, "both", backend="cpu"))
    large = some([v.requires_grad_() for v in call])[:4]
    small = some([v.detach().requires_grad_() for v in few])[:2]
    assert all(torch.equal(a[:5], b) for a, b in zip(large, small, strict=False))
    of_x, of_y = large[2:]
    keep = dropout_keep(of_y.shape, 0.1, torch.tensor(2**40 + 3))
    scaled = (of_x * keep * (1 / 0.9)).to(of_y.dtype)
    assert of_x.isfinite().all()
    torch.testing.assert_close(of_y, scaled, rtol=2 * torch.finfo(of_y.dtype).eps + 2e-10, atol=1e-9)  # p is rounded to 2^-32


def test_any_alignment():
    for offset, form in itertools.product((1, 3, 7), FORMS):
        call = [v.detach() for v in inputs(11, 65)]
        expected = outputs_and_gradients(partial(apply, form, backend="cpu"), [v.clone().requires_grad_() for v in call])
        shifted = [torch.empty(v.numel() + offset)[offset:].view(v.shape).copy_(v).requires_grad_() for v in call]
        assert all(map(torch.equal, outputs_and_gradients(partial(apply, form, backend="cpu"), shifted), expected))


def test_any_number_of_threads_and_again():
    call = inputs(5000, 70)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients(partial(apply, "both", backend="cpu"), call))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_a_row_depends_on_its_number_alone():
    """Not on how many there are."""
    call = [v.detach() for v in inputs(200, 70)]
    whole = apply("both", call, backend="cpu")
    for rows in (1, 63, 150):
        some = apply("both", [*(v[:rows] for v in call[:2]), *call[2:]], backend="cpu")
        assert all(torch.equal(a, b[:rows]) for a, b in zip(some, whole, strict=True))


def test_what_lies_behind_is_not_touched():
    """NaN around every input: none is read, and none is written over."""
    call = [v.detach() for v in inputs(5, 13)]
    expected = outputs_and_gradients(partial(apply, "output", backend="cpu"), [v.clone().requires_grad_() for v in call])
    memory = [torch.full((v.numel() + 64,), math.nan) for v in call]
    inner = [m[32:-32].view(v.shape).copy_(v).requires_grad_() for m, v in zip(memory, call, strict=True)]
    got = outputs_and_gradients(partial(apply, "output", backend="cpu"), inner)
    assert all(map(torch.equal, got, expected))
    assert all(m[:32].isnan().all() and m[-32:].isnan().all() for m in memory)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(value, dtypes):
    """In dropped elements too: an overflow must not go on as if nothing were. Other rows are as they were."""
    call = [v.detach() for v in inputs(6, 70, dtypes)]
    clean = apply("both", call, p=0.5, backend="cpu")
    keep = dropout_keep((6, 70), 0.5, torch.tensor(2**40 + 3))
    dropped = int((~keep[2]).nonzero()[0])
    call[1][2, dropped] = value
    total, out = apply("both", call, p=0.5, backend="cpu")
    assert total[2, dropped].isnan() and out[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(total[others], clean[0][others]) and torch.equal(out[others], clean[1][others])


@on_any_processor
def test_it_is_the_default_on_a_cpu(monkeypatch):
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    call = inputs(9, 70)
    assert all(map(torch.equal, apply("both", call), apply("both", call, backend="cpu")))
    assert torch.equal(residual_norm(*call, 0.1, 3), residual_norm(*call, 0.1, 3, backend="cpu"))


@on_any_processor
def test_the_op_by_name_loads_its_library():
    """As a saved program calls it: without the dispatch that would have loaded the library before."""
    code = """
import torch, vimpac.ops
x, v = torch.arange(6.0).view(2, 3), torch.ones(3)
out, total, statistics, _ = torch.ops.vimpac.residual_norm.cpu(x, x, None, v, v, 0.0, None, 1e-12, True)
assert torch.equal(total, 2 * x) and torch.equal(statistics[0], torch.tensor([2.0, 8.0]))
"""
    ended = python(code)
    assert ended.returncode == 0, ended.stderr


def test_wrong_types_reach_no_memory():
    """The ops called directly, past the checks of Python."""
    forward, backward = (dispatch.overload(f"residual_norm{name}", "cpu") for name in ("", "_backward"))
    x, v, seed, statistics = torch.ones(4, 6), torch.ones(6), torch.tensor(1), torch.ones(2, 4)

    def refused(shown, x=x, y=x, bias=v, weight=v, norm_bias=v, p=0.1, seed=seed):
        with pytest.raises(RuntimeError, match=shown):
            forward(x, y, bias, weight, norm_bias, p, seed, 1e-12, True)

    refused("float32, float64 and bfloat16", x.half(), x.half())
    refused("of one dtype, or a float32 x and a bfloat16 y", x, x.double())
    refused("of one dtype, or a float32 x and a bfloat16 y", x.to(BRAIN), x)
    refused(r"contiguous rows \[R, C\]", x.T)
    refused(r"contiguous rows \[R, C\]", x[:, :0], x[:, :0], v[:0], v[:0], v[:0])
    for y in (x[:3], x.T, torch.ones(6, 4).T):
        refused("takes y contiguous, of x's shape", y=y)
    for bad in (v[:5], torch.ones(12)[::2], v.double(), v.to(BRAIN)):
        for name in ("bias", "weight", "norm_bias"):
            refused(r"vectors as contiguous \[C\], float32", **{name: bad})
    for p in (-0.1, 1.0, math.nan):
        refused(r"p in \[0, 1\)", p=p)
    for bad in (None, torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), torch.tensor([1, 2])):
        refused("one int64 as seed", seed=bad)
    refused("dense and on a cpu device", x.to_sparse())

    def refused_back(shown, grad=x, grad_sum=x, kept=x, statistics=statistics, dtype=SINGLE):
        with pytest.raises(RuntimeError, match=shown):
            backward(grad, grad_sum, kept, statistics, v, v, 0.1, seed, True, dtype)

    for bad in (x[:3], x.double(), x.T, torch.ones(6, 4).T):
        refused_back("takes grad contiguous, of x's shape and dtype", grad=bad)
        refused_back("takes grad_sum contiguous, of x's shape and dtype", grad_sum=bad)
    for bad in (torch.ones(7), torch.ones(2, 4, dtype=torch.float64), torch.ones(4, 2).T):
        refused_back("statistics as forward returns them", statistics=bad)
    refused_back("of one dtype, or a float32 x and a bfloat16 y", dtype=torch.float64)
