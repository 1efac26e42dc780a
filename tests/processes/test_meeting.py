"""Processes that wait for each other: threads here, each with a connection of its own."""

import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from runs import free_port
from vimpac.errors import InputError
from vimpac.processes import meeting
from vimpac.processes.meeting import connect, gathering, meet
from vimpac.processes.ranks import Place

LOST = "somebody is gone"


@pytest.fixture(autouse=True)
def address(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(meeting, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(meeting, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(meeting, "LEAVE_SECONDS", 1)


def together(*works):
    """Every work, given its rank's meeting, in a thread of its own; results and errors by rank."""

    def run(rank):
        try:
            with meet(Place(rank, len(works)), LOST) as met:
                return works[rank](met)
        except (InputError, OSError, ZeroDivisionError) as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(run, range(len(works))))


def test_gather_is_in_order_and_a_barrier():
    def work(met):
        time.sleep(0.1 * (3 - met.place.rank))
        return [met.gather({"rank": met.place.rank, "turn": turn, "name": "caf\udce9.mp4"}) for turn in range(3)]

    expected = [[{"rank": rank, "turn": turn, "name": "caf\udce9.mp4"} for rank in range(4)] for turn in range(3)]
    assert together(*[work] * 4) == [expected] * 4


def test_values_larger_than_the_store_takes(monkeypatch):
    assert meeting.CHUNK < 8 << 20
    large = "x" * (20 << 20)
    first, second = together(lambda met: met.gather(large), lambda met: met.gather(""))
    assert first == second == [large, ""]


def test_a_slow_one_is_waited_for(monkeypatch):
    """However long it works, as long as it lives."""
    monkeypatch.setattr(meeting, "LOST_LOOKS", 10)  # 0.2 s

    def slow(met):
        time.sleep(1.5)
        return met.gather(1)

    assert together(lambda met: met.gather(0), slow) == [[0, 1]] * 2


@pytest.mark.parametrize(
    "raised, said",
    [
        (InputError("no room"), "rank 1 failed: no room"),
        (OSError(28, "No space left"), "rank 1 failed: [Errno 28] No space left"),
        (ZeroDivisionError("x"), "rank 1 failed: ZeroDivisionError: x"),
    ],
)
def test_one_that_fails_says_why(raised, said):
    def fail(met):
        met.gather(1)
        raise raised

    def wait(met):
        met.gather(0)
        return met.gather(0)

    first, second, third = together(wait, fail, wait)
    assert str(first) == str(third) == said and second is raised


def test_one_that_leaves_without_a_word_is_lost():
    first, second = together(lambda met: met.gather(0), lambda met: None)
    assert str(first) == LOST and second is None


def test_one_that_is_killed_is_lost(monkeypatch):
    """It beats no longer, and says nothing."""
    monkeypatch.setattr(meeting, "LOST_LOOKS", 10)
    noticed = threading.Event()

    def wait(met):
        try:
            return met.gather(0)
        finally:
            noticed.set()

    def killed(met):
        met.ended.set()
        return noticed.wait(20)

    first, second = together(wait, killed)
    assert str(first) == LOST and second


def test_gathering_notices_at_once_that_the_server_of_the_store_was_lost(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code = """
import time
from vimpac.processes.meeting import meet
from vimpac.processes.ranks import Place
with meet(Place(0, 2), "") as met:
    met.gather(0)
    print("met", flush=True)
    time.sleep(60)
"""
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        with pytest.raises(InputError, match=LOST), gathering(1, 2, LOST) as gather:
            gather(1)
            assert server.stdout.readline() == b"met\n"
            server.kill()
            gather(1)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_the_dead_of_a_store_are_passed_over(monkeypatch):
    """After a restart, torchrun serves the same store, with the call and the answers of processes that have ended."""
    store = connect(Place(0, 2))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for key, value in {"call": "old", "old/beat/0": "7", "old/beat/1": "7", "old/answer/1": "gone", "old/go": "gone"}.items():
        store.set(key, value)

    def late(met):
        return met.gather(met.place.rank), met.place.size

    assert together(late, late) == [([0, 1], 2)] * 2
    assert together(late, late) == [([0, 1], 2)] * 2  # and once more


def test_ranks_that_do_not_come(monkeypatch):
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 1)
    said = r"rank 0 waited 1 s at 127\.0\.0\.1:\d+ for rank 1, 2 of 3: did all processes start\?"
    with pytest.raises(InputError, match=said), meet(Place(0, 3), LOST):
        pass
    with pytest.raises(InputError, match=r"rank 1 cannot connect to 127\.0\.0\.1:"), meet(Place(1, 3), LOST):
        pass


def test_something_else_listens(monkeypatch):
    """It takes the connection and never answers."""
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MASTER_PORT", str(silent.getsockname()[1]))
        with pytest.raises(InputError, match=r"rank 1 cannot connect to 127\.0\.0\.1:\d+ \(what listens there does not answer"):
            connect(Place(1, 2))


def test_a_machine_whose_name_is_not_known(monkeypatch):
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 0.5)
    monkeypatch.setenv("MASTER_ADDR", "no-such-machine.invalid")
    with pytest.raises(InputError, match=r"no-such-machine\.invalid:\d+ \(the name of this machine cannot be resolved\)"):
        connect(Place(1, 2))


def test_two_of_one_rank(monkeypatch):
    """Two runs on one port: the second gets an error that says so."""
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 2)
    store, found = connect(Place(0, 2)), threading.Event()

    def once(met):
        found.wait(10)
        return met.gather(met.place.rank)

    def second(rank):
        try:
            while not store.check(["call"]) or not store.check([f"{store.get('call').decode()}/go"]):
                time.sleep(0.02)
            with meet(Place(rank, 2), LOST):
                pass
        except InputError as error:
            return str(error)
        finally:
            found.set()

    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with ThreadPoolExecutor(2) as pool:
        run, late = pool.submit(together, once, once), pool.submit(second, 1)
        assert "another process is rank 1, most likely of another run: wait for its end" in late.result()
        assert run.result() == [[0, 1]] * 2


def test_a_port_in_use(monkeypatch):
    first = connect(Place(0, 2))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(InputError, match="is in use, most likely by another run: wait for its end, or choose another"):
            connect(Place(0, 2))
    del first
