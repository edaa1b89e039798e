"""Means, their errors, and words for differences."""

from __future__ import annotations

import math

import pytest

from layerpipe.study.statistics import Mean, paired_t, verdict


def test_the_standard_error_is_the_deviation_over_the_root_of_the_count() -> None:
    assert Mean.of([1.0, 2.0, 3.0, 6.0]).text(2) == f"3.00 ± {math.sqrt(14 / 3) / 2:.2f}"
    assert Mean.of([1.0]).text(1, sign=True) == "+1.0"


@pytest.mark.parametrize("count", [2, 3, 4, 7, 12])
def test_the_t_test_is_scipys(count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    differences = [0.3 + math.sin(5 * i) for i in range(count)]
    assert paired_t(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=1e-9)


def test_a_difference_without_a_spread_is_certain_and_none_is_none() -> None:
    assert paired_t([0.5, 0.5, 0.5]) == 0.0
    assert paired_t([0.0, 0.0]) == 1.0


@pytest.mark.parametrize(
    ("differences", "lower", "words"),
    [
        ([0.0, 0.0, 0.0], True, "the same"),
        ([-0.1, -0.2], True, "better; too few seeds to test (2)"),
        ([-0.1, 0.2], True, "mixed; too few seeds to test (2)"),
        ([0.3], True, "worse; too few seeds to test (1)"),
        ([0.10, 0.11, 0.12], True, "worse (p = 0.003, in 3 of 3 seeds)"),
        ([0.10, 0.11, 0.12], False, "better (p = 0.003, in 3 of 3 seeds)"),
        ([-1.0, 0.5, 2.0], False, "no difference that 3 seeds can show (p = 0.62, better in 2)"),
    ],
)
def test_differences_in_words(differences: list[float], lower: bool, words: str) -> None:
    assert verdict(differences, lower_is_better=lower) == words
