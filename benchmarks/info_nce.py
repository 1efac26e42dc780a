"""InfoNCE over two views of n videos, forward and forward + backward: ours against the dense loss and inf-cl.

n = 1024, the paper's largest contrastive batch, and 65,536, where one dense score matrix takes 64 GiB (on a CPU 4096); d = 256;
float32 and, on a GPU, bfloat16. In float32 ours takes three TF32 products for one, inf-cl a single one: "ours (TF32)", a GPU's
too, is ours where torch allows that.
Checked against the float64 loss and gradients, computed in row blocks; how it is timed: harness.py. TFLOP/s count one dense
2n × 2n product forward and two backward, whatever an implementation really does.

    python benchmarks/info_nce.py [--quick] [--dtype float32] [--device cpu]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from harness import Benchmark, Case, Impl
from vimpac.ops import info_nce, info_nce_reference

D, TEMPERATURE = 256, 0.2
PASSES = ("forward", "forward+backward")
BLOCK_BYTES = 256 << 20  # of float64 scores at once in the check


def dense(z1: Tensor, z2: Tensor) -> Tensor:
    """Ours by the reference, normalisation included."""
    rows = [F.normalize(z.float(), dim=-1) for z in (z1, z2)]
    return info_nce_reference(*rows, *rows, 0, TEMPERATURE)


def exact(z1: Tensor, z2: Tensor, itself: bool) -> list[Tensor]:
    """Loss and gradients in float64, block by block. itself: a row is its own negative too, as inf-cl has it."""
    z1, z2 = harness.exact([z1, z2])
    n, loss = len(z1), 0.0
    step = max(1, min(n, BLOCK_BYTES // (16 * n)))
    for start in range(0, n, step):
        columns = [F.normalize(z, dim=-1) for z in (z1, z2)]
        rows = [z[start : start + step] for z in columns]
        block = with_itself(rows, columns, start) if itself else info_nce_reference(*rows, *columns, start, TEMPERATURE)
        block = block * (len(rows[0]) / n)
        block.backward()
        loss = loss + block.detach()
    return [loss, z1.grad, z2.grad]


def with_itself(rows: list[Tensor], columns: list[Tensor], start: int) -> Tensor:
    n, own = len(columns[0]), torch.arange(start, start + len(rows[0]), device=rows[0].device)
    scores = [x @ torch.cat(columns).T / TEMPERATURE for x in rows]
    return F.cross_entropy(scores[0], own + n) + F.cross_entropy(scores[1], own)


class WithTF32(torch.autograd.Function):
    """Our loss, forward and backward, as where torch's own float32 products may be TF32 ones."""

    @staticmethod
    def forward(ctx, z1, z2):
        with torch.enable_grad(), tf32():
            ctx.leaves = [z.detach().requires_grad_() for z in (z1, z2)]
            ctx.loss = info_nce(*ctx.leaves, temperature=TEMPERATURE)
        return ctx.loss.detach()

    @staticmethod
    def backward(ctx, grad):
        with tf32():
            return torch.autograd.grad(ctx.loss, ctx.leaves, grad)


@contextmanager
def tf32() -> Iterator[None]:
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        yield
    finally:
        switch.fp32_precision = before


def inf_cl(z1: Tensor, z2: Tensor) -> Tensor:
    from inf_cl import cal_inf_loss

    z, n = F.normalize(torch.cat([z1, z2]).float(), dim=-1), len(z1)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return 2 * cal_inf_loss(z / TEMPERATURE, z, labels=partner, head_dim=D)


def case(bench: Benchmark, n: int, dtype: torch.dtype) -> tuple[Case, list[Impl]]:
    torch.manual_seed(0)
    inputs = [torch.randn(n, D, device=bench.device, dtype=dtype, requires_grad=True) for _ in range(2)]
    expected = exact(*inputs, itself=False)

    def check(function, expected=expected):
        return harness.distance(harness.evaluate(function, inputs), expected)

    def check_inf_cl(function):
        return check(function, exact(*inputs, itself=True))

    bound = max(harness.BOUNDS[dtype], harness.BOUNDS[torch.float16])  # of TF32 products
    own = {"check": check_inf_cl, "bound": bound, "graph": False}
    note = "a row is also its own negative: its formula; TF32 products"
    moved, product = 2 * n * D * inputs[0].element_size(), 2.0 * (2 * n) ** 2 * D
    impls = [
        *harness.ours("info_nce", partial(info_nce, temperature=TEMPERATURE), inputs),
        *harness.reference(dense),
        Impl("inf-cl", lambda: inf_cl, note=note, **own),
    ]
    if bench.on_gpu and dtype == torch.float32:
        impls.insert(1, Impl("ours (TF32)", lambda: WithTF32.apply, bound=bound, ours=True, note="TF32 products"))
    return (
        Case(
            "info_nce",
            f"n={n} d={D}",
            dtype,
            inputs,
            check,
            PASSES,
            bytes={"forward": moved, "forward+backward": 3 * moved},
            flops={"forward": product, "forward+backward": 3 * product},
        ),
        impls,
    )


def main(argv: list[str] | None = None) -> int:
    options = harness.arguments(__doc__, argv)
    bench = Benchmark("info_nce", options, dtype=torch.float32)
    sizes = (64,) if bench.quick else (1024, 65536) if bench.on_gpu else (1024, 4096)
    dtypes = (bench.dtype,) if options.dtype or not bench.on_gpu else (torch.float32, torch.bfloat16)
    for n in sizes:
        for dtype in dtypes:
            bench.add(*case(bench, n, dtype))
    return bench.finish(small=not bench.on_gpu)


if __name__ == "__main__":
    sys.exit(main())
