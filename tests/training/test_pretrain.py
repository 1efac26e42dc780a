"""A run from beginning to end: its folder, and that stopping it anywhere changes nothing.

"Bit-identical" is exact equality: the same program on the same machine draws and adds the same numbers in the same order.
"""

import json
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from runs import (
    MODEL,
    VOCABULARY,
    Run,
    arguments,
    files_of_at_most,
    make_loop,
    metrics,
    model_bytes,
    on_call,
    restore,
    run,
    tiny_config,
    write_store,
)
from vimpac import weights
from vimpac.checkpoint import list_checkpoints, load_checkpoint
from vimpac.distributed import World
from vimpac.errors import InputError
from vimpac.training import pretrain as pretrain_module
from vimpac.training.metrics import MetricsLog
from vimpac.training.pretrain import pretrain
from vimpac.training.progress import Progress
from vimpac.training.step import PretrainStep

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = World(0, 1, torch.device("cpu"))
LINE = {
    "step",
    "loss",
    "mask_loss",
    "contrastive_loss",
    "cl_loss",
    "mask_accuracy",
    "learning_rate",
    "grad_norm",
    "videos_per_second",
    "data_wait_share",
}
FINAL = {"mask_accuracy", "most_frequent_accuracy", "nearest_copy_accuracy", "retrieval_accuracy", "retrieval_chance"}
FINAL |= {"histogram_retrieval_accuracy", "cl_loss"}


# --- the run folder -------------------------------------------------------------------------------------------------------


def test_metrics(finished_run):
    *lines, final = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line.keys() == LINE and all(isinstance(x, (int, float)) for x in line.values())
        assert line["loss"] == pytest.approx(line["mask_loss"] + 0.2 * line["contrastive_loss"], rel=1e-6)  # float32 sum
    assert final["final"] is True and final.keys() >= FINAL
    assert final["retrieval_chance"] == 1 / 7 and final["held_out_videos"] == 6 and final["retrieval_clips"] == 8
    assert all(0 <= final[name] <= 1 for name in FINAL)
    assert json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail) == final


def test_config_json(finished_run, store_folder):
    saved = json.loads((finished_run / "config.json").read_text())
    assert saved["config"]["batch_size"] == 4 and saved["config"]["model"]["vocab_size"] == VOCABULARY
    assert saved["tokenizer"] == {"name": "patch-vq", "vocab_size": VOCABULARY, "stride": 8, "digest": "d" * 64}
    assert saved["store"] == {"videos": 25, "frames": 135, "fps": 2.0}


def test_model_is_the_last_checkpoint(finished_run):
    checkpoints = list_checkpoints(finished_run)
    assert [path.stem for path in checkpoints] == ["step-00000004", "step-00000006"]  # the newest two of three
    state = load_checkpoint(checkpoints[-1])
    model = weights.load(finished_run / "model.safetensors", tokenizer_digest="d" * 64)
    assert model.config.grid == MODEL["grid"] and model.config.vocab_size == VOCABULARY
    assert model.state_dict().keys() == state["model"].keys()
    assert all(torch.equal(x, state["model"][name]) for name, x in model.state_dict().items())
    assert state["step"] == 6 and state["config"]["seed"] == 0


def test_curves_and_events(finished_run):
    assert (finished_run / "curves.png").read_bytes().startswith(b"\x89PNG")
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(finished_run / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in metrics(finished_run)[:-1]]  # float32
    assert losses == expected
    assert len(events.Scalars("final/mask_accuracy")) == 1


