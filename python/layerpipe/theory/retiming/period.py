"""The clock period of a graph, as it is and after the best retiming (Leiserson and Saxe, Algorithmica 6, 1991)."""

from __future__ import annotations

from typing import Any

import networkx as nx
import numpy as np

from layerpipe.theory.retiming.graph import INPUT, OUTPUT, Node
from layerpipe.theory.retiming.operations import RetimingError

Array = np.ndarray[Any, Any]


def clock_period(graph: nx.DiGraph) -> float:
    """The longest way without a register, in the unit of the nodes' ``time``.

    Raises:
        RetimingError: a loop without a register, which nothing can compute.
    """
    ready: dict[Node, float] = {}
    for node in combinational_order(graph):
        inputs = [a for a, _, data in graph.in_edges(node, data=True) if data["registers"] == 0]
        ready[node] = graph.nodes[node]["time"] + max((ready[a] for a in inputs), default=0.0)
    return max(ready.values())


def combinational_order(graph: nx.DiGraph) -> list[Node]:
    """The nodes in an order in which one tick can compute them.

    Raises:
        RetimingError: a loop without a register.
    """
    wires = nx.DiGraph()
    wires.add_nodes_from(graph)
    wires.add_edges_from((a, b) for a, b, data in graph.edges(data=True) if data["registers"] == 0)
    try:
        return list(nx.topological_sort(wires))
    except nx.NetworkXUnfeasible:
        loop = nx.find_cycle(wires)
        way = " -> ".join(str(a) for a, _ in loop)
        raise RetimingError(f"a loop without a register: {way} -> {loop[0][0]}", loop[0][:2]) from None


def minimum_period(graph: nx.DiGraph, *, keep_latency: bool = True) -> tuple[float, dict[Node, int]]:
    """The smallest clock period that retiming alone can reach, and the lags that reach it.

    Args:
        graph: nodes with ``time``, edges with ``registers``.
        keep_latency: whether ``X`` and ``Y`` must stay in step; otherwise registers may be added at the input.

    Raises:
        RetimingError: a loop without a register.
    """
    combinational_order(graph)
    nodes = list(graph)
    registers, times = _paths(graph, nodes)
    index = {node: i for i, node in enumerate(nodes)}
    # bound[u, v] is the most that r(u) - r(v) may be.
    bound = np.full((len(nodes), len(nodes)), np.inf)
    np.fill_diagonal(bound, 0)
    for a, b, data in graph.edges(data=True):
        bound[index[a], index[b]] = data["registers"]
    if keep_latency and INPUT in index and OUTPUT in index:
        x, y = index[INPUT], index[OUTPUT]
        bound[x, y] = min(bound[x, y], 0)
        bound[y, x] = 0
    candidates = np.unique(times[np.isfinite(registers)])
    candidates = candidates[candidates >= max(graph.nodes[n]["time"] for n in nodes)]
    best, found = -1, None
    low, high = 0, len(candidates) - 1
    while low <= high:
        middle = (low + high) // 2
        lags = _solve(np.where(times > candidates[middle], np.minimum(bound, registers - 1), bound))
        if lags is None:
            low = middle + 1
        else:
            best, found, high = middle, lags, middle - 1
    assert found is not None  # as it is, the graph has some period
    return float(candidates[best]), {node: int(found[i]) for node, i in index.items()}


def _paths(graph: nx.DiGraph, nodes: list[Node]) -> tuple[Array, Array]:
    """Leiserson and Saxe's W and D: between any two nodes the fewest registers, and the longest time with so many."""
    count = len(nodes)
    time = np.array([graph.nodes[node]["time"] for node in nodes])
    registers, times = np.full((count, count), np.inf), np.full((count, count), -np.inf)
    np.fill_diagonal(registers, 0)
    np.fill_diagonal(times, time)
    index = {node: i for i, node in enumerate(nodes)}
    for a, b, data in graph.edges(data=True):
        i, j = index[a], index[b]
        if i != j:
            registers[i, j], times[i, j] = data["registers"], time[i] + time[j]
    for k in range(count):
        w = registers[:, k, None] + registers[None, k]
        d = times[:, k, None] + times[None, k] - time[k]
        better = (w < registers) | ((w == registers) & (d > times))
        registers[better], times[better] = w[better], d[better]
    return registers, times


def _solve(bound: Array) -> Array | None:
    """Integers with ``r[u] - r[v] <= bound[u, v]`` (Bellman and Ford), or None where there are none."""
    r = np.zeros(len(bound))
    for _ in range(len(bound)):
        relaxed = np.minimum(r, (bound + r).min(axis=1))
        if np.array_equal(relaxed, r):
            return r
        r = relaxed
    return None
