"""A sublayer's end, norm(x + dropout(y + bias)), forward and forward+backward: ours against torch's eager and compiled.

The rows of 8 clips of 5×16×16 in Small (width 512) on a CPU in float32, of 256 on a GPU in bfloat16; p = 0.1. Ours with
`keeps="output"`, as the post-norm model calls it. Ours is checked against the reference in float64 with the same mask; torch's
ops, which draw from torch's generator, against the same function with the mask that the gradient of y tells. How it is timed:
harness.py. GB/s counts x, y and the output forward; a gradient, the output and two gradients backward.

    python benchmarks/residual_norm.py [--quick] [--dtype float32] [--device cpu]
"""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from harness import Benchmark, Case, Impl
from vimpac.ops import residual_norm, residual_norm_reference

SEED, P, EPS = 7, 0.1, 1e-12
PASSES = ("forward", "forward+backward")


def plain(x: Tensor, y: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor) -> Tensor:
    vectors = (v.to(x.dtype) for v in (bias, weight, norm_bias))
    bias, weight, norm_bias = vectors
    return F.layer_norm(x + F.dropout(y + bias, P), x.shape[1:], weight, norm_bias, EPS)


def masked(keep: Tensor, x: Tensor, y: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor) -> Tensor:
    """The same with a given mask."""
    return F.layer_norm(x + (y + bias) * keep / (1 - P), x.shape[1:], weight, norm_bias, EPS)


def run(bench: Benchmark, rows: int, width: int) -> None:
    torch.manual_seed(0)
    states = [torch.randn(rows, width, requires_grad=True, device=bench.device, dtype=bench.dtype) for _ in range(2)]
    vectors = [(torch.randn(width, device=bench.device) / 4 + shift).requires_grad_() for shift in (0.0, 2.0, 0.0)]
    inputs = [*states, *vectors]
    upstream = [torch.randn(rows, width, device=bench.device, dtype=bench.dtype)]
    seed = torch.full((), SEED, dtype=torch.int64, device=bench.device)  # a tensor, so that a call is the op alone
    reference = partial(residual_norm_reference, p=P, seed=seed, eps=EPS)
    doubles = [grad.double() for grad in upstream]
    expected = harness.evaluate(lambda *call: harness.outputs(reference(*call))[-1], harness.exact(inputs), doubles)

    def check(function):
        """Against the reference with its mask."""
        return harness.distance(harness.evaluate(function, inputs, upstream), expected)

    def check_own_mask(function):
        """Against the mask that the gradient of y tells."""
        got = harness.evaluate(function, inputs, upstream)
        keep = got[2] != 0
        if keep.numel() > 10**6 and abs(float(keep.double().mean()) - (1 - P)) > 0.002:
            return float("inf")
        return harness.distance(got, harness.evaluate(partial(masked, keep), harness.exact(inputs), doubles))

    def ours(*call, backend=None):
        return residual_norm(*call, P, seed, EPS, "output", backend)

    size = rows * width * bench.dtype.itemsize
    moved = dict(zip(PASSES, (3 * size, 7 * size), strict=True))
    case = Case("residual_norm", f"{rows}x{width} p={P}", bench.dtype, inputs, check, PASSES, upstream, bytes=moved)
    peers = [
        Impl("reference eager", lambda: plain, check=check_own_mask),
        Impl("reference compiled", lambda: torch.compile(plain, dynamic=False), compiled=True, check=check_own_mask),
    ]
    bench.add(case, [*harness.ours("residual_norm", ours, inputs), *peers])


def main(argv: list[str] | None = None) -> int:
    bench = Benchmark("residual_norm", harness.arguments(__doc__, argv))
    clips = 256 if bench.on_gpu else 8
    run(bench, *((13, 40) if bench.quick else (clips * 1281, 512)))
    return bench.finish(small=not bench.on_gpu)


if __name__ == "__main__":
    sys.exit(main())
