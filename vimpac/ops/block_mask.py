"""Masks for mask-then-predict: blocks (Eq. 3, section B.1), i.i.d. (Eq. 2) and BERT's 80/10/10 noise (section G.3).

    tokens [B, T, H, W] integer, sample_ids [B], seed → masked tokens, mask, packed indices of masked positions, counts

A block's length on each axis is uniform on 1…longest, its start uniform over where it fits; the mask is the union of
`n_blocks`. Longest is ⌊2T/3⌋, ⌊H/2⌋, ⌊W/2⌋, at least 1: section B.1 says "round up", but only the floor gives Table 2.

Every number is a word of philox4x32-10 with key `seed` and counter (sample low, sample high, index, purpose), so that a
sample's mask depends on its id alone, not on the batch, rank or device it is drawn for:

    purpose 0, index 2b      block b's lengths on T, H, W: 1 + ⌊word · longest / 2^32⌋
    purpose 0, index 2b + 1  block b's starts: ⌊word · (size - length + 1) / 2^32⌋
    purpose 1, index i // 4  i.i.d. mask of token i (raster index): word i % 4 < ratio · 2^32
    purpose 2, index i       noise of token i: word 0 < 0.8 · 2^32 → MASK, < 0.9 · 2^32 → code ⌊word 1 · V / 2^32⌋, else kept
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vimpac.config import MASK_OFFSET, PAD_OFFSET, ModelConfig
from vimpac.ops import dispatch
from vimpac.ops.philox import below, philox, seed_tensor, split_words

BACKENDS = {"cuda": ("cuda", "triton", "reference"), "cpu": ("triton", "cpu", "reference")}
BLOCKS, IID, NOISE = 0, 1, 2  # purposes: the fourth counter word
KERNEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.uint8)
CUDA_WORDS = 2048  # of 32 blocks' places on T, H and W, in shared memory
PAIRS = 1 << 20  # of positions, held at once
TRITON_WIDTH = 1024  # a row of tokens is held at once


class BlockMask(NamedTuple):
    tokens: Tensor  # [B, T, H, W], the input's dtype, MASK (or noise) written at masked positions
    mask: Tensor  # [B, T, H, W] bool, True where masked: these positions are predicted
    indices: Tensor  # [B·T·H·W] int64, raster indices of the masked positions packed at the front, then -1
    counts: Tensor  # [B] int64, masked positions of each clip; their sum is how many indices are valid


def block_mask(
    tokens: Tensor,
    sample_ids: Tensor,
    seed: int | Tensor,
    n_blocks: int = 5,
    ratio: float | None = None,
    noisy: bool = False,
    vocab_size: int = 8192,
    backend: str | None = None,
) -> BlockMask:
    """Draw one mask per clip and write it into the tokens (Eq. 2, Eq. 3, sections B.1 and G.3).

    tokens [B, T, H, W] integer ids; PAD (vocab_size + 1) is never masked.
    sample_ids [B] int64: a clip's mask depends on its id and on `seed` (an int or a 0-dimensional int64 tensor) alone.
    n_blocks: blocks a clip. ratio: instead of blocks, mask every token independently with this probability (Eq. 2).
    noisy: replace only 80 % of masked tokens by MASK (vocab_size + 4), 10 % by a random code, keep 10 % (section G.3).
    backend: "reference", "triton", "cuda" (both CUDA), "cpu" or None (chooses). "any" chooses as well, but does not read
    VIMPAC_BACKEND, which may be meant for tensors on another device. All draw the same bits.

    Returns a BlockMask. Raises ValueError for shapes, dtypes or numbers outside these, TypeError for what is not a tensor or
    a number.
    """
    _check(tokens, sample_ids, n_blocks, ratio, vocab_size)
    seed = seed_tensor(seed, tokens.device)
    call = (tokens, sample_ids, seed, n_blocks, ratio, noisy, vocab_size)
    match dispatch.choose("block_mask", backend, dispatch.order(BACKENDS, tokens.device), *call):
        case "reference":
            return block_mask_reference(*call)
        case name:
            return BlockMask(*dispatch.overload("block_mask", name)(*call))


def block_mask_reference(tokens, sample_ids, seed, n_blocks=5, ratio=None, noisy=False, vocab_size=8192) -> BlockMask:
    """The definition."""
    sample = split_words(sample_ids)
    grid = tokens.shape[1:]
    mask = _blocks(sample, seed, grid, n_blocks).any(1) if ratio is None else _iid(sample, seed, grid, ratio)
    mask = mask & (tokens != vocab_size + PAD_OFFSET)
    new = torch.full_like(tokens, vocab_size + MASK_OFFSET)
    if noisy:
        which, code, *_ = philox((*_per_clip(sample), _range(math.prod(grid), tokens), NOISE), seed)
        which, code = which.view_as(tokens), below(code, vocab_size).view_as(tokens).to(tokens.dtype)
        new = _where(which < _word(0.8), new, _where(which < _word(0.9), code, tokens))
    flat = mask.flatten()
    slots = torch.where(flat, flat.cumsum(0) - 1, flat.numel())  # unmasked positions go to one slot past the end
    indices = slots.new_full((flat.numel() + 1,), -1).scatter(0, slots, _range(flat.numel(), tokens))[:-1]
    return BlockMask(_where(mask, new, tokens), mask, indices, mask.flatten(1).sum(1))


def _where(mask, a: Tensor, b: Tensor) -> Tensor:
    """torch.where, which takes no uint16 on CUDA before torch 2.14."""
    if b.dtype != torch.uint16:
        return torch.where(mask, a, b)
    return torch.where(mask, a.view(torch.int16), b.view(torch.int16)).view(torch.uint16)


def _blocks(sample, seed, grid, n_blocks) -> Tensor:
    """Random blocks, bool [B, blocks, T, H, W]; the mask is their union."""
    b = 2 * torch.arange(n_blocks, device=seed.device)
    lengths = philox((*_per_clip(sample), b, BLOCKS), seed)
    starts = philox((*_per_clip(sample), b + 1, BLOCKS), seed)
    covered = torch.ones((), dtype=torch.bool, device=seed.device)
    for axis, (size, longest) in enumerate(zip(grid, longest_block(grid), strict=True)):
        length = 1 + below(lengths[axis], longest)
        start = below(starts[axis], size - length + 1)
        i = torch.arange(size, device=seed.device)
        inside = (i >= start[..., None]) & (i < (start + length)[..., None])  # [B, blocks, size]
        inside = inside.unflatten(2, [size if a == axis else 1 for a in range(3)])
        covered = covered & inside
    return covered


def _iid(sample, seed, grid, ratio) -> Tensor:
    """Every token on its own, bool [B, T, H, W]."""
    size = math.prod(grid)
    words = philox((*_per_clip(sample), torch.arange(math.ceil(size / 4), device=seed.device), IID), seed)
    return (torch.stack(words, -1).flatten(1)[:, :size] < _word(ratio)).unflatten(1, grid)


def longest_block(grid) -> tuple[int, int, int]:
    """Longest block side on each axis (section B.1, with the floor)."""
    T, H, W = grid
    return max(1, 2 * T // 3), max(1, H // 2), max(1, W // 2)


def expected_block_ratio(grid: tuple[int, int, int], n_blocks: int) -> float:
    """Expected share of masked tokens (Table 2), exactly: 1 - (1 - P(position in a block))^n_blocks, over the grid."""
    return float((1 - (1 - _box(*(along.diagonal() for along in _both_inside(grid)))) ** n_blocks).mean())


def block_count_variance(grid: tuple[int, int, int], n_blocks: int) -> float:
    """Variance of the number of masked tokens of a clip without PAD, exactly.

    It is that of the unmasked ones, the sum of P(p and q unmasked) over all pairs of positions, less the squared mean. A block
    covers neither with probability 1 - P(p) - P(q) + P(p and q). Blocks are as likely as their mirror images, so p runs over
    the first half of each axis.
    """
    both = _both_inside(grid)
    inside = _box(*(along.diagonal() for along in both))
    halves = [torch.arange((size + 1) // 2) for size in grid]
    images = _box(*(1 + (2 * i + 1 != size).double() for i, size in zip(halves, grid, strict=True))).flatten()
    total = torch.zeros((), dtype=torch.float64)
    chunk = max(1, PAIRS // inside.numel())
    for p, weight in zip(torch.cartesian_prod(*halves).split(chunk), images.split(chunk), strict=True):
        pairs = _box(*(along[i] for along, i in zip(both, p.unbind(1), strict=True)))  # [p, T, H, W]
        own = inside[tuple(p.unbind(1))][:, None, None, None]
        total += weight @ ((1 - own - inside + pairs) ** n_blocks).sum((1, 2, 3))
    return max(0.0, float(total - ((1 - inside) ** n_blocks).sum() ** 2))


def _both_inside(grid: tuple[int, int, int]) -> list[Tensor]:
    """For each axis, the probability that a block covers both i and j, float64 [size, size]."""
    axes = []
    for size, longest in zip(grid, longest_block(grid), strict=True):
        both = torch.zeros(size, size, dtype=torch.float64)
        for length in range(1, longest + 1):
            starts = size - length + 1
            for start in range(starts):
                both[start : start + length, start : start + length] += 1 / (longest * starts)
        axes.append(both)
    return axes


def _box(t: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """Products over the three axes: [..., T], [..., H], [..., W] → [..., T, H, W]."""
    return t[..., :, None, None] * h[..., None, :, None] * w[..., None, None, :]


def _per_clip(sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The two words of each clip's id, [B, 1]."""
    low, high = sample
    return low[:, None], high[:, None]


