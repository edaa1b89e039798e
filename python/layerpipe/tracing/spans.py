"""Spans of a stage's work, and the two clocks that time them: the host's and a device's.

The host's clock is right where the host does the work or waits for it. Where it only issues work, a device says when it
has come to a mark: an event in the stream that the work is in. Nobody waits for an event before the end of the trace.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from layerpipe.accelerator import Accelerator

#: Inside an action, side by side; ``past weight`` lies inside ``layers``. ``wait``: for the stage's own other streams.
LAYERS, WEIGHTS, PAST, STEP = "layers", "weight gradients", "past weight", "step"
CHANNEL, WAIT = "channel", "wait"
INNER = (LAYERS, WEIGHTS, PAST, STEP, CHANNEL, WAIT)


class Span(NamedTuple):
    """One of the names above, or an action such as ``F3``; times in seconds of ``time.perf_counter``."""

    name: str
    start: float
    end: float
    stream: int | None = None  # of the stage's streams, where it has some


class Clock(Protocol):
    """Marks times, and says later which they were."""

    def now(self) -> Any:
        """A mark, where the work that the calling thread gives goes."""

    def span(self, name: str, start: Any, end: Any) -> Span:
        """Return the span between two marks that have been reached."""


class HostClock:
    """``time.perf_counter``."""

    def now(self) -> float:
        return time.perf_counter()

    def span(self, name: str, start: float, end: float) -> Span:
        return Span(name, start, end)


class DeviceClock:
    """Timed events in one stage's streams.

    A device gives the time between two of its events, in single precision: to 0.1 us in the first second, to 8 us after
    100 s.

    Args:
        device: the stage's.
        streams: the stage's, by number; others that its layers use are numbered as they come.
        origin: an event of this device that it reached at ``began``, seconds of ``time.perf_counter``: events of
            different devices have nothing but the host's clock in common.
    """

    def __init__(self, device: Accelerator, streams: Iterable[Any], origin: Any, began: float) -> None:
        self._device, self._origin, self._began = device, origin, began
        self._numbers = {stream: number for number, stream in enumerate(streams)}

    def now(self) -> Any:
        event, stream = self._device.event(timed=True), self._device.current()
        event.record(stream)
        return event, stream

    def span(self, name: str, start: Any, end: Any) -> Span:
        (first, stream), (last, _) = start, end
        number = self._numbers.setdefault(stream, len(self._numbers))
        return Span(name, self._seconds(first), self._seconds(last), number)

    def _seconds(self, event: Any) -> float:
        elapsed: float = self._origin.elapsed_time(event)  # ms
        return self._began + 1e-3 * elapsed


class Recorder:
    """Takes one stage's marks down.

    Args:
        clock: that makes them.
    """

    def __init__(self, clock: Clock) -> None:
        self.now = clock.now
        self._clock = clock
        self._marks: list[tuple[str, Any, Any]] = []

    def add(self, name: str, start: Any) -> None:
        """From a mark until now."""
        self._marks.append((name, start, self.now()))

    def spans(self) -> list[Span]:
        """Everything added, once all marks have been reached."""
        return [self._clock.span(*marks) for marks in self._marks]
