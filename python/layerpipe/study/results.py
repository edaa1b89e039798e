"""Results of a study, row by row, beside training without a delay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from layerpipe.study.methods import METHODS
from layerpipe.study.runner import Found, chosen
from layerpipe.study.spec import Spec
from layerpipe.study.statistics import Mean
from layerpipe.study.trial import Outcome, Row, Trial


@dataclasses.dataclass(frozen=True)
class Result:
    """A row of a table.

    Attributes:
        lr: the learning rate that was chosen, ``None`` where every one of them diverged.
        edge: whether it is the smallest or the largest of several.
        outcomes: by seed; empty where every learning rate diverged.
        beside_own: differences in quality from the undelayed row of the same optimizer, of each seed.
        beside_adamw: from that of AdamW.
    """

    row: Row
    lr: float | None
    edge: bool
    outcomes: dict[int, Outcome]
    beside_own: list[float]
    beside_adamw: list[float]

    @property
    def qualities(self) -> list[float]:
        """Of the seeds that did not diverge."""
        return [outcome.quality for outcome in self.outcomes.values() if not outcome.diverged]

    @property
    def diverged(self) -> int:
        """Number of seeds that diverged."""
        return sum(outcome.diverged for outcome in self.outcomes.values())

    @property
    def mean(self) -> Mean | None:
        return Mean.of(self.qualities) if self.qualities else None


def results(spec: Spec, found: Found) -> list[Result]:
    """Of all rows whose trials have ended."""
    made = [result for row in spec.rows if (result := _result(spec, row, found)) is not None]
    by_row = {result.row: result for result in made}
    return [
        dataclasses.replace(
            result,
            beside_own=_differences(result, by_row.get(result.row.undelayed())),
            beside_adamw=_differences(result, by_row.get(result.row.undelayed("adamw"))),
        )
        for result in made
    ]


def _result(spec: Spec, row: Row, found: Found) -> Result | None:
    rates = spec.learning_rates[row.optimizer]
    if len(rates) > 1 and any(Trial(row, lr, spec.tuning_seed, tuning=True) not in found for lr in rates):
        return None
    lr = chosen(spec, row, found)
    if lr is None:
        return Result(row, None, False, {}, [], [])
    trials = {seed: Trial(row, lr, seed) for seed in spec.seeds}
    if any(trial not in found for trial in trials.values()):
        return None
    edge = len(rates) > 1 and lr in (rates[0], rates[-1])
    return Result(row, lr, edge, {seed: found[trial] for seed, trial in trials.items()}, [], [])


def _differences(result: Result, other: Result | None) -> list[float]:
    """Within the seeds in which neither diverged; none from itself."""
    if other is None or other.row == result.row:
        return []
    pairs = [(result.outcomes[seed], other.outcomes[seed]) for seed in result.outcomes if seed in other.outcomes]
    return [a.quality - b.quality for a, b in pairs if not (a.diverged or b.diverged)]


def describe(row: Row, stages: bool = True) -> str:
    """A row's method and where they are not the usual, past weights, stages and microbatches.

    Args:
        stages: name their number, and the number of microbatches that a method derives from it.
    """
    if not row.ahead:
        return "undelayed"
    method = METHODS[row.method]
    parts = [row.method if row.method != "none" else row.past]
    if row.method != "none" and method.past is None and row.past != "stash":
        parts.append(row.past)
    parts.append(f"{row.stages} stages {row.schedule}" if stages else row.schedule)
    if row.accumulate > 1 and (stages or method.accumulate is None):
        parts.append(f"{row.accumulate} microbatches")
    if row.sync_steps:
        parts.append(f"{row.sync_steps} first ones synchronous")
    return ", ".join(parts)


def errors_by_delay(found: Sequence[Result]) -> dict[tuple[str, int, str], list[float]]:
    """By kind of past weights, whole delay, and optimizer."""
    errors: dict[tuple[str, int, str], list[float]] = {}
    for result in found:
        for outcome in result.outcomes.values():
            for n, error in zip(outcome.delays, outcome.errors, strict=True):
                if error is not None and math.isfinite(error) and n == int(n):
                    errors.setdefault((result.row.past, int(n), result.row.optimizer), []).append(error)
    return errors
