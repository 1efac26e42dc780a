"""axial_attention_packed's `bias` with the Triton kernels: on a GPU and in the interpreter."""

import pytest
import torch
from test_axial_attention_bias import CASES, check_bias

from kernel_checks import DEVICE, poison_new_tensors, run_in_interpreter, runs_kernels

pytest.importorskip("triton", reason="triton is not installed")


def test_in_the_interpreter():
    run_in_interpreter(__file__)


@runs_kernels
@pytest.mark.parametrize("case", CASES[1:])
def test_gradient(case, monkeypatch):
    p, padded, context = case
    dtype = torch.float16 if padded else torch.float32
    poison_new_tensors(monkeypatch)
    check_bias("triton", dtype, p, padded, context, DEVICE)
