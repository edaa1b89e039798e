"""The commands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from layerpipe import data as datasets
from layerpipe.cli import options as o
from layerpipe.cli import plan as planning
from layerpipe.cli import plots, report
from layerpipe.cli.config import TrainConfig
from layerpipe.cli.output import RunDirectory, default_path
from layerpipe.cli.progress import TrainingBar
from layerpipe.cli.training import Result, Step, make_pipeline
from layerpipe.cli.training import train as run_training
from layerpipe.data import Images
from layerpipe.errors import UsageError
from layerpipe.schedule import NAMES

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train networks as asynchronous pipelines whose past weights are reconstructed, not stored.",
)
INTERRUPTED = 130
app.command()(planning.plan)


@app.callback()
def _root() -> None:
    pass


@app.command()
def train(
    context: typer.Context,
    model: o.Model = "resnet18",
    data: o.Data = "digits",
    data_dir: o.DataDir = TrainConfig.data_dir,
    width: o.Width = TrainConfig.width,
    stages: o.Stages = TrainConfig.stages,
    balance: o.Balance = "flops",
    past: o.Past = "blend",
    order: o.Order = TrainConfig.order,
    ema_decay: o.EmaDecay = None,
    past_norm: o.PastNorm = None,
    schedule: o.Schedule = "lockstep",
    executor: o.ExecutorName = "threads",
    split_backward: o.SplitBackward = TrainConfig.split_backward,
    lr: o.Lr = TrainConfig.lr,
    momentum: o.Momentum = TrainConfig.momentum,
    weight_decay: o.WeightDecay = TrainConfig.weight_decay,
    lr_schedule: o.LrSchedule = "cosine",
    warmup: o.Warmup = TrainConfig.warmup,
    max_norm: o.MaxNorm = None,
    batch_size: o.BatchSize = TrainConfig.batch_size,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    seed: o.Seed = TrainConfig.seed,
    device: o.Device = TrainConfig.device,
    baseline: Annotated[
        bool, typer.Option(help="Also train sequentially, with the same seed.", rich_help_panel=o.RUN)
    ] = True,
    profile: o.Profile = False,
    checkpoint_every: o.CheckpointEvery = None,
    resume: o.Resume = None,
    out: o.Out = None,
) -> int:
    """Train a network as an asynchronous pipeline, beside sequential training with the same seed."""
    config = TrainConfig(
        model=model, data=data, data_dir=data_dir, width=width, stages=stages, balance=balance, past=past, order=order,
        ema_decay=ema_decay, schedule=schedule, executor=executor, lr=lr, momentum=momentum, weight_decay=weight_decay,
        lr_schedule=lr_schedule, warmup=warmup, max_norm=max_norm, batch_size=batch_size, epochs=epochs, steps=steps,
        seed=seed, device=device, split_backward=split_backward, checkpoint_every=checkpoint_every,
        past_norm=past_norm,
    )  # fmt: skip
    if resume is not None:
        config, baseline = _of_run(context, resume)
    console = Console()
    images = _prepare(config)
    runs = {"pipeline": config}
    if baseline and (config.stages > 1 or config.schedule != "sequential"):
        runs["sequential"] = sequential(config)
    results: dict[str, Result] = {}
    path = resume or out or default_path(model, data, past)
    with RunDirectory(path, resume=resume is not None) as directory:
        if resume is None:
            directory.config(config, baseline=baseline)
        console.print(
            f"{config.model} of width {config.width} on {config.data}: {config.stages} stages, {config.schedule}, past "
            f"weights by {_kind(config)}, {config.executor}; {config.total_steps(len(images.train_x))} minibatches of "
            f"{config.batch_size}. Writing {directory.path}/"
        )
        for name, each in runs.items():
            results[name] = _run(console, directory, name, each, images, profile=profile and name == "pipeline")
            if results[name].diverged or results[name].interrupted:
                break
        _write_plots(directory.path, results, config)
        console.print()
        console.print(report.accuracy_table(results))
        console.print(report.stage_table(results["pipeline"]))
        console.print(report.memory_table(results["pipeline"]))
        if trace := results["pipeline"].profile:
            trace.write(directory.path / "trace.json")
            console.print(report.profile_table(trace))
            console.print(f"Trace: {directory.path}/trace.json, for chrome://tracing or https://ui.perfetto.dev")
        if sentence := report.history_sentence(results["pipeline"]):
            console.print(sentence)
        console.print(
            f"Plots, metrics and TensorBoard events are in {directory.path}/ (tensorboard --logdir {directory.path})"
        )
    return _status(console, results.values())


@app.command()
def compare(
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
    model: o.Model = "resnet18",
    data: o.Data = "digits",
    data_dir: o.DataDir = TrainConfig.data_dir,
    width: o.Width = 8,
    stages: o.Stages = TrainConfig.stages,
    balance: o.Balance = "flops",
    order: o.Order = TrainConfig.order,
    ema_decay: o.EmaDecay = None,
    past_norm: o.PastNorm = None,
    schedule: Annotated[
        str, typer.Option(help="Schedules to compare, with commas: lockstep, 1f1b.", rich_help_panel=o.METHOD)
    ] = TrainConfig.schedule,
    executor: o.ExecutorName = "threads",
    lr: o.Lr = TrainConfig.lr,
    momentum: o.Momentum = TrainConfig.momentum,
    weight_decay: o.WeightDecay = TrainConfig.weight_decay,
    lr_schedule: o.LrSchedule = "cosine",
    warmup: o.Warmup = TrainConfig.warmup,
    max_norm: o.MaxNorm = None,
    batch_size: o.BatchSize = TrainConfig.batch_size,
    epochs: o.Epochs = None,
    steps: o.Steps = None,
    seed: o.Seed = TrainConfig.seed,
    device: o.Device = TrainConfig.device,
    baseline: Annotated[bool, typer.Option(help="Also train sequentially.", rich_help_panel=o.RUN)] = True,
    out: o.Out = None,
) -> int:
    """Train the same network under several kinds of past weights and seeds: one table, one plot."""
    base = TrainConfig(
        model=model, data=data, data_dir=data_dir, width=width, stages=stages, balance=balance, order=order,
        executor=executor, lr=lr, momentum=momentum, weight_decay=weight_decay, lr_schedule=lr_schedule, warmup=warmup,
        max_norm=max_norm, batch_size=batch_size, epochs=epochs, steps=steps, seed=seed, device=device,
        past_norm=past_norm,
    )  # fmt: skip
    kinds = _kinds(base, past.split(","), schedule.split(","), ema_decay)
    if baseline:
        kinds = {"sequential": sequential(base), **kinds}
    console = Console()
    for each in kinds.values():
        images = _prepare(each)
    results: dict[str, list[Result]] = {name: [] for name in kinds}
    with RunDirectory(out or default_path("compare", model, data)) as directory:
        directory.config(base, past=list(kinds), seeds=seeds)
        for number in range(seeds):
            for name, each in kinds.items():
                once = dataclasses.replace(each, seed=seed + number)
                result = _run(console, directory, f"{name}/seed{once.seed}", once, images)
                if result.interrupted:
                    break
                results[name].append(result)
            else:
                continue
            break
        finished = {name: found for name, found in results.items() if found}
        console.print()
        console.print(report.comparison_table(finished))
        plots.comparison(
            directory.path / "comparison.png", finished, f"{model} of width {width}, {data}, {stages} stages"
        )
        directory.summary(finished)
        console.print(f"Curves: {directory.path}/comparison.png; numbers: {directory.path}/summary.json")
    return 0 if all(len(found) == seeds for found in results.values()) else INTERRUPTED


def sequential(config: TrainConfig) -> TrainConfig:
    """Ordinary training with the same weights, data and learning rates: one stage."""
    return dataclasses.replace(config, stages=1, schedule="sequential", executor="serial")


def _of_run(context: typer.Context, path: Path) -> tuple[TrainConfig, bool]:
    """The options of an interrupted run, and whether it has a baseline."""
    given = [
        name.replace("_", "-")
        for name in context.params
        if name not in ("resume", "profile")
        and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise UsageError(f"--resume goes on with the run's own options; leave out --{', --'.join(given)}")
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--resume {path}: its config.json cannot be read ({error})") from error
    config = TrainConfig.from_json(values)
    if config.checkpoint_every is None:
        raise UsageError(f"--resume {path}: the run wrote no checkpoints; it was started without --checkpoint-every")
    return config, bool(values.get("baseline", True))


def _kinds(
    base: TrainConfig, names: Sequence[str], schedules: Sequence[str], ema_decay: str | None
) -> dict[str, TrainConfig]:
    """Every kind of past weights under every schedule."""
    for schedule in schedules:
        if schedule not in NAMES:
            raise UsageError(f"--schedule {schedule!r} is unknown; there are: {', '.join(NAMES)}")
    return {
        name if len(schedules) == 1 else f"{name} {schedule}": dataclasses.replace(
            _of_kind(base, name, ema_decay), schedule=schedule
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
        past=kind,
        order=int(order) if order else base.order,
        ema_decay=COUPLED if COUPLED in more else ema_decay if kind == "ema" else None,
        past_norm="match" if "match" in more else base.past_norm,
    )


def _prepare(config: TrainConfig) -> Images:
    """The data, once everything that could be wrong with the options has been found out."""
    images = datasets.load(config.data, config.data_dir)
    next(images.batches(config.batch_size, config.seed))
    try:
        make_pipeline(
            dataclasses.replace(config, executor="serial"), images, lambda output, target: output.sum()
        ).close()
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    return images


def _kind(config: TrainConfig) -> str:
    kind = f"{config.past} of order {config.order}" if config.past == "blend" else config.past
    return f"{kind}, their norm matched" if config.past_norm else kind


def _run(
    console: Console,
    directory: RunDirectory,
    name: str,
    config: TrainConfig,
    images: Images,
    *,
    profile: bool = False,
) -> Result:
    with TrainingBar(console, name, config.total_steps(len(images.train_x))) as bar:

        def on_step(step: Step) -> None:
            bar.step(step)
            directory.write(name, "step", **step._asdict())
            directory.scalars(name, step.step, loss=step.loss, accuracy=step.accuracy, lr=step.lr)

        def on_test(step: int, accuracy: float) -> None:
            directory.write(name, "test", step=step, accuracy=accuracy)
            directory.scalars(name, step, test_accuracy=accuracy)

        checkpoint = directory.checkpoint(name) if config.checkpoint_every else None
        earlier = directory.earlier(name, config.total_steps(len(images.train_x)))
        result = run_training(
            config, images, on_step=on_step, on_test=on_test,
            checkpoint=checkpoint, resume=earlier, profile=profile,
        )  # fmt: skip
    for i, stage in enumerate(result.stages):
        for reading in stage.readings:
            directory.write(name, "past weights", stage=i, update=reading.update, relative_error=reading.relative)
            directory.scalars(f"{name}/stage{i}", reading.update, past_weight_error=reading.relative)
        directory.write(
            name, "stage", stage=i, layers=stage.layers, delay=stage.delay, measured=stage.measured,
            relative_error=stage.error, bytes=stage.memory._asdict(),
        )  # fmt: skip
    directory.write(
        name, "end", seconds=result.seconds, minibatches=len(result.steps), test_accuracy=result.test_accuracy,
        diverged=result.diverged, interrupted=result.interrupted,
    )  # fmt: skip
    if result.diverged:
        console.print(f"[red]{name} diverged[/red]: {result.diverged}", highlight=False)
    return result


def _write_plots(path: Path, results: dict[str, Result], config: TrainConfig) -> None:
    pipeline = results["pipeline"]
    plots.loss(path / "loss.png", results)
    plots.reconstruction(path / "past_weights.png", pipeline, config.past)
    plots.timeline(path / "timeline.png", pipeline.trace, [s.layers for s in pipeline.stages])


def _status(console: Console, found: Collection[Result]) -> int:
    if any(r.interrupted for r in found):
        console.print("Interrupted; what was measured until then is written.")
        return INTERRUPTED
    return 1 if any(r.diverged for r in found) else 0
