"""From sequential training to a pipeline: how many delays each layer needs, solved for, with the steps on record."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import networkx as nx

from layerpipe.schedule import most_updates_between
from layerpipe.theory.retiming.clocking import CLOCKINGS, Clocking, clocking
from layerpipe.theory.retiming.graph import INPUT, LOSS, OUTPUT, Node, registers, training_graph
from layerpipe.theory.retiming.operations import (
    RetimingError,
    accumulate_gradients,
    delay_gradients,
    insert_cutset,
    retime,
    retime_cutset,
    slow_down,
)

#: A forward reads weights that were there when its tick began.
WEIGHTS_HELD = 1


class Step(NamedTuple):
    """One operation of the derivation."""

    title: str
    graph: nx.DiGraph  # after it
    changes: dict[tuple[Node, Node], tuple[int, int]]  # edge -> registers before, after

    def __str__(self) -> str:
        saved = [a.kind in "XF" and b.kind in "BW" for a, b in self.changes]
        changes = [f"{a}→{b} {old}→{new}" for (a, b), (old, new) in self.changes.items()]
        shown = [text for text, is_saved in zip(changes, saved, strict=True) if not is_saved]
        if any(saved):
            shown.append(f"and {sum(saved)} from what a forward saves")
        return f"{self.title}\n      {', '.join(shown)}" if shown else self.title


@dataclasses.dataclass(frozen=True, eq=False)
class Derivation:
    """A pipeline, and what it took to make it out of sequential training."""

    stages: list[list[Hashable]]
    schedule: str
    sequential: nx.DiGraph
    graph: nx.DiGraph  # the pipeline: edges with "registers"
    input_delay: int  # registers inserted at the input
    gradient_delays: dict[Hashable, int]  # registers inserted for delayed LMS, in minibatches, per layer
    lags: dict[Node, int]
    accumulate: int = 1  # minibatches per update

    @property
    def clocking(self) -> Clocking:
        return CLOCKINGS[self.schedule]

    @functools.cached_property
    def layer_lags(self) -> dict[Hashable, int]:
        """Per layer: by how many minibatches the weights that its backward needs are older than the newest.

        Read off the retimed graph: of the registers from a layer's update to its backward, one minibatch's worth is
        the newest weights; the rest is history.
        """
        slow = self.clocking.slow
        found = {}
        for layers in self.stages:
            for layer in layers:
                found[layer] = -(-registers(self.graph, Node("U", layer), Node("B", layer)) // slow) - 1
        return found

    @property
    def layer_delays(self) -> dict[Hashable, int]:
        """``n`` per layer: by how many of its updates those weights are older than the newest; where gradients
        accumulate, at most."""
        return {layer: most_updates_between(lag, self.accumulate) for layer, lag in self.layer_lags.items()}

    @property
    def delays(self) -> list[int]:
        """``n`` per stage, which its layers share: see :attr:`layer_delays`."""
        return [max(self.layer_delays[layer] for layer in layers) for layers in self.stages]

    @property
    def inserted(self) -> list[int]:
        """Delayed-LMS registers per stage, in minibatches."""
        return [max(self.gradient_delays[layer] for layer in layers) for layers in self.stages]

    @property
    def in_flight(self) -> list[int]:
        """Per stage, the most minibatches that are between their forward and the end of their backward."""
        slow = self.clocking.slow
        first = [layers[0] for layers in self.stages]
        return [(self.lags[Node("B", a)] - self.lags[Node("F", a)]) // slow + 1 for a in first]

    @functools.cached_property
    def steps(self) -> list[Step]:
        """The derivation, each step an operation whose legality was checked when it was made."""
        slow = self.clocking.slow
        steps = [Step("sequential training: one register in each update loop", self.sequential, {})]

        def add(title: str, graph: nx.DiGraph) -> None:
            before = steps[-1].graph
            changes = {
                edge: (registers(before, *edge), registers(graph, *edge))
                for edge in graph.edges
                if registers(before, *edge) != registers(graph, *edge)
            }
            if changes:
                steps.append(Step(title, graph, changes))

        add(f"{slow} ticks per minibatch: every register becomes {slow}", slow_down(self.sequential, slow))
        add(
            f"feed-forward cutset at the input: {self.input_delay} registers, pure latency",
            insert_cutset(steps[-1].graph, {INPUT}, self.input_delay),
        )
        inserted = {layer: slow * count for layer, count in self.gradient_delays.items()}
        add("delayed LMS: the one step that changes the algorithm", delay_gradients(steps[-1].graph, inserted))
        # Lags one level at a time: every partial sum stays between what was and what will be, so each step is legal.
        for sign, way in ((-1, "towards the loss"), (1, "away from the loss")):
            for level in range(1, 1 + max(sign * lag for lag in self.lags.values())):
                inside = {node for node, lag in self.lags.items() if sign * lag >= level}
                names = " ".join(str(node) for node in self.graph if node in inside)
                add(f"cutset retiming, one register {way} through {{{names}}}",
                    retime_cutset(steps[-1].graph, inside, sign))  # fmt: skip
        if self.accumulate > 1:
            title = (
                f"accumulation: each update loop makes one update in {self.accumulate} minibatches, with the mean of "
                "their gradients"
            )
            steps.append(Step(title, accumulate_gradients(steps[-1].graph, self.accumulate), {}))
        return steps

    def __str__(self) -> str:
        lines = [f"{self.schedule}, {len(self.stages)} stages: {' | '.join(_names(s) for s in self.stages)}"]
        lines += [f"{i:>4}. {step}" for i, step in enumerate(self.steps)]
        if self.steps[-1].graph is self.sequential or (self.accumulate > 1 and len(self.steps) == 2):
            lines.append("      No stage boundary asks for a register: none is inserted, and nothing is late.")
        lines.append("Left on the weights that the backwards read:")
        for layer, lag in self.layer_lags.items():
            edge = Node("U", layer), Node("B", layer)
            least, most = lag // self.accumulate, self.layer_delays[layer]
            age = f"{most} updates old" if least == most else f"{least} or {most} updates old"
            minibatches = f"{lag} minibatches, " if self.accumulate > 1 else ""
            lines.append(f"      {edge[0]}→{edge[1]} {registers(self.graph, *edge)}: {minibatches}{age}")
        return "\n".join(lines)


def derive(
    layers: nx.DiGraph | int, grouping: Sequence[Sequence[Hashable]], schedule: str = "lockstep", accumulate: int = 1
) -> Derivation:
    """Pipeline a network's training.

    Only lower bounds go in: the registers that the schedule needs where stages meet, and that a forward finds its
    weights ready. Lags follow as longest ways to and from the loss, which is as late as a forward and as early as a
    backward can be; so the registers inserted for delayed LMS are, layer by layer, the fewest possible.

    Args:
        layers: an acyclic graph of layers, or how many a chain has.
        grouping: the layers of each stage, from input to output.
        schedule: ``"sequential"``, which gets no registers, ``"lockstep"`` or ``"1f1b"``.
        accumulate: minibatches per update, see :mod:`layerpipe.schedule`. No register depends on it.

    Raises:
        RetimingError: a connection between layers runs against the stages' order; the message names it.
        ValueError: a schedule without a derivation, a grouping that leaves out, repeats or invents a layer, or less
            than one minibatch per update.
    """
    slow, boundary, turn = clocking(schedule)
    sequential = training_graph(layers)
    stages = [list(stage) for stage in grouping]
    stage_of = _stage_of(sequential, stages)

    def needed(a: Node, b: Node) -> int:
        # A skip connection over k boundaries passes every stage on its way, and needs a register at each.
        return boundary * abs(stage_of[b] - stage_of[a]) + turn * (a == LOSS != b and b != OUTPUT)

    compute = sequential.subgraph(node for node in sequential if node.kind != "U")
    lags: dict[Node, int] = {LOSS: 0}
    order = list(nx.topological_sort(compute))
    for node in reversed(order):
        if node.kind in "XF":
            readers = (b for b in compute.successors(node) if b.kind in "FL")
            lags[node] = min(lags[b] - needed(node, b) for b in readers)
    for node in order:
        if node.kind in "BWY":
            sources = (a for a in compute.predecessors(node) if a.kind in "LB")
            lags[node] = max(lags[a] + needed(a, node) for a in sources)
    input_delay, lags[INPUT] = -lags[INPUT], 0

    gradient_delays: dict[Hashable, int] = {}
    for layer in (node.layer for node in sequential if node.kind == "U"):
        forward, gradient, update = Node("F", layer), Node("W", layer), Node("U", layer)
        latest = lags[forward] + slow * registers(sequential, update, forward) - WEIGHTS_HELD
        gradient_delays[layer] = max(0, -((latest - lags[gradient]) // slow))
        lags[update] = lags[gradient] - slow * gradient_delays[layer]

    graph = insert_cutset(slow_down(sequential, slow), {INPUT}, input_delay)
    graph = delay_gradients(graph, {layer: slow * count for layer, count in gradient_delays.items()})
    graph = retime(graph, lags)
    for a, b, data in graph.edges(data=True):
        if "U" not in (a.kind, b.kind) and data["registers"] < needed(a, b):
            raise RetimingError(f"no legal retiming: {a} -> {b} is left with {data['registers']} registers", (a, b))
    if accumulate != 1:
        graph = accumulate_gradients(graph, accumulate)
    return Derivation(stages, schedule, sequential, graph, input_delay, gradient_delays, lags, accumulate)


def delays(stages: int, schedule: str, accumulate: int = 1) -> list[int]:
    """The delay of every stage of a chain, in updates; at most, where gradients accumulate.

    Raises:
        ValueError: no stages, or an unknown schedule.
    """
    if stages < 1:
        raise ValueError(f"a pipeline has at least one stage, got {stages}")
    return derive(stages, [[s] for s in range(stages)], schedule, accumulate).delays


def _stage_of(graph: nx.DiGraph, stages: Sequence[Sequence[Hashable]]) -> Mapping[Node, int]:
    """The stage of every node. Input belongs to the first, loss and output to the last."""
    layers = [node.layer for node in graph if node.kind == "F"]
    grouped = [layer for stage in stages for layer in stage]
    for problem, found in (
        ("empty stages", [f"stage {i}" for i, stage in enumerate(stages) if not stage]),
        ("layers in more than one place", [a for a in dict.fromkeys(grouped) if grouped.count(a) > 1]),
        ("layers that are in no stage", [a for a in layers if a not in set(grouped)]),
        ("layers that the network has not", [a for a in grouped if a not in set(layers)]),
    ):
        if found:
            raise ValueError(f"a grouping puts every layer into one stage; {problem}: {', '.join(map(str, found))}")
    number = {layer: i for i, stage in enumerate(stages) for layer in stage}
    for a, b in graph.edges:
        if a.kind == b.kind == "F" and number[a.layer] > number[b.layer]:
            raise RetimingError(
                f"{a} -> {b} runs from stage {number[a.layer]} back to stage {number[b.layer]}: no feed-forward "
                "cutset separates these stages",
                (a, b),
            )
    return {node: 0 if node == INPUT else number.get(node.layer, len(stages) - 1) for node in graph}


def _names(layers: Sequence[Hashable]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}…{layers[-1]}"
