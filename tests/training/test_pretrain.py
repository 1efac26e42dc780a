"""A run from beginning to end: its folder, and that stopping it anywhere changes nothing.

"Bit-identical" is exact equality: the same program on the same machine draws and adds the same numbers in the same order.
"""

import dataclasses
import json
import shutil
import signal
import time
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from runs import (
    MODEL,
    VOCABULARY,
    Run,
    arguments,
    files_of_at_most,
    make_trainer,
    metrics,
    model_bytes,
    on_call,
    run,
    tiny_config,
    write_store,
)
from vimpac import weights
from vimpac.checkpoint import list_checkpoints, load_checkpoint
from vimpac.errors import InputError
from vimpac.training import pretrain as pretrain_module
from vimpac.training import trainer as trainer_module
from vimpac.training.distributed import World
from vimpac.training.metrics import MetricsLog
from vimpac.training.pretrain import pretrain
from vimpac.training.progress import Progress
from vimpac.training.trainer import Stopped, interpolate_moments

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = World(0, 1, torch.device("cpu"))
LINE = {
    "step",
    "loss",
    "mask_loss",
    "contrastive_loss",
    "mask_accuracy",
    "learning_rate",
    "grad_norm",
    "videos_per_second",
    "data_wait_share",
}
FINAL = {"mask_accuracy", "most_frequent_accuracy", "nearest_copy_accuracy", "retrieval_accuracy", "retrieval_chance"}
FINAL |= {"histogram_retrieval_accuracy"}


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


@pytest.fixture
def undrawn(monkeypatch):
    """Without curves.png, which takes longer than training here."""
    monkeypatch.setattr("vimpac.figures.curves.plot_curves", lambda *paths: None)


@pytest.mark.parametrize("option", [{"seed": 1}, {"model": {"dropout": 0.0}}])
def test_seed_and_dropout_matter(finished_run, store_folder, tmp_path, option, undrawn):
    """What the comparisons of this file would miss if generators were not part of them."""
    pretrain(tiny_config(data=str(store_folder), output=str(tmp_path / "run"), **option))
    assert metrics(tmp_path / "run")[0]["loss"] != metrics(finished_run)[0]["loss"]


# --- killed and resumed ---------------------------------------------------------------------------------------------------

KILLED = {
    "writing config.json": on_call("vimpac.files.atomic:publish", 1, "kill"),
    "before the first update": on_call("vimpac.training.trainer:Trainer.update", 1, "kill"),
    "before the first checkpoint": on_call("vimpac.training.trainer:Trainer.update", 2, "kill"),
    "writing the first checkpoint": on_call("torch:save", 1, "half_a_checkpoint"),
    "a line half written": on_call("vimpac.training.metrics:MetricsLog.write", 4, "half_a_line"),
    "lines of updates that have no checkpoint": on_call("vimpac.training.trainer:Trainer.update", 6, "kill"),
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
        trainer = make_trainer(store_folder, folder, precision="fp16" if scaled else "fp32")
        if scaled:  # low enough for the gradients of this small model
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2)
        if options:
            trainer.restore(load_checkpoint(options["checkpoint"]))
        lines = []
        for _ in range(steps):
            lines.append({name: float(x) for name, x in trainer.update().items()})
            trainer.step += 1
        return trainer, lines

    _, whole = train(tmp_path / "a", 5)
    trainer, first = train(tmp_path / "b", 3)
    path = trainer.save()
    torch.manual_seed(99)
    second, rest = train(tmp_path / "b", 2, checkpoint=path)
    assert first + rest == whole
    if scaled:
        assert second.scaler.get_scale() == 64.0  # grown after updates 2 and 4


# --- signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [1, 3, 5])
def test_sigterm_writes_a_checkpoint(finished_run, store_folder, tmp_path, update):
    folder = tmp_path / "run"
    hook = on_call("vimpac.training.trainer:Trainer.update", update, "terminate")
    output = run(arguments(store_folder, folder, save_every=100), tmp_path / "log", hook=hook, code=143)
    path = folder / "checkpoints" / f"step-{update:08d}.pt"
    assert f"train.py: stopped by SIGTERM; {path} is written, go on with --resume\n" in output
    assert "Traceback" not in output and list_checkpoints(folder) == [path]
    assert not (folder / "model.safetensors").exists()
    run(arguments(store_folder, folder, save_every=2, resume=True), tmp_path / "log")
    assert metrics(folder) == metrics(finished_run)
    assert model_bytes(folder) == model_bytes(finished_run)


