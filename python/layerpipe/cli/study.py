"""``layerpipe study``: what delays cost, and what is done about them, on many networks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from layerpipe.cli import options as o
from layerpipe.cli.output import default_path
from layerpipe.cli.runs import import_from_here
from layerpipe.cli.signals import exit_status, number_of
from layerpipe.errors import UsageError
from layerpipe.study import report, spec
from layerpipe.study.methods import METHODS
from layerpipe.study.runner import Records, check, execute, save
from layerpipe.study.trial import Outcome, Trial

_GRID = "Grid: several with commas"


def _grid(help: str) -> Any:
    return typer.Option(help=help, rich_help_panel=_GRID, show_default=False)


def study(
    context: typer.Context,
    file: Annotated[
        Path | None, typer.Argument(help="A TOML file with grids; see docs/study.md.", show_default=False)
    ] = None,
    model: Annotated[str | None, _grid("resnet18, vgg11, mlp, spiking, vit, gpt. Default: mlp.")] = None,
    optimizer: Annotated[str | None, _grid("sgd, adamw, muon, soap. Default: adamw.")] = None,
    method: Annotated[str | None, _grid(f"{', '.join(METHODS)}. Default: none.")] = None,
    past: Annotated[
        str | None,
        _grid(
            "Of methods that do not say it: stash, latest, ema, pipemare, blend, ema:decay=0.9, blend:order=3. "
            "Default: stash."
        ),
    ] = None,
    stages: Annotated[str | None, _grid("Default: 4.")] = None,
    schedule: Annotated[str | None, _grid("1f1b, lockstep, sequential. Default: 1f1b.")] = None,
    accumulate: Annotated[
        str | None, _grid("Microbatches per update, of methods that do not say it. Default: 1.")
    ] = None,
    sync_steps: Annotated[str | None, _grid("Minibatches without a delay at the beginning. Default: 0.")] = None,
    data: Annotated[str | None, typer.Option(help="Default: digits, python for gpt.", show_default=False)] = None,
    data_dir: o.DataDir = Path("data"),
    width: Annotated[int | None, typer.Option(help="Default: 8, 32 for gpt and vit.", show_default=False)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: 64, 8 for gpt.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Minibatches. Default: 300.", show_default=False)] = None,
    warmup: Annotated[int | None, typer.Option(help="Default: 30.", show_default=False)] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            help="Learning rates to choose from, with commas; by optimizer adamw=0.001,0.003 soap=0.003, with "
            "spaces between them. Default: three for each.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds per row. Default: 3.", show_default=False)] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Trainings at a time, one thread each. Default: one per core.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory to write to, or of a study to go on with. Default: runs/<name>, made new.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Train many networks with late gradients, by many methods: one page of tables and figures.

    An interrupted study goes on when it is given the same options and its directory as --out.
    """
    grids = {"model": model, "optimizer": optimizer, "method": method, "schedule": schedule}
    given: dict[str, Any] = {name: text.split(",") for name, text in grids.items() if text is not None}
    given |= {} if past is None else {"past": past.split(",")}
    numbers = {"stages": stages, "accumulate": accumulate, "sync_steps": sync_steps}
    given |= {name: _numbers(name, text) for name, text in numbers.items() if text is not None}
    single = {"data": data, "width": width, "batch_size": batch_size, "steps": steps, "warmup": warmup, "seeds": seeds}
    given |= {name: value for name, value in single.items() if value is not None}
    if lr is not None:
        given["lr"] = _rates(lr)
    asked = spec.make({**(spec.read(file) if file is not None else {}), **given})
    import_from_here()
    check(asked, data_dir)
    records = Records(out or default_path("study", asked.name), asked, context.obj)
    return _run(Console(), records, asked, data_dir, processes or os.cpu_count() or 1)


def _run(console: Console, records: Records, asked: spec.Spec, root: Path, processes: int) -> int:
    console.print(f"{len(asked.rows)} rows, {len(asked.seeds)} seeds. Writing {records.path}/")
    ended_by: int | None = None
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("training", total=None)

        def on_end(trial: Trial, outcome: Outcome, left: int) -> None:
            quality = "diverged" if outcome.diverged else f"{outcome.quality:.3f}"
            progress.update(bar, description=f"{left} left")
            console.print(f"{trial.key} lr {trial.lr:g} seed {trial.seed}: {quality}", highlight=False)

        try:
            found = execute(asked, records, root, processes, on_end)
        except KeyboardInterrupt as interrupt:
            ended_by = number_of(interrupt)
            found = records.everything(asked)
    save(records.path / "results.json", asked, found, records.sittings)
    made = report.write(records.path, asked, found, records.sittings, root)
    console.print(f"{records.path}/report.html, tables.md and CSV files: {len(made)} of {len(asked.rows)} rows")
    if ended_by is not None:
        console.print(f"Interrupted; the same options with --out {records.path} go on.")
        return exit_status(ended_by)
    return 0


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--{name.replace('_', '-')} {text!r} is not whole numbers with commas") from None


def _rates(text: str) -> Any:
    """``0.1,0.2``, or ``adamw=0.001,0.003 soap=0.003``."""
    try:
        if "=" not in text:
            return [float(part) for part in text.split(",")]
        parts = [part.split("=") for part in text.split()]
        return {name: [float(rate) for rate in rates.split(",")] for name, rates in parts}
    except ValueError:
        raise UsageError(f"--lr {text!r} is not numbers with commas, nor OPTIMIZER=NUMBERS") from None
