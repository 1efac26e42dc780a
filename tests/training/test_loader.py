"""Batches made ahead are the batches that are needed, in order."""

import threading

import pytest
import torch

from updates import loop_of, update
from vimpac.errors import InputError
from vimpac.training.batch import ROWS, Batch, tensors_of
from vimpac.training.loader import BatchLoader

pytestmark = pytest.mark.usefixtures("one_thread", "wide")
CPU = torch.device("cpu")


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_loader(ahead):
    made = []

    def make(first):
        made.append((first, threading.current_thread().name))
        return Batch(torch.tensor(first), None, None, None, None, first)

    loader = BatchLoader(make, iter(range(5)), CPU, ahead)
    assert [batch.masked_count for batch in loader] == [0, 1, 2, 3, 4]
    assert [first for first, _ in made] == [0, 1, 2, 3, 4] and loader.waited > 0
    assert all((name == threading.current_thread().name) == (ahead == 0) for _, name in made)
    loader.close()


def test_loader_works_ahead_but_not_further():
    made = []
    loader = BatchLoader(lambda first: made.append(first) or Batch(*[None] * 5, first), iter(range(100)), CPU, 2)
    next(loader)
    loader._thread.submit(lambda: None).result()  # all that was asked for is made
    assert made == [0, 1, 2]
    loader.close()


def test_the_loaders_thread_makes_no_context_on_another_gpu(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append((device, threading.current_thread())))
    loader = BatchLoader(lambda first: Batch(*[None] * 5, first), iter(range(3)), torch.device("cuda", 3))
    next(loader)
    loader.close()
    ((device, thread),) = seen
    assert device == torch.device("cuda", 3) and thread is not threading.main_thread()


def test_fillers_are_rows_of_their_own(store_folder):
    """Rows whose gradients meet are added one after another on a GPU."""
    batch = loop_of(store_folder).make_batch(0)
    filler = batch.rows[batch.masked_count :]
    assert len(filler) > 100 and len(filler.unique()) == len(filler) and bool((batch.targets[batch.masked_count :] == -1).all())
    assert int(filler.max()) < batch.tokens.numel() and len(batch.rows) % ROWS == 0


def test_loader_raises_what_making_a_batch_raises():
    def make(first):
        raise InputError("shard is cut short")

    loader = BatchLoader(make, iter(range(3)), CPU, 2)
    with pytest.raises(InputError, match="cut short"):
        next(loader)
    loader.close()
    assert not any(thread.name.startswith("batches") and thread.is_alive() for thread in threading.enumerate())


@pytest.mark.parametrize("named", ["triton", "cuda", "block_mask=cuda", "reference"])
def test_batches_are_made_on_the_host_whatever_backend_is_named(store_folder, monkeypatch, named):
    """A name that is meant for the GPU's tensors does not stop the host from drawing masks, which are the same bits anyway."""
    loop = loop_of(store_folder)
    expected = loop.make_batch(0)
    monkeypatch.setenv("VIMPAC_BACKEND", named)
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(loop.make_batch(0)), tensors_of(expected), strict=True))


def test_batches_made_ahead_change_nothing(store_folder, monkeypatch):
    inline = update(store_folder, updates=3, micro_batch=4)
    monkeypatch.setattr("vimpac.training.loop.BatchLoader", lambda *call: BatchLoader(*call, ahead=2))
    ahead = update(store_folder, updates=3, micro_batch=4)
    assert inline[0] == ahead[0] and all(torch.equal(g, ahead[1][name]) for name, g in inline[1].items())
