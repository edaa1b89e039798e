"""The tables a run ends with."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from layerpipe.cli.training import Result, StageResult
from layerpipe.tracing import Trace


def error_text(error: float | None) -> str:
    """A relative mean-square error, as short as it is exact."""
    if error is None:
        return "–"
    return "0 (exact)" if error == 0 else f"{error:.2g}"


def measured_text(stage: StageResult) -> str:
    """The delay that the backwards saw once the pipe was full."""
    if not stage.measured:
        return "–"
    n, count = max(stage.measured.items(), key=lambda item: item[1])
    return f"{n} ({count}×)"


def stage_table(result: Result) -> Table:
    """Per stage: its layers, its delay by the rule and as measured, the error of its past weights."""
    table = Table(
        title="Delays",
        box=SIMPLE_HEAD,
        title_justify="left",
        caption="n: updates between a minibatch's forward and its backward. Error: mean square of the past "
        "weights' error, relative to using the latest weights (1.0).",
        caption_justify="left",
    )
    table.add_column("stage")
    table.add_column("layers", overflow="fold")
    for name in ("n, rule", "n, measured", "past-weight error"):
        table.add_column(name, justify="right", overflow="fold")
    for i, stage in enumerate(result.stages):
        table.add_row(str(i), stage.layers, str(stage.delay), measured_text(stage), error_text(stage.error))
    return table


def memory_table(result: Result) -> Table:
    """Per stage: what it keeps, measured from its tensors, and what weight stashing would keep as history."""
    table = Table(title="Memory", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage")
    for name in ("weights", "history", "optimizer", "scratch", "activations", "stashing\nwould keep"):
        table.add_column(name, justify="right", overflow="fold")
    for i, stage in enumerate(result.stages):
        m = stage.memory
        columns = (m.weights, m.history, m.optimizer, m.scratch, m.activations, m.stash)
        table.add_row(str(i), *map(decimal, columns), end_section=i == len(result.stages) - 1)
    totals = (sum(column) for column in zip(*(s.memory for s in result.stages), strict=True))
    table.add_row("all", *map(decimal, totals))
    return table


def profile_table(trace: Trace) -> Table:
    """Per stage: where the time of a tick went, in milliseconds."""
    times = trace.times()
    rest = "the engine's rest"
    host = ""
    if trace.host:
        rest = "the engine's copies, and what the host had not issued yet"
        host = f" The host issued for {100 * trace.issuing():.0f} % of the time."
    table = Table(
        title="Time per tick, ms", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, caption_justify="left",
        caption="compute: layers, loss, autograd and its hooks. past: reconstructing weights. channel: waiting for a "
        f"neighbour. Python: {rest}. idle: between actions. At work: all but channel and idle. "
        f"Stages at work at once: {trace.overlap():.2f} of {len(times)}.{host}",
    )  # fmt: skip
    table.add_column("stage")
    for name in ("compute", "past", "step", "channel", "Python", "idle", "at work"):
        table.add_column(name, justify="right", overflow="fold")
    for i, time in enumerate(times):
        *seconds, busy = time
        table.add_row(str(i), *(f"{1e3 * value:.2f}" for value in seconds), f"{100 * busy:.0f} %")
    return table


def history_sentence(result: Result) -> str | None:
    """Sentence on what is kept for past weights, beside what stashing keeps; nothing where no stage has a delay."""
    kept = sum(s.memory.history for s in result.stages)
    stashed = sum(s.memory.stash for s in result.stages)
    if not stashed or not any(s.measured for s in result.stages):
        return None
    return (
        f"Kept for past weights: {decimal(kept)}, where weight stashing under the same schedule keeps "
        f"{decimal(stashed)}: {kept / stashed:.2f} of it."
    )


def accuracy_table(results: Mapping[str, Result]) -> Table:
    """Each run's accuracy on the test data, and how fast it trained."""
    table = Table(title="Accuracy", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "test accuracy", "last training loss", "samples/s", "seconds"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for name, result in results.items():
        accuracy = "diverged" if result.diverged else "–"
        if result.test_accuracy is not None and not result.interrupted:
            accuracy = f"{result.test_accuracy:.2f} %"
        tail = [s.loss for s in result.steps[-20:]]
        table.add_row(
            name, accuracy, f"{statistics.fmean(tail):.4f}" if tail else "–",
            f"{result.steps[-1].samples_per_s:.0f}" if tail else "–", f"{result.seconds:.1f}",
        )  # fmt: skip
    return table


def comparison_table(results: Mapping[str, Sequence[Result]]) -> Table:
    """Accuracy mean and spread over seeds, worst stage's past-weight error, bytes of weights and their past."""
    table = Table(
        title="Comparison", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, caption_justify="left",
        caption="n: the largest delay measured. ±: standard deviation over seeds. Error: the worst stage's, relative "
        "to the latest weights.",
    )  # fmt: skip
    for column in ("past", "n", "test accuracy", "error of\npast", "weights\n+ past", "samples\nper s", "diverged"):
        table.add_column(column, justify="left" if column == "past" else "right", overflow="fold")
    for name, found in results.items():
        good = [r.test_accuracy for r in found if r.test_accuracy is not None]
        spread = statistics.stdev(good) if len(good) > 1 else 0.0
        errors = [max((s.error for s in r.stages if s.error is not None), default=None) for r in found]
        known = [e for e in errors if e is not None]
        rates = [r.steps[-1].samples_per_s for r in found if r.steps]
        table.add_row(
            name,
            str(max((n for r in found for s in r.stages for n in s.measured), default="–")),
            f"{statistics.fmean(good):.2f} ± {spread:.2f} %" if good else "–",
            error_text(statistics.fmean(known)) if known else "–",
            decimal(max(r.kept_bytes for r in found)),
            f"{statistics.median(rates):.0f}" if rates else "–",
            f"{sum(bool(r.diverged) for r in found)} of {len(found)}",
        )
    return table
