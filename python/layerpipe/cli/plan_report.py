"""The tables of ``layerpipe plan``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Table

from layerpipe.theory.planning.plan import Plan


def report(plan: Plan, model: str, batch: int, *, measured: bool) -> Iterator[RenderableType]:
    """Yield what is printed, part by part."""
    where = "measured here, one thread" if measured else "predicted for the machine given"
    yield (
        f"{model}: {sum(s.parameters for s in plan.stages):,} parameters, "
        f"{count(sum(s.flops for s in plan.stages))}FLOP per minibatch of {batch}, forward and backward. "
        f"{len(plan.stages)} stages, {plan.schedule}; times {where}."
    )
    yield ""
    for table in (stage_table, memory_table, schedule_table):
        yield table(plan)
        yield ""
    skips = sorted({registers for _, _, registers in plan.skips})
    if skips:
        yield (
            f"{len(plan.skips)} connections cross more than one boundary and hold up to {skips[-1]} minibatches of "
            "activations."
        )
    if len(plan.stages) > 1:
        yield f"To cut it so: layerpipe.split(model, {len(plan.stages)}, at={plan.at})"


def stage_table(plan: Plan) -> Table:
    """Per stage: what is in it, its delay, and its time for one minibatch."""
    table = _table("Stages", "stage", "layers", "params", "FLOP", "n", "time")
    table.caption = "n: delay in updates, from the retimed graph. Time: one minibatch forward, back, and the update."
    for i, stage in enumerate(plan.stages):
        table.add_row(
            str(i), stage.label, count(stage.parameters), count(stage.flops), _updates(plan, i),
            seconds(stage.cost.seconds), end_section=i == len(plan.stages) - 1,
        )  # fmt: skip
    table.add_row(
        "all", "", count(sum(s.parameters for s in plan.stages)), count(sum(s.flops for s in plan.stages)), "",
        seconds(sum(s.cost.seconds for s in plan.stages)),
    )  # fmt: skip
    return table


def _updates(plan: Plan, stage: int) -> str:
    """A stage's delay; where gradients accumulate, minibatches differ in theirs."""
    lag, every = max(plan.derivation.layer_lags[a] for a in plan.derivation.stages[stage]), plan.derivation.accumulate
    return str(lag // every) if lag % every == 0 else f"{lag // every}–{lag // every + 1}"


def memory_table(plan: Plan) -> Table:
    """Per stage: weights, activations, and everything it keeps under each kind of past weights."""
    kinds = list(plan.stages[0].memory)
    rows = []
    for stage in plan.stages:
        some = stage.memory[kinds[0]]
        rows.append([some.weights, some.activations, *(stage.memory[kind].total for kind in kinds)])
    largest = max(max(row) for row in rows)
    # A unit in which small stages, too, are more than nothing.
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1.0))
    unit, size = next((u, s) for u, s in units if largest >= 100 * s or s == 1)
    table = _table(f"Memory in {unit}", "stage", "weights", "in\nflight", "activ-\nations", *kinds)
    table.caption = "Under each kind: weights, gradients, momentum, history, scratch and activations together."
    for i, (stage, row) in enumerate(zip(plan.stages, rows, strict=True)):
        cells = [_fixed(value / size) for value in row]
        table.add_row(str(i), cells[0], str(stage.in_flight), *cells[1:], end_section=i == len(rows) - 1)
    totals = [_fixed(sum(column) / size) for column in zip(*rows, strict=True)]
    table.add_row("all", totals[0], "", *totals[1:])
    return table


def schedule_table(plan: Plan) -> Table:
    """Per schedule: what the simulator predicts."""
    table = _table("Schedules", "schedule", "minibatches/s", "speed-up", "idle", "staleness", "sent")
    table.caption = (
        "Speed-up: over one processor, in steady state. Idle: of all processors, filling and "
        "draining included. Staleness: the most updates between a forward and its backward. Sent: per minibatch, "
        "all links."
    )
    for name, found in plan.reports.items():
        table.add_row(
            name, f"{1 / found.period:.3g}", f"{plan.speedup(name):.2f}", f"{found.bubble:.0%}",
            str(max(found.staleness)), decimal(found.bytes_sent),
        )  # fmt: skip
    return table


def count(value: float) -> str:
    """``25.6 M``."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or unit == "P":
            break
        value /= 1000
    return f"{_three(value)} {unit}".rstrip() if unit or value != int(value) else f"{value:.0f}"


def _three(value: float) -> str:
    """Three digits that count, zeros among them."""
    return f"{value:#.3g}".rstrip(".")


def _fixed(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def seconds(value: float) -> str:
    """``1.23 ms``."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1 or unit == "µs":
            return f"{_three(value * factor)} {unit}"
    raise AssertionError


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, caption_justify="left", pad_edge=False)
    left: Sequence[str] = ("stage", "layers", "schedule")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    return table
