"""dropout_add in C++ on a CPU: what test_dropout_add.py, which has the definition, does not reach."""

import math

import pytest
import torch
from test_dropout_add import inputs, value_and_gradients

from extension import narrower_isas, needs_cpu, on_any_processor, python, run_with
from vimpac.ops import dispatch, dropout_add
from vimpac.ops.dropout_add import dropout_keep

pytestmark = needs_cpu

# Of x and of y; the last as autocast has them.
DTYPES = [*((dtype,) * 2 for dtype in (torch.float32, torch.float64, torch.bfloat16)), (torch.float32, torch.bfloat16)]
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


def of_dtypes(elements, dtypes):
    return [z.detach().to(dtype).requires_grad_() for z, dtype in zip(inputs(elements), dtypes, strict=True)]


def check(x, y, p, seed=2**40 + 3):
    """Gradients are the reference's bit for bit: one product. So are sums where the product is exact (twice y, p = 1/2); else
    ours may be one rounding of y·scale + x where the reference rounds the product first."""
    out, grad_x, grad_y = value_and_gradients(dropout_add, x, y, p, seed, "cpu")
    expected, same_x, same_y = value_and_gradients(dropout_add, x, y, p, seed, "reference")
    assert torch.equal(grad_x, same_x) and torch.equal(grad_y, same_y)
    assert out.dtype == x.dtype and out.is_contiguous()
    if p == 0.5:
        assert torch.equal(out, expected)
    else:
        inside = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        bound = inside * y.double().abs() / (1 - p) + torch.finfo(x.dtype).eps * expected.abs()
        assert ((out - expected).abs() <= bound).all() and (x.numel() < 1000 or (out == expected).double().mean() > 0.6)
    return out


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_every_size(dtypes, p):
    """Groups full, none, one element short and one beyond."""
    for elements in (0, 1, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 66, 67, 127, 128, 129, 191, 640, 1001):
        check(*of_dtypes(elements, dtypes), p)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_large_and_odd(dtypes):
    """Pieces for several threads, the last of them not full."""
    check(*of_dtypes(1_000_003, dtypes), 0.1)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_results_larger_than_the_caches(dtypes):
    """They are written past them, but for the last group."""
    item = torch.empty((), dtype=dtypes[0]).element_size()
    check(*of_dtypes(PAST_CACHES // item + 67, dtypes), 0.1)


@pytest.mark.parametrize("elements", [67, 70_000])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_any_alignment(dtypes, elements):
    for offset in (1, 2, 3, 5, 7):
        x, y = (z.detach() for z in of_dtypes(elements + 7, dtypes))
        check(x[offset:][:elements].requires_grad_(), y[7 - offset :][:elements].requires_grad_(), 0.1)


@pytest.mark.parametrize("elements", [1_000_003, PAST_CACHES // 4 + 67])
def test_any_number_of_threads(elements):
    x, y = inputs(elements)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(dropout_add, x, y, 0.1, 3, "cpu"))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_an_element_depends_on_its_number_alone():
    """Not on how many there are: the tail's arithmetic is that of full groups."""
    x, y = (z.detach() for z in inputs(400))
    whole = dropout_add(x, y, 0.1, 3, "cpu")
    for elements in (1, 15, 63, 64, 100, 399):
        assert torch.equal(dropout_add(x[:elements], y[:elements], 0.1, 3, "cpu"), whole[:elements])


def test_what_lies_behind_is_not_touched():
    """Sentinels around x, y and the gradient: inputs are read only, whatever their tail."""
    memory = [torch.arange(200.0) for _ in range(2)]
    x, y = (m[3:70] for m in memory)
    out = dropout_add(x, y, 0.5, 3, "cpu")
    assert out.numel() == 67 and all(torch.equal(m, torch.arange(200.0)) for m in memory)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(value, dtypes):
    """In dropped elements too, as in torch's dropout: an overflow must not go on as if nothing were."""
    x, y = (z.detach() for z in of_dtypes(130, dtypes))
    y[::3] = value
    ours, expected = (dropout_add(x, y, 0.5, 3, name) for name in ("cpu", "reference"))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    dropped = ~dropout_keep((130,), 0.5, torch.tensor(3))[::3]
    assert dropped.any() and ours[::3][dropped].isnan().all() and not ours[::3].isfinite().any()
    x[1] = value
    assert not dropout_add(x, y, 0.5, 3, "cpu")[1].isfinite()


def test_it_is_the_default_on_a_cpu(monkeypatch):
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    x, y = inputs(100)
    assert torch.equal(dropout_add(x, y, 0.1, 3), dropout_add(x, y, 0.1, 3, "cpu"))


@on_any_processor
def test_the_op_by_name_loads_its_library():
    """As a saved program calls it: without the dispatch that would have loaded the library before."""
    code = """
import torch, vimpac.ops
out = torch.ops.vimpac.dropout_add.cpu(torch.ones(3), torch.ones(3), 0.0, torch.tensor(1))
assert torch.equal(out, torch.full((3,), 2.0))
"""
    ended = python(code)
    assert ended.returncode == 0, ended.stderr


def test_wrong_types_reach_no_memory():
    """The ops called directly, past the checks of Python."""
    forward, backward = (dispatch.overload(name, "cpu") for name in ("dropout_add", "dropout_add_backward"))
    x, seed = torch.ones(4, 4), torch.tensor(1)
    with pytest.raises(RuntimeError, match="float32, float64 and bfloat16"):
        forward(x.half(), x.half(), 0.1, seed)
    for bad in (x[:3], x[:, :3].contiguous()):
        with pytest.raises(RuntimeError, match="of one shape"):
            forward(bad, x, 0.1, seed)
    for dtypes in ((torch.float64, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.bfloat16)):
        with pytest.raises(RuntimeError, match="of one dtype, or a float32 x and a bfloat16 y"):
            forward(x.to(dtypes[0]), x.to(dtypes[1]), 0.1, seed)
    for call in ((x.T[:2], x[:2]), (x[:2], x.T[:2])):
        with pytest.raises(RuntimeError, match="takes contiguous tensors"):
            forward(*call, 0.1, seed)
    with pytest.raises(RuntimeError, match="takes contiguous tensors"):
        backward(x[:, ::2], 0.1, seed, x.dtype)
    for p in (-0.1, 1.0, math.nan):
        with pytest.raises(RuntimeError, match=r"p in \[0, 1\)"):
            forward(x, x, p, seed)
    for bad in (torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), torch.tensor([1, 2])):
        with pytest.raises(RuntimeError, match="one int64 as seed"):
            backward(x, 0.1, bad, x.dtype)
    for dtype in (torch.float64, torch.float16, torch.int32):
        with pytest.raises(RuntimeError, match="of one dtype, or a float32 x and a bfloat16 y"):
            backward(x, 0.1, seed, dtype)
    with pytest.raises(RuntimeError, match="dense and on a cpu device"):
        forward(x.to_sparse(), x.to_sparse(), 0.1, seed)
