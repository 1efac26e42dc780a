"""A linear layer that trains faster on x86 CPUs.

There torch multiplies float32 matrices with MKL and convolves with oneDNN. A 1×1 convolution is the same product. On two
threads of an AMD EPYC, oneDNN is 10 to 20 % faster for the forward pass and for the gradient of x (docs/performance.md). For
the weight's gradient, a sum over the rows, MKL is at least as fast.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

X86 = platform.machine().lower() in ("x86_64", "amd64")


class Linear(nn.Linear):
    """nn.Linear that uses oneDNN for float32 training on an x86 CPU.

    Not in evaluation, where the number of rows may change with every batch: oneDNN keeps some memory for each number.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.bias)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x · weightᵀ + bias, with another bias than the layer's own or none."""
        if self.training and fits_convolution(x, self.weight):
            return _Convolution.apply(x, self.weight, bias)
        return F.linear(x, self.weight, bias)


def fits_convolution(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's convolution computes x · weightᵀ."""
    if not X86 or torch.compiler.is_compiling():
        return False
    rows = x.dim() == 2 and len(x) > 0 and x.is_contiguous()
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return rows and plain and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu")


class _Convolution(torch.autograd.Function):
    """x [R, K], weight [N, K], bias [N] or None → x · weightᵀ + bias."""

    generate_vmap_rule = True  # works under torch.func, as nn.Linear does

    @staticmethod
    def forward(x, weight, bias):
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, *grad_outputs):
        x, weight = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        of_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = grad.t() @ x if ctx.needs_input_grad[1] else None
        return of_x, of_weight, grad.sum(0) if ctx.needs_input_grad[2] else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias as the convolution of an image of R×1 pixels, whose channels lie next to each other."""
    image = x[None, :, None].permute(0, 3, 1, 2)  # [1, K, R, 1], channels last
    return F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1).flatten(0, 2)
