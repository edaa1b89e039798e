"""Ctrl-C between a stage's actions, not within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Held:
    """``with Held() as held:`` a Ctrl-C waits for :meth:`release`, so that no update is left half done; a second one
    does not wait.

    Only the main thread ever sees one; elsewhere this does nothing.
    """

    __slots__ = ("_frame", "_handler", "came")

    def __enter__(self) -> Held:
        self.came = False
        self._frame: FrameType | None = None
        self._handler: Any = None
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGINT)
            if callable(handler):
                self._handler = handler
                signal.signal(signal.SIGINT, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            self._handler(number, frame)
        self.came, self._frame = True, frame

    def release(self) -> None:
        """Let a Ctrl-C that has come do what it does."""
        if self.came:
            self.came = False
            self._handler(signal.SIGINT, self._frame)

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self.release()
