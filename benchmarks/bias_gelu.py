"""GELU with a linear layer's bias, forward and forward+backward: ours against torch's eager and compiled.

The rows of 8 clips of 5×16×16 in Small (2048 wide in the MLP) on a CPU in float32, of 256 on a GPU in bfloat16. All are checked
against torch's ops in float64. How it is timed: harness.py. GB/s counts h and the output forward; a gradient, h and its
gradient backward.

    python benchmarks/bias_gelu.py [--quick] [--dtype float32] [--device cpu]
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from harness import Benchmark, Case
from vimpac.ops import bias_gelu

PASSES = ("forward", "forward+backward")


def plain(h: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(h + bias.to(h.dtype))


def run(bench: Benchmark, rows: int, width: int) -> None:
    torch.manual_seed(0)
    h = torch.randn(rows, width, requires_grad=True, device=bench.device, dtype=bench.dtype)
    inputs = [h, torch.randn(width, requires_grad=True, device=bench.device)]
    upstream = [torch.randn(rows, width, device=bench.device, dtype=bench.dtype)]
    expected = harness.evaluate(plain, harness.exact(inputs), [grad.double() for grad in upstream])

    def check(function):
        return harness.distance(harness.evaluate(function, inputs, upstream), expected)

    size = h.numel() * h.element_size()
    moved = dict(zip(PASSES, (2 * size, 5 * size), strict=True))
    case = Case("bias_gelu", f"{rows}x{width}", bench.dtype, inputs, check, PASSES, upstream, bytes=moved)
    bench.add(case, [*harness.ours("bias_gelu", bias_gelu, inputs), *harness.reference(plain)])


def main(argv: list[str] | None = None) -> int:
    bench = Benchmark("bias_gelu", harness.arguments(__doc__, argv))
    clips = 256 if bench.on_gpu else 8
    run(bench, *((13, 40) if bench.quick else (clips * 1281, 2048)))
    return bench.finish(small=not bench.on_gpu)


if __name__ == "__main__":
    sys.exit(main())