def test_nothing_else_is_left(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoints", "tensorboard", "model.safetensors", "curves.png"}
    assert not list(finished_run.rglob("*.tmp"))


def test_a_second_run_is_identical(finished_run, store_folder, tmp_path):
    run(arguments(store_folder, tmp_path / "again"), tmp_path / "log")
    assert metrics(tmp_path / "again") == metrics(finished_run)
    assert model_bytes(tmp_path / "again") == model_bytes(finished_run)


@pytest.mark.parametrize("option", [{"seed": 1}, {"model": {"dropout": 0.0}}])
def test_seed_and_dropout_matter(finished_run, store_folder, tmp_path, option, undrawn):
    """What the comparisons of this file would miss if generators were not part of them."""
    pretrain(tiny_config(data=str(store_folder), output=str(tmp_path / "run"), **option))
    assert metrics(tmp_path / "run")[0]["loss"] != metrics(finished_run)[0]["loss"]


# --- killed and resumed ---------------------------------------------------------------------------------------------------

KILLED = {
    "writing config.json": on_call("vimpac.files.atomic:publish", 1, "kill"),
    "before the first update": on_call("vimpac.training.loop:Loop.update", 1, "kill"),
    "before the first checkpoint": on_call("vimpac.training.loop:Loop.update", 2, "kill"),
    "writing the first checkpoint": on_call("torch:save", 1, "half_a_checkpoint"),
    "a line half written": on_call("vimpac.training.metrics:MetricsLog.write", 4, "half_a_line"),
    "lines of updates that have no checkpoint": on_call("vimpac.training.loop:Loop.update", 6, "kill"),
    "naming a checkpoint": on_call("vimpac.files.atomic:publish", 3, "kill"),
    "writing the last checkpoint": on_call("torch:save", 3, "half_a_checkpoint"),
    "before the model": on_call("vimpac.weights:save", 1, "kill"),
    "in the evaluation": on_call("vimpac.evaluation.pretraining:partners_found", 1, "kill"),
    "the final line half written": on_call("vimpac.training.metrics:MetricsLog.write", 7, "half_a_line"),
    "drawing": on_call("vimpac.figures.curves:plot_curves", 1, "kill"),
}


@pytest.mark.parametrize("moment", KILLED)
def test_killed_and_resumed(finished_run, store_folder, tmp_path, moment):
    folder = tmp_path / "run"
    run(arguments(store_folder, folder, resume=True), tmp_path / "killed", hook=KILLED[moment], code=-signal.SIGKILL)
    assert not (folder / "curves.png").exists()
    run(arguments(store_folder, folder, resume=True), tmp_path / "resumed")
    assert metrics(folder) == metrics(finished_run)
    assert model_bytes(folder) == model_bytes(finished_run)
    assert not list(folder.rglob("*.tmp"))


def test_killed_again_and_again(finished_run, store_folder, tmp_path):
    """By the clock, whatever it is doing; a run that ends may be resumed as well."""
    folder, words = tmp_path / "run", arguments(store_folder, tmp_path / "run", resume=True)
    for attempt, seconds in enumerate((0.25, 0.4, 0.3, 0.5)):
        started = Run(words, tmp_path / f"killed-{attempt}")
        time.sleep(seconds)
        started.signal(signal.SIGKILL)
        assert started.wait()[0] in (-signal.SIGKILL, 0)
    run(words, tmp_path / "resumed")
    run(words, tmp_path / "resumed-after-its-end")
    assert metrics(folder) == metrics(finished_run)
    assert model_bytes(folder) == model_bytes(finished_run)


def test_a_damaged_last_checkpoint_may_be_deleted(finished_run, store_folder, tmp_path, undrawn):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    list_checkpoints(folder)[-1].unlink()
    pretrain(tiny_config(data=str(store_folder), output=str(folder), resume=True))
    assert metrics(folder) == metrics(finished_run)


@pytest.mark.parametrize("scaled", [False, True])
def test_resume_restores_everything(store_folder, tmp_path, scaled):
    """Float16 too: the gradient scaler's factor, which grows every second update here, is part of the state."""

    def train(folder, steps, **options):
        loop = make_loop(store_folder, folder, precision="fp16" if scaled else "fp32")
        if scaled:  # low enough for the gradients of this small model
            loop.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
        if options:
            restore(loop, load_checkpoint(options["checkpoint"]))
        lines = []
        for _ in range(steps):
            lines.append({name: float(x) for name, x in loop.update().items()})
            loop.step += 1
        return loop, lines

    _, whole = train(tmp_path / "a", 5)
    loop, first = train(tmp_path / "b", 3)
    path = loop.save()
    torch.manual_seed(99)
    second, rest = train(tmp_path / "b", 2, checkpoint=path)
    assert first + rest == whole
    if scaled:
        assert second.scaler.get_scale() == 64.0  # grown after updates 2 and 4


def one_line(step=1, **values):
    return {"step": step, "learning_rate": 0.1, "grad_norm": torch.tensor(1.0), "loss": torch.tensor(2.0)} | values


# --- the paper's CL-Loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"micro_batch": 2}, {"alpha": 0.5, "temperature": 0.3}], ids=str)
def test_cl_loss_is_the_temperature_times_the_contrastive_loss(store_folder, tmp_path, undrawn, options):
    """γ · L_cl, whatever α is and however the batch is split; on held-out clips as well, and null without the task."""
    pretrain(tiny_config(data=str(store_folder), output=str(tmp_path / "run"), steps=2, **options))
    *lines, final = metrics(tmp_path / "run")
    gamma = options.get("temperature", 0.2)
    assert [line["cl_loss"] for line in lines] == pytest.approx([gamma * line["contrastive_loss"] for line in lines], rel=1e-6)
    assert 0 < final["cl_loss"] < 2 * gamma * np.log(8)  # chance is γ · log of the 7 or 8 clips that one is told from
    pretrain(tiny_config(data=str(store_folder), output=str(tmp_path / "alone"), steps=1, alpha=0.0))
    assert all(line["cl_loss"] is None for line in metrics(tmp_path / "alone"))


# --- losses that are not finite -------------------------------------------------------------------------------------------


def test_diverges(store_folder, tmp_path):
    folder = tmp_path / "run"
    config = tiny_config(data=str(store_folder), output=str(folder), learning_rate=1e30, steps=50, warmup=0.5, save_every=1)
    with pytest.raises(InputError) as error:
        pretrain(config)
    last = metrics(folder)[-1]["step"]
    assert f"step {last + 1}: " in str(error.value) and "is not finite, so the run stops" in str(error.value)
    checkpoint = list_checkpoints(folder)[-1]
    assert f"the last checkpoint before it is {checkpoint}" in str(error.value)
    assert load_checkpoint(checkpoint)["step"] == last
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("term", ["mask_loss", "contrastive_loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_the_step_and_the_term(store_folder, tmp_path, monkeypatch, term, value):
    original, calls = getattr(PretrainStep, "forward"), []  # noqa: B009

    def bad(self, *args):
        out = original(self, *args)
        calls.append(1)
        return {**out, "loss": out["loss"] * value, term: out[term] * value} if len(calls) == 4 else out

    monkeypatch.setattr(PretrainStep, "forward", bad)
    folder = tmp_path / "run"
    with pytest.raises(InputError) as error:
        pretrain(tiny_config(data=str(store_folder), output=str(folder)))
    other = {"mask_loss", "contrastive_loss"} - {term}
    assert str(error.value).startswith(f"step 4: {term}={value}, loss={value}, grad_norm=nan is not finite")
    assert not any(name in str(error.value) for name in other)
    assert [path.stem for path in list_checkpoints(folder)] == ["step-00000002"]
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]


@pytest.mark.parametrize("may_overflow", [True, False])
def test_a_float16_gradient_that_overflows(tmp_path, may_overflow):
    log = MetricsLog(tmp_path, CPU, 0, pretrain_module.METRICS)
    log.add(one_line(grad_norm=torch.tensor(float("inf"))))
    progress = Progress(1, enabled=False)
    if may_overflow:
        log.flush(progress, 4, may_overflow)
        assert metrics(tmp_path)[0]["grad_norm"] is None
    else:
        with pytest.raises(InputError, match=r"step 1: grad_norm=inf is not finite.*no checkpoint was written before it"):
            log.flush(progress, 4, may_overflow)


def test_looks_at_several_updates_at_once(tmp_path):
    """As on a GPU: lines that wait are written up to the bad one."""
    log = MetricsLog(tmp_path, CPU, 0, pretrain_module.METRICS)
    for step in range(1, 6):
        log.add(one_line(step, loss=torch.tensor(float("nan") if step == 4 else step)))
    with pytest.raises(InputError, match="step 4: loss=nan"):
        log.flush(Progress(5, enabled=False), 4, False)
    assert [line["loss"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_a_full_disk_names_the_file(tmp_path):
    log = MetricsLog(tmp_path, CPU, 0, pretrain_module.METRICS)
    with files_of_at_most(100), pytest.raises(OSError) as error:
        log.write([{"step": step} for step in range(100)])
    assert error.value.filename == str(tmp_path / "metrics.jsonl")


def test_share_of_time_spent_waiting_for_data(tmp_path, monkeypatch):
    """Of the time between two looks."""
    clock = iter([100.0, 110.0, 114.0])
    monkeypatch.setattr("vimpac.training.metrics.time.perf_counter", lambda: next(clock))
    log = MetricsLog(tmp_path, CPU, 0, pretrain_module.METRICS)
    for step, waited in ((1, 4.0), (2, 5.0)):
        log.add(one_line(step))
        log.flush(Progress(2, enabled=False), 8, False, waited)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["data_wait_share"], line["videos_per_second"]) for line in lines] == [(0.4, 0.8), (0.25, 2.0)]


def test_float16_scaler_recovers(store_folder, tmp_path):
    """A scale that overflows every gradient is halved, update by update, until they fit; nothing is lost on the way."""
    loop = make_loop(store_folder, tmp_path / "run", precision="fp16")
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    before = {name: p.clone() for name, p in loop.module.named_parameters()}
    for _ in range(20):
        norm = loop.update()["grad_norm"]
        if torch.isfinite(norm):
            break
        assert loop.may_overflow
        assert all(torch.equal(p, before[name]) for name, p in loop.module.named_parameters())
        loop.step += 1
    assert loop.step > 0 and torch.isfinite(norm)


# --- what a run asks of its evaluation ----------------------------------------------------------------------------------


def test_held_out_batches_have_no_video_twice(store_folder, tmp_path, undrawn, monkeypatch):
    asked = {}

    def note(model, objective, masking, pairs, batches, videos, *rest):
        asked.update(pairs=pairs, batches=batches, videos=videos)
        return {}

    monkeypatch.setattr(pretrain_module, "evaluate", note)
    pretrain(tiny_config(data=str(store_folder), output=str(tmp_path / "run"), eval_batches=5))
    batches = [asked["pairs"].batch(4 * i, 4).videos for i in range(5)]
    assert asked["batches"] == 5 and asked["videos"] == 4
    assert all(len(set(videos)) == 4 for videos in batches)
    trained_on, held_out = pretrain_module.split_videos(asked["pairs"].store, 0.25)
    assert set(np.concatenate(batches)) == set(held_out) and not set(held_out) & set(trained_on)


def test_held_out_videos_shorter_than_the_clip(tmp_path, undrawn):
    """No reason to fail, least of all at the end of a run: they are padded."""
    from vimpac.data.clips import split_videos
    from vimpac.data.store import TokenStore

    names = TokenStore(write_store(tmp_path / "probe", frames=(5,) * 8))
    held_out = split_videos(names, 0.01)[1]
    store = write_store(tmp_path / "tokens", frames=[2 if i in held_out else 5 for i in range(8)])
    result = pretrain(tiny_config(data=str(store), output=str(tmp_path / "run"), held_out=0.01, steps=1))
    assert result["held_out_videos"] == len(held_out) == 2 and result["masked_tokens"] > 0
