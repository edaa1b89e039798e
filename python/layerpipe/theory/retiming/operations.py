"""Legal changes of a graph's registers. Every operation checks that it is legal and returns a new graph."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping

import networkx as nx

from layerpipe.theory.retiming.graph import Node


class RetimingError(ValueError):
    """An operation that would change what the graph computes, or that no circuit can do; ``edge`` is where."""

    def __init__(self, message: str, edge: tuple[Node, Node]) -> None:
        super().__init__(message)
        self.edge = edge


def insert_cutset(graph: nx.DiGraph, before: Collection[Node], count: int = 1) -> nx.DiGraph:
    """Put ``count`` registers on every edge of a feed-forward cutset: those that leave ``before`` for the rest.

    All ways across the cut get the same delay, so the outputs stay what they are and come ``count`` ticks later.

    Raises:
        RetimingError: an edge crosses the cut backwards; it would close a loop whose delay then changes.
        ValueError: a negative count, or unknown nodes.
    """
    before = _known(graph, before)
    if count < 0:
        raise ValueError(f"cannot insert {count} registers")
    for a, b in graph.edges:
        if a not in before and b in before:
            raise RetimingError(
                f"not a feed-forward cutset: {a} -> {b} crosses it backwards, so registers on the cut would add delay "
                "to a loop",
                (a, b),
            )
    out = graph.copy()
    for a, b, data in out.edges(data=True):
        if a in before and b not in before:
            data["registers"] += count
    return out


def delay_gradients(graph: nx.DiGraph, counts: Mapping[Hashable, int]) -> nx.DiGraph:
    """Put registers between layers' weight gradients and their updates: delayed LMS.

    The one step that changes the algorithm: a layer is then updated by the gradient of ``counts[layer]`` ticks ago, at
    the weights it had then. It converges for small enough steps (Long, Ling and Proakis, IEEE Trans. ASSP 37(9), 1989).

    Raises:
        ValueError: a negative count, or a layer that is not there.
    """
    out = graph.copy()
    for layer, count in counts.items():
        edge = Node("W", layer), Node("U", layer)
        if edge not in out.edges:
            raise ValueError(f"the graph has no layer {layer!r}")
        if count < 0:
            raise ValueError(f"cannot insert {count} registers on {edge[0]} -> {edge[1]}")
        out.edges[edge]["registers"] += count
    return out


def accumulate_gradients(graph: nx.DiGraph, count: int) -> nx.DiGraph:
    """Let every update add up the gradients of ``count`` minibatches and change the weights in the last of them only.

    No register is moved or made; a register in an update loop then holds the same weights for ``count`` minibatches.
    Like a larger minibatch this changes the algorithm. Nodes ``U`` of the result carry ``every``.

    Raises:
        ValueError: a count below 1.
    """
    if count < 1:
        raise ValueError(f"an update takes the gradients of at least 1 minibatch, got {count}")
    out = graph.copy()
    for node, data in out.nodes(data=True):
        if node.kind == "U":
            data["every"] = count
    return out


def slow_down(graph: nx.DiGraph, factor: int) -> nx.DiGraph:
    """``factor`` ticks per minibatch instead of one: every register becomes ``factor`` (a C-slow graph).

    A node then works in one tick of ``factor``, so that this many nodes can share a processor.

    Raises:
        ValueError: a factor below 1.
    """
    if factor < 1:
        raise ValueError(f"a graph can be slowed down by 1 or more, got {factor}")
    out = graph.copy()
    for _, _, data in out.edges(data=True):
        data["registers"] *= factor
    return out


def retime(graph: nx.DiGraph, lags: Mapping[Node, int]) -> nx.DiGraph:
    """Leiserson and Saxe: ``w_r(u -> v) = w(u -> v) + r(v) - r(u)``, where a node that is not in ``lags`` has 0.

    A node of lag ``r`` does its work ``r`` ticks later. No loop's delay changes, and no output as long as the lags of
    ``X`` and ``Y`` are equal.

    Raises:
        RetimingError: an edge would be left with a negative number of registers.
        ValueError: unknown nodes.
    """
    _known(graph, lags)
    out = graph.copy()
    for a, b, data in out.edges(data=True):
        data["registers"] += lags.get(b, 0) - lags.get(a, 0)
        if data["registers"] < 0:
            raise RetimingError(f"illegal retiming: {a} -> {b} would carry {data['registers']} registers", (a, b))
    return out


def retime_cutset(graph: nx.DiGraph, inside: Collection[Node], count: int = 1) -> nx.DiGraph:
    """Move registers across a cut: the edges into ``inside`` gain ``count``, those out of it lose as many.

    The same as giving all nodes inside the lag ``count``; a negative one moves them the other way.

    Raises:
        RetimingError: an edge has fewer registers than it would lose.
        ValueError: unknown nodes.
    """
    return retime(graph, dict.fromkeys(_known(graph, inside), count))


def _known(graph: nx.DiGraph, nodes: Collection[Node]) -> set[Node]:
    found = set(nodes)
    if unknown := [str(node) for node in found if node not in graph]:
        raise ValueError(f"the graph has no node {', '.join(sorted(unknown))}")
    return found
