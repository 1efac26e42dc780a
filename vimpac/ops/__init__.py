"""The ops. Each file holds one op's formula, reference, schema, fake, gradient and list of backends."""

from vimpac.ops.axial_attention import axial_attention, axial_attention_packed, axial_attention_reference
from vimpac.ops.bias_gelu import bias_gelu, bias_gelu_reference, gelu_linear
from vimpac.ops.block_mask import BlockMask, block_mask, block_mask_reference
from vimpac.ops.dropout_add import dropout, dropout_add, dropout_add_reference
from vimpac.ops.info_nce import info_nce, info_nce_reference
from vimpac.ops.masked_cross_entropy import masked_cross_entropy, masked_cross_entropy_reference
from vimpac.ops.residual_norm import residual_norm, residual_norm_reference, residual_sum_norm

__all__ = [
    "BlockMask",
    "axial_attention",
    "axial_attention_packed",
    "axial_attention_reference",
    "bias_gelu",
    "bias_gelu_reference",
    "block_mask",
    "block_mask_reference",
    "dropout",
    "dropout_add",
    "dropout_add_reference",
    "gelu_linear",
    "info_nce",
    "info_nce_reference",
    "masked_cross_entropy",
    "masked_cross_entropy_reference",
    "residual_norm",
    "residual_norm_reference",
    "residual_sum_norm",
]
