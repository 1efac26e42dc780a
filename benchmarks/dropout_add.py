"""The residual connection with its dropout, x + dropout(y), forward, backward, both: ours against torch's eager and compiled.

The rows of 8 clips of 5×16×16 in Small (width 512) on a CPU in float32, of 256 on a GPU in bfloat16, and once more with x in
float32 and y in bfloat16, as they are under autocast; p = 0.1. Ours is checked against the reference in float64 with the same
mask; what draws from torch's generator must have kept 90 % of the elements (to 0.2 %, where there are enough of them), with
values and gradients that say the same. How it is timed: harness.py. GB/s counts x, y and the sum forward, a gradient in and one
out backward.

    python benchmarks/dropout_add.py [--quick] [--dtype float32] [--device cpu]
"""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
import report
from harness import Benchmark, Case, Impl
from vimpac.ops import dropout_add, dropout_add_reference

SEED, P = 7, 0.1
PASSES = ("forward", "backward", "forward+backward")


def plain(x: Tensor, y: Tensor) -> Tensor:
    return x + F.dropout(y, P)


def run(bench: Benchmark, rows: int, width: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """dtypes: of x, and so of the sum, and of y."""
    torch.manual_seed(0)
    states, dtype = dtypes
    inputs = [torch.randn(rows, width, requires_grad=True, device=bench.device, dtype=dtype) for dtype in dtypes]
    upstream = [torch.randn(rows, width, device=bench.device, dtype=states)]
    seed = torch.full((), SEED, dtype=torch.int64, device=bench.device)  # a tensor, so that a call is the op alone
    reference = partial(dropout_add_reference, p=P, seed=seed)
    expected = harness.evaluate(reference, harness.exact(inputs), [grad.double() for grad in upstream])

    def check(function):
        """Against the reference with its mask, which implementations of `seed` share."""
        return harness.distance(harness.evaluate(function, inputs, upstream), expected)

    def check_own_mask(function):
        """Against the mask that the gradient of y tells."""
        out, grad_x, grad_y = harness.evaluate(function, inputs, upstream)
        keep = grad_y != 0
        if keep.numel() > 10**6 and abs(float(keep.double().mean()) - (1 - P)) > 0.002:
            return float("inf")
        x, y, grad = (z.detach().double() for z in (*inputs, *upstream))
        return harness.distance((out, grad_x, grad_y), (x + keep * y / (1 - P), grad, keep * grad / (1 - P)))

    def ours(x, y, backend=None):
        return dropout_add(x, y, P, seed, backend)

    x_bytes, y_bytes = (z.numel() * z.element_size() for z in inputs)
    moved = 2 * x_bytes + y_bytes, x_bytes + y_bytes
    case = Case(
        "dropout_add",
        f"{rows}x{width} p={P}" + (f" x={report.name(states)}" if states != dtype else ""),
        dtype,
        inputs,
        check,
        PASSES,
        upstream,
        bytes=dict(zip(PASSES, (*moved, sum(moved)), strict=True)),
    )
    impls = harness.ours("dropout_add", ours, inputs)
    for impl in impls:
        if impl.note == "backend torch" or impl.name == "ours:torch":
            impl.check = check_own_mask
    compiled = Impl("torch compiled", lambda: torch.compile(plain, dynamic=False), compiled=True, check=check_own_mask)
    bench.add(case, [*impls, compiled, *harness.reference(reference)])


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(__doc__, argv)
    bench = Benchmark("dropout_add", options)
    clips = 256 if bench.on_gpu else 8
    sizes = (13, 40) if bench.quick else (clips * 1281, 512)
    run(bench, *sizes, (bench.dtype, bench.dtype))
    if options.dtype in (None, "bfloat16"):
        run(bench, *sizes, (torch.float32, torch.bfloat16))
    return bench.finish(small=not bench.on_gpu)


if __name__ == "__main__":
    sys.exit(main())
