"""Several processes (gloo, CPU) do what one does; no process is left waiting for another."""

import itertools
import re
import signal
import time

import pytest
import torch

from runs import (
    Run,
    arguments,
    hooks,
    keep_weights,
    metrics,
    model_bytes,
    moments_kept,
    on_call,
    on_rank,
    run,
    undrawn,
    wide_start,
)
from vimpac.checkpoint import list_checkpoints, load_checkpoint
from vimpac.distributed import World, averaging
from vimpac.errors import InputError
from vimpac.files.atomic import locked
from vimpac.training.device import generator_of, seed_dropout
from vimpac.training.optim import adamw, load_whole_state, whole_state
from vimpac.training.plan import BatchPlan, plan_batches

# Float32 sums in another order, through 20 updates: 1e-5 of each value (measured: 4e-6 of losses, 8e-6 of gradient norms).
CLOSE = {"rtol": 1e-5, "atol": 1e-7}
# The same where batch norm has 4 rows, or its input varies less: ten times as much (measured: 2e-5).
NEAR = {"rtol": 1e-4, "atol": 1e-6}
# eps far above the rounding of gradients: weights whose gradient is nothing but rounding (biases of keys, or in front of a
# batch norm) would otherwise take whole updates of either sign, and a wrong scale of all gradients would not show.
EXACT = {"batch_size": 8, "contrastive_videos": 8, "steps": 20, "save_every": 100, "learning_rate": 1e-3, "eps": 1e-2}
MODEL = {
    "dropout": 0.0,
    "layers": 2,
    "width": 32,
    "head_layers": 3,
    "head_width": 32,
    "grid": (5, 4, 4),
}  # 5 frames: short videos are padded