def _range(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


def _word(probability: float) -> int:
    """The 32-bit word below which a uniform word falls with this probability."""
    return round(probability * 2**32)


def _check(tokens, sample_ids, n_blocks, ratio, vocab_size) -> None:
    dispatch.check_tensors(tokens=tokens, sample_ids=sample_ids)
    dispatch.check_numbers(n_blocks=n_blocks, vocab_size=vocab_size, **({} if ratio is None else {"ratio": ratio}))
    if tokens.ndim != 4 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"tokens must be integer [B, T, H, W], got {tokens.dtype} of shape {tuple(tokens.shape)}")
    if 0 in tokens.shape[1:]:
        raise ValueError(f"T, H and W must be at least 1, got tokens of shape {tuple(tokens.shape)}")
    if tuple(sample_ids.shape) != tokens.shape[:1] or sample_ids.dtype != torch.int64:
        raise ValueError(
            f"sample_ids must be int64 [{tokens.shape[0]}], got {sample_ids.dtype} of shape {tuple(sample_ids.shape)}"
        )
    if sample_ids.device != tokens.device:
        raise ValueError(f"tokens and sample_ids must be on one device, got {tokens.device} and {sample_ids.device}")
    if vocab_size < 1 or vocab_size + MASK_OFFSET > torch.iinfo(tokens.dtype).max:
        raise ValueError(f"vocab_size must be at least 1 and leave room for special ids in {tokens.dtype}, got {vocab_size}")
    if n_blocks < 1:
        raise ValueError(f"n_blocks must be at least 1, got {n_blocks}")
    if ratio is not None and not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must be in [0, 1], got {ratio}")


