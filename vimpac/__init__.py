"""VIMPAC: video pre-training by block-masked token prediction and contrastive learning."""

__version__ = "0.1.0"
