"""The pictures of ``layerpipe plan``."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx as nx

from layerpipe.drawing import new_figure, save
from layerpipe.theory import retiming
from layerpipe.theory.planning.memory import Memory
from layerpipe.theory.planning.plan import Plan
from layerpipe.theory.retiming import Derivation, Node
from layerpipe.theory.simulate import Timeline

#: Beyond this a graph's labels cannot be read any more.
MOST_DRAWN = 8
COLOURS = {
    "F": "#4c78a8",
    "B": "#e45756",
    "W": "#f2a541",
    "U": "#72b7b2",
    "X": "#bab0ac",
    "L": "#bab0ac",
    "Y": "#bab0ac",
}
KINDS = {"F": "forward", "B": "activation gradient", "W": "weight gradient", "U": "update"}


def draw(plan: Plan, directory: Path) -> list[Path]:
    """All pictures; returns what was written."""
    count = len(plan.stages)
    written = []
    if count <= MOST_DRAWN and plan.schedule != "sequential":
        stages = retiming.derive(count, [[s] for s in range(count)], plan.schedule)
        written.append(delay_graph(directory / "delays.png", stages))
    written.append(gantt(directory / "schedules.png", plan.timelines))
    written.append(memory(directory / "memory.png", plan))
    return written


def delay_graph(path: Path, derivation: Derivation) -> Path:
    """The training graph before and after: a number on an edge is its registers."""
    count = len(derivation.stages)
    fig, (above, below) = new_figure(figsize=(max(8.0, 2.1 * count + 2.5), 8.5), nrows=2)
    _draw_graph(
        above, derivation.sequential, f"Sequential training: {count} stages, one register in each update's loop"
    )
    kinds = ", ".join(f"{kind} {name}" for kind, name in KINDS.items())
    below.text(0.5, -0.02, f"{kinds}; X input, L loss, Y output. Red: registers, and how many.\n"
               "Not drawn: each U's loop to itself, and what the forwards save for the backwards.",
               transform=below.transAxes, ha="center", va="top", fontsize=9, color="#666666")  # fmt: skip
    title = f"After retiming, {derivation.schedule}: delays n = {', '.join(map(str, derivation.delays))}"
    _draw_graph(below, derivation.graph, title)
    return save(fig, path)


def _draw_graph(axes: Any, graph: nx.DiGraph, title: str) -> None:
    layers = [node.layer for node in graph if node.kind == "F"]
    column = {layer: 2.0 * i for i, layer in enumerate(layers)}
    height, shift = {"F": 3.0, "U": 2.0, "B": 0.0, "W": 1.0}, {"F": 0.0, "U": 0.45, "B": 0.0, "W": -0.35}
    places = {n: (column[n.layer] + shift[n.kind], height[n.kind]) for n in graph if n.kind in "FBWU"}
    end = 2.0 * len(layers) - 0.4
    places |= {Node("X"): (-1.4, 3.0), Node("L"): (end, 1.5), Node("Y"): (end + 0.9, 1.5)}
    # What a forward saves for its backward is left out: its registers are the activations of minibatches in flight.
    shown = [
        (a, b) for a, b in graph.edges
        if a != b and (a.kind, b.kind) not in {("F", "B"), ("F", "W"), ("X", "W"), ("X", "L")}
    ]  # fmt: skip
    ink = {(a, b): "#c0392b" if retiming.registers(graph, a, b) else "#999999" for a, b in shown}
    nx.draw_networkx_nodes(
        graph, places, ax=axes, node_color=[COLOURS[n.kind] for n in graph], node_size=620, edgecolors="white"
    )
    nx.draw_networkx_labels(graph, places, {n: str(n) for n in graph}, ax=axes, font_size=9, font_color="white")
    # Weights go to a backward past its weight gradient: bent, so that edges do not lie on each other.
    bent = [(a, b) for a, b in shown if (a.kind, b.kind) == ("U", "B")]
    for edges, style in ((bent, "arc3,rad=-0.25"), ([e for e in shown if e not in bent], "arc3")):
        nx.draw_networkx_edges(
            graph, places, edges, ax=axes, edge_color=[ink[e] for e in edges], connectionstyle=style,
            node_size=620, arrowsize=12, width=[1.6 if retiming.registers(graph, *e) else 0.9 for e in edges],
        )  # fmt: skip
        labels = {e: retiming.registers(graph, *e) for e in edges if retiming.registers(graph, *e)}
        nx.draw_networkx_edge_labels(
            graph, places, labels, ax=axes, connectionstyle=style, font_size=9, font_color="#c0392b", rotate=False,
            label_pos=0.5, bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none"},
        )  # fmt: skip
    axes.set_title(title, fontsize=11)
    axes.set_axis_off()
    axes.margins(0.06, 0.12)


def gantt(path: Path, timelines: Mapping[str, Timeline]) -> Path:
    """Draw the schedules, a panel each, on one time scale; numbers are minibatches."""
    from matplotlib.patches import Patch

    rows = max(timeline.processors for timeline in timelines.values())
    fig, panels = new_figure(
        figsize=(13, len(timelines) * min(3.2, 0.34 * rows + 0.8) + 0.9),
        nrows=len(timelines),
        sharex=True,
        squeeze=False,
    )
    # As long as the async schedules take to fill, and some ticks more.
    span = max(_filled(timeline) for timeline in timelines.values())
    for axes, (name, timeline) in zip(panels[:, 0], timelines.items(), strict=True):
        _draw_timeline(axes, timeline, span, numbers=rows <= MOST_DRAWN)
        axes.set_title(name, loc="left", fontsize=10)
    panels[-1, 0].set_xlabel("milliseconds")
    handles = [Patch(color=COLOURS[k], label=KINDS[k]) for k in "FBW"]
    handles[1].set_label("backward (under layerpipe the activation gradient alone)")
    fig.legend(handles=handles, loc="outside upper right", ncols=3, fontsize=9)
    return save(fig, path)


def _filled(timeline: Timeline) -> float:
    """Return when eight minibatches are through, or all are."""
    ends: dict[int, float] = {}
    for event in timeline.tasks:
        ends[event.key.minibatch] = max(ends.get(event.key.minibatch, 0.0), event.end)
    return sorted(ends.values())[min(7, len(ends) - 1)] if len(ends) > 6 else 0.0


def _draw_timeline(axes: Any, timeline: Timeline, span: float, *, numbers: bool) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    scale, boxes, colours, edges = 1e3, [], [], []
    for event in timeline.tasks:
        width = min(event.end, span) - event.start
        if width <= 0:
            continue
        y, left = timeline.processors - 1 - event.processor, event.start * scale
        boxes.append(Rectangle((left, y - 0.43), width * scale, 0.86))
        edges.append(0.4 if width > 0.006 * span else 0.0)  # an edge must not hide its box
        colours.append(to_rgba(COLOURS[event.key.kind], 0.7 + 0.3 * (event.key.minibatch % 2)))
        if numbers and width > 0.012 * span:
            axes.text(left + width / 2 * scale, y, str(event.key.minibatch), ha="center", va="center",
                      fontsize=7, color="white")  # fmt: skip
    axes.add_collection(PatchCollection(boxes, facecolors=colours, edgecolors="white", linewidths=edges))
    step = 1 if timeline.processors <= 16 else timeline.processors // 8
    ticks = range(0, timeline.processors, step)
    axes.set(xlim=(0, span * scale), ylim=(-0.6, timeline.processors - 0.4), ylabel="processor")
    axes.set_yticks([timeline.processors - 1 - p for p in ticks], [str(p) for p in ticks])


def memory(path: Path, plan: Plan) -> Path:
    """Bytes per stage and kind of past weights: stacked bars, or a line per kind where stages are many."""
    kinds, count = list(plan.stages[0].memory), len(plan.stages)
    fig, (weights, activations) = new_figure(
        figsize=(max(9.0, min(14.0, 1.3 * count + 4)), 5), ncols=2, width_ratios=(2, 1)
    )
    unit, divisor = _unit(max(_beside_activations(m) for stage in plan.stages for m in stage.memory.values()))
    if count <= MOST_DRAWN:
        _memory_bars(weights, plan, kinds, divisor)
    else:
        for kind in kinds:
            sizes = [_beside_activations(stage.memory[kind]) / divisor for stage in plan.stages]
            weights.step(range(count), sizes, where="mid", label=kind)
        weights.set(ylim=(0, None))
        weights.grid(alpha=0.3)
        weights.legend(title="past weights")
    weights.set(xlabel="stage", ylabel=unit, title="Weights and what they need, by kind of past weights")
    # Activations do not depend on the kind, and are often so much more that nothing else could be seen beside them.
    unit, divisor = _unit(max(stage.memory[kinds[0]].activations for stage in plan.stages))
    sizes = [stage.memory[kinds[0]].activations / divisor for stage in plan.stages]
    activations.bar(range(count), sizes, color="#9c755f")
    activations.set(xlabel="stage", ylabel=unit, title="Activations in flight")
    for axes in (weights, activations):
        axes.set(xticks=range(0, count, 1 if count <= 16 else count // 8))
    fig.suptitle(f"Memory per stage, {plan.schedule}")
    return save(fig, path)


def _beside_activations(memory: Memory) -> int:
    return memory.total - memory.activations


def _memory_bars(axes: Any, plan: Plan, kinds: Sequence[str], divisor: float) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    parts = [part for part in Memory._fields if part != "activations"]
    colours, width = colormaps["tab10"], 0.85 / len(kinds)
    for (k, kind), (s, stage) in itertools.product(enumerate(kinds), enumerate(plan.stages)):
        bottom, x = 0.0, s + (k - (len(kinds) - 1) / 2) * width
        for i, part in enumerate(parts):
            size = getattr(stage.memory[kind], part) / divisor
            if size:  # an empty one would take the margin above it away
                axes.bar(x, size, width * 0.92, bottom=bottom, color=colours(i))
            bottom += size
        axes.text(x, bottom, f" {kind}", rotation=90, ha="center", va="bottom", fontsize=8)
    axes.margins(y=0.25)
    axes.legend(handles=[Patch(color=colours(i), label=part) for i, part in enumerate(parts)], fontsize=9)


def _unit(largest: float) -> tuple[str, float]:
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
    return next((name, size) for name, size in units if largest >= size or size == 1)
