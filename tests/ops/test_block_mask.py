"""block_mask: against the docstring in Python integers, against Table 2, and the promises about batches and packing."""

import itertools
import math

import pytest
import torch
from test_philox import philox_ints

from extension import needs_compiler
from vimpac.ops import BlockMask, block_mask, block_mask_reference, dispatch
from vimpac.ops.block_mask import SCHEMA, _blocks, _fake, expected_block_ratio
from vimpac.ops.philox import seed_tensor, split_words

TABLE_2 = {  # masked share in % for 4…8 blocks
    (5, 16, 16): (11.9, 14.5, 17.0, 19.4, 21.7),
    (5, 32, 32): (10.6, 13.1, 15.2, 17.5, 19.5),
    (10, 16, 16): (10.4, 12.8, 15.0, 17.1, 19.2),
    (10, 32, 32): (9.3, 11.4, 13.4, 15.4, 17.2),
}
SEEDS = [0, -1, 1234567890123456789]
OPTIONS = [  # of kernels' tests
    {},
    {"n_blocks": 1},
    {"n_blocks": 33},  # one more than the bits of a word
    {"n_blocks": 3, "noisy": True},
    {"ratio": 0.15},
    {"ratio": 0.6, "noisy": True},
]
GRIDS = [(1, 1, 1), (5, 6, 7), (5, 16, 16), (10, 32, 32), (3, 2, 70)]
DTYPES = [  # of tokens, with a vocabulary
    (torch.int64, 8192),
    (torch.int64, 2**31 - 5),
    (torch.int32, 8192),
    (torch.int16, 8192),
    (torch.uint16, 65531),
    (torch.uint8, 200),
    (torch.int8, 1),
]
SAMPLES = [0, 3, 2**32 + 3, -5, 2**63 - 1]


