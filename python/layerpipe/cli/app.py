"""The commands."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from layerpipe.cli import compare as comparison
from layerpipe.cli import optimizers, plots, processes, report
from layerpipe.cli import options as o
from layerpipe.cli import plan as planning
from layerpipe.cli.config import TrainConfig
from layerpipe.cli.output import RunDirectory, default_path
from layerpipe.cli.runs import INTERRUPTED, follow, prepare, run, sequential, settled
from layerpipe.cli.training import Result
from layerpipe.data import Images
from layerpipe.errors import UsageError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train networks as asynchronous pipelines whose past weights are reconstructed, not stored.",
)


@app.callback()
def _root() -> None:
    pass


@app.command()
def train(
    context: typer.Context,
    model: o.Model = "resnet18",
    data: o.Data = None,
    data_dir: o.DataDir = TrainConfig.data_dir,
    width: o.Width = None,
    channels_last: o.ChannelsLast = TrainConfig.channels_last,
    stages: o.Stages = TrainConfig.stages,
    balance: o.Balance = "flops",
    past: o.Past = "blend",
    order: o.Order = TrainConfig.order,
    ema_decay: o.EmaDecay = None,
    past_norm: o.PastNorm = None,
    schedule: o.Schedule = "lockstep",
    executor: o.ExecutorName = "threads",
    split_backward: o.SplitBackward = TrainConfig.split_backward,
    accumulate: o.Accumulate = TrainConfig.accumulate,
    sync_steps: o.SyncSteps = TrainConfig.sync_steps,
    optimizer: o.OptimizerName = None,
    lr: o.Lr = None,
    momentum: o.Momentum = None,
    weight_decay: o.WeightDecay = None,
    spike_compensation: o.SpikeCompensation = None,
    weight_prediction: o.WeightPrediction = None,
    lr_schedule: o.LrSchedule = "cosine",
    warmup: o.Warmup = TrainConfig.warmup,
    max_norm: o.MaxNorm = None,
    batch_size: o.BatchSize = None,
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
    timeout: o.Timeout = 600,
    out: o.Out = None,
) -> int:
    """Train a network as an asynchronous pipeline, beside sequential training with the same seed."""
    config = TrainConfig.of_model(
        model, data=data, data_dir=data_dir, width=width, stages=stages, balance=balance, past=past, order=order,
        ema_decay=ema_decay, schedule=schedule, executor=executor, accumulate=accumulate, sync_steps=sync_steps,
        optimizer=optimizer, lr_schedule=lr_schedule, warmup=warmup, max_norm=max_norm, batch_size=batch_size,
        epochs=epochs, steps=steps, seed=seed, device=device, split_backward=split_backward,
        checkpoint_every=checkpoint_every, past_norm=past_norm, channels_last=channels_last,
    )  # fmt: skip
    config = optimizers.with_defaults(
        config, lr=lr, momentum=momentum, weight_decay=weight_decay, spike_compensation=spike_compensation,
        weight_prediction=weight_prediction,
    )  # fmt: skip
    config.check_past()
    path = resume or out or default_path(model, config.data, past)
    if processes.started() and (executor == "distributed" or resume is not None):
        with processes.joined(timeout) as reports:
            if resume is not None:  # the run is where the process that reports is, and may be nowhere else
                found = processes.agreed("distributed", lambda: _of_run(context, path) if reports else None)
                config, baseline = processes.told("distributed", found or (config, baseline))
            processes.check(config.executor, config.stages)
            images = processes.agreed_on_each_host(lambda: prepare(config))
            config = settled(config, images, reports=reports)
            directory = processes.agreed(
                config.executor, lambda: RunDirectory(path, resume=resume is not None) if reports else None
            )
            if directory is None:
                return _status(Console(quiet=True), [follow(config, images, profile=profile)])
            return _train(config, images, directory, baseline, resume is not None, profile)
    if resume is not None:
        config, baseline = _of_run(context, resume)
    images = prepare(config)
    if config.executor == "distributed":
        processes.start(config.stages, context.obj)
    config = settled(config, images)
    return _train(config, images, RunDirectory(path, resume=resume is not None), baseline, resume is not None, profile)


def _train(
    config: TrainConfig, images: Images, directory: RunDirectory, baseline: bool, resumed: bool, profile: bool
) -> int:
    console = Console()
    runs = {"pipeline": config}
    if baseline and (config.stages > 1 or config.schedule != "sequential"):
        runs["sequential"] = sequential(config)
    results: dict[str, Result] = {}
    with directory:
        if not resumed:
            directory.config(config, baseline=baseline)
        console.print(
            f"{config.model} of width {config.width} on {config.data} with {config.optimizer}: {config.stages} stages, "
            f"{config.schedule}, past weights by {_kind(config)}, {config.executor}; "
            f"{config.total_steps(len(images.train_x))} minibatches of {config.batch_size}. Writing {directory.path}/"
        )
        for name, each in runs.items():
            if name == "sequential":
                processes.alone(config.executor)
            results[name] = run(console, directory, name, each, images, profile=profile and name == "pipeline")
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


def _of_run(context: typer.Context, path: Path) -> tuple[TrainConfig, bool]:
    """The options of an interrupted run, and whether it has a baseline."""
    given = [
        name.replace("_", "-")
        for name in context.params
        if name not in ("resume", "profile", "timeout")
        and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise UsageError(f"--resume goes on with the run's own options; leave out --{', --'.join(given)}")
    try:
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--resume {path}: its config.json cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"--resume {path}: its config.json holds no options")
    if "seeds" in values:
        raise UsageError(f"--resume {path}: a run of layerpipe compare, which cannot go on")
    baseline = bool(values.pop("baseline", True))
    values.pop("environment", None)
    config = TrainConfig.from_json(values)
    if config.checkpoint_every is None:
        raise UsageError(f"--resume {path}: the run wrote no checkpoints; it was started without --checkpoint-every")
    return config, baseline


def _kind(config: TrainConfig) -> str:
    kind = f"{config.past} of order {config.order}" if config.past == "blend" else config.past
    return f"{kind}, their norm matched" if config.past_norm else kind


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


app.command()(comparison.compare)
app.command()(planning.plan)
