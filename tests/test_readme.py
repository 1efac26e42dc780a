"""README.md's Python runs as it stands."""

import re
from pathlib import Path

import torch

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_ops():
    found, (block,) = {}, re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(block, found)
    masked, tokens, ids = (found[name] for name in ("masked", "tokens", "ids"))
    assert torch.equal(masked.tokens[~masked.mask], tokens[~masked.mask]) and (masked.tokens[masked.mask] == ids + 4).all()
    assert found["out"].shape == (2, 5, 16, 16, 8, 64) and found["cls_out"].shape == (2, 8, 64)
    assert 0 <= float(found["accuracy"]) <= 1 and found["loss"].isfinite() and found["x"].shape == (2, 512)
