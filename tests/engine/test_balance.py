from __future__ import annotations

import itertools

import numpy as np
import pytest

from layerpipe.balance import CapError, balance


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
