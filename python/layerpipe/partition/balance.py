"""Cutting a chain into parts whose most expensive one is as cheap as can be."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Cuts = tuple[int, ...]
_BALANCED = 1.02  # what the slowest part may take, in what they take on average


class CapError(ValueError):
    """No cut keeps to the cap; ``least`` is one that some cut keeps to."""

    def __init__(self, parts: int, cap: float, least: float) -> None:
        super().__init__(f"no cut into {parts} parts keeps every part to {cap:.4g}; {least:.4g} would do")
        self.least = least


def balance(
    costs: Sequence[float],
    parts: int,
    *,
    crossing: Sequence[float] | None = None,
    memory: Sequence[Array] | None = None,
    cap: float = np.inf,
) -> list[int]:
    """Cuts ``0 = c_0 < ... < c_parts = len(costs)``; exact, by dynamic programming over parts.

    Args:
        costs: of each layer, in any unit; not negative.
        parts: how many.
        crossing: ``[layers + 1]``, the cost of the link that a cut before each layer makes, in the same unit: no link
            may be slower than the slowest part.
        memory: of each part ``[layers + 1, layers + 1]``, bytes that it keeps with the layers ``start`` to ``end``.
        cap: bytes that no part may exceed.

    Raises:
        CapError: a cap that no cut keeps to; it says which one would do.
        ValueError: more parts than layers, or negative costs.
    """
    count = len(costs)
    if not 1 <= parts <= count:
        raise ValueError(f"cannot cut {count} layers into {parts} parts")
    if min(costs) < 0:
        raise ValueError("costs must not be negative")
    ends = np.arange(count + 1)
    links = np.zeros(count + 1) if crossing is None else np.array([0, *crossing[1:count], 0], dtype=float)
    spans = sums(np.asarray(costs, dtype=float))
    needs = memory if np.isfinite(cap) else None
    cuts = _best(spans, links, parts, ends, needs, cap)
    if cuts is None:
        assert needs is not None
        raise CapError(parts, cap, _least_cap(needs, parts, ends))
    return cuts


def sums(values: Array) -> Array:
    """``[start, end]``: sums of ``values[start:end]``, infinite where that is empty."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    return np.where(np.triu(np.ones((len(total), len(total)), dtype=bool), 1), total - total[:, None], np.inf)


def refine(
    costs: Sequence[float],
    parts: int,
    measure: Callable[[Sequence[Cuts]], Sequence[Sequence[float]]],
    *,
    begin: Sequence[int] | None = None,
    rounds: int = 4,
) -> tuple[list[int], list[float]]:
    """Cuts by what whole parts take, where that is not the sum of their layers: compiled together, say.

    Whatever a part takes more or less than its layers is shared out among them, and the parts are balanced anew. Where
    that gives cuts that have been measured and do not balance, others are tried that differ from the best in one place:
    a cut within what would have been compiled into one costs what no layer does.

    Args:
        costs: of each layer, in any unit.
        parts: how many.
        measure: what each part takes, for every one of these cuts. It gets all that were tried before, too: only times
            of one moment can be compared on a machine whose speed drifts.
        begin: the first cuts to measure, by default those of :func:`balance`.
        rounds: measurements at most.

    Returns:
        The cuts whose slowest part is fastest, of those measured, and what their parts took when all were.
    """
    current, taken = [float(cost) for cost in costs], dict[Cuts, list[float]]()

    def fastest() -> Cuts:
        return min(taken, key=lambda cuts: max(taken[cuts]))

    while len(taken) < rounds:
        cuts = tuple(balance(current, parts) if begin is None or taken else begin)
        if cuts in taken:
            best = fastest()
            if max(taken[best]) * parts <= _BALANCED * sum(taken[best]):
                break
            cuts = min((c for c in _moved(best) if c not in taken), key=lambda c: _slowest(current, c), default=cuts)
            if cuts in taken:
                break
        tried = [*taken, cuts]
        taken = {c: [float(t) for t in times] for c, times in zip(tried, measure(tried), strict=True)}
        for (a, b), time in zip(itertools.pairwise(cuts), taken[cuts], strict=True):
            layers = sum(current[a:b])
            current[a:b] = [cost * time / layers if layers else time / (b - a) for cost in current[a:b]]
    best = fastest()
    return list(best), taken[best]


def _slowest(costs: Sequence[float], cuts: Sequence[int]) -> float:
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(cuts))


def _moved(cuts: Cuts) -> Iterator[Cuts]:
    """All cuts that differ in one place."""
    for i in range(1, len(cuts) - 1):
        for at in range(cuts[i - 1] + 1, cuts[i + 1]):
            yield (*cuts[:i], at, *cuts[i + 1 :])


def _best(
    spans: Array, links: Array, parts: int, ends: Array, needs: Sequence[Array] | None, cap: float
) -> list[int] | None:
    before = np.where(ends == 0, 0.0, np.inf)  # the most expensive of p parts that end here
    chosen = []
    for p in range(parts):
        worst = np.maximum(np.maximum(before, links)[:, None], spans)  # [start, end] of part p
        if needs is not None:
            worst = np.where(needs[p] <= cap, worst, np.inf)
        chosen.append(worst.argmin(axis=0))
        before = worst[chosen[-1], ends]
    if not np.isfinite(before[-1]):
        return None
    cuts = [len(ends) - 1]
    for starts in reversed(chosen):
        cuts.append(int(starts[cuts[-1]]))
    return cuts[::-1]


def _least_cap(needs: Sequence[Array], parts: int, ends: Array) -> float:
    before = np.where(ends == 0, 0.0, np.inf)
    for p in range(parts):
        before = np.maximum(before[:, None], needs[p]).min(axis=0)
    return float(before[-1])
