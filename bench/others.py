"""How much of the processor others took while a bench ran: with more than a little of it, its numbers say nothing."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from types import TracebackType

#: A share of all cores that a quiet machine's background work stays below.
QUIET = 0.05


class Others:
    """``with Others() as others: ...; others.share`` of all cores' time; None where there is no ``/proc/stat``.

    Time that a hypervisor gave to somebody else is in it.
    """

    share: float | None = None

    def __enter__(self) -> Others:
        self._start = _times()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = _times()
        if self._start is not None and end is not None:
            busy, total, own = (b - a for a, b in zip(self._start, end, strict=True))
            self.share = max(0.0, (busy - own) / total) if total else 0.0

    @property
    def quiet(self) -> bool:
        return self.share is None or self.share < QUIET

    def __str__(self) -> str:
        if self.share is None:
            return "What else ran on this machine is not known."
        said = f"Others took {self.share:.0%} of the processor's time"
        return f"{said}." if self.quiet else f"{said}: too much, these numbers are not to be trusted."


def _times() -> tuple[float, float, float] | None:
    """Seconds of all cores: busy, altogether, and busy for this process and its children."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, idle, waiting, *rest = (int(x) / os.sysconf("SC_CLK_TCK") for x in line.split()[1:9])
    busy = user + nice + system + sum(rest)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy, busy + idle + waiting, sum(u.ru_utime + u.ru_stime for u in usage)