def follow(store_folder, tmp_path, ranks, options, model, one=None, tolerance=CLOSE):
    """Run in `ranks` processes and in one; compare every line of metrics and the model."""
    options, model = {**EXACT, **options}, {**MODEL, **model}
    single, several = tmp_path / "single", tmp_path / "several"
    run(
        arguments(store_folder, single, model, **{**options, **(one or {})}),
        tmp_path / "log-1",
        hook=hooks(undrawn, wide_start),
    )
    words = arguments(store_folder, several, model, **options)
    run(words, tmp_path / "log-2", ranks, hooks(undrawn, wide_start, keep_weights(tmp_path)))
    expected, lines = metrics(single), metrics(several)
    assert len(lines) == options["steps"] + 1
    for line, same in zip(lines[:-1], expected[:-1], strict=True):
        assert line.keys() == same.keys()
        for name, x in line.items():
            # a gradient's norm has a term for every weight, where a loss averages its rounding: seen 2e-5 with any backend
            allowed = {**tolerance, "rtol": max(tolerance["rtol"], 1e-4)} if name == "grad_norm" else tolerance
            torch.testing.assert_close(x, same[name], **allowed, msg=lambda m, n=name, k=line["step"]: f"{n}, step {k}: {m}")
    weights = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(ranks)]
    for other in weights[1:]:
        assert all(torch.equal(x, other[name]) for name, x in weights[0].items())  # updates are the same numbers everywhere
    reference = load_checkpoint(list_checkpoints(single)[-1])["model"]
    for name, x in weights[0].items():  # a hundredth of one update
        torch.testing.assert_close(x, reference[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_follow_one(store_folder, tmp_path):
    """Batch norm of 32 rows: with 16 the plain definitions' rounding came to 1.1e-5 of a loss behind it, on one processor."""
    follow(store_folder, tmp_path, 2, {"batch_size": 16, "contrastive_videos": 16}, {})


def test_accumulation_in_two_processes(store_folder, tmp_path):
    follow(store_folder, tmp_path, 2, {"batch_size": 16}, {})


@pytest.mark.parametrize("ranks, micro_batch", [(2, 8), (4, 4)])
def test_several_contrastive_groups(store_folder, tmp_path, ranks, micro_batch):
    """Each group contrasts its own videos, like the micro-steps of one process; with one linear layer there is no batch norm,
    which spans all processes but not micro-steps, and without the mask task no mean over different counts of tokens."""
    options = {"batch_size": 16, "micro_batch": micro_batch, "mask_task": False}
    follow(store_folder, tmp_path, ranks, options, {"head_layers": 1}, one={"micro_batch": 8})


@pytest.mark.parametrize(
    "options, model",
    [
        ({"alpha": 0.0}, {"cls_in_context": False}),
        ({"mask_task": False}, {"cls_in_context": False}),
        ({"contrastive_masked": False}, {}),
        ({"activation_checkpointing": "full", "noisy_mask": True}, {"norm": "pre", "layout": "T,HxW"}),
        ({"n_blocks": 1, "batch_size": 2, "contrastive_videos": 2}, {}),  # one video a process, few masked tokens
    ],
    ids=["mask task only", "contrastive only", "intact clips", "checkpointed", "one video a process"],
)
def test_every_task_in_two_processes(store_folder, tmp_path, options, model):
    """No parameter of these is left without a gradient, which DistributedDataParallel would wait for."""
    follow(store_folder, tmp_path, 2, {"steps": 4, **options}, model, tolerance=NEAR)


def test_every_micro_step_of_every_process_draws_its_own_dropout():
    """The same again for the same numbers, whatever was drawn before."""
    cpu, draws = torch.device("cpu"), {}
    for numbers in itertools.product((0, 1), (0, 1, 2), (0, 1), (0, 1, 2)):  # seed, update, micro-step, rank
        seed_dropout(cpu, *numbers)
        draws[numbers] = torch.randint(2**62, ()).item()
    assert len(set(draws.values())) == len(draws) == 36
    assert generator_of(cpu) is torch.default_generator
    for numbers, draw in draws.items():
        seed_dropout(cpu, *numbers)
        assert torch.randint(2**62, ()).item() == draw


# --- stopping and going on ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(store_folder, tmp_path_factory):
    """The tiny run, dropout 0.1, in two processes."""
    folder = tmp_path_factory.mktemp("two") / "whole"
    run(arguments(store_folder, folder), folder.with_name("log"), 2, undrawn)
    return folder


@pytest.mark.parametrize("ranks", [(0, 1), (0,), (1,)])
def test_sigterm(store_folder, whole, tmp_path, ranks):
    """To both processes or to one: all stop after the same update, and go on where they stopped, with their own dropout."""
    folder = tmp_path / "run"
    stop = on_call("vimpac.training.loop:Loop.update", 3, "terminate")
    hook = hooks(undrawn, *(on_rank(rank, stop) for rank in ranks))
    output = run(arguments(store_folder, folder, save_every=100), tmp_path / "log", 2, hook, code=143)
    path = folder / "checkpoints" / "step-00000003.pt"
    assert output.count("stopped by SIGTERM") == 1 and str(path) in output and "Traceback" not in output
    assert list_checkpoints(folder) == [path]
    run(arguments(store_folder, folder, resume=True), tmp_path / "log", 2, undrawn)
    assert metrics(folder) == metrics(whole) and model_bytes(folder) == model_bytes(whole)


def test_sigterm_by_the_clock(store_folder, tmp_path):
    words = arguments(store_folder, tmp_path / "run", resume=True, steps=500, save_every=500)
    started = Run(words, tmp_path / "log", 2, undrawn)
    deadline = time.monotonic() + 30
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    started.signal(signal.SIGTERM)
    assert started.wait() == [143, 143] and "Traceback" not in started.output


def test_another_number_of_processes(store_folder, whole, tmp_path):
    """Two processes stop, one goes on: same clips, masks and updates (dropout 0; with dropout it is a new draw)."""
    model = {"dropout": 0.0, "width": 32, "head_width": 32}
    start = hooks(undrawn, wide_start)
    stop = hooks(start, on_call("vimpac.training.loop:Loop.update", 3, "terminate"))
    run(arguments(store_folder, tmp_path / "two", model), tmp_path / "log", 2, stop, code=143)
    run(arguments(store_folder, tmp_path / "two", model, resume=True), tmp_path / "log", hook=start)
    run(arguments(store_folder, tmp_path / "one", model), tmp_path / "log", hook=start)
    for line, expected in zip(metrics(tmp_path / "two")[:-1], metrics(tmp_path / "one")[:-1], strict=True):
        torch.testing.assert_close(line, expected, **NEAR)


# --- a sharded optimizer --------------------------------------------------------------------------------------------------


def test_sharded_optimizer(store_folder, whole, tmp_path):
    """Each rank keeps a part of AdamW's state; the numbers, the checkpoint and the run are those of the whole one."""
    folder = tmp_path / "run"
    hook = hooks(undrawn, moments_kept(tmp_path))
    run(arguments(store_folder, folder, shard_optimizer=True), tmp_path / "log", 2, hook)
    assert metrics(folder) == metrics(whole) and model_bytes(folder) == model_bytes(whole)
    sharded, plain = (load_checkpoint(list_checkpoints(path)[-1])["optimizer"] for path in (folder, whole))
    assert [group["param_names"] for group in sharded["param_groups"]] == [g["param_names"] for g in plain["param_groups"]]
    for i, state in plain["state"].items():
        assert all(torch.equal(x, sharded["state"][i][name]) for name, x in state.items())
    counts = [int((tmp_path / f"moments-{rank}").read_text()) for rank in range(2)]
    assert sum(counts) == len(plain["state"]) and min(counts) > 0


@pytest.mark.parametrize("before, after", [(True, False), (False, True), (True, True)])
def test_a_sharded_optimizer_goes_on(store_folder, whole, tmp_path, before, after):
    stop = hooks(undrawn, on_call("vimpac.training.loop:Loop.update", 3, "terminate"))
    run(arguments(store_folder, tmp_path / "run", shard_optimizer=before), tmp_path / "log", 2, stop, code=143)
    run(arguments(store_folder, tmp_path / "run", shard_optimizer=after, resume=True), tmp_path / "log", 2, undrawn)
    assert metrics(tmp_path / "run") == metrics(whole) and model_bytes(tmp_path / "run") == model_bytes(whole)


def test_loaded_moments_are_there_once(first_of):
    """ZeRO's own loading leaves a copy of them behind, and step counts on the CPU, where the fused AdamW cannot read them."""
    first_of(2)
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2))
    optimizers = [adamw(layer, 0.1, (0.9, 0.98), 1e-8, shard=shard) for shard in (False, True)]
    layer(torch.ones(1, 3)).sum().backward()
    optimizers[0].step()
    load_whole_state(optimizers[1], whole_state(optimizers[0], layer, True))
    assert not optimizers[1].state and len(optimizers[1].optim.state) == 1  # of two parameters
    for p, moments in optimizers[1].optim.state.items():
        assert all(x.device == p.device for x in moments.values()) and moments["step"] == 1


