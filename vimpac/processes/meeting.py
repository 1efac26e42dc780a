"""Ranks that find each other and wait for each other, through keys in the store that torchrun serves.

A collective fails after its timeout even if the peers are only slow, and if a peer has ended it waits that long to say so. Here
a rank waits without a limit for peers that are alive, and notices within about a minute that one is not.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast
from uuid import uuid4

from vimpac.errors import InputError
from vimpac.processes.ranks import Place, read_place

CONNECT_SECONDS = 300
"""How long ranks wait for each other to start: importing torch from a slow network file system takes minutes."""
LOOK_SECONDS = 0.2
BEAT_SECONDS = 2.0
LOST_LOOKS = 300
"""A peer without a heartbeat for this many looks (a minute or more) is lost. Not seconds, since all may have been suspended."""
LEAVE_SECONDS = 10
"""How long the rank that serves the store waits for the others to leave."""
CHUNK = 4 << 20  # bytes; the store refuses values above 8 MiB
LEFT = "left"
GONE = "another process was lost, so this one ends"
# Messages of gloo and NCCL when a peer has ended; torch's store raises errors of its own.
LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe"),
    *("NCCL communicator was aborted", "remote process"),
)
OTHER_PORT = "wait for its end, or choose another --master-port"


T = TypeVar("T")


class PeerLost(InputError):
    """Another process has ended without giving a reason."""


class Meeting:
    """All ranks of a run, once they have found each other. name: a key prefix that no earlier meeting in this store had."""

    def __init__(self, store: Any, place: Place, name: str, lost: str):
        from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]  documented there

        self.store: Any = PrefixStore(name, store)
        self.place, self.lost, self.rounds = place, lost, 0
        self.ended = threading.Event()
        self.beating = threading.Thread(target=self._beat, daemon=True)

    def gather(self, value: Any) -> list:
        """The values of all ranks, in rank order. Values are sent as JSON, since anyone who reaches the port can write there.

        Raises InputError if a rank has ended, with the reason if it left one.
        """
        self.rounds += 1
        with self._store_loss_as_peer_loss():
            self._put(str(self.rounds), json.dumps(value).encode())
            self._wait([f"{self.rounds}/{rank}" for rank in range(self.place.size)])
            return [json.loads(self._get(f"{self.rounds}/{rank}")) for rank in range(self.place.size)]

    def _put(self, name: str, data: bytes) -> None:
        key = f"{name}/{self.place.rank}"
        chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
        for i, chunk in enumerate(chunks):
            self.store.set(f"{key}/{i}", chunk)
        self.store.set(key, str(len(chunks)))  # last, so that the chunks are there once this key is

    def _get(self, key: str) -> bytes:
        return b"".join(self.store.get(f"{key}/{i}") for i in range(int(self.store.get(key))))

    def _wait(self, keys: list[str]) -> None:
        beats = [f"beat/{rank}" for rank in range(self.place.size)]
        last, silent, pause = None, [0] * self.place.size, 0.01
        while not self.store.check(keys):
            now = self.store.multi_get(beats)
            silent = [n + 1 if last and a == b else 0 for n, a, b in zip(silent, now, last or now, strict=True)]
            for rank, beat in enumerate(now):
                word = beat.decode("utf-8", "replace")
                if (word.startswith(LEFT) or silent[rank] >= LOST_LOOKS) and not self.store.check([keys[rank]]):
                    why = word.removeprefix(LEFT).strip() if word.startswith(LEFT) else ""
                    raise InputError(f"rank {rank} failed: {why}") if why else PeerLost(self.lost)
            last = now
            time.sleep(pause)
            pause = min(2 * pause, LOOK_SECONDS)

    @contextmanager
    def _store_loss_as_peer_loss(self) -> Iterator[None]:
        """Turns an error of the store into PeerLost: it ends with the process that serves it."""
        try:
            yield
        except RuntimeError as error:
            if not is_loss(error):
                raise
            raise PeerLost(self.lost) from None

    def _say(self, word: str) -> None:
        self.store.set(f"beat/{self.place.rank}", word)

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store has ended, which `gather` reports
            number = 0
            while not self.ended.wait(BEAT_SECONDS):
                number += 1
                self._say(str(number))

    def _leave(self, word: str, stay: bool) -> None:
        """Tells the others that this rank leaves, and why. stay: if it serves the store, wait until all others have left."""
        self.ended.set()
        self.beating.join(LEAVE_SECONDS)
        with suppress(RuntimeError):
            self._say(f"{LEFT} {word}")
            if stay and self.place.rank == 0 and not torchrun_serves():
                beats = [f"beat/{rank}" for rank in range(self.place.size)]
                until = time.monotonic() + LEAVE_SECONDS
                while not all(x.startswith(LEFT.encode()) for x in self.store.multi_get(beats)) and time.monotonic() < until:
                    time.sleep(LOOK_SECONDS)


@contextmanager
def meet(place: Place, lost: str) -> Iterator[Meeting]:
    """Finds the other ranks at MASTER_ADDR and MASTER_PORT, and sends them a heartbeat until the body ends.

    lost: the message if one of them ends without giving a reason. Raises InputError if they cannot be found.
    """
    store = connect(place)
    meeting = Meeting(store, place, _find_all(store, place), lost)
    meeting.beating.start()
    word, stay = "", False
    try:
        yield meeting
        stay = True
    except Exception as error:
        stay = not isinstance(error, PeerLost)
        word = " ".join(f"{'' if isinstance(error, InputError | OSError) else type(error).__name__ + ': '}{error}".split())
        raise
    finally:
        meeting._leave(word[:1000], stay)


@contextmanager
def gathering(rank: int, world: int, lost: str) -> Iterator[Callable[[object], list]]:
    """Yields gather(value) → the values of all ranks. It is a barrier as well, without a limit to how long ranks may take.

    lost: the message if another rank ends without giving a reason.
    """
    if world == 1:
        yield lambda value: [value]
        return
    place = read_place()
    if (place.rank, place.size) != (rank, world):
        raise InputError(f"rank {rank} of {world} has no MASTER_ADDR, the machine to meet at: start the ranks with torchrun")
    with meet(place, lost) as meeting:
        yield meeting.gather


def agree(gather: Callable[[object], list], step: Callable[[], T]) -> T:
    """The result of step(). If it raises InputError in one rank, every rank raises, so that none waits for that one."""
    result, error = None, None
    try:
        result = step()
    except InputError as raised:
        error = raised
    messages = [message for message in gather(str(error) if error else None) if message]
    if messages:
        raise error or InputError(messages[0])
    return cast(T, result)


def connect(place: Place) -> Any:
    """The store at MASTER_ADDR and MASTER_PORT, which torchrun or rank 0 serves."""
    answer: list[Any] = []
    opening = threading.Thread(target=_open, args=(place, answer), daemon=True)
    opening.start()
    opening.join(CONNECT_SECONDS + BEAT_SECONDS)  # torch waits forever for a server that is not a store
    said = "what listens there does not answer as torch's store does"
    if answer and not isinstance(answer[0], RuntimeError):
        return answer[0]
    if answer:
        said = str(answer[0]).strip().splitlines()[0][:200]
    elif not _resolves(os.environ["MASTER_ADDR"]):
        said = "the name of this machine cannot be resolved"
    if "EADDRINUSE" in said or "already in use" in said:
        raise InputError(port_taken(address()))
    raise InputError(
        f"rank {place.rank} cannot connect to {address()} ({said}): is rank 0 running, and are MASTER_ADDR and MASTER_PORT the "
        "same on all machines?"
    )


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def _open(place: Place, answer: list) -> None:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  documented there

    serves = place.rank == 0 and not torchrun_serves()
    options = {"is_master": serves, "wait_for_workers": False, "timeout": timedelta(seconds=CONNECT_SECONDS)}
    try:
        answer.append(TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), place.size, **options))
    except RuntimeError as error:
        answer.append(error)


def torchrun_serves() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def port_taken(where: str) -> str:
    return f"the port of {where} is in use, most likely by another run: {OTHER_PORT}"


def is_loss(error: RuntimeError) -> bool:
    """Whether a collective or the store failed because a peer has ended."""
    from torch.distributed import DistNetworkError

    return isinstance(error, DistNetworkError) or any(words in str(error) for words in LOST)


def _find_all(store: Any, place: Place) -> str:
    """The name of this meeting: rank 0 calls with a new name, the others answer, and it confirms whose answers it accepted.

    The store may still hold keys of an earlier run (torchrun restarts), but those processes do not answer.
    """
    me = uuid4().hex
    try:
        return _call(store, place, me) if place.rank == 0 else _answer(store, place, me)
    except RuntimeError as error:
        if not is_loss(error):
            raise
        raise InputError(f"the ranks lost {address()}, where they meet, while they started: start again") from None


def _call(store: Any, place: Place, me: str) -> str:
    answers = [f"{me}/answer/{rank}" for rank in range(1, place.size)]
    store.set(f"{me}/beat/0", "0")
    store.set("call", me)

    def missing() -> str:
        ranks = [rank for rank, key in enumerate(answers, 1) if not store.check([key])]
        some = ", ".join(map(str, ranks[:10])) + (", …" if len(ranks) > 10 else "")
        return f"rank 0 waited {CONNECT_SECONDS} s at {address()} for rank {some} of {place.size}: did all processes start?"

    def all_here() -> bool:
        if store.get("call") != me.encode():
            raise InputError(f"another process also meets at {address()} as rank 0, most likely of another run: {OTHER_PORT}")
        return store.check(answers)

    _until(all_here, missing)
    store.set(f"{me}/go", " ".join(x.decode() for x in store.multi_get(answers)))
    return me


def _answer(store: Any, place: Place, me: str) -> str:
    calls: list[str] = []
    chosen: list[str] = []

    def chosen_by_one() -> bool:
        if store.check(["call"]) and (call := store.get("call").decode()) not in calls:
            calls.append(call)
            store.set(f"{call}/beat/{place.rank}", "0")
            store.compare_set(f"{call}/answer/{place.rank}", "", me)
        chosen.extend(call for call in calls if store.check([f"{call}/go"]) and me.encode() in store.get(f"{call}/go").split())
        return bool(chosen)

    def alone() -> str:
        who = f"rank {place.rank} waited {CONNECT_SECONDS} s at {address()}"
        if calls and store.check([f"{calls[-1]}/go"]):
            return f"{who}, where another process is rank {place.rank}, most likely of another run: {OTHER_PORT}"
        return f"{who} for {'the other ranks' if calls else 'rank 0'}: did all processes start?"

    _until(chosen_by_one, alone)
    return chosen[0]


def _until(done: Callable[[], bool], late: Callable[[], str]) -> None:
    """Polls until done() is true. Raises InputError(late()) after CONNECT_SECONDS."""
    until = time.monotonic() + CONNECT_SECONDS
    while not done():
        if time.monotonic() > until:
            raise InputError(late())
        time.sleep(LOOK_SECONDS / 4)
