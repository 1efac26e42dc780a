"""Which tokens of a clip are hidden from the model, as a function of the run's seed and the clip's sample id."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from vimpac.config import PretrainConfig
from vimpac.ops import BlockMask, block_mask
from vimpac.ops.block_mask import block_count_variance, expected_block_ratio

TARGET_RATIO = 0.15  # section B.1: the number of blocks whose expected ratio is closest to this
MOST_BLOCKS = 64


@dataclass(frozen=True)
class Masking:
    """How the masks of a run are drawn: blocks (Eq. 3) if `ratio` is None, else independent tokens (Eq. 2)."""

    grid: tuple[int, int, int]
    vocab_size: int
    seed: int
    n_blocks: int
    ratio: float | None
    noisy: bool
    """Replace only 80 % of the masked tokens by MASK (section G.3)."""

    @classmethod
    def from_config(cls, config: PretrainConfig) -> Masking:
        grid, ratio = config.model.grid, config.mask_ratio if config.mask == "iid" else None
        n_blocks = config.n_blocks or blocks_for_ratio(grid)
        return cls(grid, config.model.vocab_size, config.seed, n_blocks, ratio, config.noisy_mask)

    def draw(self, tokens: Tensor, sample_ids: Tensor, backend: str | None = None) -> BlockMask:
        """The masks of clips [B, T, H, W] with sample ids [B]: the same bits on every device and however a batch is split."""
        return block_mask(tokens, sample_ids, self.seed, self.n_blocks, self.ratio, self.noisy, self.vocab_size, backend)

    @property
    def expected_share(self) -> float:
        """Expected share of masked tokens in clips without padding."""
        return expected_block_ratio(self.grid, self.n_blocks) if self.ratio is None else self.ratio

    @property
    def count_variance(self) -> float:
        """Variance of the number of masked tokens of a clip without padding."""
        if self.ratio is None:
            return block_count_variance(self.grid, self.n_blocks)
        return math.prod(self.grid) * self.ratio * (1 - self.ratio)


def blocks_for_ratio(grid: tuple[int, int, int], ratio: float = TARGET_RATIO) -> int:
    """The number of blocks whose expected share of masked tokens is closest to `ratio` (bold in Table 2)."""
    return min(range(1, MOST_BLOCKS + 1), key=lambda n: abs(expected_block_ratio(grid, n) - ratio))
