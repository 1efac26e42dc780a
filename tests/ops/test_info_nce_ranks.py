"""info_nce among the ranks of a group, against one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from info_nce_calls import FLOAT32, features, slot_backend, value_and_gradients, with_temperature
from torch.testing import assert_close

from vimpac.ops import dispatch, info_nce, info_nce_reference
from vimpac.ops.info_nce import _AllGather

RANKS, ROWS, WIDTH = 4, 3, 5


@pytest.fixture(scope="module", autouse=True)
def slot():
    with slot_backend():
        yield


@pytest.fixture(params=["reference", "slot"])
def backend(request):
    return request.param


def _rank(rank, folder):
    """Each rank's rows against all ranks' and against its pair's; writes losses and gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", world_size=RANKS, rank=rank)
    dispatch.register("info_nce", "slot", dispatch.always)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    results = {}
    for backend in ("reference", "slot"):
        for name, group in (("world", dist.group.WORLD), ("pair", pairs[rank // 2])):
            z1, z2 = (z.detach()[ROWS * rank : ROWS * (rank + 1)].requires_grad_() for z in features(RANKS * ROWS, WIDTH))
            loss = info_nce(z1, z2, 0.1, group, backend)
            again = torch.autograd.grad(loss, (z1, z2), retain_graph=True)
            grads = torch.autograd.grad(loss, (z1, z2))
            assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))
            results[backend, name] = loss.detach(), *grads
            for x in (z1, z2):
                x.grad = None
            results[backend, name, "learned"] = [
                x.detach() for x in with_temperature(z1, z2, 0.1, group=group, backend=backend, upstream=1.0 + rank)
            ]
    grad = torch.ones(RANKS * ROWS, WIDTH)
    (summed,) = torch.autograd.grad(_AllGather.apply(z1, dist.group.WORLD), z1, grad)
    assert (summed == RANKS).all() and (grad == 1).all()  # the incoming gradient is someone else's: not summed in place
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (str(folder),), RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("members", [[0, 1, 2, 3], [0, 1], [2, 3]])
def test_ranks_equal_one_process(ranks, backend, members):
    """Mean of losses = the loss, and a gradient averaged as DistributedDataParallel does = the gradient: to float32."""
    z1, z2 = (z.detach()[ROWS * members[0] : ROWS * (members[-1] + 1)].requires_grad_() for z in features(RANKS * ROWS, WIDTH))
    expected = value_and_gradients(info_nce, z1, z2, 0.1, backend="reference", upstream=1.0)
    results = [ranks[rank][backend, "world" if len(members) == 4 else "pair"] for rank in members]
    loss = torch.stack([loss for loss, *_ in results]).mean()
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
    for view in (1, 2):
        averaged = torch.cat([result[view] for result in results]) / len(members)
        assert (averaged - expected[view]).norm() <= 1e-6 * expected[view].norm()


@pytest.mark.parametrize("members", [[0, 1, 2, 3], [0, 1], [2, 3]])
def test_ranks_learn_one_temperature(ranks, backend, members):
    """One parameter on all ranks: the mean of its gradients is that of the mean of losses, each with a factor of its own."""
    z1, z2 = (z.detach()[ROWS * members[0] : ROWS * (members[-1] + 1)].requires_grad_() for z in features(RANKS * ROWS, WIDTH))
    learned, unit = torch.tensor(0.1, requires_grad=True), [F.normalize(z, dim=1) for z in (z1, z2)]
    offsets = [ROWS * i for i in range(len(members))]
    losses = [info_nce_reference(*(u[i : i + ROWS] for u in unit), *unit, i, learned) for i in offsets]
    mean = sum((1.0 + rank) * loss for rank, loss in zip(members, losses, strict=True)) / len(members)
    expected = torch.autograd.grad(mean, (z1, z2, learned))
    results = [ranks[rank][backend, "world" if len(members) == 4 else "pair", "learned"] for rank in members]
    for view in (1, 2):
        averaged = torch.cat([result[view] for result in results]) / len(members)
        assert (averaged - expected[view - 1]).norm() <= 2e-6 * expected[view - 1].norm()
    averaged = torch.stack([result[3] for result in results]).mean()
    assert averaged.item() == pytest.approx(expected[2].item(), rel=5e-6)  # float32 sums of both signs


def test_group_of_one_is_no_group(tmp_path):
    z1, z2 = features(4, 3)
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", world_size=1, rank=0)
    try:
        assert_close(info_nce(z1, z2, 0.2, dist.group.WORLD), info_nce(z1, z2), rtol=0, atol=0)
    finally:
        dist.destroy_process_group()


def test_offset_rows_are_a_part_of_all(device):
    columns = [F.normalize(z.detach(), dim=1) for z in features(6, 4, device)]
    parts = [info_nce_reference(*(c[i : i + 2] for c in columns), *columns, i, 0.2) for i in (0, 2, 4)]
    assert_close(torch.stack(parts).mean(), info_nce_reference(*columns, *columns), **FLOAT32)
