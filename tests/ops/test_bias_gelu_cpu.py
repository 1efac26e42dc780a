"""bias_gelu in C++ on a CPU: what test_bias_gelu.py, which has the definition, does not reach."""

import math
from functools import partial

import pytest
import torch
from test_bias_gelu import BRAIN, DTYPES, FORMS, SINGLE, apply, check_range, inputs, is_exact, output_and_gradients

from extension import narrower_isas, needs_cpu, on_any_processor, python, run_with
from vimpac.ops import dispatch

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


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width(dtype):
    """Registers full, none, one element short and one beyond."""
    for columns in (1, 2, 3, 5, 8, 15, 17, 31, 33, 63, 65, 200):
        for form in FORMS:
            is_exact(form, inputs(33, columns, dtype, form=form), "cpu")


@pytest.mark.parametrize("dtype", [SINGLE, torch.float64])
def test_the_tail(dtype):
    check_range(dtype, "cpu", in_tail=True)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 16 * 64, 16 * 64 + 1, 64 * 17 + 3, 5000])
def test_every_number_of_rows(rows):
    """A chunk's column sums are added up, then the chunks'."""
    is_exact("again", inputs(rows, 12, form="again"), "cpu")


@pytest.mark.parametrize("dtype, columns", [(SINGLE, 512), (SINGLE, 515), (BRAIN, 512)])
def test_results_larger_than_the_caches(dtype, columns):
    """They are written past them, where rows are aligned; rows are what they are alone."""
    rows = PAST_CACHES // (columns * dtype.itemsize) + 1
    call = [v.detach() for v in inputs(rows, columns, dtype)]
    backward = dispatch.overload("bias_gelu_backward", "cpu")
    for some in (slice(0, 5), slice(rows - 5, rows)):
        assert torch.equal(apply("gelu", call, "cpu")[some], apply("gelu", [call[0][some], call[1]], "cpu"))
        large, small = (backward(h.flip(1), h, call[1], True)[:2] for h in (call[0], call[0][some]))
        assert all(torch.equal(a[some], b) for a, b in zip(large, small, strict=True))
    assert torch.equal(large[1], apply("gelu", call, "cpu"))


def test_any_number_of_threads_and_again():
    call = inputs(5000, 70, form="again")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            results.append(output_and_gradients(partial(apply, "gelu", backend="cpu"), call[:2]))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


def test_what_lies_behind_is_not_touched():
    """NaN around every input at any alignment: none is read, and none is written over."""
    call = [v.detach() for v in inputs(5, 13)]
    run = partial(output_and_gradients, partial(apply, "gelu", backend="cpu"))
    expected = run([v.clone().requires_grad_() for v in call])
    for offset in (32, 33, 39):
        memory = [torch.full((v.numel() + 2 * offset,), math.nan) for v in call]
        inner = [m[offset:-offset].view(v.shape).copy_(v).requires_grad_() for m, v in zip(memory, call, strict=True)]
        assert all(map(torch.equal, run(inner), expected))
        assert all(m[:offset].isnan().all() and m[-offset:].isnan().all() for m in memory)


@on_any_processor
def test_it_is_the_default_on_a_cpu(monkeypatch):
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    for form in FORMS:
        call = inputs(9, 70, form=form)
        assert torch.equal(apply(form, call), apply(form, call, "cpu"))


@on_any_processor
def test_the_op_by_name_loads_its_library():
    """As a saved program calls it: without the dispatch that would have loaded the library before."""
    code = """
import torch, vimpac.ops
h = torch.zeros(2, 3)
of_h, out, of_bias = torch.ops.vimpac.bias_gelu_backward.cpu(h + 1, h, h[0], True)
assert torch.equal(of_h, h + 0.5) and torch.equal(out, h) and torch.equal(of_bias, h[0] + 1)
"""
    ended = python(code)
    assert ended.returncode == 0, ended.stderr


def test_wrong_types_reach_no_memory():
    """The ops called directly, past the checks of Python."""
    forward, backward = (dispatch.overload(f"bias_gelu{name}", "cpu") for name in ("", "_backward"))
    h, bias = torch.ones(4, 6), torch.ones(6)

    def refused(shown, h=h, bias=bias):
        for op, call in ((forward, (h, bias)), (backward, (h, h, bias, True))):
            with pytest.raises(RuntimeError, match=shown):
                op(*call)

    refused("float32, float64 and bfloat16", h.half())
    for bad in (h.T, bias, h[None]):
        refused(r"takes contiguous rows \[R, F\]", bad)
    for bad in (bias[:5], torch.ones(12)[::2], bias.double(), bias.to(BRAIN)):
        refused(r"takes bias as contiguous \[F\], float32", bias=bad)
    refused("dense and on a cpu device", h.to_sparse())
    for bad in (h[:3], h.double(), h.T, torch.ones(6, 4).T):
        with pytest.raises(RuntimeError, match="takes grad contiguous, of h's shape and dtype"):
            backward(bad, h, bias, False)
