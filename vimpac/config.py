"""Every option of the project with its default, written once, and the paper's presets (Tables 3 and 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from vimpac.errors import InputError
from vimpac.layouts import parse_layout

MOST_VIDEOS = 1_000_000
MOST_PIXELS = 100_000_000  # of a generated video
# The range of float32 with a margin: a smaller eps would become 0, a larger learning rate infinite.
SMALLEST, LARGEST = 1e-30, 1e30
WIDEST = 2**20
# Special ids follow the V codes, as in the released weights: PAD is V + 1, MASK is V + 4. csrc/block_mask.h repeats them.
SPECIAL_IDS, PAD_OFFSET, MASK_OFFSET = 5, 1, 4


@dataclass(frozen=True)
class TokenizeConfig:
    """How `vimpac tokenize` turns videos into token ids."""

    tokenizer: Literal["patch-vq", "dalle"] = "patch-vq"
    """patch-vq: k-means over 8×8 patches, fitted on these videos. dalle: OpenAI's discrete VAE, as in the paper."""
    tokenizer_path: str | None = None
    """An already fitted tokenizer: a .safetensors file, or a store whose tokenizer to reuse. Required for dalle."""
    codes: int = 512
    """Vocabulary size of a newly fitted patch-vq, 2 to 8192; fewer if the patches are too much alike."""
    frame_size: int = 128
    """Side of the square frames in pixels, a multiple of 8, at most 4096."""
    fps: float = 2.0
    """Frames kept per second of video, 0.001 to 1000."""
    views: Literal["center", "train", "test"] = "center"
    """center: one centre crop (pre-training). train: Table 4's 12 views (2 sizes × 3 crops × 2 flips). test: 3 crops."""
    flip: bool = True
    """Whether the train views include horizontal flips; --no-flip where left and right matter (SSV2)."""
    seed: int = 0
    """Seed of the k-means fit, 0 to 2³² - 1."""
    video_timeout: float = 3600.0
    """Seconds that decoding and encoding one video may take; one that takes longer is listed as failed."""

    def __post_init__(self):
        size, fps, codes = self.frame_size, self.fps, self.codes
        if not 8 <= size <= 4096 or size % 8:
            raise InputError(f"frame size is {size}, expected a positive multiple of 8, such as 128, and at most 4096")
        if not 0.001 <= fps <= 1000:
            raise InputError(f"fps is {fps}, expected a positive number of frames a second, such as 2: 0.001 to 1000")
        if not 2 <= codes <= 8192:
            raise InputError(f"codes is {codes}, expected 2 to 8192")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}, expected 0 to {2**32 - 1}")
        if not 1 <= self.video_timeout <= 1e9:
            raise InputError(f"video_timeout is {self.video_timeout}, expected 1 to 10⁹ seconds")


@dataclass(frozen=True)
class SynthesizeConfig:
    """What `vimpac synthesize` draws: textured shapes moving on textured, moving backgrounds."""

    videos: int = 256
    """How many videos to write, at most 1,000,000."""
    seconds: float = 8.0
    """Length of each video."""
    fps: float = 8.0
    """Frames per second of the files, 0.1 to 240."""
    size: int = 96
    """Side of the square frames in pixels, even, 32 to 4096. A video is drawn whole: at most 100 million pixels in all."""
    seed: int = 0
    """Seed of everything drawn, below 2⁶³: the same seed draws the same frames (H.264 encoders may round them otherwise)."""

    def __post_init__(self):
        if not 1 <= self.videos <= MOST_VIDEOS:
            raise InputError(f"videos is {self.videos}, expected at least 1, and at most {MOST_VIDEOS}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}, expected 0 or more, and below 2⁶³")
        if not 0 < self.seconds < math.inf:
            raise InputError(f"seconds is {self.seconds}, expected a number above 0")
        if not 0.1 <= self.fps <= 240:
            raise InputError(f"fps is {self.fps}, expected 0.1 to 240")
        if not 32 <= self.size <= 4096 or self.size % 2:
            raise InputError(f"size is {self.size}, expected an even number of pixels, at least 32 and at most 4096")
        frames = round(self.seconds * self.fps) if self.seconds <= MOST_PIXELS else MOST_PIXELS
        if frames < 1:
            raise InputError(f"{self.seconds} seconds at {self.fps} fps hold no frame; give more seconds or a higher fps")
        if frames * self.size**2 > MOST_PIXELS:
            raise InputError(
                f"{self.seconds} seconds at {self.fps} fps and size {self.size} are more than {MOST_PIXELS} pixels, and a "
                "video is drawn whole; give fewer seconds, or a lower fps or size"
            )


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
            _counts(f"model.{name}", getattr(self, name), 1024)
        for name in ("width", "heads", "head_width", "head_out"):
            _counts(f"model.{name}", getattr(self, name), WIDEST)
        _counts("model.vocab_size", self.vocab_size, 2**16)
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise InputError(f"model.grid must be three positive numbers T H W, got {self.grid}")
        _require(max(self.grid) <= 4096, "model.grid", self.grid, "at most 4096 along each axis")
        for name, value in (("attention_width", self.key_width), ("mlp_width", self.hidden_width)):
            _counts(f"model.{name}", value, WIDEST)
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