@pytest.mark.parametrize("ranks, ends", [(1, 2), (2, 3)])
def test_one_process_on_a_gpu_ends_after_the_update(store_folder, tmp_path, monkeypatch, ranks, ends):
    """It looks at its metrics every third update, and several agree on nothing in between."""
    trainer = make_trainer(store_folder, tmp_path, steps=9, save_every=9)
    trainer.look_every, trainer.world = 3, World(0, ranks, torch.device("cpu"))
    monkeypatch.setattr(trainer, "update", lambda: trainer.step != 1 or signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(trainer_module.distributed, "any_rank", lambda flag, world: flag)
    monkeypatch.setattr(trainer, "save", lambda: tmp_path / f"step-{trainer.step}")
    log = Mock()
    with pretrain_module.handling_signals(trainer.note_signal), pytest.raises(Stopped, match=rf"step-{ends} is written"):
        trainer.train(log, Progress(9, enabled=False))
    assert log.add.call_count == ends and log.flush.call_count == 1


@pytest.mark.parametrize(
    "hook",
    [
        on_call("vimpac.training.trainer:Trainer.update", 6, "terminate"),  # the last one
        on_call("vimpac.evaluation.pretraining:partners_found", 1, "terminate"),
    ],
    ids=["last update", "evaluation"],
)
def test_sigterm_after_training(finished_run, store_folder, tmp_path, hook):
    folder = tmp_path / "run"
    output = run(arguments(store_folder, folder), tmp_path / "log", hook=hook, code=143)
    assert "stopped by SIGTERM" in output and "Traceback" not in output
    assert not (folder / "curves.png").exists()
    run(arguments(store_folder, folder, resume=True), tmp_path / "log")
    assert metrics(folder) == metrics(finished_run)


def test_ctrl_c_twice(store_folder, tmp_path, capfd):
    """torchrun passes Ctrl-C on, so each process gets it twice; only one that comes later is impatience."""
    trainer = make_trainer(store_folder, tmp_path / "run")
    trainer.note_signal(signal.SIGINT, None)
    trainer.note_signal(signal.SIGINT, None)
    trainer.note_signal(signal.SIGTERM, None)
    assert trainer.signal[0] == signal.SIGINT
    assert capfd.readouterr().err == "SIGINT: a checkpoint is written after this update, Ctrl-C again ends at once\n"
    trainer.signal = signal.SIGINT, time.monotonic() - 10
    with pytest.raises(KeyboardInterrupt):
        trainer.note_signal(signal.SIGINT, None)


@pytest.mark.parametrize("ranks, when", [(1, "after this update"), (2, "within 10 updates, when all processes look for it")])
def test_a_signal_says_when_it_is_heeded(store_folder, tmp_path, capfd, ranks, when):
    trainer = make_trainer(store_folder, tmp_path)
    trainer.look_every, trainer.world = 10, World(0, ranks, torch.device("cpu"))  # as on GPUs
    trainer.note_signal(signal.SIGTERM, None)
    assert capfd.readouterr().err == f"SIGTERM: a checkpoint is written {when}\n"


def test_handlers_are_given_back(store_folder, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(pretrain_module.Trainer, "update", lambda self: signal.raise_signal(signal.SIGINT) or one_line())
    with pytest.raises(Stopped) as stopped:
        pretrain(tiny_config(data=str(store_folder), output=str(tmp_path / "run")))
    assert stopped.value.signal == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def one_line(step=1, **values):
    return {"step": step, "learning_rate": 0.1, "grad_norm": torch.tensor(1.0), "loss": torch.tensor(2.0)} | values


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
    original, calls = getattr(trainer_module.PretrainStep, "forward"), []  # noqa: B009

    def bad(self, *args):
        out = original(self, *args)
        calls.append(1)
        return {**out, "loss": out["loss"] * value, term: out[term] * value} if len(calls) == 4 else out

    monkeypatch.setattr(trainer_module.PretrainStep, "forward", bad)
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
    log = MetricsLog(tmp_path, CPU, 0)
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
    log = MetricsLog(tmp_path, CPU, 0)
    for step in range(1, 6):
        log.add(one_line(step, loss=torch.tensor(float("nan") if step == 4 else step)))
    with pytest.raises(InputError, match="step 4: loss=nan"):
        log.flush(Progress(5, enabled=False), 4, False)
    assert [line["loss"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_a_full_disk_names_the_file(tmp_path):
    log = MetricsLog(tmp_path, CPU, 0)
    with files_of_at_most(100), pytest.raises(OSError) as error:
        log.write([{"step": step} for step in range(100)])
    assert error.value.filename == str(tmp_path / "metrics.jsonl")


def test_share_of_time_spent_waiting_for_data(tmp_path, monkeypatch):
    """Of the time between two looks."""
    clock = iter([100.0, 110.0, 114.0])
    monkeypatch.setattr("vimpac.training.metrics.time.perf_counter", lambda: next(clock))
    log = MetricsLog(tmp_path, CPU, 0)
    for step, waited in ((1, 4.0), (2, 5.0)):
        log.add(one_line(step))
        log.flush(Progress(2, enabled=False), 8, False, waited)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["data_wait_share"], line["videos_per_second"]) for line in lines] == [(0.4, 0.8), (0.25, 2.0)]


def test_float16_scaler_recovers(store_folder, tmp_path):
    """A scale that overflows every gradient is halved, update by update, until they fit; nothing is lost on the way."""
    trainer = make_trainer(store_folder, tmp_path / "run", precision="fp16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    before = {name: p.clone() for name, p in trainer.module.named_parameters()}
    for _ in range(20):
        norm = trainer.update()["grad_norm"]
        if torch.isfinite(norm):
            break
        assert trainer.may_overflow
        assert all(torch.equal(p, before[name]) for name, p in trainer.module.named_parameters())
        trainer.step += 1
    assert trainer.step > 0 and torch.isfinite(norm)


# --- two stages -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_store(tmp_path_factory):
    """The same tokenizer at twice the frame size."""
    return write_store(tmp_path_factory.mktemp("large") / "tokens", side=8)


def test_two_stages(finished_run, large_store, tmp_path, undrawn):
    folder = tmp_path / "stage-2"
    config = tiny_config(
        {"grid": (4, 8, 8)},
        data=str(large_store),
        output=str(folder),
        continue_from=str(finished_run),
        steps=9,
        weight_decay=0.3,
    )
    pretrain(config)
    *lines, final = metrics(folder)
    assert [line["step"] for line in lines] == [7, 8, 9] and final["step"] == 9
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-2 * (9 - k) / 8 for k in (6, 7, 8)])
    state = load_checkpoint(list_checkpoints(folder)[-1])
    groups = state["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]  # this stage's, not the first one's
    assert all(float(s["step"]) == 9 for s in state["optimizer"]["state"].values())  # Adam counts on
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for path in [*list_checkpoints(again), again / "metrics.jsonl"]:
        path.unlink()  # resumed before its first checkpoint: continues from the first stage again
    pretrain(dataclasses.replace(config, output=str(again), resume=True))
    assert metrics(again) == metrics(folder)


def test_continue_from_takes_weights_and_moments(finished_run, large_store, tmp_path):
    trainer = make_stage(finished_run, large_store, tmp_path, grid=(4, 8, 8))
    first = load_checkpoint(list_checkpoints(finished_run)[-1])
    model = trainer.module.model.state_dict()
    resized = {"backbone.positions.time": 4, "backbone.positions.height": 8, "backbone.positions.width": 8}
    for name, x in first["model"].items():
        if name not in resized:
            assert torch.equal(model[name], x)
        else:
            assert torch.allclose(model[name], interpolated(x, resized[name]), atol=1e-6)  # float32 sums of two
    names = [name for group in first["optimizer"]["param_groups"] for name in group["param_names"]]
    ids = [i for group in first["optimizer"]["param_groups"] for i in group["params"]]
    parameters = dict(trainer.module.named_parameters())
    for i, name in zip(ids, names, strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            before, now = first["optimizer"]["state"][i][key], trainer.optimizer.state[parameters[name]][key]
            size = resized.get(name.removeprefix("model."))
            assert torch.allclose(now, before if size is None else interpolated(before, size), atol=1e-6)
            assert now.shape == parameters[name].shape
    assert trainer.step == 6


def make_stage(first, store_folder, tmp_path, grid, **options):
    from vimpac.data.store import TokenStore

    trainer = make_trainer(store_folder, tmp_path / "stage", model={"grid": grid}, steps=20, **options)
    trainer.continue_from(first, TokenStore(store_folder))
    return trainer


def interpolated(table, size):
    """Linear, with half-pixel centres, written with numpy."""
    n = len(table)
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    columns = [np.interp(at, np.arange(n), column) for column in table.T.numpy()]
    return torch.tensor(np.stack(columns, 1), dtype=torch.float32)


def test_second_moments_stay_positive():
    moments = {"state": {0: {"step": 1, "exp_avg": torch.randn(3, 2), "exp_avg_sq": torch.rand(3, 2)}}}
    moments["param_groups"] = [{"params": [0], "param_names": ["model.backbone.positions.time"]}]
    assert interpolate_moments(moments, (7, 4, 4))["state"][0]["exp_avg_sq"].min() >= 0


def test_init_from_takes_weights_only(finished_run, large_store, tmp_path):
    weights = finished_run / "model.safetensors"
    trainer = make_trainer(large_store, tmp_path / "run", model={"grid": (3, 8, 8), "dropout": 0.3}, init_from=str(weights))
    state = trainer.module.model.state_dict()
    saved = weights.load(weights, grid=(3, 8, 8)).state_dict()
    assert all(torch.equal(x, saved[name]) for name, x in state.items())
    assert trainer.step == 0 and not trainer.optimizer.state
    assert trainer.module.model.config.dropout == 0.3  # this run's


# --- what a run asks of its evaluation ----------------------------------------------------------------------------------


def test_held_out_batches_have_no_video_twice(store_folder, tmp_path, undrawn, monkeypatch):
    asked = {}

    def note(step, pairs, batches, videos, micro_batch, most_frequent):
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
