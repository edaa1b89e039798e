"""The tables of a study, as text; and how they are written."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
from collections.abc import Sequence
from pathlib import Path

from layerpipe.study.methods import METHODS
from layerpipe.study.results import Result, describe, errors_by_delay
from layerpipe.study.stability import largest_stable_step
from layerpipe.study.statistics import Mean, verdict
from layerpipe.study.tasks import LOSS, cut, measure_of, task
from layerpipe.study.theory import theory
from layerpipe.study.training import SCHEDULES
from layerpipe.study.trial import Row
from layerpipe.theory.planning.memory import history_copies

#: Of the map of stable steps.
DELAYS = (0, 1, 3, 7, 14)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a title, with a line below."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def markdown(self) -> str:
        """As GitHub shows it, without the title."""
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return text + (f"\n\n{self.note}" if self.note else "")

    def csv(self) -> str:
        file = io.StringIO()
        csv.writer(file, lineterminator="\n").writerows([self.columns, *self.rows])
        return file.getvalue()

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in self.rows
        )
        return (
            f'<div class="table"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'
            f'<p class="note">{html.escape(self.note)}</p>\n'
        )


def quality_table(model: str, found: Sequence[Result]) -> Table:
    """Of one network: quality beside training without a delay, and what the difference says."""
    loss = measure_of(model) is LOSS
    digits = 3 if loss else 2
    rows = []
    for result in found:
        row, mean = result.row, result.mean
        quality = mean.text(digits) if mean else "diverged"
        if mean and result.diverged:
            quality += f", {result.diverged} diverged"
        rows.append(
            (
                row.optimizer, describe(row), "0" if not row.delay else f"{row.delay:g} … 0",
                "–" if result.lr is None else f"{result.lr:g}{'*' if result.edge else ''}", quality,
                _beside(result.beside_own, digits), _beside(result.beside_adamw, digits),
                "" if not result.beside_own else verdict(result.beside_own, lower_is_better=loss),
            )
        )  # fmt: skip
    unit = "test loss, nats per byte" if loss else "test accuracy, %"
    columns = ("optimizer", "method", "delays", "lr", unit, "beside undelayed", "beside undelayed AdamW", "verdict")
    first, seeds = found[0].row, max(len(result.outcomes) for result in found)
    note = (
        f"{model} of width {first.width} on {first.data}, {first.steps} minibatches of {first.batch_size}. "
        f"Means ± standard errors of {seeds} seeds; differences within a seed; p of a paired t-test, not corrected for "
        "the number of rows. * the edge of the learning rates that were tried."
    )
    return Table(f"{model}, {first.data}", columns, rows, note)


def _beside(differences: Sequence[float], digits: int) -> str:
    return Mean.of(differences).text(digits, sign=True) if differences else "–"


def error_table(found: Sequence[Result]) -> Table:
    """The mean square error of past weights by delay, relative to the latest weights, beside what theory says."""
    rows = []
    for (kind, n, optimizer), errors in sorted(errors_by_delay(found).items()):
        measured, expected = Mean.of(errors).value, theory(kind, n)
        rows.append((kind, optimizer, f"{n}", f"{measured:.4f}", f"{expected:.4f}"))
    note = (
        "Measured: over all stages and seeds of that delay, after the warm-up. Theory: updates correlate as .9 to the "
        "power of their distance; nothing is predicted."
    )
    return Table("Error of past weights", ("past", "optimizer", "n", "measured", "theory"), rows, note)


def methods_table(found: Sequence[Result]) -> Table:
    """The methods of a study, with formula and source."""
    names = [name for name in METHODS if any(result.row.method == name for result in found)]
    rows = [(name, METHODS[name].title, METHODS[name].formula, METHODS[name].source) for name in names]
    return Table("Methods", ("name", "method", "formula", "source"), rows)


def stability_table() -> Table:
    """The largest stable product of learning rate and curvature on a quadratic, by delay."""
    knobs = [
        ("average, β = .9", 0.9, 0.0, 0.0),
        ("spike compensation, β = .9", 0.9, 1.0, 0.0),
        ("and half a prediction, β = .9", 0.9, 1.0, 0.5),
        ("and half a prediction, β = .99", 0.99, 1.0, 0.5),
        ("and a whole prediction, β = .99", 0.99, 1.0, 1.0),
    ]
    rows = [(name, *(f"{largest_stable_step(n, *knob):.2f}" for n in DELAYS)) for name, *knob in knobs]
    return Table(
        "Largest stable learning rate times curvature, quadratic",
        ("directions", *(f"n = {n}" for n in DELAYS)),
        rows,
        "By the roots of the recurrence: python -m bench.stable_steps.",
    )


def survival_table(found: Sequence[Result], tuned: Sequence[tuple[Row, float, bool]]) -> Table:
    """The largest learning rate of those tried that did not diverge, by row.

    Args:
        tuned: rows, learning rates that were tried, and whether training diverged.
    """
    rows = []
    for result in found:
        tried = [(lr, diverged) for row, lr, diverged in tuned if row == result.row]
        stable = [lr for lr, diverged in tried if not diverged]
        if tried:
            largest = f"{max(stable):g}" if stable else "none"
            most = f"{max(lr for lr, _ in tried):g}"
            rows.append(
                (result.row.model, result.row.optimizer, describe(result.row), f"{result.row.delay:g}", largest, most)
            )
    columns = ("network", "optimizer", "method", "largest n", "largest that did not diverge", "largest tried")
    return Table("Learning rates that did not diverge", columns, rows)


def memory_table(
    found: Sequence[Result], root: Path, kinds: Sequence[str] = ("stash", "ema", "blend", "blend:order=3", "latest")
) -> Table:
    """Table of what the past weights of one network take, by kind and by the stages of the study, in copies of its
    weights.

    Counts every stage's weights as often as its history keeps them; activations, optimizer states and the scratch
    memory for one past weight come on top, and are the same for all kinds but the last.
    """
    first = found[0].row
    made = task(first.model, first.data, first.width, first.batch_size, 1, 0, root).model
    sizes = {name: param.numel() * param.element_size() for name, param in made.named_parameters()}
    rows = []
    for stages, schedule in sorted({(r.row.stages, r.row.schedule) for r in found if r.row.ahead}):
        stage_of = cut(first.model, first.data, first.width, stages, root)
        delays = [SCHEDULES[schedule] * (stages - 1 - s) for s in range(stages)]
        copies = []
        for kind in kinds:
            kept = [history_copies(kind, n) for n in delays]
            copies.append(sum(kept[stage_of[param]] * size for param, size in sizes.items()) / sum(sizes.values()))
        rows.append((f"{stages}", schedule, f"{delays[0]}", *(f"{each:.2f}" for each in copies)))
    return Table(
        f"Memory for past weights: {first.model} of width {first.width}",
        ("stages", "schedule", "largest n", *kinds),
        rows,
        f"Copies of all weights ({sum(sizes.values()) / 1e6:.2f} MB) that are kept, without activations.",
    )
