"""The Triton kernels of axial_attention without a GPU: in Triton's interpreter, and compiled for three architectures.

The interpreter must be chosen before triton is imported, so its tests run in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vimpac.ops import axial_attention, axial_attention_packed, axial_attention_reference

pytest.importorskip("triton", reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")

CASES = [  # grid, axes, heads, head width, cls_in_context, dropout
    ((1, 1, 1), ("T",), 1, 16, True, 0.0),
    ((5, 4, 6), ("T",), 2, 16, True, 0.3),  # 3 lines a block
    ((2, 4, 3), ("T", "H", "W"), 3, 16, True, 0.4),  # 8, 4 and 5 lines a block
    ((1, 16, 16), ("H", "W"), 2, 64, True, 0.1),  # the model's own: 17 keys
    ((7, 2, 9), ("T", "W"), 2, 20, False, 0.4),  # 7 and 9 keys, head width padded to 32
    ((10, 3, 3), ("T",), 2, 32, True, 0.1),
    ((2, 32, 2), ("H", "T"), 2, 32, True, 0.3),  # [CLS] is key 32: a call of its own
    ((1, 33, 4), ("W", "H"), 2, 16, True, 0.2),
    ((2, 64, 3), ("H",), 1, 128, False, 0.2),
]


def test_in_the_interpreter():
    if INTERPRETED:
        pytest.skip("this is the interpreter's process")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    ended = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0 and " passed" in ended.stdout, ended.stdout[-3000:] + ended.stderr[-2000:]


def inputs(grid, heads, width, dtype, clips=2):
    """Permuted strides, as views of a larger tensor whose other entries are NaN."""
    g = torch.Generator().manual_seed(3)
    T, H, W = grid
    whole = torch.full((heads, clips, 3, T, H, W, width + 2), float("nan"))
    whole[..., :width] = torch.randn(whole[..., :width].shape, generator=g)
    qkv = whole.to(dtype)[..., :width].permute(1, 3, 4, 5, 2, 0, 6)
    cls = torch.randn(clips, heads, 3, width, generator=g).to(dtype).transpose(1, 2)
    pad = torch.rand(clips, T, H, W, generator=g) < 0.3
    pad[0, :, 0] = True  # lines without any token
    return qkv, cls, pad


def run(function, qkv, cls, *arguments, **options):
    """Outputs and gradients for a strided upstream gradient."""
    g = torch.Generator().manual_seed(4)
    leaves = [x.detach().requires_grad_() for x in (qkv, cls)]
    out = function(*leaves, *arguments, **options)
    upstream = [
        torch.randn(2, *x.shape, generator=g).to(x.dtype)[0].transpose(0, -1).contiguous().transpose(0, -1) for x in out
    ]
    return [*out, *torch.autograd.grad(out, leaves, upstream)]


@in_interpreter
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grid, axes, heads, width, context, p", CASES)
def test_float32_is_the_reference(grid, axes, heads, width, context, p, padded, monkeypatch):
    """Values, gradients, [CLS], PAD and dropout, element by element; outputs start as NaN."""
    empty = torch.Tensor.new_empty

    def poisoned(x, *shape, **options):
        new = empty(x, *shape, **options)
        return new.fill_(float("nan")) if new.is_floating_point() else new

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    qkv, cls, pad = inputs(grid, heads, width, torch.float32)
    call = (axes, pad if padded else None, p, 98765432109876, context)
    got = run(axial_attention, qkv, cls, *call, backend="triton")
    expected = run(axial_attention, qkv, cls, *call, backend="reference")
    for a, b in zip(got, expected, strict=True):
        # float32 sums of up to 65 keys and, for [CLS], of all lines, in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5 if a.ndim == 4 else 5e-6)


@in_interpreter
@pytest.mark.parametrize("grid, axes, heads, width, context, p", CASES[1:5])
def test_float16_is_as_exact_as_plain_torch(grid, axes, heads, width, context, p):
    """At most twice the error of the reference's own products in float16, both against float64."""
    qkv, cls, pad = inputs(grid, heads, width, torch.float16)
    call = (axes, pad, p, 5, context)
    seed = torch.tensor(5)
    exact = run(axial_attention_reference, qkv.double(), cls.double(), axes, pad, p, seed, context)
    got = run(axial_attention, qkv, cls, *call, backend="triton")
    plain = run(axial_attention, qkv, cls, *call, backend="reference")
    for a, b, e in zip(got, plain, exact, strict=True):
        ours, theirs = (float((x.double() - e).abs().max()) for x in (a, b))
        assert ours <= 2 * theirs + 1e-3 * float(e.abs().max())  # the kernel multiplies float16 probabilities


