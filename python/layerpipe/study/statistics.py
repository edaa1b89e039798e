"""Means, their errors, and what differences within seeds say, in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

#: A difference is called one when chance alone would give as large a one less often than this.
LEVEL = 0.05


class Mean(NamedTuple):
    """A mean and its standard error, which one value does not have."""

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error)

    def text(self, digits: int, sign: bool = False) -> str:
        """``1.02 ± 0.03``."""
        value = f"{self.value:{'+' if sign else ''}.{digits}f}"
        return value if self.error is None else f"{value} ± {self.error:.{digits}f}"


def paired_t(differences: Sequence[float]) -> float:
    """The two-sided p-value of Student's paired t-test: how often chance gives a mean as far from 0.

    Raises:
        ValueError: fewer than two differences.
    """
    if len(differences) < 2:
        raise ValueError("a t-test takes at least two differences")
    mean = Mean.of(differences)
    if not mean.error:
        return 0.0 if mean.value else 1.0
    t, degrees = abs(mean.value / mean.error), len(differences) - 1
    return _student_tail(t, degrees)


def _student_tail(t: float, degrees: int) -> float:
    """Both tails of Student's distribution beyond ``t``, by its closed form for whole degrees of freedom."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine, term, total = math.cos(theta), 1.0, 0.0
    if degrees % 2:
        term = cosine
        for k in range(3, degrees + 1, 2):
            total += term
            term *= cosine * cosine * (k - 1) / k
        inside = 2 / math.pi * (theta + math.sin(theta) * total)
    else:
        for k in range(2, degrees + 1, 2):
            total += term
            term *= cosine * cosine * (k - 1) / k
        inside = math.sin(theta) * total
    return max(0.0, 1 - inside)


def verdict(differences: Sequence[float], *, lower_is_better: bool) -> str:
    """Return what differences within seeds say of a row beside the one that they are to."""
    if all(difference == 0 for difference in differences):
        return "the same"
    good = [difference < 0 if lower_is_better else difference > 0 for difference in differences]
    count = len(differences)
    if count < 3:
        side = "better" if all(good) else "worse" if not any(good) else "mixed"
        return f"{side}; too few seeds to test ({count})"
    p = paired_t(differences)
    mean = statistics.fmean(differences)
    side = "better" if (mean < 0) == lower_is_better else "worse"
    agree = sum(good) if side == "better" else count - sum(good)
    if p >= LEVEL:
        return f"no difference that {count} seeds can show (p = {p:.2f}, {side} in {agree})"
    return (
        f"{side} (p = {p:.3f}, in {agree} of {count} seeds)"
        if p >= 0.001
        else f"{side} (p < 0.001, {agree} of {count})"
    )
