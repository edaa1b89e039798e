from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from layerpipe.partition.balance import CapError, balance, refine


def every_cut(count: int, parts: int) -> list[list[int]]:
    return [[0, *inner, count] for inner in itertools.combinations(range(1, count), parts - 1)]


def worst(costs: np.ndarray, cuts: list[int]) -> float:
    return max(float(costs[a:b].sum()) for a, b in itertools.pairwise(cuts))


def test_the_cut_is_the_best_of_all() -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        count = int(random.integers(1, 9))
        costs = random.random(count)
        for parts in range(1, count + 1):
            cuts = balance(costs.tolist(), parts)
            assert cuts in every_cut(count, parts)
            assert worst(costs, cuts) == pytest.approx(min(worst(costs, c) for c in every_cut(count, parts)))


def test_the_cut_is_the_best_of_those_that_keep_to_the_cap() -> None:
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(60):
        count, parts = 7, int(random.integers(2, 5))
        costs, memory = random.random(count), random.random((parts, count))
        received, cap = random.random((parts, count + 1)) / 4, 1.3

        def need(cuts: list[int], memory: np.ndarray = memory, received: np.ndarray = received) -> float:
            spans = enumerate(itertools.pairwise(cuts))
            return max(float(memory[p, a:b].sum() + received[p, a]) for p, (a, b) in spans)

        legal = [cuts for cuts in every_cut(count, parts) if need(cuts) <= cap]
        if legal:
            cuts = balance(costs.tolist(), parts, memory=memory, received=received, cap=cap)
            assert cuts in legal
            assert worst(costs, cuts) == pytest.approx(min(worst(costs, c) for c in legal))
        else:
            refused += 1
            with pytest.raises(CapError, match="would do") as error:
                balance(costs.tolist(), parts, memory=memory, received=received, cap=cap)
            assert error.value.least == pytest.approx(min(need(c) for c in every_cut(count, parts)))
    assert 5 < refused < 55


def test_a_slow_link_is_not_cut_at() -> None:
    assert balance([1, 1, 1, 1], 2) == [0, 2, 4]
    assert balance([1, 1, 1, 1], 2, crossing=[0, 0, 9, 0, 0]) == [0, 1, 4]


def test_a_thousand_layers_into_64_parts() -> None:
    """A cut of random costs is hardly worse than the mean, and never better."""
    costs = np.random.default_rng(2).random(1000)
    memory = np.outer(np.arange(65, 1, -1), costs)
    for options in ({}, {"memory": memory, "cap": 800.0}):
        cuts = balance(costs.tolist(), 64, **options)
        assert len(cuts) == 65
        assert costs.sum() / 64 <= worst(costs, cuts) < 1.1 * costs.sum() / 64


@pytest.mark.parametrize(("costs", "parts"), [([1.0], 2), ([1.0, 2.0], 0), ([1.0, -1.0], 1)])
def test_bad_arguments(costs: list[float], parts: int) -> None:
    with pytest.raises(ValueError):
        balance(costs, parts)


def fused(costs: np.ndarray, cuts: Sequence[int], discount: float) -> list[float]:
    """Parts whose layers are cheaper together than alone, those behind the middle more so."""
    half = len(costs) // 2
    return [float(costs[a:b][np.arange(a, b) < half].sum() + discount * costs[a:b][np.arange(a, b) >= half].sum())
            for a, b in itertools.pairwise(cuts)]  # fmt: skip


def test_refined_cuts_are_the_best_of_those_measured_and_mostly_of_all() -> None:
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(60):
        costs, parts, discount = random.random(10) + 0.1, int(random.integers(2, 4)), random.random()
        measured: list[tuple[list[int], list[float]]] = []

        def measure(cuts: Sequence[int], costs: Any = costs, discount: float = discount, seen: Any = measured) -> Any:
            seen.append((list(cuts), fused(costs, cuts, discount)))
            return seen[-1][1]

        cuts, taken = refine(costs.tolist(), parts, measure)
        assert 1 <= len(measured) <= 4
        assert len({tuple(c) for c, _ in measured}) == len(measured)  # nothing is measured twice
        assert (cuts, taken) in measured
        assert max(taken) == min(max(t) for _, t in measured)
        best = min(max(fused(costs, c, discount)) for c in every_cut(10, parts))
        hits += max(taken) < 1.02 * best
        assert max(taken) <= max(fused(costs, balance(costs.tolist(), parts), discount))
    assert hits > 45


def test_layers_that_seemed_to_cost_nothing_are_balanced_too() -> None:
    costs = [0.0] * 4
    cuts, taken = refine(costs, 2, lambda cuts: [3.0 * (b - a) for a, b in itertools.pairwise(cuts)])
    assert (cuts, taken) == ([0, 2, 4], [6.0, 6.0])


def test_refining_measures_no_more_often_than_it_may() -> None:
    measured: list[Sequence[int]] = []

    def measure(cuts: Sequence[int]) -> list[float]:
        measured.append(cuts)
        return fused(np.ones(12), cuts, 0.2)

    for rounds in (1, 2):
        measured.clear()
        refine([1.0] * 12, 3, measure, rounds=rounds)
        assert len(measured) == rounds


def test_a_cut_that_no_sum_of_layers_predicts_is_found_beside_the_best() -> None:
    """As where a residual block is compiled into one: cuts within it cost both parts, those around it nothing."""
    costs, block = [2.0] * 13, range(6, 8)

    def measure(cuts: Sequence[int]) -> list[float]:
        return [sum(costs[a:b]) + 9.0 * (cuts[1] in block) for a, b in itertools.pairwise(cuts)]

    _, taken = refine(costs, 2, measure)
    assert max(taken) == min(max(measure(c)) for c in every_cut(13, 2)) == 16.0


def test_balanced_parts_are_measured_once() -> None:
    measured: list[Sequence[int]] = []

    def measure(cuts: Sequence[int]) -> list[float]:
        measured.append(cuts)
        return [2.01 * (b - a) for a, b in itertools.pairwise(cuts)]

    refine([2.0] * 12, 2, measure)
    assert measured == [(0, 6, 12)]
