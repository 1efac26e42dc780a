"""Which backend an op takes where none is named: the first of a row that can run the call, fastest first.

The table is what benchmarks/ measured (docs/kernels.md has the numbers). No GPU has been measured yet; there the CUDA kernels,
where they were built, come before Triton's because of what attention's machine code promises (tools/predicted.py), and
because Triton's launches go through Python. A product of axes, or a line of more than 64 tokens, is a long sequence, and
torch's scaled_dot_product_attention is made for those.
"""

from __future__ import annotations

FASTEST = {  # op → device → backends
    "axial_attention": {"cuda": ("cuda", "triton", "reference"), "cpu": ("triton", "cpu", "reference")},
    "axial_attention on long lines": {"cuda": ("sdpa",), "cpu": ("sdpa",)},
    "block_mask": {"cuda": ("cuda", "triton", "reference"), "cpu": ("triton", "cpu", "reference")},
    "dropout_add": {"cuda": ("triton", "torch", "reference"), "cpu": ("triton", "cpu", "torch", "reference")},
    "info_nce": {"cuda": ("triton", "reference"), "cpu": ("triton", "cpu", "reference")},
    "masked_cross_entropy": {"cuda": ("triton", "chunked"), "cpu": ("triton", "chunked")},
}  # triton on a CPU runs in its interpreter, and only where TRITON_INTERPRET asks for that


def order(op: str, device_type: str) -> tuple[str, ...]:
    """Backends to try for a row of the table, fastest first; devices other than CUDA are as a CPU."""
    return FASTEST[op]["cuda" if device_type == "cuda" else "cpu"]