def test_graphs_are_not_split_where_buckets_end(first_of):
    first_of(2)
    with torch._dynamo.config.patch(optimize_ddp=True):
        averaging(torch.nn.Linear(3, 2), World(0, 2, torch.device("cpu")))
        assert torch._dynamo.config.optimize_ddp is False


def test_a_second_stage_shards(store_folder, whole, tmp_path):
    """Moments of the first stage, interpolated positions among them, find the rank that keeps them."""
    model = {"grid": (4, 4, 4)}
    for name, shard in (("plain", False), ("sharded", True)):
        words = arguments(
            store_folder, tmp_path / name, model, continue_from=str(whole), steps=8, shard_optimizer=shard, weight_decay=0.3
        )
        run(words, tmp_path / "log", 2, undrawn)
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "sharded")
    assert model_bytes(tmp_path / "plain") == model_bytes(tmp_path / "sharded")


# --- a process is lost ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0, 1])
def test_the_others_end_when_one_is_lost(store_folder, tmp_path, lost):
    """With a sentence, not a traceback; whoever comes back finds the last checkpoint."""
    hook = hooks(undrawn, on_rank(lost, on_call("vimpac.training.loop:Loop.update", 4, "kill")))
    started = Run(arguments(store_folder, tmp_path / "run"), tmp_path / "log", 2, hook)
    codes = started.wait()
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 1
    output = started.logs[1 - lost].read_text()
    assert "Traceback" not in output
    if lost == 1:  # each machine's first process speaks
        assert "another process was lost" in output and "step-00000002.pt" in output and "--resume" in output


