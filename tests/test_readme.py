"""README.md's Python runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from runs import write_store
from vimpac.errors import InputError

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_blocks_are_found():
    assert len(BLOCKS) == 2 and "STORE" in BLOCKS[0]


def features(store, run):
    """What the first block defines, on a store and a run that are there."""
    found = {}
    exec(BLOCKS[0].replace("STORE", str(store)).replace("runs/mine", str(run)), found)
    return found


@pytest.fixture(scope="module")
def names(store_folder, finished_run):
    return features(store_folder, finished_run)


def test_features(names):
    model, videos = names["model"], len(names["videos"])
    assert names["cls"].shape == (videos, model.config.width) and names["logits"].shape == (2, 10)
    again = model.backbone(torch.from_numpy(names["clips"][:3]))[0]
    torch.testing.assert_close(names["cls"][:3], again, rtol=1e-5, atol=1e-5)  # no dropout; products of other shapes


def test_features_of_another_tokenizers_store(finished_run, tmp_path):
    with pytest.raises(InputError, match="was trained on tokenizer dddddddddddd…, the store was made with eeeeeeeeeeee"):
        features(write_store(tmp_path / "store", digest="e" * 64), finished_run)


def test_ops():
    found = {}
    exec(BLOCKS[1], found)
    masked, tokens, ids = (found[name] for name in ("masked", "tokens", "ids"))
    assert torch.equal(masked.tokens[~masked.mask], tokens[~masked.mask]) and (masked.tokens[masked.mask] == ids + 4).all()
    assert found["out"].shape == (2, 5, 16, 16, 8, 64) and found["cls_out"].shape == (2, 8, 64)
    assert 0 <= float(found["accuracy"]) <= 1 and found["loss"].isfinite() and found["x"].shape == (2, 512)
