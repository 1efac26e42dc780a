"""Metrics as TensorBoard events. If writing them fails, for example on a full disk, the run continues without them."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vimpac.files.atomic import naming


class EventLog:
    """A file of events in `folder`. TensorBoard then ignores earlier events from `first_step` on.

    (torch's SummaryWriter writes in a thread, and reports an error some calls later without the file's name.)
    failure: a sentence on why events are no longer written; None while they are.
    """

    def __init__(self, folder: Path, first_step: int):
        now = time.time_ns()
        self.path = folder / f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now % 10**9}"
        self.file: io.RawIOBase | None = None
        self.failure: str | None = None
        with self._forgiving():
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]  # protobuf makes them

            folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "xb", buffering=0)  # noqa: SIM115, open until the run ends
            version = Event(wall_time=time.time(), step=first_step, file_version="brain.Event:2")
            start = Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
            self._append([version, start])

    def write(self, lines: Sequence[dict]) -> None:
        """Every number of lines of metrics.jsonl, under train/ or final/."""
        if self.file is None:
            return
        with self._forgiving():
            from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  # protobuf makes them
            from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]  # protobuf makes them

            now, events = time.time(), []
            for line in lines:
                group = "final" if line.get("final") else "train"
                values = {name: x for name, x in line.items() if name not in ("step", "final") and isinstance(x, int | float)}
                summary = Summary(value=[Summary.Value(tag=f"{group}/{name}", simple_value=x) for name, x in values.items()])
                events.append(Event(wall_time=now, step=line["step"], summary=summary))
            self._append(events)

    def _append(self, events: Sequence) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        assert self.file is not None
        records = io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        data = records.getvalue()
        while data:  # an almost full disk takes a part, and raises for the rest
            data = data[self.file.write(data) :]

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            with naming(self.path):
                yield
        except Exception as error:  # the disk's; tensorboard with an incompatible protobuf raises nearly anything
            reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            self.failure = f"TensorBoard's events are no longer written, metrics.jsonl is: {' '.join(reason.split())[:300]}"
            if self.file is not None:
                self.file.close()
                self.file = None