def test_one_is_lost_while_all_start(store_folder, tmp_path):
    """Before there is a checkpoint, or a run."""
    hook = on_rank(1, on_call("vimpac.training.pretrain:open_run", 1, "kill"))
    started = Run(arguments(store_folder, tmp_path / "run"), tmp_path / "log", 2, hook)
    assert started.wait() == [1, -signal.SIGKILL]
    said = "train.py: error: another process was lost, so this one ends: start again with --resume"
    assert said in started.output and "Traceback" not in started.output and started.output.count("\n") == 1


@pytest.mark.parametrize("code", [0, 143])
def test_process_groups_end_after_their_reducers(store_folder, tmp_path, code):
    """Otherwise one run in ten hangs at its end, or after a signal."""
    hook = hooks(undrawn, on_call("torch.distributed:destroy_process_group", 1, "only_without_reducers"))
    if code:
        hook = hooks(hook, on_call("vimpac.training.loop:Loop.update", 2, "terminate"))
    run(arguments(store_folder, tmp_path / "run"), tmp_path / "log", 2, hook, code)


# --- mistakes -------------------------------------------------------------------------------------------------------------


def test_a_mistake_is_said_once(store_folder, tmp_path):
    output = run(arguments(store_folder, tmp_path / "run", contrastive_videos=3), tmp_path / "log", 2, code=1)
    assert output.count("train.py: error: contrastive_videos=3 cannot be split evenly over 2 processes") == 1
    assert output.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_on_one_rank(store_folder, tmp_path):
    hook = on_rank(1, on_call("vimpac.training.step:PretrainStep.forward", 3, "nan_loss"))
    output = run(arguments(store_folder, tmp_path / "run"), tmp_path / "log", 2, hooks(undrawn, hook), code=1)
    assert output.count("train.py: error: step 3: mask_loss=nan, loss=nan, grad_norm=nan is not finite") == 1
    assert "Traceback" not in output and [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


def test_the_first_process_fails_alone(tmp_path):
    """While the others wait for the store that it makes."""
    words = arguments("unused", tmp_path / "run", synthetic_videos=2)
    del words[1:3]  # --data
    hook = on_call("vimpac.data.synthetic:synthesize", 1, "input_error")
    output = run(words, tmp_path / "log", 2, hook, code=1)
    assert output == "train.py: error: made up by a test\n"


def test_folders_that_are_not_shared(store_folder, whole, tmp_path):
    """A machine that does not see the run folder would start from the beginning."""
    words = arguments(store_folder, whole, resume=True)
    hook = on_rank(1, on_call("vimpac.training.run:list_checkpoints", 1, "nothing"))
    before = metrics(whole)
    output = run(words, tmp_path / "log", 2, hook, code=1)
    assert "processes would continue from different steps [6, 0]" in output and metrics(whole) == before


def test_a_folder_that_another_run_holds(store_folder, whole, tmp_path):
    """The first process finds out, all end."""
    before = metrics(whole)
    with locked(whole, "as another run"):
        output = run(arguments(store_folder, whole, resume=True), tmp_path / "log", 2, code=1)
    assert output.startswith(f"train.py: error: another run is writing to {whole}: ") and output.count("\n") == 1
    assert metrics(whole) == before


def test_a_folder_that_cannot_be_made(store_folder, tmp_path):
    """An OSError on the first rank ends all processes."""
    (tmp_path / "file").touch()
    output = run(arguments(store_folder, tmp_path / "file" / "run"), tmp_path / "log", 2, code=1)
    assert (
        output.startswith("train.py: error: ")
        and "Not a directory; choose another folder\n" in output
        and output.count("\n") == 1
    )


# --- plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch_size, contrastive_videos, micro_batch, ranks, plan",
    [
        (1024, 128, None, 1, BatchPlan(128, 8, 1)),
        (1024, 128, None, 8, BatchPlan(16, 8, 8)),
        (1024, 128, 128, 8, BatchPlan(128, 1, 1)),
        (1024, 128, 32, 8, BatchPlan(32, 4, 4)),
        (1024, 256, None, 16, BatchPlan(16, 4, 16)),
        (6, 3, 3, 2, BatchPlan(3, 1, 1)),
        (1024, 128, 64, 1, BatchPlan(64, 16, 1, 2)),  # more than one forward pass holds: in parts
        (1024, 1024, 32, 8, BatchPlan(32, 4, 8, 4)),
    ],
)
def test_plans(batch_size, contrastive_videos, micro_batch, ranks, plan):
    assert plan_batches(batch_size, contrastive_videos, micro_batch, ranks) == plan
    assert plan.micro_batch * plan.group_ranks * plan.parts == contrastive_videos
    assert plan.micro_steps % plan.parts == 0 and (plan.parts == 1 or plan.group_ranks == ranks)
    assert plan.micro_batch * plan.micro_steps * ranks == batch_size


