"""metrics.jsonl of a run that goes on: damaged lines, lost ones, and what is durable when a checkpoint is."""

import json
import os
import shutil

import pytest
import torch

from runs import metrics, tiny_config
from vimpac.checkpoint import list_checkpoints
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.training.metrics import MetricsLog, read_lines
from vimpac.training.pretrain import METRICS, pretrain

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = World(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Without curves.png, which takes longer than training here."""
    monkeypatch.setattr("vimpac.figures.curves.plot_curves", lambda *paths: None)


@pytest.fixture
def stopped_run(finished_run, tmp_path):
    """A run of six updates that has lost the checkpoint of the last two."""
    folder = shutil.copytree(finished_run, tmp_path / "run")
    list_checkpoints(folder)[-1].unlink()
    return folder


DAMAGE = [b"\xff", b"[1, 2]", b"7", b"null", b'"text"', b'{"loss": 1.0}', b'{"step": "3"}', b'{"step": true}', b'{"step": 1.5}']
DAMAGE += [b'{"step": -1}', b"[" * 100_000, b'{"step": 3, "lo', b'{"step": 1' + b"0" * 30 + b"}"]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.decode(errors="replace")[:20])
def test_damaged_lines_are_left_out(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    assert read_lines(path) == [{"step": 1}, {"step": 3}]


def test_a_damaged_line_does_not_end_a_resumed_run(stopped_run, finished_run, store_folder, capsys):
    path = stopped_run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff" + lines[1] + b"[]\n" + b"".join(lines[3:]))
    pretrain(tiny_config(data=str(store_folder), output=str(stopped_run), resume=True))
    whole = metrics(finished_run)
    assert metrics(stopped_run) == [whole[0], *whole[3:]]
    said = " ".join(capsys.readouterr().err.split())
    assert "metrics.jsonl lacks 2 of the updates up to step 4, the first of them 2: lines were lost or damaged" in said


@pytest.mark.parametrize(
    "kept, lacks", [([0, 1], "2 of the updates up to step 4, the first of them 3"), ([], "4 of"), (None, "4 of")]
)
def test_lost_lines_are_said(stopped_run, store_folder, capsys, kept, lacks):
    """Of an unclean end, after which the file system brings back an older file than the checkpoint; or somebody deleted it."""
    path = stopped_run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.unlink() if kept is None else path.write_bytes(b"".join(lines[i] for i in kept))
    pretrain(tiny_config(data=str(store_folder), output=str(stopped_run), resume=True))
    assert f"metrics.jsonl lacks {lacks}" in " ".join(capsys.readouterr().err.split())
    assert [line["step"] for line in metrics(stopped_run)] == [i + 1 for i in kept or []] + [5, 6, 6]


def test_nothing_is_said_of_a_whole_log(stopped_run, store_folder, capsys):
    pretrain(tiny_config(data=str(store_folder), output=str(stopped_run), resume=True))
    assert "lacks" not in capsys.readouterr().err


def test_the_first_update_of_a_later_stage_is_not_known(tmp_path):
    """A stage that continues another begins at that one's step."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n{"step": 8}\n{"step": 10}\n{"step": 11}\n')
    log = MetricsLog(tmp_path, CPU, 10, METRICS)
    assert log.gap(None).startswith(f"{tmp_path / 'metrics.jsonl'} lacks 1 of the updates up to step 10, the first of them 9")
    assert "lacks 7 of" in log.gap(1) and log.dropped == 1


def test_lines_are_durable_before_their_checkpoint(store_folder, tmp_path, monkeypatch):
    """Each file's contents at the moment when it was synced; the checkpoint's is named by its temporary file."""
    synced, fsync = [], os.fsync

    def record(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((os.path.basename(path), os.path.getsize(path)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    run = tmp_path / "run"
    pretrain(tiny_config(data=str(store_folder), output=str(run), save_every=3))
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    names = [name for name, _ in synced]
    for step, checkpoint in ((3, "step-00000003.pt"), (6, "step-00000006.pt")):
        before = synced[: next(i for i, name in enumerate(names) if name.startswith(checkpoint))]
        assert ("metrics.jsonl", len(b"".join(lines[:step]))) in before
        assert before[-1][0] == "run"  # its entry in the folder as well


def test_a_pipe_is_no_log(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"cannot read .*metrics\.jsonl: it is a pipe"):
        read_lines(tmp_path / "metrics.jsonl")


def test_a_step_without_bound_is_no_work_without_bound(stopped_run, store_folder):
    """Of a run without a checkpoint: whether one is missing is not looked for step by step."""
    shutil.rmtree(stopped_run / "checkpoints")
    (stopped_run / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 2**62}) + "\n")
    with pytest.raises(InputError, match=f"has no checkpoint, although its metrics reach step {2**62}"):
        pretrain(tiny_config(data=str(store_folder), output=str(stopped_run), resume=True))
