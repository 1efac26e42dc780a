"""The shape of the model (Table 3), and the special ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vimpac.config.checks import counts, require
from vimpac.errors import InputError
from vimpac.layouts import parse_layout

WIDEST = 2**20
# Special ids follow the V codes, as in the released weights: PAD is V + 1, MASK is V + 4. csrc/block_mask.h repeats them.
SPECIAL_IDS, PAD_OFFSET, MASK_OFFSET = 5, 1, 4


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer (Table 3) and of its heads (section C.1): at most 1024 layers, 2²⁰ wide, 4096 along an axis."""

    layers: int = 6
    """Transformer layers."""
    width: int = 512
    """C, the hidden size."""
    heads: int = 8
    """N, attention heads, split evenly over the axes of a block."""
    layout: str = "T,H|W"
    """Attention blocks of a layer (Table 13): `,` = one after another, `|` = heads split over axes, `x` = joined axes."""
    grid: tuple[int, int, int] = (5, 16, 16)
    """T, H, W of the token grid: frames of a clip, frame height and width divided by 8."""
    norm: Literal["post", "pre", "pre-vit"] = "post"
    """post: layer norm after each residual connection (Eq. 10, 14). pre: before each block, as the released program has it.
    pre-vit: before each block, as GPT and ViT have it: there attention adds to its input, in `pre` to its normalised input."""
    attention_width: int | None = None
    """Heads × head width; None = width. Large-Half uses half of it."""
    mlp_width: int | None = None
    """Hidden size of the MLP; None = 4 × width."""
    dropout: float = 0.1
    """Dropout of embeddings, attention probabilities and block outputs."""
    cls_in_context: bool = True
    """True: each line of tokens has [CLS] as one more key and query. False: tokens and [CLS] attend to tokens only."""
    head_layers: int = 3
    """Linear layers of the contrastive head."""
    head_width: int = 4096
    """Hidden size of the contrastive head."""
    head_out: int = 256
    """Size of the features that are contrasted."""
    vocab_size: int = 8192
    """V, token types; in training always the store's. Five special ids follow, among them PAD = V + 1 and MASK = V + 4."""

    def __post_init__(self):
        object.__setattr__(self, "grid", tuple(self.grid))
        for name in ("layers", "head_layers"):
            counts(f"model.{name}", getattr(self, name), 1024)
        for name in ("width", "heads", "head_width", "head_out"):
            counts(f"model.{name}", getattr(self, name), WIDEST)
        counts("model.vocab_size", self.vocab_size, 2**16)
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise InputError(f"model.grid must be three positive numbers T H W, got {self.grid}")
        require(max(self.grid) <= 4096, "model.grid", self.grid, "at most 4096 along each axis")
        for name, value in (("attention_width", self.key_width), ("mlp_width", self.hidden_width)):
            counts(f"model.{name}", value, WIDEST)
        if self.key_width % self.heads:
            raise InputError(f"attention width {self.key_width} must be a multiple of the {self.heads} heads")
        if self.norm not in ("post", "pre", "pre-vit"):
            raise InputError(f"model.norm must be 'post', 'pre' or 'pre-vit', got {self.norm!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"model.dropout must be in [0, 1), got {self.dropout}")
        parse_layout(self.layout, self.heads)

    @property
    def key_width(self) -> int:
        return self.width if self.attention_width is None else self.attention_width

    @property
    def hidden_width(self) -> int:
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    @property
    def pad_id(self) -> int:
        return self.vocab_size + PAD_OFFSET

    @property
    def mask_id(self) -> int:
        return self.vocab_size + MASK_OFFSET

    @classmethod
    def small(cls, **options) -> ModelConfig:
        """Table 3, Small: 29.4 M parameters, the model of the paper's analysis."""
        return cls(**options)

    @classmethod
    def base(cls, **options) -> ModelConfig:
        """Table 3, Base: 119.7 M parameters."""
        return cls(**{"layers": 12, "width": 768, "heads": 12, **options})

    @classmethod
    def large_half(cls, **options) -> ModelConfig:
        """Table 3, Large-Half: 210.1 M parameters, attention and MLP of half their usual width."""
        sizes = {"layers": 24, "width": 1024, "heads": 16, "attention_width": 512, "mlp_width": 2048}
        return cls(**{**sizes, **options})
