from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from layerpipe.partition.balance import CapError, balance, refine, sums


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
        costs, cap = random.random(count), 1.3
        memory = [sums(random.random(count)) + random.random((count + 1, 1)) / 4 for _ in range(parts)]

        def need(cuts: list[int], memory: Sequence[np.ndarray] = memory) -> float:
            return max(float(memory[p][a, b]) for p, (a, b) in enumerate(itertools.pairwise(cuts)))

        legal = [cuts for cuts in every_cut(count, parts) if need(cuts) <= cap]
        if legal:
            cuts = balance(costs.tolist(), parts, memory=memory, cap=cap)
            assert cuts in legal
            assert worst(costs, cuts) == pytest.approx(min(worst(costs, c) for c in legal))
        else:
            refused += 1
            with pytest.raises(CapError, match="would do") as error:
                balance(costs.tolist(), parts, memory=memory, cap=cap)
            assert error.value.least == pytest.approx(min(need(c) for c in every_cut(count, parts)))
    assert 5 < refused < 55


def test_a_slow_link_is_not_cut_at() -> None:
    assert balance([1, 1, 1, 1], 2) == [0, 2, 4]
    assert balance([1, 1, 1, 1], 2, crossing=[0, 0, 9, 0, 0]) == [0, 1, 4]


def test_a_thousand_layers_into_64_parts() -> None:
    """A cut of random costs is hardly worse than the mean, and never better."""
    costs = np.random.default_rng(2).random(1000)
    memory = [factor * sums(costs) for factor in range(65, 1, -1)]
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


class Bench:
    """Measures all the cuts it is given, on a machine that is slower every time."""

    def __init__(self, taken: Callable[[Sequence[int]], Sequence[float]], slowdown: float = 1.0) -> None:
        self.taken, self.slowdown = taken, slowdown
        self.runs: list[list[tuple[int, ...]]] = []

    def __call__(self, tried: Sequence[tuple[int, ...]]) -> list[list[float]]:
        speed = self.slowdown ** len(self.runs)
        self.runs.append(list(tried))
        return [[speed * t for t in self.taken(cuts)] for cuts in tried]


@pytest.mark.parametrize("slowdown", [1.0, 1.5, 0.6])
def test_refined_cuts_are_the_best_of_those_measured_and_mostly_of_all(slowdown: float) -> None:
    """Whether the machine becomes slower or faster meanwhile."""
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(60):
        costs, parts, discount = random.random(10) + 0.1, int(random.integers(2, 4)), random.random()
        taken_by = functools.partial(fused, costs, discount=discount)
        bench = Bench(taken_by, slowdown)
        cuts, taken = refine(costs.tolist(), parts, bench)
        tried = bench.runs[-1]
        assert bench.runs == [tried[: i + 1] for i in range(len(tried))]  # one more every time, beside all before
        assert 1 <= len(set(tried)) == len(tried) <= 4
        assert tuple(cuts) in tried
        assert taken == pytest.approx([slowdown ** (len(tried) - 1) * t for t in taken_by(cuts)])
        assert max(taken_by(cuts)) == min(max(taken_by(c)) for c in tried)
        best = min(max(taken_by(c)) for c in every_cut(10, parts))
        hits += max(taken_by(cuts)) < 1.02 * best
        assert max(taken_by(cuts)) <= max(taken_by(balance(costs.tolist(), parts)))
    assert hits > 45


def test_layers_that_seemed_to_cost_nothing_are_balanced_too() -> None:
    costs = [0.0] * 4
    cuts, taken = refine(costs, 2, Bench(lambda cuts: [3.0 * (b - a) for a, b in itertools.pairwise(cuts)]))
    assert (cuts, taken) == ([0, 2, 4], [6.0, 6.0])


@pytest.mark.parametrize("rounds", [1, 2])
def test_refining_measures_no_more_often_than_it_may(rounds: int) -> None:
    bench = Bench(lambda cuts: fused(np.ones(12), cuts, 0.2))
    refine([1.0] * 12, 3, bench, rounds=rounds)
    assert len(bench.runs) == rounds


def test_a_cut_that_no_sum_of_layers_predicts_is_found_beside_the_best() -> None:
    """As where a residual block is compiled into one: cuts within it cost both parts, those around it nothing."""
    costs, block = [2.0] * 13, range(6, 8)

    def taken_by(cuts: Sequence[int]) -> list[float]:
        return [sum(costs[a:b]) + 9.0 * (cuts[1] in block) for a, b in itertools.pairwise(cuts)]

    _, taken = refine(costs, 2, Bench(taken_by))
    assert max(taken) == min(max(taken_by(c)) for c in every_cut(13, 2)) == 16.0


def test_balanced_parts_are_measured_once() -> None:
    bench = Bench(lambda cuts: [2.01 * (b - a) for a, b in itertools.pairwise(cuts)])
    refine([2.0] * 12, 2, bench)
    assert bench.runs == [[(0, 6, 12)]]
