"""Axial attention with a shared [CLS], forward, backward and both: ours against what torch and xformers offer for it.

On a GPU Small at 5×16×16 and Large-Half at 5×16×16, 5×32×32, 10×32×32, along T and along H|W, bfloat16, dropout 0.1 and a batch
whose four tensors (q, k, v, out) take 2 GB. On a CPU Small and Large-Half at 5×16×16 along T, H and W, float32, 8 clips and no
dropout, which the reference's random numbers would dominate; it ends with the median over axes of how much faster ours is.

Ours reads and writes packed rows as the model does. Peers get transposed copies of the tokens with [CLS] concatenated to every
line, in chunks of at most 65,535 lines, which is what some of their launches hold. Checked in float64 on the first clips with
the same dropout; peers that draw their own, and ours once more, without dropout on the first and last clips. How it is timed:
harness.py. GB/s counts 4 tensors forward, 7 backward, 11 for both; TFLOP/s the two products of attention forward and four
backward.

    python benchmarks/axial_attention.py [--axes T 'H|W'] [--dropout 0.1] [--quick] [--dtype float16] [--device cpu]
    python benchmarks/axial_attention.py --compile I/N        no times, see --help
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import harness
from harness import Benchmark, Case, Impl
from vimpac.layouts import axis_dimensions
from vimpac.ops import axial_attention_packed, axial_attention_reference
from vimpac.ops.axial_attention import has_long_lines
from vimpac.ops.lines import from_lines, head_groups, line_qkv, unpack

SEED = 7
SHAPES = {  # name → (T, H, W), N, D
    "Small": ((5, 16, 16), 8, 64),
    "Large-Half": ((5, 16, 16), 16, 32),
    "Large-Half 256 px": ((5, 32, 32), 16, 32),
    "Large-Half 10 frames 256 px": ((10, 32, 32), 16, 32),
}
TINY = {"tiny": ((3, 4, 5), 4, 16)}
PASSES = ("forward", "backward", "forward+backward")
TENSORS = dict(zip(PASSES, (4, 7, 11), strict=True))  # that must be read or written
PRODUCTS = dict(zip(PASSES, (2, 4, 6), strict=True))
CHECKED = 2  # clips at either end of the batch that are compared
MOST_LINES = 65535  # what a launch grid's second dimension holds


@dataclass(frozen=True)
class Problem:
    grid: tuple[int, int, int]
    heads: int
    width: int
    axes: tuple[str, ...]
    clips: int
    dropout: float

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid))
        return f"{grid} N={self.heads} D={self.width} axes={'|'.join(self.axes)} B={self.clips} dropout={self.dropout:g}"

    @property
    def tensor(self) -> int:
        """Elements of out, of q, of k or of v."""
        return self.clips * math.prod(self.grid) * self.heads * self.width

    @property
    def scores(self) -> int:
        """Elements of the scores, [CLS] as a query and a key included."""
        total = 0
        for axis in self.axes:
            keys = math.prod(self.grid[d - 1] for d in axis_dimensions(axis))
            total += math.prod(self.grid) // keys * (keys + 1) ** 2
        return self.clips * total * self.heads // len(self.axes)


# --- implementations --------------------------------------------------------------------------------------------------


def packed(rows: Tensor, problem: Problem, backend: str | None, dropout: float | None = None) -> Tensor:
    dropout = problem.dropout if dropout is None else dropout
    seed = SEED if dropout else None
    return axial_attention_packed(rows, problem.grid, problem.axes, None, dropout, seed, True, backend)


def reference(qkv: Tensor, cls_qkv: Tensor, problem: Problem, dropout: float | None = None) -> tuple[Tensor, Tensor]:
    dropout = problem.dropout if dropout is None else dropout
    seed = torch.full((), SEED, dtype=torch.int64, device=qkv.device)
    return axial_attention_reference(qkv, cls_qkv, problem.axes, None, dropout, seed)


def on_lines(qkv: Tensor, cls_qkv: Tensor, problem: Problem, attend: Callable, dropout: float | None = None):
    """attend(q, k, v [lines, n, L + 1, D], dropout) on transposed copies, as many clips at a time as a launch takes."""
    dropout = problem.dropout if dropout is None else dropout
    lengths = [math.prod(problem.grid[d - 1] for d in axis_dimensions(axis)) for axis in problem.axes]
    most = math.prod(problem.grid) // min(lengths)  # lines of a clip
    chunks = zip(qkv.split(MOST_LINES // most), cls_qkv.split(MOST_LINES // most), strict=True)
    outs, cls_outs = zip(*(attend_lines(*chunk, problem.axes, attend, dropout) for chunk in chunks), strict=True)
    return (outs[0], cls_outs[0]) if len(outs) == 1 else (torch.cat(outs), torch.cat(cls_outs))


def attend_lines(qkv, cls_qkv, axes, attend, dropout) -> tuple[Tensor, Tensor]:
    outs, cls_outs = [], []
    for heads, axis in head_groups(qkv.shape[5], axes):
        q, k, v = line_qkv(qkv, cls_qkv, heads, axis)  # [B, S, n, L + 1, D], [CLS] last
        out = attend(*(x.flatten(0, 1) for x in (q, k, v)), dropout).unflatten(0, q.shape[:2])
        outs.append(from_lines(out[..., :-1, :], axis, qkv.shape[:4]))
        cls_outs.append(out[..., -1, :].mean(1))
    return torch.cat(outs, 4), torch.cat(cls_outs, 1)


def sdpa(q, k, v, dropout, backend):
    if backend == SDPBackend.CUDNN_ATTENTION:
        dropout = math.ceil(16 * dropout) / 16  # it takes no rates in between
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    # Its kernel for few queries, which it would choose, puts lines × heads where a launch holds 65,535.
    options = {"FORCE_USE_FLEX_ATTENTION": True}
    return lambda q, k, v, dropout: compiled(q, k, v, kernel_options=options)


def xformers() -> Callable:
    from xformers.ops import memory_efficient_attention

    def attend(q, k, v, dropout):
        return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), p=dropout).transpose(1, 2)

    return attend


def peers(problem: Problem, check: Callable) -> list[Impl]:
    def peer(name: str, build: Callable[[], Callable], **options) -> Impl:
        return Impl(name, lambda: partial(on_lines, problem=problem, attend=build()), check=check, **options)

    named = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}
    backends = {name: getattr(SDPBackend, member) for name, member in named.items()}
    notes = {"cudnn": "dropout rounded up to a multiple of 1/16, all it takes"} if problem.dropout else {}
    rows = [peer(f"sdpa {n}", lambda b=b: partial(sdpa, backend=b), note=notes.get(n, "")) for n, b in backends.items()]
    rows.append(peer("xformers", xformers))
    return [*rows, peer("flex_attention", flex, compiled=True, note="timed without dropout, which it does not have")]


# --- cases ------------------------------------------------------------------------------------------------------------


class Data:
    """Inputs and upstream gradients of a problem: packed rows, and the same memory as tokens and [CLS]."""

    def __init__(self, problem: Problem, device: torch.device, dtype: torch.dtype):
        torch.manual_seed(0)
        self.problem, self.shape = problem, (problem.clips, *problem.grid)
        R, head = problem.clips * (math.prod(problem.grid) + 1), (problem.heads, problem.width)
        self.rows = torch.randn(R, 3, *head, device=device, dtype=dtype, requires_grad=True)
        self.grad = torch.randn(R, *head, device=device, dtype=dtype)
        self.tokens = [x.detach().requires_grad_() for x in unpack(self.rows, self.shape)]
        self.grads = unpack(self.grad, self.shape)

    def expected(self, clips: slice, dropout: float) -> list[Tensor]:
        inputs = harness.exact([x[clips] for x in self.tokens])
        run = partial(reference, problem=self.problem, dropout=dropout)
        return harness.evaluate(run, inputs, [x[clips].double() for x in self.grads])

    def error(self, got: list[Tensor], clips: slice, dropout: float) -> float:
        """got: outputs and gradients, packed or not."""
        if len(got) == 2:
            got = [x for rows in got for x in unpack(rows, self.shape)]
        return harness.distance([x[clips] for x in got], self.expected(clips, dropout))

    def check_dropout(self, function: Callable, inputs, upstream) -> float:
        return self.error(harness.evaluate(function, inputs, upstream), slice(CHECKED), self.problem.dropout)

    def check_plain(self, function: Callable, inputs, upstream) -> float:
        got = harness.evaluate(partial(function, dropout=0.0), inputs, upstream)
        return max(self.error(got, clips, 0.0) for clips in (slice(CHECKED), slice(-CHECKED, None)))


def ours(data: Data) -> list[Impl]:
    rows, grads = [data.rows], [data.grad]

    def check(function):
        plain = data.check_plain(function, rows, grads)
        own_dropout = function.keywords["backend"] == "sdpa" or has_long_lines(data.problem.axes, data.tokens[0].shape)
        return plain if own_dropout else max(plain, data.check_dropout(function, rows, grads))

    return harness.ours("axial_attention", partial(packed, problem=data.problem), rows, check=check)


def run(bench: Benchmark, problem: Problem) -> None:
    data = Data(problem, bench.device, bench.dtype)
    size = problem.tensor * data.rows.element_size()
    case = Case(
        "axial_attention",
        str(problem),
        bench.dtype,
        [data.rows],
        partial(data.check_dropout, inputs=[data.rows], upstream=[data.grad]),
        PASSES,
        [data.grad],
        bytes={which: n * size for which, n in TENSORS.items()},
        flops={which: 2.0 * n * problem.scores * problem.width for which, n in PRODUCTS.items()},
    )
    bench.add(case, ours(data))
    unpacked = {"inputs": data.tokens, "upstream": data.grads}
    case = replace(case, check=partial(data.check_dropout, **unpacked), **unpacked)
    eager, compiled = harness.reference(partial(reference, problem=problem))
    bench.add(case, [eager, *peers(problem, partial(data.check_plain, **unpacked)), compiled])


def speedups(rows: list[dict]) -> list[str]:
    """Median over axes of a peer's time by ours, for each shape of head: the reference, and the fastest of torch's SDPA."""
    times = {(row["shape"], row["pass"], row["impl"]): row["ms"] for row in rows if row["ms"]}
    found: dict[tuple, list[float]] = {}
    for (shape, which, impl), ms in times.items():
        heads = " ".join(word for word in shape.split() if not word.startswith("axes="))
        fastest = min((t for (s, w, i), t in times.items() if (s, w) == (shape, which) and i.startswith("sdpa")), default=None)
        for peer, t in (("reference eager", times.get((shape, which, "reference eager"))), ("sdpa", fastest)):
            if impl == "ours" and t:
                found.setdefault((heads, which, peer), []).append(t / ms)
    return [f"{heads}, {which}: {median(x):.1f} times as fast as {peer}" for (heads, which, peer), x in found.items()]


def problems(options: argparse.Namespace) -> Iterator[Problem]:
    """Every shape along every axes, of one clip."""
    on_gpu = options.device == "cuda"
    p = options.dropout if options.dropout is not None else 0.1 if on_gpu else 0.0
    shapes = list((TINY if options.quick else SHAPES).values())
    for grid, heads, width in shapes if on_gpu else shapes[:2]:
        for axes in options.axes or (["T", "H|W"] if on_gpu else ["T", "H", "W"]):
            yield Problem(grid, heads, width, tuple(axes.split("|")), 1, p)


def compile_triton(problem: Problem, device: torch.device, dtype: torch.dtype) -> None:
    """Forward and backward of a few clips as the benchmark runs them: with its dropout, and without to be checked."""
    data = Data(replace(problem, clips=2), device, dtype)
    for dropout in {problem.dropout, 0.0}:
        packed(data.rows, data.problem, "triton", dropout).backward(data.grad)


def main(argv: list[str] | None = None) -> int:
    axes = {"nargs": "+", "help": "axes of the head groups, joined by |; default: T and H|W on cuda, T, H and W on cpu"}
    dropout = {"type": float, "help": "default: 0.1 on cuda, 0 on cpu"}
    part = {
        "metavar": "I/N",
        "help": "only compile the Triton kernels of every N-th case from the I-th on, into Triton's cache",
    }
    options = harness.arguments(__doc__, argv, axes=axes, dropout=dropout, compile=part)
    if options.compile:
        first, count = map(int, options.compile.split("/"))
        dtype = getattr(torch, options.dtype or "bfloat16")
        for problem in list(problems(options))[first - 1 :: count]:
            compile_triton(problem, torch.device(options.device), dtype)
        return 0
    bench = Benchmark("axial_attention", options, budget=200.0 if options.device == "cuda" else 120.0)
    for one in problems(options):
        clips = math.ceil(2e9 / (4 * one.tensor * bench.dtype.itemsize)) if bench.on_gpu else 8
        run(bench, replace(one, clips=3 if bench.quick else clips))
    print("\nmedian over axes", *speedups(bench.rows), sep="\n")
    return bench.finish(small=not bench.on_gpu)


if __name__ == "__main__":
    sys.exit(main())
