"""Ctrl-C between a stage's actions, not within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

#: Those that a handler may turn into an exception; by default only the first is.
SIGNALS = tuple(int(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))

# Of the module in C: Python's own converts to and from enums, which takes longer than all else here.
_signals: Any = getattr(signal, "_signal", signal)
_get, _set = _signals.getsignal, _signals.signal


class _Handler:
    """Handles one signal: the handler that was there before, unless somebody holds it back at present."""

    __slots__ = ("before", "held")

    def __init__(self, before: Any) -> None:
        self.before = before
        self.held: Held | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        held = self.held
        if held is None:
            self.before(number, frame)
            return
        if held.came:
            self.before(number, frame)
        held.came, held.frame = number, frame


class Held:
    """``with Held() as held:`` a Ctrl-C waits for :meth:`release`, so that no update is left half done; a second one
    does not wait. So does every other signal that has a handler in Python.

    Only the main thread ever sees one; elsewhere this does nothing.

    Args:
        keep: leave the handlers in place afterwards, where they call those before them, until :func:`restore`. To put
            them there takes two calls of the kernel, which cost a pipeline of small layers more than a stage's step.
    """

    __slots__ = ("_handlers", "_keep", "came", "frame")

    def __init__(self, *, keep: bool = False) -> None:
        self._keep = keep
        self.came = 0  # the signal's number
        self.frame: FrameType | None = None

    def __enter__(self) -> Held:
        self._handlers: dict[int, _Handler] = {}
        if threading.get_ident() == threading.main_thread().ident:
            for number in SIGNALS:
                handler = _get(number)
                if type(handler) is not _Handler:
                    if not callable(handler):
                        continue
                    handler = _Handler(handler)
                    _set(number, handler)
                elif handler.held is not None:  # a pipeline inside of a stage of another one
                    continue
                handler.held = self
                self._handlers[number] = handler
        return self

    def release(self) -> None:
        """Let a signal that has come do what it does."""
        if number := self.came:
            self.came = 0
            self._handlers[number].before(number, self.frame)

    def __exit__(self, *_: object) -> None:
        for handler in self._handlers.values():
            handler.held = None
        if not self._keep:
            restore()
        self.release()


def restore() -> None:
    """Put the handlers back that were there before the first :class:`Held` that has kept its own in place.

    Does nothing outside the main thread, and to a handler that somebody else has put there since.
    """
    if threading.get_ident() == threading.main_thread().ident:
        for number in SIGNALS:
            handler = _get(number)
            if type(handler) is _Handler and handler.held is None:
                _set(number, handler.before)
