"""``layerpipe compare``: the same network under several kinds of past weights, schedules and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from layerpipe.cli import options as o
from layerpipe.cli import plots, report
from layerpipe.cli.config import TrainConfig, with_options_of
from layerpipe.cli.output import RunDirectory, default_path
from layerpipe.cli.runs import prepare, run, sequential, settled
from layerpipe.cli.signals import exit_status
from layerpipe.cli.training import Result
from layerpipe.errors import UsageError
from layerpipe.schedule import NAMES
from layerpipe_kernels.past import parse


@with_options_of(TrainConfig, without=("past", "schedule", "split_backward", "checkpoint_every"), width=8)
def compare(
    base: TrainConfig,
    past: Annotated[
        str,
        typer.Option(
            help="Kinds to compare, with commas, each as layerpipe train takes it: ema,blend:order=3:decay=coupled.",
            rich_help_panel=o.METHOD,
        ),
    ] = "stash,latest,ema,blend",
    seeds: Annotated[
        int, typer.Option(min=1, help="Seeds per kind: --seed, --seed + 1, ...", rich_help_panel=o.TRAINING)
    ] = 3,
    schedule: Annotated[
        str,
        typer.Option(
            help="Schedules to compare, with commas: lockstep, 1f1b, sequential, auto.", rich_help_panel=o.METHOD
        ),
    ] = TrainConfig.schedule,
    baseline: Annotated[bool, typer.Option(help="Also train sequentially.", rich_help_panel=o.RUN)] = True,
    out: o.Out = None,
) -> int:
    """Train the same network under several kinds of past weights and seeds: one table, one plot."""
    if base.executor == "distributed":
        raise UsageError("compare trains in this process alone; leave --executor distributed to layerpipe train")
    base.check()
    kinds = _kinds(base, past.split(","), schedule.split(","))
    if baseline:
        kinds = {"sequential": sequential(base), **kinds}
    console = Console()
    for each in kinds.values():
        images = prepare(each)
    base.check_length(len(images.train_x))
    base = settled(base, images)
    kinds = {name: dataclasses.replace(each, at=base.at if each.stages > 1 else None) for name, each in kinds.items()}
    results: dict[str, list[Result]] = {name: [] for name in kinds}
    ended_by: int | None = None
    with RunDirectory(out or default_path("compare", base.model, base.data)) as directory:
        directory.config(base, past=list(kinds), seeds=seeds)
        for number in range(seeds):
            for name, each in kinds.items():
                once = dataclasses.replace(each, seed=base.seed + number)
                result = run(console, directory, f"{name}/seed{once.seed}", once, images)
                if result.interrupted:
                    ended_by = result.signal
                    break
                results[name].append(result)
            else:
                continue
            break
        finished = {name: found for name, found in results.items() if found}
        console.print()
        console.print(report.comparison_table(finished))
        title = f"{base.model} of width {base.width}, {base.data}, {base.stages} stages"
        plots.comparison(directory.path / "comparison.png", finished, title)
        directory.summary(finished)
        console.print(f"Curves: {directory.path}/comparison.png; numbers: {directory.path}/summary.json")
    return 0 if ended_by is None else exit_status(ended_by)


def _kinds(base: TrainConfig, names: Sequence[str], schedules: Sequence[str]) -> dict[str, TrainConfig]:
    """Every kind of past weights under every schedule."""
    for schedule in schedules:
        if schedule not in NAMES:
            raise UsageError(f"--schedule {schedule!r} is unknown; there are: {', '.join(NAMES)}")
    return {
        name if len(schedules) == 1 else f"{name} {schedule}": dataclasses.replace(
            base, past=_checked(name.strip()), schedule=cast(Any, schedule)
        )
        for name in names
        for schedule in schedules
    }


def _checked(past: str) -> str:
    try:
        return str(parse(past))
    except ValueError as error:
        raise UsageError(f"--past {past!r}: {error}") from None
