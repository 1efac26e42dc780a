"""block_mask in C++ on a CPU, bit for bit: what test_block_mask.py, which has the definition, does not reach."""

import pytest
import torch
from test_block_mask import DTYPES, SAMPLES, SEEDS, assert_same, clips

from extension import needs_cpu
from kernel_checks import poison_new_tensors
from vimpac.ops import block_mask, dispatch

pytestmark = needs_cpu

OPTIONS = [
    {},
    {"n_blocks": 1},
    {"n_blocks": 33},
    {"n_blocks": 3, "noisy": True},
    {"ratio": 0.15},
    {"ratio": 0.0},
    {"ratio": 1.0},
    {"ratio": 0.6, "noisy": True},
]


def check(tokens, ids, seed, **options):
    before = tokens.clone()
    result = block_mask(tokens, ids, seed, backend="cpu", **options)
    assert all(x.is_contiguous() for x in result) and torch.equal(tokens, before)
    assert_same(result, block_mask(tokens, ids, seed, backend="reference", **options))
    return result


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("grid", [(1, 1, 1), (5, 6, 7), (2, 1, 9), (5, 16, 16), (3, 2, 70)])
def test_is_the_reference(grid, options, monkeypatch):
    poison_new_tensors(monkeypatch)
    for B, seed in zip((5, 1, 0), reversed(SEEDS), strict=True):
        check(clips(B, grid), torch.tensor(SAMPLES)[:B], seed, **options)


@pytest.mark.parametrize("options", [{}, {"ratio": 0.15, "noisy": True}])
def test_real_size(options):
    for B, grid in ((512, (5, 16, 16)), (30, (10, 32, 32))):  # pieces for several threads
        result = check(clips(B, grid, dtype=torch.int64), torch.arange(10**9, 10**9 + B), 3, **options)
        assert 0.05 < result.mask.float().mean() < 0.3


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(
    "dtype, vocab_size",
    [*DTYPES, (torch.uint8, 251)],
)
def test_every_integer_dtype(dtype, vocab_size, noisy):
    tokens = clips(3, (2, 5, 6), dtype=torch.int64, vocab_size=vocab_size).to(dtype)
    check(tokens, torch.arange(3), 1, noisy=noisy, vocab_size=vocab_size)
    check(tokens.transpose(1, 3), torch.arange(3), 1, noisy=noisy, vocab_size=vocab_size)


@pytest.mark.parametrize("options", [{"noisy": True}, {"ratio": 0.5}])
def test_strides_do_not_matter(options):
    tokens = clips(4, (3, 5, 6))
    spread = torch.full((4, 3, 2, 5, 7, 3), -1, dtype=tokens.dtype)[:, :, 1, :, :6, 2].copy_(tokens)
    permuted = tokens.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    one = tokens[:1].expand(4, -1, -1, -1)
    for same in (spread, permuted, one, tokens.flip(0)[1:3]):
        ids = torch.arange(2 * len(same))[::2] - 3
        check(same, ids, 1, **options)
    check(tokens, torch.tensor(2**40).expand(4), 1, **options)


def test_all_masked_and_none():
    """Packing where a clip, or all, give no index, and where there is nothing to fill up."""
    tokens = clips(5, (2, 5, 5), pad=False)
    assert (check(tokens, torch.arange(5), 0, ratio=1.0).indices >= 0).all()
    tokens[1:4] = 8193
    assert check(tokens, torch.arange(5), 0, ratio=1.0).counts.tolist() == [50, 0, 0, 0, 50]
    assert (check(torch.full_like(tokens, 8193), torch.arange(5), 0).indices == -1).all()


def test_any_number_of_threads():
    tokens, ids, before = clips(200, (5, 16, 16)), torch.arange(200), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            check(tokens, ids, 7)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", [(5, None, False), (1, 0.4, True)])
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(options, strided):
    tokens, ids = clips(4, (3, 5, 6)), torch.arange(4)
    if strided:
        tokens, ids = tokens.transpose(1, 2), torch.arange(8)[::2]
    torch.library.opcheck(dispatch.overload("block_mask", "cpu"), (tokens, ids, torch.tensor(7), *options, 8192))


def test_traces_whole_with_any_batch():
    def draw(tokens, ids, seed):
        return block_mask(tokens, ids, seed, 5, None, True, backend="cpu")

    compiled = torch.compile(draw, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, seed in ((3, 5), (6, -(2**62))):
        call = clips(B, (4, 5, 6)), torch.arange(B), torch.tensor(seed)
        assert_same(compiled(*call), draw(*call))


def test_says_why_it_cannot_run():
    tokens = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot run this call: .*2147483644, it takes"):
        block_mask(tokens, torch.zeros(1, dtype=torch.int64), 0, vocab_size=2**31 - 4, backend="cpu")
