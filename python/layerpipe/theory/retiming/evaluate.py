"""Run a graph tick by tick, to see what its registers do."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import networkx as nx

from layerpipe.theory.retiming.graph import INPUT, OUTPUT, Node
from layerpipe.theory.retiming.period import combinational_order

#: A node's value from those of its sources.
Operation = Callable[[Mapping[Node, Any]], Any]


def run(
    graph: nx.DiGraph, operations: Mapping[Node, Operation], weights: Mapping[Node, Any], inputs: Iterable[Any]
) -> list[Any]:
    """Return what ``Y`` puts out in each tick when ``X`` gets ``inputs``.

    None is a bubble: a node with a bubble among its inputs rests and hands one on; an update keeps its weights. So does
    one that accumulates gradients, until it has as many as it wants; then it is given their mean.

    Args:
        graph: with registers on its edges.
        operations: for every node but ``X``, ``U`` included.
        weights: what the registers behind each ``U`` hold at first. All others hold bubbles.
        inputs: one per tick.

    Raises:
        RetimingError: a loop without a register.
    """
    order = combinational_order(graph)
    held = {(a, b): collections.deque([weights.get(a)] * data["registers"]) for a, b, data in graph.edges(data=True)}
    waiting: dict[Node, list[Any]] = {node: [] for node in graph if node.kind == "U"}
    outputs = []
    for value in inputs:
        now: dict[Node, Any] = {}
        for node in order:
            if node == INPUT:
                now[node] = value
                continue
            sources = {a: held[a, node][0] if held[a, node] else now[a] for a in graph.predecessors(node)}
            ready = all(source is not None for source in sources.values())
            if ready and (every := graph.nodes[node].get("every", 1)) > 1:
                (gradient,) = (a for a in sources if a != node)
                waiting[node].append(sources[gradient])
                ready = len(waiting[node]) == every
                if ready:
                    sources[gradient] = sum(waiting[node]) / every
                    waiting[node] = []
            if ready:
                now[node] = operations[node](sources)
            else:
                now[node] = sources[node] if node.kind == "U" else None
        for (a, _), line in held.items():
            if line:
                line.append(now[a])
                line.popleft()
        outputs.append(now[OUTPUT])
    return outputs
