"""Sums up a timeline: throughput, idle time, staleness, and what is in flight."""

from __future__ import annotations

import bisect
import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from layerpipe.theory.simulate.events import Event, Timeline


@dataclasses.dataclass(frozen=True)
class Report:
    """Seconds and bytes. Lists are per stage."""

    makespan: float
    period: float  # seconds per minibatch once the pipe is full
    busy: list[float]  # per processor
    bubble: float  # idle share of all processors' time, filling and draining included
    bytes_sent: int  # per minibatch
    staleness: list[int]  # the most updates between a minibatch's forward and its backward
    in_flight: list[int]  # the most minibatches, or parts of one, between forward and backward

    @property
    def utilisation(self) -> float:
        """Of the processors once the pipe is full."""
        return 1.0 - self.bubble


def report(timeline: Timeline) -> Report:
    """Read a timeline.

    Raises:
        ValueError: an empty one.
    """
    if not timeline.tasks:
        raise ValueError("nothing ran")
    minibatches = 1 + max(event.key.minibatch for event in timeline.tasks)
    busy = [0.0] * timeline.processors
    for event in timeline.tasks:
        busy[event.processor] += event.end - event.start
    stages: dict[int, list[Event]] = defaultdict(list)
    for event in timeline.tasks:
        stages[event.key.stage].append(event)
    makespan = timeline.makespan
    return Report(
        makespan=makespan,
        # What the window saw may be work done ahead; in the long run the busiest processor sets the pace.
        period=max(_period(timeline), max(busy) / minibatches),
        busy=busy,
        bubble=1 - sum(busy) / (makespan * timeline.processors),
        bytes_sent=round(sum(message.bytes for message in timeline.messages) / minibatches),
        staleness=[_staleness(events) for _, events in sorted(stages.items())],
        in_flight=[_in_flight(events) for _, events in sorted(stages.items())],
    )


def _period(timeline: Timeline) -> float:
    """Mean distance between the ends of minibatches while new ones still come in, the first half left out."""
    ends: dict[int, float] = defaultdict(float)
    for event in timeline.tasks:
        ends[event.key.minibatch] = max(ends[event.key.minibatch], event.end)
    entered = max(event.start for event in timeline.tasks if event.key.kind == "F" and event.key.stage == 0)
    steady = sorted(end for end in ends.values() if end <= entered)
    steady = steady[len(steady) // 2 :]
    if len(steady) < 2:
        return timeline.makespan / len(ends)
    return (steady[-1] - steady[0]) / (len(steady) - 1)


def _staleness(events: list[Event]) -> int:
    """Counted: updates that end after a forward has begun and before its backward begins."""
    updates = sorted(event.end for event in events if event.updates)
    starts: dict[tuple[str, int], float] = {}
    for event in events:
        key = event.key.kind, event.key.minibatch
        starts[key] = min(starts.get(key, event.start), event.start)
    return max(
        (
            bisect.bisect_right(updates, starts["B", m]) - bisect.bisect_right(updates, begin)
            for (kind, m), begin in starts.items()
            if kind == "F" and ("B", m) in starts
        ),
        default=0,
    )


def _in_flight(events: list[Event]) -> int:
    spans: dict[tuple[int, int], tuple[float, float]] = {}
    for event in events:
        key = event.key.minibatch, event.key.part
        start, end = spans.get(key, (event.start, event.end))
        spans[key] = min(start, event.start), max(end, event.end)
    # At one moment, what ends is gone before what starts is there.
    changes = sorted([(start, 1) for start, _ in spans.values()] + [(end, -1) for _, end in spans.values()])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def to_chrome(timelines: Mapping[str, Timeline]) -> str:
    """For chrome://tracing and Perfetto: one process per timeline, one thread per processor (Trace Event Format)."""
    events: list[dict[str, Any]] = []
    for pid, (name, timeline) in enumerate(timelines.items()):
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}})
        for processor in range(timeline.processors):
            label = {"name": f"processor {processor}"}
            events.append({"ph": "M", "pid": pid, "tid": processor, "name": "thread_name", "args": label})
        for event in timeline.tasks:
            events.append(
                {
                    "ph": "X", "pid": pid, "tid": event.processor, "name": str(event.key), "cat": event.key.kind,
                    "ts": event.start * 1e6, "dur": (event.end - event.start) * 1e6,
                    "args": {"stage": event.key.stage, "minibatch": event.key.minibatch},
                }
            )  # fmt: skip
        for number, message in enumerate(timeline.messages):
            identity = {"pid": pid, "id": f"{pid}.{number}", "cat": "message", "name": str(message.key)}
            events.append({**identity, "ph": "s", "tid": message.processor, "ts": message.start * 1e6})
            events.append({**identity, "ph": "f", "bp": "e", "tid": message.target, "ts": message.end * 1e6})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
