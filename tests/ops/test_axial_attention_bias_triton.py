"""axial_attention_packed's `bias` with the Triton kernels: on a GPU and in the interpreter."""

import pytest
import torch
from test_axial_attention_bias import CASES, check_bias

from kernel_checks import DEVICE, poison_new_tensors, run_in_interpreter, runs_kernels

pytest.importorskip("triton", reason="triton is not installed")


def test_in_the_interpreter():
    run_in_interpreter(__file__)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("p, padded, context", CASES)
def test_gradient(p, padded, context, dtype, monkeypatch):
    poison_new_tensors(monkeypatch)
    check_bias("triton", dtype, p, padded, context, DEVICE)
