"""Notices in torch's store for processes that wait for each other's replicas: that one of them ended, and why.

A replica that ended sends no gradient, and whoever averages with it would wait until the group's timeout. A wait looks
here once a second.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import time
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from layerpipe.errors import DivergenceError, StageError, StageInterrupted
from layerpipe.executors.ranks import reached

_LOOK = datetime.timedelta(seconds=1)
#: What one process's error is in the others, the most special first.
KINDS: tuple[type[StageError], ...] = (DivergenceError, StageInterrupted, StageError)


def described(error: BaseException | None) -> dict[str, Any]:
    """An error, or that there was none, for other processes: ``kind``, ``stage`` and ``message``."""
    if isinstance(error, StageError):
        stage, message = error.stage, error.message
    else:
        stage, message = "", "closed its pipeline" if error is None else f"{type(error).__name__}: {error}"
    kind = next((i for i, known in enumerate(KINDS) if isinstance(error, known)), len(KINDS) - 1)
    if isinstance(error, KeyboardInterrupt):
        kind = KINDS.index(StageInterrupted)
    return {"kind": kind, "stage": stage[:150], "message": message[:500]}


def raised(content: dict[str, Any], stage: str) -> StageError:
    """The error that :func:`described` was given, as another process raises it; of this ``stage`` if it names none."""
    kind: type[StageError] = KINDS[content["kind"]]
    return kind(content["stage"] or stage, content["message"])


class Notices:
    """One pipeline's.

    Args:
        group: of all processes.
        timeout: of a wait.
        replica: this process's.
        replicas: how many there are.
    """

    def __init__(self, group: Any, timeout: datetime.timedelta, replica: int, replicas: int) -> None:
        self._store = PrefixStore(f"layerpipe {group.group_name}", _get_default_store())
        self._timeout = timeout.total_seconds()
        self._replica, self._replicas = replica, replicas
        self.fed = 0  # minibatches since all replicas were empty
        self._drains = 0
        self._ended = False

    def end(self, error: BaseException | None) -> None:
        """This process takes no further part, and if that is an error, why."""
        if self._ended:
            return
        self._ended = True
        content = {**described(error), "process": f"a process of replica {self._replica}"}
        with contextlib.suppress(RuntimeError):  # the process that holds the store is gone
            self._store.compare_set("ended", "", json.dumps(content))

    def drains(self) -> None:
        """This replica is fed nothing more before all of them are empty.

        Raises:
            StageError: the store is gone.
        """
        reached("another replica", lambda: self._store.set(f"{self._drains} {self._replica}", str(self.fed)))

    def drained(self) -> None:
        """All replicas are empty."""
        self._drains += 1
        self.fed = 0

    def wait(self, work: Any, name: str) -> None:
        """Return once a collective is done.

        Raises:
            StageError: another process has ended, is gone, or was drained after fewer minibatches.
        """
        end = time.monotonic() + self._timeout
        said: StageError | None = None
        while True:
            try:
                work.wait(_LOOK)
                return
            except RuntimeError:
                if said is not None:
                    raise said from None
                said = self._look(name)  # what is said may be about what comes after this: wait once more
                if said is None and (work.is_completed() or time.monotonic() > end):
                    reached(name, functools.partial(work.wait, _LOOK))

    def _look(self, name: str) -> StageError | None:
        def look() -> StageError | None:
            if self._store.check(["ended"]):
                content = json.loads(self._store.get("ended"))
                return raised(content, content["process"])
            for replica in set(range(self._replicas)) - {self._replica}:
                key = f"{self._drains} {replica}"
                if self._store.check([key]) and (fed := int(self._store.get(key))) < self.fed:
                    return StageError(
                        f"replica {replica}",
                        f"was drained after {fed} minibatches, this one was fed {self.fed}: every replica must be "
                        "given the same number of minibatches",
                    )
            return None

        return reached(name, look)
