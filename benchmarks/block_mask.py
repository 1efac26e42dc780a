"""Block masks of 512 clips, from ids to masked ids, mask, packed indices and counts: ours against a Python loop.

5×16×16 and 10×32×32 tokens, as many blocks as the paper takes for them (Table 2), int64 ids. Ours must equal the reference on
the CPU in every element ("error" is the share that does not). The loop over clips and blocks, random integers and slices in
Python, then a copy to the device and the masking there, draws other masks: its error is how far its masked share lies from the
expected one. How it is timed: harness.py. GB/s counts reading the ids and writing ids, mask and indices.

    python benchmarks/block_mask.py [--quick] [--device cpu]
"""

from __future__ import annotations

import math
import sys
from functools import partial

import torch
from torch import Tensor

import harness
import naive
from harness import Benchmark, Case, Impl
from vimpac.config import MASK_OFFSET
from vimpac.model.masking import blocks_for_ratio
from vimpac.ops import block_mask, block_mask_reference
from vimpac.ops.block_mask import expected_block_ratio

SEED, VOCABULARY = 3, 8192
CLIPS = 512


def loop(tokens: Tensor, sample_ids: Tensor, n_blocks: int) -> tuple[Tensor, Tensor]:
    mask = naive.block_masks(len(tokens), tuple(tokens.shape[1:]), n_blocks).to(tokens.device)
    return tokens.masked_fill(mask, VOCABULARY + MASK_OFFSET), mask


def unequal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Share of elements that differ, the worst of several tensors."""
    return max(float((a.cpu() != b).double().mean()) for a, b in zip(got, expected, strict=True))


def run(bench: Benchmark, clips: int, grid: tuple[int, int, int]) -> None:
    n_blocks = blocks_for_ratio(grid)
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (clips, *grid))
    sample_ids = torch.arange(10**9, 10**9 + clips)
    seed = torch.full((), SEED)  # a tensor, so that a call is the op alone
    expected = block_mask_reference(tokens, sample_ids, seed, n_blocks)
    inputs = [x.to(bench.device) for x in (tokens, sample_ids)]

    def check_loop(function):
        share = function(*inputs)[1].double().mean()
        return abs(float(share) - expected_block_ratio(grid, n_blocks))

    case = Case(
        "block_mask",
        f"{'x'.join(map(str, grid))} B={clips} blocks={n_blocks}",
        torch.int64,
        inputs,
        lambda function: unequal(function(*inputs), expected),
        bytes={"forward": clips * math.prod(grid) * (8 + 8 + 1 + 8)},
    )
    options = {"bound": 0.0}
    settings = {"seed": seed.to(bench.device), "n_blocks": n_blocks}
    python = Impl("python loop", lambda: partial(loop, n_blocks=n_blocks), graph=False, check=check_loop, bound=0.02)
    ours = harness.ours("block_mask", partial(block_mask, **settings), inputs, **options)
    bench.add(case, [*ours, python, *harness.reference(partial(block_mask_reference, **settings), **options)])


def main(argv: list[str] | None = None) -> int:
    bench = Benchmark("block_mask", harness.arguments(__doc__, argv))
    for grid in [(3, 4, 5)] if bench.quick else [(5, 16, 16), (10, 32, 32)]:
        run(bench, CLIPS, grid)
    return bench.finish(small=bench.quick)


if __name__ == "__main__":
    sys.exit(main())
