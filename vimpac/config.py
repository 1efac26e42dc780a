"""Every option of the project with its default, written once, and the paper's presets (Tables 3 and 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vimpac.errors import InputError


@dataclass(frozen=True)
class TokenizeConfig:
    """How `vimpac tokenize` turns videos into token ids."""

    tokenizer: Literal["patch-vq", "dalle"] = "patch-vq"
    """patch-vq: k-means over 8×8 patches, fitted on these videos. dalle: OpenAI's discrete VAE, as in the paper."""
    tokenizer_path: str | None = None
    """An already fitted tokenizer: a .safetensors file, or a store whose tokenizer to reuse. Required for dalle."""
    codes: int = 512
    """Vocabulary size of a newly fitted patch-vq, at most 8192."""
    frame_size: int = 128
    """Side of the square frames in pixels, a multiple of 8."""
    fps: float = 2.0
    """Frames kept per second of video."""
    views: Literal["center", "train", "test"] = "center"
    """center: one centre crop (pre-training). train: Table 4's 12 views (2 sizes × 3 crops × 2 flips). test: 3 crops."""
    flip: bool = True
    """Whether the train views include horizontal flips; --no-flip where left and right matter (SSV2)."""
    seed: int = 0
    """Seed of the k-means fit."""


@dataclass(frozen=True)
class SynthesizeConfig:
    """What `vimpac synthesize` draws: textured shapes moving on textured, moving backgrounds."""

    videos: int = 256
    """How many videos to write."""
    seconds: float = 8.0
    """Length of each video."""
    fps: float = 8.0
    """Frames per second of the files."""
    size: int = 96
    """Side of the square frames in pixels, even."""
    seed: int = 0
    """Seed of everything drawn: the same seed writes the same frames."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer (Table 3) and of its heads (section C.1)."""

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
    norm: Literal["post", "pre"] = "post"
    """Layer norm after each residual connection (Eq. 10, 14), or before each block."""
    attention_width: int | None = None
    """Heads × head width; None = width. Large-Half uses half of it."""
    mlp_width: int | None = None
    """Hidden size of the MLP; None = 4 × width."""
    dropout: float = 0.1
    """Dropout of embeddings, attention probabilities and block outputs."""
    cls_in_context: bool = True
    """True: [CLS] is a key of every line and a query beside its tokens. False: Eq. 12-15 read literally."""
    head_layers: int = 3
    """Linear layers of the contrastive head."""
    head_width: int = 4096
    """Hidden size of the contrastive head."""
    head_out: int = 256
    """Size of the features that are contrasted."""
    vocab_size: int = 8192
    """V, token types. Five special ids follow, among them PAD = V + 1 and MASK = V + 4."""

    def __post_init__(self):
        from vimpac.model.layouts import parse_layout  # the grammar belongs to the model

        object.__setattr__(self, "grid", tuple(self.grid))
        for name in ("layers", "width", "heads", "head_layers", "head_width", "head_out", "vocab_size"):
            _at_least_one(f"model.{name}", getattr(self, name))
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise InputError(f"model.grid must be three positive numbers T H W, got {self.grid}")
        for name, value in (("attention_width", self.key_width), ("mlp_width", self.hidden_width)):
            _at_least_one(f"model.{name}", value)
        if self.key_width % self.heads:
            raise InputError(f"attention width {self.key_width} must be a multiple of the {self.heads} heads")
        if self.norm not in ("post", "pre"):
            raise InputError(f"model.norm must be 'post' or 'pre', got {self.norm!r}")
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
        return self.vocab_size + 1

    @property
    def mask_id(self) -> int:
        return self.vocab_size + 4

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


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} must be at least 1, got {value}")