def _counts(name: str, value: int, most: int) -> None:
    _require(value >= 1, name, value, "at least 1")
    _require(value <= most, name, value, f"at most {most}")


@dataclass(frozen=True)
class TrainConfig:
    """A pre-training run. A video counts as its two clips throughout."""

    data: str | None = None
    """Token store made by `vimpac tokenize`."""
    synthetic_videos: int = 0
    """Without data: generate this many labelled videos, tokenize them and train on them; 0 = data is required."""
    output: str = "runs/pretrain"
    """Run folder: config.json, metrics.jsonl, checkpoints, model.safetensors, curves.png."""
    resume: bool = False
    """Continue from the last checkpoint in the run folder."""
    continue_from: str | None = None
    """Run folder of an earlier stage: take its weights, Adam moments and step; positions are interpolated."""
    init_from: str | None = None
    """A run folder, model or checkpoint to start from: its weights only, positions interpolated. Not with continue_from."""
    seed: int = 0
    """Seed of initialisation, data order, masks and dropout, 0 or more."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model (Tables 3, 13, 14). The vocabulary size is taken from the store."""
    fit_frame_size: bool = False
    """Take the grid's height and width from the store instead of refusing another frame size. demo: off with --model.grid."""

    steps: int | None = None
    """Updates until the run ends; None = as many as epochs takes."""
    epochs: float = 10.0
    """Passes over the training videos until the run ends, if steps is None."""
    schedule_epochs: float | None = None
    """Passes until the learning rate is 0; None = epochs. With --steps: steps · schedule_epochs / epochs updates."""
    batch_size: int = 1024
    """Videos per update, over all processes and accumulated micro-steps."""
    contrastive_videos: int = 128
    """n of Eq. 5: videos contrasted with each other, 2 or more; n - 1 of them are negatives (Table 11)."""
    micro_batch: int | None = None
    """Videos per forward pass in each process; None = contrastive_videos / processes. Fewer needs gradient caching."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup: float = 0.1
    """Share of the schedule in which the learning rate rises linearly; after it, it falls linearly to 0."""
    weight_decay: float = 0.05
    """AdamW's, on everything but biases and norm weights."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    grad_clip: float = 1.0
    """Largest gradient norm."""

    mask_task: bool = True
    """Whether to predict masked tokens. Tables 7 and 16, contrastive only: --no-mask-task --no-contrastive-masked."""
    alpha: float = 1.0
    """α of Eq. 6 (Table 16): the loss is mask + alpha · temperature · contrastive; 0 = mask-then-predict only."""
    temperature: float = 0.2
    """γ: what Eq. 4 divides similarities by, and Eq. 6 multiplies the contrastive loss by."""
    mask: Literal["block", "iid"] = "block"
    """Blocks (Eq. 3) or independent tokens (Eq. 2)."""
    n_blocks: int | None = None
    """Blocks per clip; None = the number whose expected ratio is closest to 15 % (Table 2)."""
    mask_ratio: float = 0.145
    """Share of masked tokens of an iid mask (Tables 8, 15)."""
    noisy_mask: bool = False
    """BERT's 80/10/10 replacement instead of MASK everywhere (section G.3)."""
    contrastive_masked: bool = True
    """Contrast the masked clips of mask-then-predict; --no-contrastive-masked contrasts intact clips instead (Table 12)."""
    d_max: float | None = None
    """Largest distance of a video's two clips in seconds (Table 10); None = anywhere."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast dtype; auto = bf16 on a GPU that has it, else fp32. (A CPU with AMX is also faster in bf16.)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of embedding, layers and token head; auto = on a CUDA device that can."""
    graphs: bool = False
    """Replay the micro-step as a CUDA graph: for steps so short that launching kernels takes most of their time."""
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"
    """What backward recomputes: nothing; whatever is cheap compared with matrix products; every layer (a third slower)."""
    shard_optimizer: bool = False
    """ZeRO-1: each process keeps and updates its part of AdamW's state, instead of all of it."""

    held_out: float = 0.0625
    """Videos kept for the evaluation at the end: a share of them (below 1; at most 2048 videos) or their number (1 or more)."""
    eval_batches: int = 16
    """Batches of contrastive_videos held-out videos in the evaluation."""
    log_every: int = 10
    """Updates between reading the metrics (with several GPUs also checking for signals). Each update gets a line anyway."""
    save_every: int = 500
    """Updates between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    profile: bool = False
    """Profile a few updates near the start: RUN/profile.json (a trace for Perfetto) and a table of where the time goes."""

    def __post_init__(self):
        for name in ("data", "output", "continue_from", "init_from"):
            _require(getattr(self, name) != "", name, "''", "a path (is a shell variable unset?)")
        for name in ("batch_size", "contrastive_videos", "micro_batch", "eval_batches"):
            if getattr(self, name) is not None:
                _counts(name, getattr(self, name), MOST_VIDEOS)
        for name in ("steps", "log_every", "save_every", "keep_checkpoints"):
            if getattr(self, name) is not None:
                _counts(name, getattr(self, name), 2**31 - 1)
        for name in ("learning_rate", "eps", "grad_clip"):
            _positive(name, getattr(self, name), SMALLEST, LARGEST)
        for name in ("epochs", "temperature"):
            _positive(name, getattr(self, name), 1e-6, 1e6)
        for name in ("alpha", "weight_decay"):
            _not_negative(name, getattr(self, name), "0 or a positive number", 1e6)
        for name in ("warmup", "mask_ratio"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(0 <= self.seed < 2**63 - 1, "seed", self.seed, "0 to 2⁶³ - 2")
        _require(self.held_out > 0, "held_out", self.held_out, "above 0, since the run ends with an evaluation")
        whole = self.held_out < 1 or (self.held_out < 2**31 and float(self.held_out).is_integer())
        _require(whole, "held_out", self.held_out, "a share below 1, or a number of videos")
        _require(self.mask != "iid" or self.mask_ratio > 0, "mask_ratio", self.mask_ratio, "above 0 for an iid mask")
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        if self.d_max is not None:
            _not_negative("d_max", self.d_max, "0 or more seconds", 1e9)
        _not_negative("synthetic_videos", self.synthetic_videos, "0 or more", MOST_VIDEOS)
        tokens = math.prod(self.model.grid)
        _require(self.n_blocks is None or self.n_blocks >= 1, "n_blocks", self.n_blocks, "at least 1")
        _require((self.n_blocks or 1) <= tokens, "n_blocks", self.n_blocks, f"at most the {tokens} tokens of a clip")
        _, height, width = self.model.grid
        _require(
            bool(self.data or not self.synthetic_videos) or height == width,
            "model.grid",
            self.model.grid,
            f"square to generate videos for it, such as {self.model.grid[0]} {height} {height}",
        )
        schedule = self.schedule_epochs
        fits = schedule is None or self.epochs <= schedule < math.inf
        ratio = "" if self.steps is None else " (with --steps only the ratio of the two counts: give both)"
        _require(fits, "schedule_epochs", schedule, f"at least epochs={self.epochs}, and finite{ratio}")
        _require((schedule or 1) <= 1e6, "schedule_epochs", schedule, "at most 1e+06")
        _require(
            self.alpha == 0 or self.contrastive_videos >= 2,
            "contrastive_videos",
            self.contrastive_videos,
            f"at least 2 with alpha={self.alpha}, since each video is contrasted with the others (or --alpha 0)",
        )
        _require(
            self.init_from is None or self.continue_from is None,
            "init_from",
            self.init_from,
            f"left out with continue_from={self.continue_from}, which brings its own weights (or add --continue-from None)",
        )
        _require(
            self.mask_task or self.alpha > 0,
            "alpha",
            self.alpha,
            "above 0 without the mask task, or nothing is learned",
        )


def _positive(name: str, value: float, least: float, most: float) -> None:
    _require(0 < value < math.inf, name, value, "a positive number")
    _require(least <= value <= most, name, value, f"from {least:g} to {most:g}")


def _not_negative(name: str, value: float, kind: str, most: float) -> None:
    _require(0 <= value < math.inf, name, value, kind)
    _require(value <= most, name, value, f"at most {most:g}")


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise InputError(f"{name} must be {expected}, got {value}")


PRESETS: dict[str, tuple[str, TrainConfig]] = {
    "demo": (
        "a small model on synthetic videos, minutes on a laptop",
        TrainConfig(
            synthetic_videos=256,
            fit_frame_size=True,
            held_out=0.125,
            output="runs/demo",
            model=ModelConfig(layers=4, width=128, heads=4, grid=(5, 8, 8), dropout=0.0, head_width=512, head_out=128),
            steps=200,
            batch_size=16,
            contrastive_videos=16,
            save_every=50,
        ),
    ),
    "small": ("the paper's analysis: Small, 5×128 px, 10 epochs (Table 4)", TrainConfig(output="runs/small")),
    "base": ("Base with the analysis schedule (Table 6)", TrainConfig(output="runs/base", model=ModelConfig.base())),
    "large-half": (
        "the paper's results, first stage: Large-Half, 5×128 px, 90 of 100 epochs, 255 negatives (Table 4)",
        TrainConfig(
            output="runs/large-half",
            model=ModelConfig.large_half(),
            epochs=90.0,
            schedule_epochs=100.0,
            contrastive_videos=256,
            learning_rate=3e-4,
            warmup=0.05,
        ),
    ),
    "large-half-256": (
        "the paper's results, second stage: 5×256 px, the last 10 of 100 epochs, 127 negatives (Table 4)",
        TrainConfig(
            output="runs/large-half-256",
            continue_from="runs/large-half",
            model=ModelConfig.large_half(grid=(5, 32, 32)),
            epochs=100.0,
            schedule_epochs=100.0,
            learning_rate=3e-4,
            warmup=0.05,
        ),
    ),
}
"""What `train.py PRESET` runs: name → (description, configuration)."""
