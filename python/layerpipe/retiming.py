"""Where the delays come from: the training graph of a chain of stages, and its retiming into a pipeline.

The nodes of stage ``s`` are its forward ``F``, its activation gradient ``B``, its weight gradient ``G`` and its update
``W``; a register on an edge is one minibatch of delay. The derivation is LayerPipe2's (arXiv 2512.08160):

1. sequential training has one register, on each update loop and on the weights it hands out;
2. registers at the network's input are pure latency, allowed;
3. registers from a weight gradient to its update are delayed LMS, the one step that changes the algorithm;
4. retiming (Leiserson and Saxe) moves registers through nodes, ``w_r(u -> v) = w(u -> v) + r(v) - r(u) >= 0``, until
   every stage boundary carries one in each direction.

Step 3 inserts no more registers than step 4 turns out to need: that number is solved for, not written down.
"""

from __future__ import annotations

from typing import NamedTuple

import networkx as nx


class Node(NamedTuple):
    kind: str  # F, B, G, W
    stage: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}"


class Derivation(NamedTuple):
    """The retimed graph and what it took."""

    graph: nx.DiGraph  # edges with "registers"
    inserted: list[int]  # delayed-LMS registers, per stage
    delays: list[int]  # n, per stage: how much older the weights in the backward are than those of the forward


def training_graph(stages: int) -> nx.DiGraph:
    """Sequential training of a chain. Edges carry ``registers`` and ``boundary``, whether they join two stages.

    Raises:
        ValueError: no stages.
    """
    if stages < 1:
        raise ValueError(f"a pipeline has at least one stage, got {stages}")
    graph = nx.DiGraph()

    def edge(a: Node, b: Node, registers: int = 0) -> None:
        graph.add_edge(a, b, registers=registers, boundary=a.stage != b.stage)

    last = stages - 1
    for s in range(stages):
        forward, backward, gradient, update = (Node(kind, s) for kind in "FBGW")
        edge(update, forward, 1)
        edge(update, backward, 1)
        edge(update, update, 1)
        edge(gradient, update)
        edge(backward, gradient)  # a stage's weight gradient runs with its activation gradient, in the same tick
        if s < last:
            edge(forward, Node("F", s + 1))
            edge(Node("B", s + 1), backward)
    edge(Node("F", last), Node("B", last))
    return graph


def pipeline(graph: nx.DiGraph) -> Derivation:
    """Insert delayed-LMS registers and retime, so that every stage boundary carries at least one register.

    Lags solve the difference constraints ``r(v) - r(u) >= needed - w(u -> v)`` by longest paths; an update may then
    start as early as its successors allow, and what its gradient edge still lacks is inserted there.
    """
    stages = 1 + max(node.stage for node in graph)
    compute = nx.DiGraph()
    for a, b, data in graph.edges(data=True):
        if "W" not in (a.kind, b.kind):
            compute.add_edge(a, b, weight=data["registers"] - int(data["boundary"]))
    compute.add_nodes_from(node for node in graph if node.kind != "W")
    lag: dict[Node, int] = {}
    for node in nx.topological_sort(compute):  # longest paths from the input
        arrivals = [lag[a] - data["weight"] for a, _, data in compute.in_edges(node, data=True)]
        lag[node] = max(arrivals, default=0)

    inserted = []
    for s in range(stages):
        update = Node("W", s)
        readers = [b for b in graph.successors(update) if b != update]
        lag[update] = min(lag[b] + graph.edges[update, b]["registers"] - 1 for b in readers)
        gradient = Node("G", s)
        inserted.append(max(0, lag[gradient] - lag[update] - graph.edges[gradient, update]["registers"]))

    retimed = graph.copy()
    for a, b, data in retimed.edges(data=True):
        extra = inserted[b.stage] if (a.kind, b.kind) == ("G", "W") else 0
        data["registers"] += extra + lag[b] - lag[a]
        if data["registers"] < int(data["boundary"]):
            raise ValueError(f"no legal retiming: {a} -> {b} is left with {data['registers']} registers")
    delays = [
        retimed.edges[Node("W", s), Node("B", s)]["registers"] - retimed.edges[Node("W", s), Node("F", s)]["registers"]
        for s in range(stages)
    ]
    return Derivation(retimed, inserted, delays)


def lockstep_delays(stages: int) -> list[int]:
    """The delay of every stage when each boundary holds one register in each direction: ``[2 (P-1), ..., 2, 0]``."""
    return pipeline(training_graph(stages)).delays
