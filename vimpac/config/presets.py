"""The presets: the demos, and the runs of the paper (Tables 3 and 4)."""

from __future__ import annotations

from vimpac.config.finetune import FinetuneConfig
from vimpac.config.model import ModelConfig
from vimpac.config.pretrain import PretrainConfig

PRESETS: dict[str, tuple[str, PretrainConfig | FinetuneConfig]] = {
    "demo": (
        "a small model on synthetic videos, minutes on a laptop",
        PretrainConfig(
            synthetic_videos=1024,
            fit_frame_size=True,
            output="runs/demo",
            model=ModelConfig(layers=4, width=128, heads=4, grid=(5, 8, 8), dropout=0.0, head_width=512, head_out=128),
            steps=900,
            batch_size=8,
            contrastive_videos=8,
            save_every=200,
        ),
    ),
    "small": ("the paper's analysis: Small, 5×128 px, 10 epochs (Table 4)", PretrainConfig(output="runs/small")),
    "base": ("Base with the analysis schedule (Table 6)", PretrainConfig(output="runs/base", model=ModelConfig.base())),
    "large-half": (
        "the paper's results, first stage: Large-Half, 5×128 px, 90 of 100 epochs, 255 negatives (Table 4)",
        PretrainConfig(
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
        PretrainConfig(
            output="runs/large-half-256",
            continue_from="runs/large-half",
            model=ModelConfig.large_half(grid=(5, 32, 32)),
            epochs=100.0,
            schedule_epochs=100.0,
            learning_rate=3e-4,
            warmup=0.05,
        ),
    ),
    "finetune-demo": (
        "fine-tune the demo's model on the motions of its synthetic videos, and a new model beside it",
        FinetuneConfig(
            start="runs/demo",
            synthetic_videos=1024,
            held_out=0.25,
            output="runs/finetune-demo",
            epochs=5.0,
            batch_size=8,
            learning_rate=1e-3,
            layer_decay=0.65,
            validate_every=2.5,
            eval_clips=4,
            compare_scratch=True,
            save_every=50,
        ),
    ),
    "finetune-ucf101": (
        "UCF101 (Table 4): 10×256 px at 2 frames a second, 50 epochs",
        FinetuneConfig(output="runs/finetune-ucf101", frames=10, fps=2.0, epochs=50.0),
    ),
    "finetune-hmdb51": (
        "HMDB51 (Table 4): 10×256 px at 4 frames a second, 50 epochs",
        FinetuneConfig(output="runs/finetune-hmdb51", frames=10, fps=4.0, epochs=50.0),
    ),
    "finetune-diving48": (
        "Diving48 (Table 4): 10×256 px at 4 frames a second, 50 epochs",
        FinetuneConfig(output="runs/finetune-diving48", frames=10, fps=4.0, epochs=50.0),
    ),
    "finetune-ssv2": (
        "Something-Something v2 (Table 4): 10×256 px at 4 frames a second, 22 epochs, one spatial crop at test time",
        FinetuneConfig(output="runs/finetune-ssv2", frames=10, fps=4.0, epochs=22.0, scratch_epochs=1.5, eval_views="center"),
    ),
    "finetune-kinetics400": (
        "Kinetics-400 (Table 4): 10×256 px at 2 frames a second, 30 epochs",
        FinetuneConfig(output="runs/finetune-kinetics400", frames=10, fps=2.0, epochs=30.0, scratch_epochs=1.5),
    ),
}
"""What `train.py PRESET` runs: name → (description, configuration)."""
