"""The figures of a study, as SVG to be put into a page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from layerpipe.drawing import new_figure
from layerpipe.study.results import Result, describe, errors_by_delay
from layerpipe.study.statistics import Mean
from layerpipe.study.tasks import measure_of
from layerpipe.study.theory import theory
from layerpipe.study.trial import Row

_STYLES = ("-", "--", ":", "-.")


def _figure(lines: int) -> tuple[Any, Any]:
    """With room for a legend of so many lines below; with matplotlib's letters, it can be read on a phone."""
    figure, axes = new_figure(figsize=(5.6, 3.8 + 0.24 * lines))
    axes.set_prop_cycle(color=_colours())
    axes.grid(alpha=0.3, which="both")
    return figure, axes


def _colours() -> list[Any]:
    from matplotlib import colormaps

    tab20 = [colormaps["tab20"](i) for i in range(20)]
    return tab20[::2] + tab20[1::2]


def svg(figure: Any) -> str:
    """The figure as an ``<svg>`` that is as wide as its place, and the same bytes every time."""
    import matplotlib
    from matplotlib import pyplot as plt

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "layerpipe", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    text = file.getvalue()
    return text[text.index("<svg") :]


def curves(found: Sequence[Result]) -> str:
    """Training loss of every row of one network, the mean over seeds: a colour per method, a dash per depth."""
    drawn = [result for result in found if result.mean is not None]
    names = list(dict.fromkeys(_name(result.row) for result in drawn))
    depths = sorted({result.row.stages for result in drawn})
    figure, axes = _figure(len(drawn))
    for result in drawn:
        outcomes = [outcome for outcome in result.outcomes.values() if not outcome.diverged]
        losses = [sum(values) / len(values) for values in zip(*(o.curve for o in outcomes), strict=False)]
        steps = [outcomes[0].every * (i + 1) for i in range(len(losses))]
        axes.plot(
            steps, losses, _STYLES[depths.index(result.row.stages) % len(_STYLES)], linewidth=1.5,
            color=_colours()[names.index(_name(result.row)) % 20],
            label=f"{result.row.optimizer}, {describe(result.row)}",
        )  # fmt: skip
    axes.set(xlabel="minibatches", ylabel="training loss", yscale="log")
    _legend(figure)
    return svg(figure)


def by_stages(model: str, found: Sequence[Result]) -> str | None:
    """Final quality against the number of stages, a line per method; nothing where there is one number only."""
    lines: dict[str, dict[int, Mean]] = {}
    for result in found:
        if result.mean is not None and result.row.delay:
            lines.setdefault(_name(result.row), {})[result.row.stages] = result.mean
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure, axes = _figure(len(lines))
    for name, points in lines.items():
        stages = sorted(points)
        errors = [points[s].error or 0.0 for s in stages]
        axes.errorbar(stages, [points[s].value for s in stages], errors, marker="o", capsize=3, label=name)
    for result in found:
        if result.mean is not None and not result.row.delay:
            axes.axhline(result.mean.value, color="grey", linestyle="--", linewidth=1)
            axes.annotate(f"{result.row.optimizer} undelayed", (0.01, result.mean.value), color="grey", fontsize=8,
                          xycoords=("axes fraction", "data"), va="bottom")  # fmt: skip
    axes.set(xlabel="stages", ylabel=measure_of(model).unit, xscale="log")
    ticks = sorted({s for points in lines.values() for s in points})
    axes.set_xticks(ticks, [str(s) for s in ticks])
    axes.minorticks_off()
    _legend(figure)
    return svg(figure)


def rates(tuned: Sequence[tuple[Row, float, float]], model: str) -> str | None:
    """Validation against the learning rate, a line per row; nothing where none were tried.

    Args:
        tuned: rows of one network, learning rates and validations.
    """
    lines: dict[Row, list[tuple[float, float]]] = {}
    for row, lr, validation in tuned:
        lines.setdefault(row, []).append((lr, validation))
    if not lines:
        return None
    figure, axes = _figure(len(lines))
    for row, points in lines.items():
        points = [(lr, validation) for lr, validation in sorted(points) if math.isfinite(validation)]
        axes.plot(*zip(*points, strict=True) if points else ([], []), "-" if row.delay else "--", marker=".",
                  label=f"{row.optimizer}, {describe(row)}")  # fmt: skip
    axes.set(xlabel="learning rate", ylabel=f"validation, {measure_of(model).unit}", xscale="log")
    _legend(figure)
    return svg(figure)


def reconstruction(found: Sequence[Result]) -> str | None:
    """Error of past weights against the delay, a colour per kind: measured points, theory as a line."""
    errors = errors_by_delay(found)
    kinds = sorted({kind for kind, _, _ in errors} - {"latest"})
    if not kinds:
        return None
    figure, axes = _figure(len(kinds))
    for kind in kinds:
        points = [(n, Mean.of(values).value) for (name, n, _), values in sorted(errors.items()) if name == kind]
        line = axes.plot(*zip(*points, strict=True), "o", label=kind)[0]
        delays = range(1, max(n for n, _ in points) + 1)
        axes.plot(delays, [theory(kind, n) for n in delays], "-", color=line.get_color(), alpha=0.6)
    axes.axhline(1.0, color="grey", linestyle="--", linewidth=1)
    axes.set(xlabel="delay n, updates", ylabel="error relative to the latest weights", yscale="log", ylim=(1e-5, None))
    _legend(figure)
    return svg(figure)


def _name(row: Row) -> str:
    return f"{row.optimizer}, {describe(row, stages=False)}"


def _legend(figure: Any) -> None:
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", fontsize="medium")
