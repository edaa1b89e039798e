"""The graph of sequential training: what is computed from what, and where a register holds a value for a tick.

For a chain of two layers, ``[1]`` a register::

    X ──> F0 ──────> F1 ──> L ──> Y         U0 ──[1]──> U0, F0, B0
                            │               U1 ──[1]──> U1, F1, B1
          B0 <────── B1 <───┤
                 └──> W0    └──> W1         W0 ──> U0,  W1 ──> U1

``F`` is a layer's forward, ``B`` its activation gradient, ``W`` its weight gradient, ``U`` its update; ``X`` the input
and target, ``L`` the loss, ``Y`` where it leaves. ``F``, ``B`` and ``W`` are
the letters of the zero-bubble papers (arXiv 2401.10241). ``B`` and ``W`` also read what the forward saved (not drawn).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

import networkx as nx


class Node(NamedTuple):
    kind: str  # X, F, L, B, W, U, Y
    layer: Hashable = None  # X, L and Y belong to none

    def __str__(self) -> str:
        if self.layer is None:
            return self.kind
        return f"{self.kind}{self.layer}" if isinstance(self.layer, int) else f"{self.kind}({self.layer})"


INPUT, LOSS, OUTPUT = Node("X"), Node("L"), Node("Y")


def chain(layers: int | Iterable[Hashable]) -> nx.DiGraph:
    """A network whose layers follow one another, numbered or named.

    Raises:
        ValueError: no layers.
    """
    names = list(range(layers)) if isinstance(layers, int) else list(layers)
    if not names:
        raise ValueError(f"a network has at least one layer, got {layers}")
    graph = nx.DiGraph()
    graph.add_nodes_from(names)
    nx.add_path(graph, names)
    return graph


def training_graph(layers: nx.DiGraph | int) -> nx.DiGraph:
    """Sequential training of a network.

    Args:
        layers: a directed acyclic graph of layers, or how many a chain has. A layer's attributes ``forward``,
            ``backward`` (activation gradient), ``gradient`` (of the weights) and ``update`` are times in any one unit;
            by default 1, 1, 1 and 0.

    Returns:
        A graph of :class:`Node`; nodes carry ``time``, edges ``registers``.

    Raises:
        ValueError: no layers, or layers in a circle.
    """
    if isinstance(layers, int):
        layers = chain(layers)
    if not layers:
        raise ValueError("a network has at least one layer, got none")
    if not nx.is_directed_acyclic_graph(layers):
        circle = " -> ".join(str(a) for a, _ in nx.find_cycle(layers))
        raise ValueError(f"the layers form a circle: {circle}; unroll it, or make it one layer")
    graph = nx.DiGraph()
    graph.add_nodes_from((INPUT, LOSS, OUTPUT), time=0.0)
    for layer, data in layers.nodes(data=True):
        for kind, name, default in (
            ("F", "forward", 1),
            ("B", "backward", 1),
            ("W", "gradient", 1),
            ("U", "update", 0),
        ):
            graph.add_node(Node(kind, layer), time=float(data.get(name, default)))

    def edge(a: Node, b: Node, registers: int = 0) -> None:
        graph.add_edge(a, b, registers=registers)

    edge(INPUT, LOSS)  # the target
    edge(LOSS, OUTPUT)
    for layer in layers:
        forward, backward, gradient, update = (Node(kind, layer) for kind in "FBWU")
        sources = [Node("F", a) for a in layers.predecessors(layer)] or [INPUT]
        above = [Node("B", b) for b in layers.successors(layer)] or [LOSS]
        for source in sources:
            edge(source, forward)
            edge(source, gradient)  # the saved input
        if not list(layers.successors(layer)):
            edge(forward, LOSS)
        edge(forward, backward)  # the saved output
        edge(forward, gradient)
        for node in above:
            edge(node, backward)
            edge(node, gradient)
        edge(gradient, update)
        for reader in (update, forward, backward):
            edge(update, reader, 1)
    return graph


def registers(graph: nx.DiGraph, a: Node, b: Node) -> int:
    """Return the number of registers of an edge."""
    return int(graph.edges[a, b]["registers"])


def latency(graph: nx.DiGraph) -> int:
    """Ticks between a minibatch's entry and its loss: the registers on any way from input to output."""
    return int(nx.shortest_path_length(graph, INPUT, OUTPUT, weight="registers"))
