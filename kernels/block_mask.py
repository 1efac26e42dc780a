"""Masks of all clips, their tokens and the packed indices in one launch; vimpac/ops/block_mask.py has the definition.

A program owns a run of consecutive clips. It draws their masks and writes tokens, mask and counts, a tile of rows (t, h) of W
tokens at a time. Its indices come after those of the programs before it, so it must then know how many positions these have
masked. It publishes its own number and adds up all of theirs, reading each as soon as it is there: one step, not a chain.
Unmasked positions write their -1 from the end of `indices` backwards, so no program waits for the total.

Programs number themselves by a counter as they start. So a program only waits for programs that already run, even where few fit
on the device at once. Sums are of integers, so results do not depend on the order of programs.

Bytes moved: tokens in and out, 1 for the mask written and read, 8 an index.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vimpac.config import MASK_OFFSET, PAD_OFFSET
from vimpac.kernels.fusion import FUSED
from vimpac.kernels.philox import philox

PROGRAMS = 1024  # at most, a power of two: each reads the numbers of all before it, 4 MB from L2 altogether
TILE = 1024  # tokens of a tile
OPTIONS = {"num_warps": 4, "maxnreg": 128, **FUSED}
# Nothing spills, and 4 programs fit on a multiprocessor: 512 clips run at once on 132 of them. With tiles of 2048, noise took
# 210 registers; without maxnreg the compiler spilled a little to reach 96. Not measured on a GPU yet.
PAD, MASK = tl.constexpr(PAD_OFFSET), tl.constexpr(MASK_OFFSET)  # added to the number of codes
STATES: dict[tuple[torch.device, int], torch.Tensor] = {}  # a device's stream → the programs' numbers and two counters


class Constants(NamedTuple):
    """What the kernel is compiled for."""

    GRID: tuple[int, int, int]
    LONGEST: tuple[int, int, int]  # sides of a block
    ROWS: int  # of a tile
    WP: int  # W padded to a power of two
    NB: int  # blocks at once: bits of a word
    INDEPENDENT: bool  # whether tokens are masked one by one (Eq. 2)
    VOCAB: int
    NOISY: bool  # BERT's noise: some masked tokens are kept, or become a random code
    PROGRAMS: int  # at most
    BLOCK: int  # positions at once when indices are packed


@triton.jit
def _inside(place, length_word, start_word, SIZE: tl.constexpr, LONGEST: tl.constexpr):
    """Which places of an axis each block covers, [places, blocks]."""
    length = 1 + tl.umulhi(length_word, tl.full(length_word.shape, LONGEST, tl.uint32))
    start = tl.umulhi(start_word, SIZE - length + 1)
    place = place.to(tl.uint32)[:, None]
    return (place >= start[None, :]) & (place < (start + length)[None, :])


@triton.jit
def _in_blocks(o_r, o_w, sample, seed, n_blocks, CONST: tl.constexpr):
    """Whether a block covers the token, [rows, places on W]. A block is a bit of a row's word and of a column's."""
    GRID: tl.constexpr = CONST.GRID
    LONGEST: tl.constexpr = CONST.LONGEST
    NB: tl.constexpr = CONST.NB
    covered = tl.zeros((o_r.shape[0], o_w.shape[0]), tl.uint32)
    for first in range(0, n_blocks, NB):
        b = first + tl.arange(0, NB)
        lengths = philox(sample, 2 * b, 0, seed, 10)
        starts = philox(sample, 2 * b + 1, 0, seed, 10)
        bit = tl.where(b < n_blocks, 1 << tl.arange(0, NB).to(tl.uint32), 0)
        on_t = _inside(o_r // GRID[1], lengths[0], starts[0], GRID[0], LONGEST[0])
        on_h = _inside(o_r % GRID[1], lengths[1], starts[1], GRID[1], LONGEST[1])
        on_w = _inside(o_w, lengths[2], starts[2], GRID[2], LONGEST[2])
        row = tl.sum(tl.where(on_t & on_h, bit[None, :], 0), 1)
        column = tl.sum(tl.where(on_w, bit[None, :], 0), 1)
        covered |= row[:, None] & column[None, :]
    return covered != 0


@triton.jit
def _independent(i, sample, seed, threshold):
    """Whether token i is masked on its own (Eq. 2): four tokens share a call."""
    w0, w1, w2, w3 = philox(sample, i // 4, 1, seed, 10)
    word = tl.where(i % 4 < 2, tl.where(i % 4 == 0, w0, w1), tl.where(i % 4 == 2, w2, w3))
    return word.to(tl.int64) < threshold.to(tl.int64)  # up to 2^32


@triton.jit
def _replacement(ids, i, sample, seed, MASK_ID: tl.constexpr, VOCAB: tl.constexpr, NOISY: tl.constexpr):
    """What masked tokens become."""
    new = tl.full(ids.shape, MASK_ID, ids.dtype)
    if NOISY:
        which, word, _w2, _w3 = philox(sample, i, 2, seed, 10)
        code = tl.umulhi(word, tl.full(word.shape, VOCAB, tl.uint32)).to(ids.dtype)
        # shares of 2^32: 0.8 → MASK, 0.1 → a random code, the rest is kept
        new = tl.where(which < 3435973837, new, tl.where(which < 3865470566, code, ids))
    return new


@triton.jit
def _mask_clip(
    tokens,
    new,
    mask,
    sample,
    seed,
    n_blocks,
    threshold,
    strides,
    s_w,
    CONST: tl.constexpr,
):
    """Write one clip's tokens and mask; pointers are the clip's own. Returns how many positions are masked."""
    T: tl.constexpr = CONST.GRID[0]
    H: tl.constexpr = CONST.GRID[1]
    W: tl.constexpr = CONST.GRID[2]
    VOCAB: tl.constexpr = CONST.VOCAB
    _s_b, s_t, s_h = strides
    o_w = tl.arange(0, CONST.WP)
    count = tl.zeros((), tl.int32)
    for start in range(0, T * H, CONST.ROWS):
        o_r = start + tl.arange(0, CONST.ROWS)
        i = o_r[:, None] * W + o_w[None, :]
        m = (o_r < T * H)[:, None] & (o_w < W)[None, :]
        row = (o_r // H).to(tl.int64) * s_t + (o_r % H).to(tl.int64) * s_h
        ids = tl.load(tokens + row[:, None] + o_w.to(tl.int64)[None, :] * s_w, mask=m, other=0)
        if CONST.INDEPENDENT:
            masked = _independent(i, sample, seed, threshold)
        else:
            masked = _in_blocks(o_r, o_w, sample, seed, n_blocks, CONST)
        masked &= m & (ids != VOCAB + PAD)
        ids = tl.where(masked, _replacement(ids, i, sample, seed, VOCAB + MASK, VOCAB, CONST.NOISY), ids)
        tl.store(new + i, ids, mask=m)
        tl.store(mask + i, masked, mask=m)
        count += tl.sum(tl.sum(masked.to(tl.int32), 1), 0)
    return count


@triton.jit
def _masked_before(state, ticket, total, PROGRAMS: tl.constexpr):
    """Sum of the totals of all programs before this one. Leaves `state` all zeros once every program has been here."""
    o_p = tl.arange(0, PROGRAMS)
    tl.atomic_xchg(state + ticket, total + 1, sem="relaxed")  # 0 = not there yet; the number is all that is handed over
    words = tl.where(o_p < ticket, 0, 1).to(tl.int64)
    while tl.min(words, 0) == 0:
        words = tl.load(state + o_p, mask=words == 0, other=words, volatile=True)
    before = tl.sum(words - 1, 0)
    tl.debug_barrier()  # all threads have read before their program counts as done
    if tl.atomic_add(state + PROGRAMS + 1, 1) == tl.num_programs(0) - 1:
        tl.store(state + o_p, tl.zeros((PROGRAMS,), tl.int64))
        tl.store(state + PROGRAMS + tl.arange(0, 2), tl.zeros((2,), tl.int64))
    return before


@triton.jit(do_not_specialize=["B", "n_blocks", "threshold"], do_not_specialize_on_alignment=["sample_ids", "seed"])
def _draw(
    tokens,
    sample_ids,
    seed,
    new,
    mask,
    indices,
    counts,
    state,
    B,
    n_blocks,
    threshold,
    strides,
    s_w,
    s_sample,
    CONST: tl.constexpr,
):
    SIZE: tl.constexpr = CONST.GRID[0] * CONST.GRID[1] * CONST.GRID[2]
    BLOCK: tl.constexpr = CONST.BLOCK
    ticket = tl.atomic_add(state + CONST.PROGRAMS, 1, sem="relaxed")  # int64
    first = B * ticket // tl.num_programs(0)
    last = B * (ticket + 1) // tl.num_programs(0)
    key = tl.load(seed)
    total = tl.zeros((), tl.int64)
    for clip in range(first, last):
        count = _mask_clip(
            tokens + clip * strides[0],
            new + clip * SIZE,
            mask + clip * SIZE,
            tl.load(sample_ids + clip * s_sample),
            key,
            n_blocks,
            threshold,
            strides,
            s_w,
            CONST,
        )
        tl.store(counts + clip, count.to(tl.int64))
        total += count
    before = _masked_before(state, ticket, total, CONST.PROGRAMS)
    tl.debug_barrier()  # the mask is read by other threads than those that wrote it
    for start in range(first * SIZE, last * SIZE, BLOCK):
        i = start + tl.arange(0, BLOCK)
        m = i < last * SIZE
        masked = tl.load(mask + i, mask=m, other=0).to(tl.int32)
        rank = before + tl.cumsum(masked, 0) - masked  # masked positions before i
        slot = tl.where(masked != 0, rank, B.to(tl.int64) * SIZE - 1 - (i - rank))
        tl.store(indices + slot, tl.where(masked != 0, i, -1), mask=m)
        before += tl.sum(masked, 0)


def draw(tokens, sample_ids, seed, n_blocks, ratio, noisy, vocab_size):
    """tokens [B, T, H, W], sample_ids [B], seed [] → masked tokens, mask, packed indices, counts, all contiguous."""
    new, mask = tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape, dtype=torch.bool)
    indices, counts = tokens.new_empty(tokens.numel(), dtype=torch.int64), sample_ids.new_empty(sample_ids.shape)
    if B := tokens.shape[0]:
        *strides, s_w = tokens.stride()
        arguments = (tokens, sample_ids, seed, new, mask, indices, counts, _state(tokens.device), B, n_blocks)
        threshold = 0 if ratio is None else round(ratio * 2**32)
        const = constants(tokens.shape[1:], n_blocks, ratio is not None, noisy, vocab_size)
        _draw[(min(B, PROGRAMS),)](*arguments, threshold, tuple(strides), s_w, sample_ids.stride(0), const, **OPTIONS)
    return new, mask, indices, counts


def constants(grid, n_blocks, independent, noisy, vocab_size):
    T, H, W = grid
    WP = triton.next_power_of_2(W)
    return Constants(
        GRID=(T, H, W),
        LONGEST=(max(1, 2 * T // 3), max(1, H // 2), max(1, W // 2)),
        ROWS=min(triton.next_power_of_2(T * H), TILE // WP),
        WP=WP,
        NB=min(32, triton.next_power_of_2(n_blocks)),
        INDEPENDENT=independent,
        VOCAB=vocab_size,
        NOISY=noisy,
        PROGRAMS=PROGRAMS,
        BLOCK=min(triton.next_power_of_2(T * H * W), TILE),
    )


def _state(device):
    """The zeros that a launch needs and leaves behind: one buffer for each stream, whose launches follow one another.

    A captured graph gets its own buffer, so that its memory is never used outside of it. A lasting buffer is allocated by a new
    thread: in the caller's, torch.compile's CUDA graphs may take all allocations from a pool that they reuse later.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _zeros(device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    key = device, stream.cuda_stream if stream else 0
    if key not in STATES:
        with ThreadPoolExecutor(1) as thread:
            STATES.setdefault(key, thread.submit(_zeros, device).result())
        if stream:
            stream.wait_stream(torch.cuda.default_stream(device))  # on which the new thread has filled it
    return STATES[key]


def _zeros(device):
    return torch.zeros(PROGRAMS + 2, dtype=torch.int64, device=device)
