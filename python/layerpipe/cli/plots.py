"""The pictures a run leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from layerpipe.cli.training import Result
from layerpipe.drawing import new_figure, save
from layerpipe.measured import Event


def smooth(values: Sequence[float], span: int = 15) -> np.ndarray[Any, Any]:
    """A centred running mean that keeps the length."""
    array, window = np.asarray(values, dtype=float), np.ones(min(span, len(values)))
    return np.convolve(array, window, mode="same") / np.convolve(np.ones_like(array), window, mode="same")


def loss(path: Path, runs: Mapping[str, Result]) -> None:
    """Training loss against steps: each minibatch faintly, their running mean boldly."""
    figure, axes = new_figure(figsize=(8, 4.5))
    for name, result in runs.items():
        if not result.steps:
            continue
        steps, values = [s.step for s in result.steps], [s.loss for s in result.steps]
        (line,) = axes.plot(steps, smooth(values), label=name, linewidth=2)
        axes.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.8)
    axes.set(xlabel="minibatches", ylabel="training loss (cross entropy)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend()
    save(figure, path)


def reconstruction(path: Path, result: Result, past: str) -> None:
    """Relative error of the past weights in each stage against its updates."""
    figure, axes = new_figure(figsize=(8, 4.5))
    for i, stage in enumerate(result.stages):
        readings = [r for r in stage.readings if r.error > 0]
        if readings:
            axes.plot([r.update for r in readings], [r.relative for r in readings], ".-", markersize=4,
                      label=f"stage {i} (n = {stage.delay})")  # fmt: skip
    axes.axhline(1.0, color="grey", linestyle="--", linewidth=1)
    axes.annotate("using the latest weights", (0.99, 1.0), xycoords=("axes fraction", "data"), ha="right",
                  va="bottom", color="grey", fontsize=9)  # fmt: skip
    axes.set(xlabel="updates of the stage", ylabel="error relative to the latest weights", yscale="log",
             title=f"Reconstructed past weights, past={past!r}: |Ŵ − W(t−n)|² / |W(t) − W(t−n)|²")  # fmt: skip
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "exact in every stage", transform=axes.transAxes, ha="center")
    save(figure, path)


def timeline(path: Path, trace: Sequence[Event], names: Sequence[str], ticks: int | None = None) -> None:
    """Draw the ticks as they were recorded while the pipeline ran; colours tell minibatches apart."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    stages = len(names)
    ticks = ticks or 2 * (stages - 1) + 7
    figure, axes = new_figure(figsize=(max(7.0, 0.75 * ticks), 0.75 * stages + 1.6))
    colours = colormaps["tab10"]
    for event in trace:
        if event.tick >= ticks:
            continue
        action = event.action
        forward = action.kind == "F"
        x, y = event.tick + (0 if forward else 0.5), stages - 1 - action.stage
        axes.add_patch(
            Rectangle((x + 0.02, y + 0.08), 0.46, 0.84, facecolor=colours(action.minibatch % 10),
                      alpha=0.35 if forward else 0.9, edgecolor="black", linewidth=0.5)
        )  # fmt: skip
        axes.text(x + 0.25, y + 0.5, f"{action.kind}{action.minibatch}", ha="center", va="center", fontsize=8)
    axes.set(xlim=(0, ticks), ylim=(0, stages), xlabel="tick", xticks=range(ticks + 1),
             yticks=[stages - 0.5 - s for s in range(stages)],
             yticklabels=[f"stage {s}\n{name}" for s, name in enumerate(names)],
             title="F: forward, B: backward and update; the number is the minibatch")  # fmt: skip
    axes.grid(axis="x", alpha=0.3)
    save(figure, path)


def comparison(path: Path, curves: Mapping[str, Sequence[Result]], title: str) -> None:
    """Test accuracy and training loss of several kinds of past weights; bands show the spread over seeds."""
    figure, (left, right) = new_figure(figsize=(12, 4.8), ncols=2)
    for name, results in curves.items():
        _band(left, name, [[accuracy for _, accuracy in r.tests] for r in results],
              [step for step, _ in max((r.tests for r in results), key=len)])  # fmt: skip
        longest = max((r.steps for r in results), key=len)
        _band(right, name, [list(smooth([s.loss for s in r.steps])) for r in results], [s.step for s in longest])
    left.set(xlabel="minibatches", ylabel="test accuracy (%)", title=title)
    right.set(xlabel="minibatches", ylabel="training loss", yscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend()
    save(figure, path)


def _band(axes: Any, name: str, series: Sequence[Sequence[float]], x: Sequence[int]) -> None:
    """Mean and standard deviation of the series that reach each point; a diverged one ends where it did."""
    if not x:
        axes.plot([], [], label=f"{name} (diverged)")
        return
    rows = np.full((len(series), len(x)), np.nan)
    for row, values in zip(rows, series, strict=True):
        row[: len(values)] = values
    mean, spread = np.nanmean(rows, axis=0), np.nanstd(rows, axis=0)
    (line,) = axes.plot(x, mean, label=name, linewidth=1.8)
    if len(series) > 1:
        axes.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.15, linewidth=0)
