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


@with_options_of(TrainConfig, without=("past", "ema_decay", "schedule", "split_backward", "checkpoint_every"), width=8)
def compare(
    base: TrainConfig,
    past: Annotated[
        str,
        typer.Option(
            help="Kinds to compare, with commas; blend:1 is a blend of order 1, ema+match one with --past-norm match, "
            "blend+coupled one with --ema-decay coupled.",
            rich_help_panel=o.METHOD,
        ),
    ] = "stash,latest,ema,blend",
    seeds: Annotated[
        int, typer.Option(min=1, help="Seeds per kind: --seed, --seed + 1, ...", rich_help_panel=o.TRAINING)
    ] = 3,
    ema_decay: Annotated[
        str | None,
        typer.Option(
            help="Decay of ema's average: matched, white, window, or a number. Default: matched.",
            rich_help_panel=o.METHOD,
            show_default=False,
        ),
    ] = None,
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
    kinds = _kinds(base, past.split(","), schedule.split(","), ema_decay)
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


def _kinds(
    base: TrainConfig, names: Sequence[str], schedules: Sequence[str], ema_decay: str | None
) -> dict[str, TrainConfig]:
    """Every kind of past weights under every schedule."""
    if ema_decay is not None and not any(name.strip().split("+")[0] == "ema" for name in names):
        raise UsageError("--ema-decay is that of ema, which --past does not name; of a blend there is blend+coupled")
    for schedule in schedules:
        if schedule not in NAMES:
            raise UsageError(f"--schedule {schedule!r} is unknown; there are: {', '.join(NAMES)}")
    return {
        name if len(schedules) == 1 else f"{name} {schedule}": dataclasses.replace(
            _of_kind(base, name, ema_decay), schedule=cast(Any, schedule)
        )
        for name in names
        for schedule in schedules
    }


def _of_kind(base: TrainConfig, name: str, ema_decay: str | None) -> TrainConfig:
    from layerpipe_kernels.decay import COUPLED
    from layerpipe_kernels.history import KINDS

    first, *more = name.strip().split("+")
    kind, _, order = first.partition(":")
    ordered = not order or (kind == "blend" and order in ("1", "2", "3"))
    if kind not in KINDS or not ordered or not {*more} <= ({"match", COUPLED} if kind == "blend" else {"match"}):
        raise UsageError(
            f"--past {name!r} is unknown; there are: {', '.join(KINDS)}, blend:1, blend:2, blend:3, each also with "
            "+match, a blend with +coupled"
        )
    return dataclasses.replace(
        base,
        past=cast(Any, kind),
        order=int(order) if order else base.order,
        ema_decay=COUPLED if COUPLED in more else ema_decay if kind == "ema" else None,
        past_norm="match" if "match" in more else base.past_norm,
    )
