"""Ctrl-C between a stage's actions, not within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

#: Those that a handler may turn into an exception; by default only the first is.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Held:
    """``with Held() as held:`` a Ctrl-C waits for :meth:`release`, so that no update is left half done; a second one
    does not wait. So does every other signal that has a handler in Python.

    Only the main thread ever sees one; elsewhere this does nothing.
    """

    __slots__ = ("_frame", "_handlers", "came")

    def __enter__(self) -> Held:
        self.came = 0  # the signal's number
        self._frame: FrameType | None = None
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            self._handlers[number](number, frame)
        self.came, self._frame = number, frame

    def release(self) -> None:
        """Let a signal that has come do what it does."""
        if number := self.came:
            self.came = 0
            self._handlers[number](number, self._frame)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.release()