def sample_call(config: ModelConfig, device: torch.device) -> dispatch.Call:
    """What training a model calls, for one clip: tokens that hold nothing."""
    tokens = torch.empty(1, *config.grid, dtype=torch.int64, device=device)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    call = (tokens, ids, ids[0], 5, None, False, config.vocab_size)
    return dispatch.Call("block_mask", dispatch.order(BACKENDS, device), call)


def _fake(tokens, sample_ids, seed, n_blocks, ratio, noisy, vocab_size):
    mask = tokens.new_empty(tokens.shape, dtype=torch.bool)
    indices = tokens.new_empty(tokens.numel(), dtype=torch.int64)
    return tokens.new_empty(tokens.shape), mask, indices, sample_ids.new_empty(sample_ids.shape)  # all contiguous


SCHEMA = (
    "(Tensor tokens, Tensor sample_ids, Tensor seed, int n_blocks, float? ratio, bool noisy, int vocab_size)"
    " -> (Tensor tokens, Tensor mask, Tensor indices, Tensor counts)"
)
dispatch.define("block_mask", SCHEMA, _fake)
dispatch.register("block_mask", "reference", dispatch.always)


def _why_not_triton(tokens, sample_ids, seed, n_blocks, ratio, noisy, vocab_size) -> list[str]:
    reasons = dispatch.why_not_triton(tokens, KERNEL_DTYPES)
    if tokens.shape[3] > TRITON_WIDTH:
        reasons.append(f"W of {tokens.shape[3]}, it takes up to {TRITON_WIDTH}")
    if vocab_size >= 2**31 - MASK_OFFSET:
        reasons.append(f"vocab_size of {vocab_size}, it takes ids below 2^31")
    return reasons


dispatch.implement_triton("block_mask", "block_mask.draw")
dispatch.register("block_mask", "triton", _why_not_triton)


def _why_not_library(backend, tokens, vocab_size) -> list[str]:
    reasons = dispatch.why_not_library(tokens, backend, KERNEL_DTYPES)
    if math.prod(tokens.shape[1:]) > 2**30:
        reasons.append(f"a clip of {math.prod(tokens.shape[1:])} tokens, it takes up to 2^30")
    if vocab_size >= 2**31 - MASK_OFFSET:
        reasons.append(f"vocab_size of {vocab_size}, it takes ids below 2^31")
    return reasons


def _why_not_cpu(tokens, sample_ids, seed, n_blocks, ratio, noisy, vocab_size) -> list[str]:
    return _why_not_library("cpu", tokens, vocab_size)


def _why_not_cuda(tokens, sample_ids, seed, n_blocks, ratio, noisy, vocab_size) -> list[str]:
    reasons = _why_not_library("cuda", tokens, vocab_size)
    words = math.ceil(n_blocks / 32) * sum(tokens.shape[1:])
    if ratio is None and words > CUDA_WORDS:
        reasons.append(
            f"{n_blocks} blocks on a grid of {tuple(tokens.shape[1:])}, it takes ⌈n_blocks / 32⌉ · (T + H + W) ≤ 2048"
        )
    return reasons


dispatch.implement_library("block_mask", "cpu")
dispatch.implement_library("block_mask", "cuda")
dispatch.register("block_mask", "cpu", _why_not_cpu)
dispatch.register("block_mask", "cuda", _why_not_cuda)
