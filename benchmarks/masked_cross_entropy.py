"""The token head's product and cross-entropy without all logits in memory, forward and forward + backward: ours against peers.

M = 12,288 masked tokens (64 videos of Small) of C = 512 and 1024 against V = 8197 ids; bfloat16 on a GPU, on a CPU float32 and
M = 1024. "plain" is what a model does: logits in the dtype of the states, cross-entropy in float32. Half of the targets have
the largest logit, so that the accuracy means something; peers are not asked for it. Checked against float64; how it is timed:
harness.py. TFLOP/s count the product of the logits and the two of its gradients.

    python benchmarks/masked_cross_entropy.py [--quick] [--dtype float16] [--device cpu]
"""

from __future__ import annotations

import inspect
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import harness
from harness import Benchmark, Case, Impl
from vimpac.ops import masked_cross_entropy, masked_cross_entropy_reference

PASSES = ("forward", "forward+backward")
IDS = 8197


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.float(), target), (logits.argmax(-1) == target).float().mean()


def torch_fused(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, linear_bias=bias, options=options)


def liger():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, bias, target: loss(weight, hidden, target, bias)


def cut_cross_entropy():
    from cut_cross_entropy import linear_cross_entropy

    if "bias" in inspect.signature(linear_cross_entropy).parameters:  # release 25.1.1 has none
        return lambda hidden, weight, bias, target: linear_cross_entropy(hidden, weight, target, bias=bias)

    def bias_in_weight(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        """The bias is one more column of the weight, times 1; 63 of zeros keep whole blocks of columns."""
        hidden = F.pad(F.pad(hidden, (0, 1), value=1.0), (0, 63))
        weight = F.pad(torch.cat([weight, bias[:, None]], 1), (0, 63))
        return linear_cross_entropy(hidden, weight, target)

    return bias_in_weight


def data(bench: Benchmark, M: int, C: int, V: int) -> list[Tensor]:
    torch.manual_seed(0)
    like = {"device": bench.device, "dtype": bench.dtype}
    hidden, weight = torch.randn(M, C, **like), torch.randn(V, C, **like) / C**0.5
    bias, target = 0.1 * torch.randn(V, **like), torch.randint(V, (M,), device=bench.device)
    half = slice(M // 2)
    hidden[half] += 10 * weight[target[half]]  # their logit is about 10, the largest other one 4
    return [*(x.requires_grad_() for x in (hidden, weight, bias)), target]


def run(bench: Benchmark, M: int, C: int, V: int) -> None:
    inputs = data(bench, M, C, V)
    loss, accuracy, *grads = harness.evaluate(masked_cross_entropy_reference, harness.exact(inputs))

    def check(function):
        got = harness.evaluate(function, inputs)
        accuracies = [accuracy] if len(got) == 5 else []
        return harness.distance(got, [loss, *accuracies, *grads])

    moved = sum(x.numel() * x.element_size() for x in inputs)
    case = Case(
        "masked_cross_entropy",
        f"M={M} C={C} V={V}",
        bench.dtype,
        inputs,
        check,
        PASSES,
        bytes={"forward": moved, "forward+backward": 3 * moved},
        flops={"forward": 2.0 * M * C * V, "forward+backward": 6.0 * M * C * V},
    )
    fewer = {"graph": False, "note": "no accuracy"}  # they read sizes or counts back from the device
    early = {**fewer, "note": "no accuracy; its forward computes the gradients too"}
    peers = [
        Impl("torch linear_cross_entropy", lambda: torch_fused, **early),
        Impl("liger-kernel", liger, **early),
        Impl("cut-cross-entropy", cut_cross_entropy, bound=5e-2, **fewer),  # it adds gradients up in the states' dtype
        Impl("plain eager", lambda: plain),
        Impl("plain compiled", lambda: torch.compile(plain, dynamic=False), compiled=True),
    ]
    ours = harness.ours("masked_cross_entropy", masked_cross_entropy, inputs)
    bench.add(case, [*ours, *peers, *harness.reference(masked_cross_entropy_reference)])


def main(argv: list[str] | None = None) -> int:
    bench = Benchmark("masked_cross_entropy", harness.arguments(__doc__, argv))
    M = 12288 if bench.on_gpu else 1024
    for sizes in [(64, 32, 101)] if bench.quick else [(M, 512, IDS), (M, 1024, IDS)]:
        run(bench, *sizes)
    return bench.finish(small=not bench.on_gpu)


if __name__ == "__main__":
    sys.exit(main())
