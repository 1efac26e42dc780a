"""vimpac doctor: what it names, and why a backend is passed over."""

import importlib.metadata
import importlib.util
import re

import torch

from extension import CPU_ERROR
from vimpac.commands import doctor
from vimpac.ops import dispatch


def test_doctor_runs_from_a_checkout_alone(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert doctor.versions() | {"vimpac": "not installed", "torch": torch.__version__} == doctor.versions()


def test_doctor_names_every_backend(capsys):
    from vimpac.commands.main import main

    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for op, implementations in dispatch._REGISTRY.items():
        blocks = re.findall(rf"^  {op} .*\n(?:    not .*\n?)*", shown, re.MULTILINE)
        assert blocks and all(re.search(rf"\b{name}\b", block) for name in implementations for block in blocks)
    for words in ("versions", f"torch         {torch.__version__}", "_ops_cpu.so", "_ops_cuda.so", "ops on cpu with bfloat16"):
        assert words in shown
    assert CPU_ERROR in shown
    assert "can run here, but" in shown and "it can run" not in shown


def test_doctor_says_why_a_backend_is_passed_over(monkeypatch):
    monkeypatch.setitem(dispatch._REGISTRY, "made up", dict.fromkeys(("first", "second", "unlisted"), dispatch.always))
    monkeypatch.delenv("VIMPAC_BACKEND", raising=False)
    call = dispatch.Call("made up", ("first", "second"), ())
    _, second, unlisted = doctor.choice("made up", call)
    assert second.startswith("    not second ") and second.endswith(" can run here, but comes after first")
    assert unlisted.endswith(" can run here, but is not in the order of backends for this call")
    for named in ("second", "unheard-of"):
        monkeypatch.setenv("VIMPAC_BACKEND", named)
        assert doctor.choice("made up", call)[1].endswith(" can run here, but VIMPAC_BACKEND decides")
