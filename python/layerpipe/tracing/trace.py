"""The time of real ticks: spans of every stage, as a Chrome/Perfetto trace and as a summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from layerpipe.tracing.spans import CHANNEL, INNER, LAYERS, PAST, STEP, WAIT, WEIGHTS, Span


class StageTime(NamedTuple):
    """Seconds per tick of one stage; on several streams at once, the columns but ``idle`` are sums over them."""

    compute: float  # layers, loss and autograd, with the hooks that save and hand out tensors
    past: float  # reconstructing past weights; in a replayed graph a part of compute
    step: float  # the optimizer
    channel: float  # waiting for a neighbour's tensors
    python: float  # everything else of the engine; on a device, its copies and what the host had not issued yet
    idle: float  # no stream in an action, or those that are wait for the stage's others
    utilisation: float  # share of the time in which at least one stream does something else than wait


class Trace:
    """Spans of some ticks, per stage.

    :meth:`layerpipe.Pipeline.watch` begins it and ends it, any number of times: what the caller does in between counts
    nowhere.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.stages: list[list[Span]] = [[] for _ in names]
        self.host: list[Span] = []  # issuing ticks, where devices do the work in their own time
        self._seconds = 0.0

    def add(self, stages: Sequence[Sequence[Span]]) -> None:
        """Add what each stage did from one beginning to its end."""
        for mine, new in zip(self.stages, stages, strict=True):
            mine += new
        spans = [span for new in stages for span in new]
        if spans:
            self._seconds += max(span.end for span in spans) - min(span.start for span in spans)

    def seconds(self) -> float:
        """From the first span's start to the last one's end, and so after each interruption."""
        return self._seconds

    def times(self) -> list[StageTime]:
        """Per stage; a tick is as long as the trace divided by the stage's backwards.

        A stage's columns add up to the tick, and on several streams to as much more as these overlapped.
        """
        wall, report = self.seconds(), []
        for spans in self.stages:
            sums = dict.fromkeys(INNER, 0.0)
            for span in spans:
                if span.name in sums:
                    sums[span.name] += span.end - span.start
            actions = [span for span in spans if span.name not in sums]
            waits = [span for span in spans if span.name == WAIT]
            channel = [span for span in spans if span.name == CHANNEL]
            compute = sums[LAYERS] + sums[WEIGHTS] - sums[PAST]
            whole = sum(span.end - span.start for span in actions)
            python = whole - compute - sums[PAST] - sums[STEP] - sums[CHANNEL] - sums[WAIT]
            idle = wall - _covered(actions, waits)
            busy = _covered(actions, waits + channel) / wall if wall else 0.0
            ticks = max(1, sum(span.name.startswith("B") for span in actions))
            seconds = (compute, sums[PAST], sums[STEP], sums[CHANNEL], python, idle)
            report.append(StageTime._make([*(value / ticks for value in seconds), busy]))
        return report

    def overlap(self) -> float:
        """Return the mean number of stages at work at once; a stage on several streams counts once."""
        return sum(time.utilisation for time in self.times())

    def issuing(self) -> float:
        """Share of the time in which the host issues ticks; near 1, devices wait for it, or their queues are full."""
        return sum(span.end - span.start for span in self.host) / self.seconds() if self.seconds() else 0.0

    def write(self, path: Path) -> None:
        """As JSON that ``chrome://tracing`` and https://ui.perfetto.dev open, times in us: one row per stage, or per
        stage and stream with one above them for the host."""
        rows = [("host", self.host)] if self.host else []
        for stage, (name, spans) in enumerate(zip(self.names, self.stages, strict=True)):
            streams = sorted({span.stream for span in spans if span.stream is not None})
            if not streams:
                rows.append((f"stage {stage}: {name}", spans))
            for stream in streams:
                rows.append((f"stage {stage}: {name}, stream {stream}", [s for s in spans if s.stream == stream]))
        origin = min((span.start for _, spans in rows for span in spans), default=0.0)
        events: list[dict[str, object]] = []
        for row, (label, spans) in enumerate(rows):
            at = {"pid": 0, "tid": row}
            events.append({"ph": "M", "name": "thread_name", **at, "args": {"name": label}})
            events.append({"ph": "M", "name": "thread_sort_index", **at, "args": {"sort_index": row}})
            for span in spans:
                us = {"ts": 1e6 * (span.start - origin), "dur": 1e6 * (span.end - span.start)}
                events.append({"ph": "X", "name": span.name, "cat": "tick", **at, **us})
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")


def _covered(spans: Sequence[Span], pauses: Sequence[Span]) -> float:
    """Seconds in which at least one span runs and does not pause; a pause lies in one span, and in no other pause."""
    edges = [(s.start, 1) for s in spans] + [(s.end, -1) for s in spans]
    edges += [(p.start, -1) for p in pauses] + [(p.end, 1) for p in pauses]
    seconds, running, since = 0.0, 0, 0.0
    for at, change in sorted(edges):
        if running > 0:
            seconds += at - since
        running, since = running + change, at
    return seconds
