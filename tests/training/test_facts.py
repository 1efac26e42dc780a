"""What a run says at its start, at a resume and at its end."""

import pytest

from runs import arguments, make_loop, run, undrawn
from vimpac.checkpoint import list_checkpoints
from vimpac.data.store import TokenStore
from vimpac.training import facts

pytestmark = pytest.mark.usefixtures("one_thread")


def test_at_the_start_and_at_the_end(store_folder, tmp_path):
    folder = tmp_path / "run"
    said = run(arguments(store_folder, folder, steps=4), tmp_path / "log", hook=undrawn)
    assert f"{folder}: 19 training videos of {store_folder}, 6 held out, " in said
    assert "6 held-out videos: too few for the evaluation to mean much" in said
    assert f"model: {folder / 'model.safetensors'}\n" in said and "continues after" not in said
    last = list_checkpoints(folder)[-1]
    again = run(arguments(store_folder, folder, steps=4, resume=True), tmp_path / "log", hook=undrawn)
    assert f"continues after update 4, from {last}" in again


def test_the_size_of_checkpoints(store_folder, tmp_path):
    """As the files are, up to torch.save's own records."""
    loop = make_loop(store_folder, tmp_path / "run", model={"width": 64, "head_width": 64})
    loop.update()
    path = loop.save()
    loop.close()
    assert facts.checkpoint_bytes(loop.module.model) == pytest.approx(path.stat().st_size, rel=0.2)


def test_a_full_disk_is_foreseen(store_folder, tmp_path, monkeypatch):
    loop = make_loop(store_folder, tmp_path / "run")
    monkeypatch.setattr(facts, "checkpoint_bytes", lambda model: int(1e15))
    said = facts.start_facts(loop, TokenStore(store_folder), 19, 10)
    assert len(said) == 2 and "checkpoints take 1000000.0 GB each" in said[1] and "use another disk for --output" in said[1]