@pytest.mark.parametrize(
    "batch_size, contrastive_videos, micro_batch, ranks, message",
    [
        (1024, 128, None, 3, "contrastive_videos=128 cannot be split evenly over 3 processes: use a multiple of 3, or"),
        (1024, 128, 48, 1, "contrastive_videos=128 cannot be made up of micro_batch=48 videos in each of 1 processes"),
        (1024, 256, 32, 3, "must be micro_batch × a divisor of 3, or a multiple of micro_batch × 3 (with gradient caching)"),
        (960, 128, 32, 1, "batch_size=960 must be a multiple of contrastive_videos=128: use --batch-size 896 or 1024"),
        (16, 5, None, 1, "of contrastive_videos=5: use --batch-size 15 or 20, or --contrastive-videos 4 or 8"),
        (3, 5, None, 1, "of contrastive_videos=5: use --batch-size 5, or --contrastive-videos 3"),
        (1, 5, None, 1, "of contrastive_videos=5: use --batch-size 5"),
        (25, 8, 8, 3, "batch_size=25 must be a multiple of micro_batch × processes = 8 × 3 = 24: use --batch-size 24 or 48"),
        (1024, 128, 64, 3, "for example --micro-batch 128"),
        (1024, 128, 24, 8, "for example --micro-batch 128 or 64 or 32 or 16"),
        (1024, 128, 256, 8, "contrastive_videos=128 cannot be made up of micro_batch=256"),
        (1000, 128, None, 8, "batch_size=1000 must be a multiple of contrastive_videos=128: use --batch-size 896 or 1024, or"),
        (64, 128, None, 1, "batch_size=64 must be a multiple of contrastive_videos=128: use --batch-size 128, or"),
    ],
)
def test_a_contrastive_batch_never_shrinks(batch_size, contrastive_videos, micro_batch, ranks, message):
    with pytest.raises(InputError) as error:
        plan_batches(batch_size, contrastive_videos, micro_batch, ranks)
    assert message in str(error.value)
    given = {"batch-size": batch_size, "contrastive-videos": contrastive_videos, "micro-batch": micro_batch}
    for option, values in re.findall(r"--([a-z-]+) (\d+(?: or \d+)*)", str(error.value) if "batch_size=" in message else ""):
        for value in values.split(" or "):  # what it suggests works
            plan_batches(*(given | {option: int(value)}).values(), ranks)