def by_integers(tokens, sample, seed, n_blocks, ratio, noisy, vocab_size):
    """One clip's masked ids and mask as nested lists, from the docstring alone."""
    grid = tokens.shape
    T, H, W = grid

    def word(i, index, purpose):
        return philox_ints((sample % 2**32, (sample >> 32) % 2**32, index, purpose), seed)[i]

    mask = torch.zeros(grid, dtype=torch.bool)
    for b in range(n_blocks if ratio is None else 0):
        block = []
        for axis, (size, longest) in enumerate(zip(grid, (2 * T // 3, H // 2, W // 2), strict=True)):
            length = 1 + word(axis, 2 * b, 0) * max(1, longest) // 2**32
            start = word(axis, 2 * b + 1, 0) * (size - length + 1) // 2**32
            assert start >= 0 and start + length <= size
            block.append(slice(start, start + length))
        mask[tuple(block)] = True
    out = tokens.clone().to(torch.int64)
    for i in range(tokens.numel()):
        at = (i // (H * W), i // W % H, i % W)
        if ratio is not None:
            mask[at] = word(i % 4, i // 4, 1) < round(ratio * 2**32)
        if tokens[at] == vocab_size + 1:
            mask[at] = False
        if mask[at]:
            share = word(0, i, 2) / 2**32
            if not noisy or share < 0.8:
                out[at] = vocab_size + 4
            elif share < 0.9:
                out[at] = word(1, i, 2) * vocab_size // 2**32
    return out, mask


def clips(B, grid, device="cpu", dtype=torch.int32, vocab_size=8192, pad=True):
    """Random ids, the last frame of every second clip PAD."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab_size, (B, *grid), generator=generator)
    if pad:
        tokens[1::2, -1] = vocab_size + 1
    return tokens.to(dtype).to(device)


@pytest.fixture(scope="module", autouse=True)
def slot():
    """A backend "slot" behind its own overload, as a kernel would come: the definition, made contiguous."""

    def implementation(*call):
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in block_mask_reference(*call))

    dispatch.define_overload("block_mask", "slot", SCHEMA, _fake)
    dispatch.implement("block_mask", "slot", "CompositeExplicitAutograd", implementation)
    dispatch.register("block_mask", "slot", dispatch.always)
    yield
    del dispatch._REGISTRY["block_mask"]["slot"]


def assert_same(actual, expected):
    for name, a, b in zip(BlockMask._fields, actual, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n_blocks, ratio, noisy", [(1, None, False), (5, None, True), (5, 0.15, False), (1, 0.6, True)])
@pytest.mark.parametrize("grid", [(1, 1, 1), (5, 6, 7), (2, 1, 9)])
def test_is_the_docstring(grid, n_blocks, ratio, noisy, seed, device):
    tokens, samples = clips(len(SAMPLES), grid, device), torch.tensor(SAMPLES, device=device)
    actual = block_mask(tokens, samples, seed, n_blocks, ratio, noisy)
    for i, sample in enumerate(SAMPLES):
        out, mask = by_integers(tokens[i].cpu(), sample, seed, n_blocks, ratio, noisy, 8192)
        assert torch.equal(actual.mask[i].cpu(), mask)
        assert torch.equal(actual.tokens[i].cpu().long(), out)


def test_real_size_is_the_docstring():
    tokens = clips(2, (5, 16, 16))
    actual = block_mask(tokens, torch.tensor([7, 8]), 2021, 5, None, True)
    for i, sample in enumerate((7, 8)):
        out, mask = by_integers(tokens[i], sample, 2021, 5, None, True, 8192)
        assert torch.equal(actual.mask[i], mask) and torch.equal(actual.tokens[i].long(), out)


@pytest.mark.parametrize("ratio, share", [(None, None), (0.0, 0.0), (1.0, 1.0)])
def test_ratio_ends(ratio, share):
    mask = block_mask(clips(3, (2, 5, 5), pad=False), torch.arange(3), 0, ratio=ratio).mask
    assert share is None or mask.float().mean() == share
    assert ratio is not None or 0 < mask.float().mean() < 1


@pytest.mark.parametrize("ratio", [0.05, 0.15, 0.5])
def test_iid_share(ratio):
    masked = block_mask(clips(200, (5, 16, 16), pad=False), torch.arange(200), 9, ratio=ratio).mask.float().mean().item()
    sigma = math.sqrt(ratio * (1 - ratio) / (200 * 1280))
    assert abs(masked - ratio) < 4 * sigma  # 4 standard deviations of independent draws: 1 seed in 16,000


def test_noise_shares():
    """80 % MASK, 10 % any code, 10 % kept; codes uniform over the vocabulary."""
    tokens = torch.full((100, 5, 16, 16), 77, dtype=torch.int32)
    result = block_mask(tokens, torch.arange(100), 3, ratio=0.5, noisy=True, vocab_size=1000)
    masked = result.tokens[result.mask]
    n = masked.numel()
    codes = masked[(masked != 1004) & (masked != 77)]
    for share, expected in (((masked == 1004), 0.8), ((masked == 77), 0.1001), (codes < 500, 0.5)):
        sigma = math.sqrt(expected * (1 - expected) / len(share))
        assert abs(share.float().mean().item() - expected) < 4 * sigma  # as above
    assert n > 60000 and codes.min() < 10 and 990 <= codes.max() < 1000
    assert (result.tokens[~result.mask] == 77).all()


# --- Table 2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", TABLE_2)
def test_table_2_over_clips(grid, one_thread):
    """The share that the op masks over 20,000 clips, within 0.2 points of the print and of what is expected.

    Block b does not depend on how many there are, so one draw of 8 holds those of 4…7: checked on the first clips.
    """
    masked, seed = [0] * 5, seed_tensor(2021, torch.device("cpu"))
    for ids in torch.arange(20000).split(200):
        blocks = _blocks(split_words(ids), seed, grid, 8)  # [B, 8, T, H, W]
        union = blocks[:, :3].any(1)
        for i in range(5):
            union |= blocks[:, 3 + i]
            masked[i] += int(union.sum())
            if ids[0] == 0:
                tokens = torch.zeros(len(ids), *grid, dtype=torch.int32)
                assert torch.equal(block_mask(tokens, ids, 2021, 4 + i).mask, union)
    shares = [100 * n / (20000 * math.prod(grid)) for n in masked]
    assert shares == pytest.approx(TABLE_2[grid], abs=0.2)
    # a clip's share has a standard deviation of at most 9 points, the mean's is 0.064: 3 of them
    assert shares == pytest.approx([100 * expected_block_ratio(grid, n) for n in range(4, 9)], abs=0.2)


@pytest.mark.parametrize("grid", TABLE_2)
def test_table_2_exactly(grid, monkeypatch):
    """Expected shares agree with the printed ones, which were measured; "round up" (section B.1's text) is 1 to 4 off."""
    ratios = [100 * expected_block_ratio(grid, n) for n in range(4, 9)]
    assert ratios == pytest.approx(TABLE_2[grid], abs=0.15)
    T, H, W = grid
    monkeypatch.setitem(expected_block_ratio.__globals__, "longest_block", lambda _: (math.ceil(2 * T / 3), H // 2, W // 2))
    up = [100 * expected_block_ratio(grid, n) for n in range(4, 9)]
    assert min(a - b for a, b in zip(up, TABLE_2[grid], strict=True)) > 1


@pytest.mark.parametrize("grid, n_blocks", [((1, 1, 1), 3), ((2, 2, 5), 1), ((3, 4, 2), 3)])
def test_expected_ratio_counts_every_draw(grid, n_blocks):
    """All (length, start) of every axis, enumerated with their probabilities."""
    T, H, W = grid
    axes = []
    for size, longest in zip(grid, (max(1, 2 * T // 3), max(1, H // 2), max(1, W // 2)), strict=True):
        draws = [(s, s + n, 1 / longest / (size - n + 1)) for n in range(1, longest + 1) for s in range(size - n + 1)]
        assert sum(p for *_, p in draws) == pytest.approx(1)
        axes.append(draws)
    share = 0.0
    for at in itertools.product(*map(range, grid)):
        hits = [sum(p for start, end, p in draws if start <= x < end) for x, draws in zip(at, axes, strict=True)]
        share += (1 - (1 - math.prod(hits)) ** n_blocks) / math.prod(grid)
    assert expected_block_ratio(grid, n_blocks) == pytest.approx(share, rel=1e-12)  # float64 sums


# --- promises ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"n_blocks": 5}, {"ratio": 0.3}, {"n_blocks": 3, "noisy": True}])
def test_any_split_or_order_gives_the_same_masks(options, device):
    tokens, ids = clips(7, (3, 5, 6), device), torch.tensor([4, 1, 9, 2**40, 0, -3, 8], device=device)
    whole = block_mask(tokens, ids, 5, **options)
    order = torch.tensor([3, 6, 0, 5, 1, 2, 4], device=device)
    shuffled = block_mask(tokens[order], ids[order], 5, **options)
    assert torch.equal(shuffled.mask, whole.mask[order]) and torch.equal(shuffled.tokens, whole.tokens[order])
    for part in (slice(0, 1), slice(1, 6), slice(6, 7)):
        result = block_mask(tokens[part], ids[part], 5, **options)
        assert torch.equal(result.mask, whole.mask[part]) and torch.equal(result.tokens, whole.tokens[part])
    assert not torch.equal(block_mask(tokens, ids, 6, **options).mask, whole.mask)
    assert not torch.equal(block_mask(tokens, ids + 1, 5, **options).mask, whole.mask)


@pytest.mark.parametrize("options", [{"n_blocks": 5}, {"ratio": 0.3}, {"ratio": 1.0, "noisy": True}])
def test_packing(options, device):
    tokens = clips(6, (4, 5, 6), device)
    before = tokens.clone()
    result = block_mask(tokens, torch.arange(6, device=device), 5, **options)
    assert torch.equal(tokens, before)  # the input is left alone
    assert not result.mask[tokens == 8193].any()
    assert torch.equal(result.tokens[~result.mask], tokens[~result.mask])
    positions = result.mask.flatten().nonzero()[:, 0]
    assert result.indices.shape == (tokens.numel(),) and result.indices.dtype == torch.int64
    assert torch.equal(result.indices[: len(positions)], positions)
    assert (result.indices[len(positions) :] == -1).all()
    assert result.counts.dtype == torch.int64 and torch.equal(result.counts, result.mask.flatten(1).sum(1))


def test_all_pad_masks_nothing():
    result = block_mask(torch.full((2, 3, 4, 4), 8193), torch.arange(2), 0, ratio=1.0, noisy=True)
    assert not result.mask.any() and (result.tokens == 8193).all()
    assert result.counts.tolist() == [0, 0] and (result.indices == -1).all()


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(
    "dtype, vocab_size",
    [(torch.int64, 8192), (torch.int32, 8192), (torch.int16, 8192), (torch.uint16, 65531), (torch.uint8, 200), (torch.int8, 1)],
)
def test_every_integer_dtype(dtype, vocab_size, noisy, device):
    tokens = clips(3, (2, 5, 5), device, torch.int64, vocab_size)
    ids = torch.arange(3, device=device)
    expected = block_mask(tokens, ids, 1, noisy=noisy, vocab_size=vocab_size)
    result = block_mask(tokens.to(dtype), ids, 1, noisy=noisy, vocab_size=vocab_size)
    assert result.tokens.dtype == dtype and torch.equal(result.tokens.long(), expected.tokens)
    for name in ("mask", "indices", "counts"):
        assert torch.equal(getattr(result, name), getattr(expected, name))


@pytest.mark.parametrize("backend", ["reference", "slot"])
@pytest.mark.parametrize("noisy, ratio", [(False, None), (True, 0.5)])
def test_strides_do_not_matter(backend, noisy, ratio, device):
    tokens, ids = clips(4, (3, 5, 6), device), torch.arange(4, device=device)
    expected = block_mask(tokens, ids, 1, 5, ratio, noisy)
    strided = torch.empty(4, 3, 2, 5, 6, dtype=tokens.dtype, device=device)[:, :, 1].copy_(tokens)
    permuted = tokens.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    for same in (strided, permuted):
        assert not same.is_contiguous()
        spread = ids.repeat_interleave(2)[::2]
        assert_same(block_mask(same, spread, 1, 5, ratio, noisy, backend=backend), expected)


@pytest.mark.parametrize("options", [{}, {"ratio": 0.5}, {"noisy": True}])
def test_empty_batch(options):
    result = block_mask(torch.zeros(0, 3, 4, 5, dtype=torch.int32), torch.zeros(0, dtype=torch.int64), 0, **options)
    assert [tuple(x.shape) for x in result] == [(0, 3, 4, 5), (0, 3, 4, 5), (0,), (0,)]


def test_seed_tensor_is_the_int(device):
    tokens, ids = clips(3, (3, 4, 5), device), torch.arange(3, device=device)
    assert_same(block_mask(tokens, ids, torch.tensor(-9, device=device)), block_mask(tokens, ids, -9))


def test_defaults():
    tokens, ids = clips(3, (3, 4, 5)), torch.arange(3)
    assert_same(block_mask(tokens, ids, 1), block_mask_reference(tokens, ids, torch.tensor(1), 5, None, False, 8192))


# --- the slot ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(5, None, False), (1, 0.4, False), (2, None, True), (1, 0.4, True)])
def test_slot_equals_reference(options, device):
    for B in (0, 1, 5):
        call = clips(B, (5, 7, 6), device), torch.arange(B, device=device), torch.tensor(3, device=device), *options
        assert_same(block_mask(*call, backend="slot"), block_mask(*call, backend="reference"))


@pytest.mark.parametrize("options", [(5, None, False), (1, 0.4, True)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint16])
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(options, dtype, strided):
    tokens, ids = clips(4, (3, 5, 6), dtype=dtype), torch.arange(4)
    if strided:
        tokens, ids = tokens.transpose(1, 2), torch.arange(8)[::2]
    torch.library.opcheck(dispatch.overload("block_mask", "slot"), (tokens, ids, torch.tensor(7), *options, 8192))


@pytest.mark.parametrize("backend", ["reference", "slot"])
@pytest.mark.parametrize("ratio, noisy", [(None, True), (0.4, False)])
def test_traces_whole_with_any_batch(backend, ratio, noisy):
    def draw(tokens, ids, seed):
        return block_mask(tokens, ids, seed, 5, ratio, noisy, backend=backend)

    compiled = torch.compile(draw, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, seed in ((3, 5), (6, -(2**62))):
        call = clips(B, (4, 5, 6)), torch.arange(B), torch.tensor(seed)
        assert_same(compiled(*call), draw(*call))


@needs_compiler
def test_compiled_masks_are_the_same(ratio=0.4):
    """Compiled code for real (Philox's products once overflowed there); one batch size and kind, since it takes seconds."""
    compiled = torch.compile(lambda *call: block_mask(*call, ratio=ratio, backend="reference"), fullgraph=True, dynamic=False)
    for seed in (5, -(2**62)):
        call = clips(3, (4, 5, 6)), torch.tensor([0, -9, 2**40]), torch.tensor(seed)
        assert_same(compiled(*call), block_mask(*call, ratio=ratio, backend="reference"))


# --- bad calls --------------------------------------------------------------------------------------------------------

X, I = torch.zeros(2, 3, 4, 5, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, options, shown",
    [
        ((X[0], I, 0), {}, r"tokens must be integer \[B, T, H, W\], got torch.int64 of shape \(3, 4, 5\)"),
        ((X.float(), I, 0), {}, "must be integer .* got torch.float32"),
        ((X.bool(), I, 0), {}, "must be integer .* got torch.bool"),
        ((X.to(torch.complex64), I, 0), {}, "must be integer .* got torch.complex64"),
        ((X[:, :0], I, 0), {}, r"T, H and W must be at least 1, got tokens of shape \(2, 0, 4, 5\)"),
        ((X, I[:1], 0), {}, r"sample_ids must be int64 \[2\], got torch.int64 of shape \(1,\)"),
        ((X, I[:, None], 0), {}, r"of shape \(2, 1\)"),
        ((X, I.int(), 0), {}, r"sample_ids must be int64 \[2\], got torch.int32"),
        ((X, I.to("meta"), 0), {}, "one device, got cpu and meta"),
        ((X, I, 0.5), {}, "seed must be an int or a 0-dimensional int64 tensor, got 0.5"),
        ((X, I, torch.tensor([0])), {}, r"seed must be .* of shape \(1,\)"),
        ((X, I, 0), {"n_blocks": 0}, "n_blocks must be at least 1, got 0"),
        ((X, I, 0), {"ratio": 1.01}, r"ratio must be in \[0, 1\], got 1.01"),
        ((X, I, 0), {"ratio": -0.1}, "got -0.1"),
        ((X, I, 0), {"ratio": math.nan}, "got nan"),
        ((X, I, 0), {"vocab_size": 0}, "vocab_size must be at least 1 .* got 0"),
        ((X.to(torch.int16), I, 0), {"vocab_size": 2**15 - 4}, "room for special ids in torch.int16, got 32764"),
        ((X.to(torch.uint16), I, 0), {"vocab_size": 65532}, "room for special ids in torch.uint16, got 65532"),
        ((X, I, 0), {"backend": "turbo"}, "no backend 'turbo'; it has cpu, "),
    ],
)
def test_bad_calls_are_shown(call, options, shown):
    with pytest.raises(ValueError, match=shown):
        block_mask(*call, **options)
