"""Compiler options of every launch."""

FUSED = {"enable_fp_fusion": True}  # a·b + c in one instruction, rounded once: from 3.10 on not Triton's default
