"""TensorBoard's event file."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any


class Board:
    """Writes scalars where they are said, without the thread and the queue of ``SummaryWriter``: an interrupt inside
    that queue leaves it locked, and closing it then waits for minutes.

    Args:
        directory: the file is made there with the first scalar.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: Any = None

    def scalar(self, tag: str, value: float, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if self._file is None:
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
            self._file = (self._directory / name).open("ab")
            self._records = RecordWriter(self._file)
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._records.write(event.SerializeToString())
