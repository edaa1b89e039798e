"""All stages in the caller's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from layerpipe.executors.base import Executor, Tick
from layerpipe.executors.interrupts import Held, restore


class Serial(Executor):
    """All stages in the caller's thread, one after the other. Easy to follow and to debug."""

    name = "serial"
    blocking = False
    lookahead = 0

    def submit(self, tick: Tick) -> None:
        self.check()
        run, caller = self._run, threading.get_ident()
        with Held(keep=True) as interrupt:
            for action in tick.actions:
                try:
                    self._acts = caller
                    run(action, tick)
                    if interrupt.came:
                        interrupt.release()
                except BaseException as error:
                    if self._closed and isinstance(error, Exception):  # what is missing was let go of
                        break
                    self._failure = self._named(action.stage, error)
                    raise self._failure from self._failure.__cause__
                finally:
                    self._acts = None
                if self._closed:  # inside the action: the stages may be in different ticks
                    break
        if self._closed:
            self.check()

    def wait(self, done: Callable[[], bool]) -> None:
        if not done():
            raise RuntimeError("the schedule promised a result that no stage produced")

    def synchronize(self) -> None:
        pass  # a tick is done when submit returns

    def drained(self, fed: int) -> None:
        restore()
        super().drained(fed)

    def close(self) -> None:
        super().close()
        restore()
