"""Every option of the project with its default, written once, and the presets."""

from vimpac.config.data import SynthesizeConfig, TokenizeConfig
from vimpac.config.finetune import FROM_SCRATCH, FinetuneConfig
from vimpac.config.model import MASK_OFFSET, PAD_OFFSET, SPECIAL_IDS, ModelConfig
from vimpac.config.presets import PRESETS
from vimpac.config.pretrain import PretrainConfig
from vimpac.config.run import RunConfig

__all__ = [
    "FROM_SCRATCH",
    "MASK_OFFSET",
    "PAD_OFFSET",
    "PRESETS",
    "SPECIAL_IDS",
    "FinetuneConfig",
    "ModelConfig",
    "PretrainConfig",
    "RunConfig",
    "SynthesizeConfig",
    "TokenizeConfig",
]
