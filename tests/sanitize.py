"""Every GPU kernel once on small, odd shapes: what compute-sanitizer watches. It asserts nothing.

`make gpu` runs it plainly first, in parts beside the tests, since compiling takes a minute on one core; then whole, under
memcheck and under racecheck, which find everything compiled.

    python tests/sanitize.py [--part=I/N]
"""

import argparse
from functools import partial

import torch

from vimpac.ops import axial_attention, block_mask, dropout_add, info_nce, libraries, masked_cross_entropy


def attention(dtype, grid, axes, device):
    qkv = torch.randn(2, *grid, 3, 2, 20, device=device, dtype=dtype, requires_grad=True)
    cls = torch.randn(2, 3, 2, 20, device=device, dtype=dtype, requires_grad=True)
    pad = torch.rand(2, *grid, device=device) < 0.3
    out, cls_out = axial_attention(qkv, cls, axes, pad, 0.1, 3, backend="triton")
    (out.sum() + cls_out.sum()).backward()


def contrast(dtype, device):
    z1, z2 = (torch.randn(33, 200, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    info_nce(z1, z2, backend="triton").backward()


def the_rest(dtype, device):
    hidden = torch.randn(37, 24, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(101, 24, device=device, dtype=dtype, requires_grad=True)
    bias = torch.zeros(101, device=device, requires_grad=True)
    target = torch.randint(-3, 101, (37,), device=device)
    masked_cross_entropy(hidden, weight, bias, target, backend="triton")[0].backward()
    for elements in (4096 + 64, 4097):
        x = torch.randn(elements, device=device, requires_grad=True)
        y = torch.randn(elements, device=device, dtype=dtype, requires_grad=True)
        dropout_add(x, y, 0.1, 3, "triton").sum().backward()


def masks(backend, device):
    for ratio in (None, 0.3):
        tokens = torch.randint(100, (9, 3, 5, 7), device=device)
        block_mask(tokens, torch.arange(9, device=device), 1, 5, ratio, True, 100, backend)


def library(device):
    """The extension's: masks; attention's lines that fill a tile, several lines in one, two tiles, PAD and dropout."""
    if not libraries.library_path("cuda").exists():
        return
    masks("cuda", device)
    bf16, fp16 = torch.bfloat16, torch.float16
    for grid, width, dtype, context in (
        ((5, 6, 17), 32, bf16, True),
        ((16, 3, 2), 64, fp16, False),
        ((32, 3, 2), 64, bf16, True),
        ((32, 3, 2), 32, fp16, False),
    ):
        qkv = torch.randn(2, *grid, 3, 2, width, device=device, dtype=dtype, requires_grad=True)
        cls = torch.randn(2, 3, 2, width, device=device, dtype=dtype, requires_grad=True)
        pad = torch.rand(2, *grid, device=device) < 0.3
        for axes in (("T",), ("H", "W")):
            out, cls_out = axial_attention(qkv, cls, axes, pad, 0.1, 3, context, backend="cuda")
            (out.sum() + cls_out.sum()).backward()


DTYPES = (torch.float32, torch.bfloat16)
LINES = [((5, 6, 17), ("H", "W")), ((2, 64, 3), ("H",)), ((5, 6, 17), ("T",))]  # on Hopper those of 64 tokens take wgmma
PARTS = [  # the slowest to compile first
    *(partial(attention, dtype, *lines) for lines in LINES for dtype in DTYPES),
    *(partial(part, dtype) for part in (contrast, the_rest) for dtype in DTYPES),
    partial(masks, "triton"),
    library,
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="1/1", help="I/N: every N-th part from the I-th on")
    first, count = map(int, parser.parse_args().part.split("/"))
    device = torch.device("cuda")
    for run in PARTS[first - 1 :: count]:
        run(device)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