@in_interpreter
def test_packed_rows_and_empty_batches():
    rows = torch.randn(2 * (5 * 3 * 2 + 1), 3, 4, 16)
    call = ((5, 3, 2), ("T", "W"), None, 0.2, 7)
    both = []
    for backend in ("triton", "reference"):
        x = rows.clone().requires_grad_()
        y = axial_attention_packed(x, *call, backend=backend)
        both.append([y, *torch.autograd.grad(y, x, torch.ones_like(y).cumsum(0) / 62)])
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)  # as above
    assert axial_attention_packed(rows[:0], *call, backend="triton").shape == (0, 4, 16)


@in_interpreter
def test_one_program_or_several(monkeypatch):
    from vimpac.kernels import axial_attention as kernels

    qkv, cls, pad = inputs((5, 7, 6), 2, 16, torch.float32)
    results = []
    for programs in (1, 1 << 20):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        results.append(run(axial_attention, qkv, cls, ("T", "H"), pad, 0.1, 3, backend="triton"))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)  # [CLS]'s sums are split in another way


def test_says_why_it_cannot_run():
    if INTERPRETED:
        pytest.skip("the interpreter runs it")
    qkv, cls, _ = inputs((2, 65, 2), 2, 144, torch.float64)
    with pytest.raises(ValueError, match=r"on cpu, it needs a CUDA device; torch.float64.*at most 64 tokens; head width 144"):
        axial_attention(qkv, cls, ("H",), backend="triton")


# --- compiled without a GPU -------------------------------------------------------------------------------------------

POINTERS = {"pad": "*i1", "seed": "*i64", "part": "*fp32"}
SHAPES = [((5, 16, 16), 8, 64), ((5, 16, 16), 16, 32), ((10, 32, 32), 16, 32)]  # Small, Large-Half (Tables 2, 3)


def compiled(kernel, architecture, grid, heads, width, axes):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vimpac.kernels import axial_attention as kernels

    forward = kernel == "_forward"
    options = kernels._options(torch.empty(1, *grid, 3, heads, width, device="meta"), axes, None, 0.1, True)
    options |= {"ROWS": kernels.rows(width, kernels.FORWARD_ELEMENTS if forward else kernels.BACKWARD_ELEMENTS), "SPLITS": 1}
    function = getattr(kernels, kernel)
    signature = {}
    for name in function.arg_names:
        tuples = {"strides": ("i32",) * 6, "cls_strides": ("i32",) * 3}
        kind = "constexpr" if name in options else tuples.get(name, POINTERS.get(name, "i32" if name == "B" else "*bf16"))
        signature[name] = kind
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for i, kind in enumerate(signature.values()):
        attributes |= {(i, j): aligned for j in range(len(kind))} if isinstance(kind, tuple) else {}
        attributes |= {(i,): aligned} if isinstance(kind, str) and kind.startswith("*") else {}
    source = ASTSource(fn=function, signature=signature, constexprs=options, attrs=attributes)
    launch = kernels.FORWARD if forward else kernels.BACKWARD
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("axes", [("T",), ("H", "W")])
@pytest.mark.parametrize("grid, heads, width", SHAPES)
@pytest.mark.parametrize("kernel", ["_forward", "_backward"])
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_to_tensor_cores_without_spills(architecture, kernel, grid, heads, width, axes, tmp_path):
    """Matrix instructions, 16-byte global loads, no local memory, shared memory within the chip's 100 KB for two programs."""
    import triton

    binary = compiled(kernel, architecture, grid, heads, width, axes)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    (tmp_path / "k.cubin").write_bytes(binary.asm["cubin"])
    usage, sass = (
        subprocess.run([tools / tool, *flags, tmp_path / "k.cubin"], capture_output=True, text=True, check=True).stdout
        for tool, flags in (("cuobjdump", ["-res-usage"]), ("nvdisasm", ["-c"]))
    )
    assert "mma.sync" in binary.asm["ptx"]
    assert " STACK:0 " in usage and " LOCAL:0 " in usage, usage
    assert "LDL" not in sass and "STL" not in sass
    assert any("LDG" in line and ".128" in line for line in sass.splitlines())
    assert binary.metadata.shared <= 100 << 10
