"""Signals that end a run: Ctrl-C, and SIGTERM and SIGHUP, which leave what Ctrl-C leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """A signal that ends a run as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def number_of(interrupt: BaseException) -> int:
    """The signal that this came of."""
    return int(getattr(interrupt, "number", signal.SIGINT))


def exit_status(number: int) -> int:
    """Exit status of a process that a signal has ended: 130 after Ctrl-C."""
    return 128 + number


@contextmanager
def terminable() -> Iterator[list[int]]:
    """Raise :class:`Terminated` where SIGTERM or SIGHUP would end the process at once; the signals that came so."""
    came: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}

    def handler(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise Terminated(number)

    ours = [number for number, found in before.items() if found is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield came
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
