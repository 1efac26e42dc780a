"""Processes that find each other, and wait for each other as long as they live: keys in the store that torchrun serves.

A collective ends in an error after its time-out however well a peer works, and one that peers are gone from before it began
waits until then. Here a process waits without a limit for those that live, and learns within a minute that one does not.
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
from typing import Any
from uuid import uuid4

from vimpac.errors import InputError
from vimpac.processes.ranks import Place

CONNECT_SECONDS = 300
"""How long ranks wait for each other to start: importing torch from a slow network file system takes minutes."""
LOOK_SECONDS = 0.2
BEAT_SECONDS = 2.0
LOST_LOOKS = 300
"""A peer that has not said that it lives for so many looks, a minute or more, is lost. Looks, since all may be suspended."""
LEAVE_SECONDS = 10
"""How long the process that serves the store waits for the others to have read what they need."""
CHUNK = 4 << 20  # bytes; the store refuses values above 8 MiB
LEFT = "left"
GONE = "another process was lost, so this one ends"
# What gloo and NCCL say when a peer is gone, beside the errors of torch's store.
LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe"),
    *("NCCL communicator was aborted", "remote process"),
)
OTHER_PORT = "wait for its end, or choose another --master-port"


class PeerLost(InputError):
    """Another process is gone without a word."""


class Meeting:
    """All ranks of a run, once each has found the others. name: unlike that of any meeting before in the same store."""

    def __init__(self, store: Any, place: Place, name: str, lost: str):
        from torch.distributed import PrefixStore

        self.store, self.place, self.lost, self.rounds = PrefixStore(name, store), place, lost, 0
        self.ended = threading.Event()
        self.beating = threading.Thread(target=self._beat, daemon=True)

    def gather(self, value: Any) -> list:
        """The values of all ranks, in their order: what JSON can hold, since who reaches the port can write to the store.

        Raises InputError where a rank is gone, with the reason if it left one.
        """
        self.rounds += 1
        with self._explained():
            self._put(str(self.rounds), json.dumps(value).encode())
            self._wait([f"{self.rounds}/{rank}" for rank in range(self.place.size)])
            return [json.loads(self._get(f"{self.rounds}/{rank}")) for rank in range(self.place.size)]

    def _put(self, name: str, data: bytes) -> None:
        key = f"{name}/{self.place.rank}"
        chunks = [data[start : start + CHUNK] for start in range(0, len(data), CHUNK)]
        for i, chunk in enumerate(chunks):
            self.store.set(f"{key}/{i}", chunk)
        self.store.set(key, str(len(chunks)))  # last: whoever sees it finds the chunks

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
    def _explained(self) -> Iterator[None]:
        """The store goes with the process that serves it."""
        try:
            yield
        except RuntimeError as error:
            if not is_loss(error):
                raise
            raise PeerLost(self.lost) from None

    def _say(self, word: str) -> None:
        self.store.set(f"beat/{self.place.rank}", word)

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store is gone: who waits for others notices
            number = 0
            while not self.ended.wait(BEAT_SECONDS):
                number += 1
                self._say(str(number))

    def _leave(self, word: str, stay: bool) -> None:
        """Says that this rank will not come again, and why. stay: until nobody needs the store, if this serves it."""
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
    """Find the other ranks, at MASTER_ADDR and MASTER_PORT, and be there for them until the body ends.

    lost: what to say where one of them is gone without a word. Raises InputError where they cannot be found.
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


def connect(place: Place) -> Any:
    """The store at MASTER_ADDR and MASTER_PORT, which torchrun serves, or rank 0."""
    answer: list[Any] = []
    opening = threading.Thread(target=_open, args=(place, answer), daemon=True)
    opening.start()
    opening.join(CONNECT_SECONDS + BEAT_SECONDS)  # torch waits for ever for what listens there and is no store
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
    from torch.distributed import TCPStore

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
    """Whether a collective, or the store, failed because a peer is gone."""
    from torch.distributed import DistNetworkError

    return isinstance(error, DistNetworkError) or any(words in str(error) for words in LOST)


def _find_all(store: Any, place: Place) -> str:
    """The name of this meeting: rank 0 calls under a new name, the others answer, then it says whom it has found.

    The store may have served processes before that are gone (torchrun restarts), and keep all they said. They do not answer.
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
            raise InputError(f"another process meets at {address()} as rank 0, too, most likely of another run: {OTHER_PORT}")
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
    """Looks until it is done. Raises InputError(late()) after CONNECT_SECONDS."""
    until = time.monotonic() + CONNECT_SECONDS
    while not done():
        if time.monotonic() > until:
            raise InputError(late())
        time.sleep(LOOK_SECONDS / 4)
