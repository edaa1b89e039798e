"""Where the time of real ticks goes: spans of every stage, as a Chrome/Perfetto trace and as a summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from layerpipe.saved import Spans

#: Inside an action, side by side; ``past weight`` lies inside ``layers``.
LAYERS, WEIGHTS, PAST, STEP, CHANNEL = "layers", "weight gradients", "past weight", "step", "channel"
_INNER = (LAYERS, WEIGHTS, PAST, STEP, CHANNEL)


class StageTime(NamedTuple):
    """Seconds per tick of one stage."""

    compute: float  # layers, loss and autograd, with the hooks that save and hand out tensors
    past: float  # reconstructing past weights
    step: float  # the optimizer
    channel: float  # waiting for a neighbour's tensors
    python: float  # everything else of the engine
    idle: float  # between actions
    utilisation: float  # share of the time that is none of channel and idle


class Trace:
    """Spans of some ticks, per stage; :meth:`layerpipe.Pipeline.watch` fills it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.stages: list[Spans] = [[] for _ in names]
        self.paused = 0.0  # seconds that the caller spent on something else, such as an evaluation

    def seconds(self) -> float:
        """From the first span's start to the last one's end, pauses left out."""
        starts = [start for spans in self.stages for _, start, _ in spans]
        ends = [end for spans in self.stages for _, _, end in spans]
        return max(ends) - min(starts) - self.paused if starts else 0.0

    def times(self) -> list[StageTime]:
        """Per stage; a tick is as long as the trace divided by the stage's backwards."""
        wall, report = self.seconds(), []
        for spans in self.stages:
            inner = dict.fromkeys(_INNER, 0.0)
            whole, ticks = 0.0, 0
            for name, start, end in spans:
                if name in inner:
                    inner[name] += end - start
                else:
                    whole += end - start
                    ticks += name.startswith("B")
            per = max(1, ticks)
            past, layers = inner[PAST], inner[LAYERS] + inner[WEIGHTS] - inner[PAST]
            rest = whole - layers - past - inner[STEP] - inner[CHANNEL]
            busy = (whole - inner[CHANNEL]) / wall if wall else 0.0
            step, channel = inner[STEP] / per, inner[CHANNEL] / per
            report.append(
                StageTime(layers / per, past / per, step, channel, rest / per, (wall - whole) / per, utilisation=busy)
            )
        return report

    def overlap(self) -> float:
        """How many stages are at work at once, on average."""
        return sum(time.utilisation for time in self.times())

    def write(self, path: Path) -> None:
        """As JSON that ``chrome://tracing`` and https://ui.perfetto.dev open: one row per stage, times in us."""
        origin = min((start for spans in self.stages for _, start, _ in spans), default=0.0)
        events: list[dict[str, object]] = []
        for row, (name, spans) in enumerate(zip(self.names, self.stages, strict=True)):
            label = {"name": f"stage {row}: {name}"}
            events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": label})
            events.append({"ph": "M", "name": "thread_sort_index", "pid": 0, "tid": row, "args": {"sort_index": row}})
            for what, start, end in spans:
                us = {"ts": 1e6 * (start - origin), "dur": 1e6 * (end - start)}
                events.append({"ph": "X", "name": what, "cat": "tick", "pid": 0, "tid": row, **us})
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")
