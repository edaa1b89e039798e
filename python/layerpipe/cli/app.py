"""The commands."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from layerpipe import __version__, executors
from layerpipe.cli import compare as comparison
from layerpipe.cli import options as o
from layerpipe.cli import plan as planning
from layerpipe.cli import plots, processes, report
from layerpipe.cli import study as studies
from layerpipe.cli.config import TrainConfig, with_options_of
from layerpipe.cli.output import RunDirectory, default_path
from layerpipe.cli.resumed import read, read_config
from layerpipe.cli.runs import follow, prepare, run, sequential, settled
from layerpipe.cli.signals import exit_status
from layerpipe.cli.training import Result
from layerpipe.data import Images
from layerpipe.errors import UsageError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train networks as asynchronous pipelines whose past weights are reconstructed, not stored.",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"layerpipe {__version__}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Say which version this is.", callback=_version)] = False,
) -> None:
    pass


@app.command()
@with_options_of(TrainConfig)
def train(
    config: TrainConfig,
    context: typer.Context,
    baseline: Annotated[
        bool, typer.Option(help="Also train sequentially, with the same seed.", rich_help_panel=o.RUN)
    ] = True,
    profile: o.Profile = False,
    resume: o.Resume = None,
    timeout: o.Timeout = 600,
    out: o.Out = None,
) -> int:
    """Train a network as an asynchronous pipeline, beside sequential training with the same seed."""
    config.check()
    path = resume or out or default_path(config.model, config.data, config.past)

    def directory(config: TrainConfig, images: Images) -> RunDirectory:
        if resume is None:
            return RunDirectory(path)
        return RunDirectory(path, read(path, _runs(config, baseline), len(images.train_x), images.checksum()))

    executors.check(config.executor)
    if processes.started(config.executor == "distributed" or resume is not None):
        with processes.joined(timeout) as reports:
            processes.check_same({"resume": resume is not None, **config.of_all_processes(), "profile": profile})
            if resume is not None:  # the run is where the process that reports is, and may be nowhere else
                found = processes.call_on_all_ranks("distributed", lambda: _of_run(context, path) if reports else None)
                config, baseline = processes.broadcast("distributed", found or (config, baseline))
            elif out is not None and processes.restarted():  # whatever it came to before a process died
                left = reports and (out / "config.json").exists()
                found = processes.call_on_all_ranks("distributed", lambda: read_config(out) if left else None)
                if found := processes.broadcast("distributed", found):
                    resume, (config, baseline) = out, found
            processes.check(config.executor, config.stages, config.dp)
            images = processes.call_on_each_host(lambda: prepare(config))
            processes.check_same({"data": images.checksum()})
            if resume is None:
                config.check_length(len(images.train_x))
            config = settled(config, images, reports=reports)
            ours = processes.call_on_all_ranks(config.executor, lambda: directory(config, images) if reports else None)
            if ours is None:
                status = _status(Console(quiet=True), [follow(config, images, profile=profile)])
            else:
                status = _train(config, images, ours, baseline, resume is not None, profile)
            if status >= exit_status(0):
                sys.exit(status)  # the others may be anywhere: a group that they leave one by one says they are lost
            return status
    if resume is not None:
        config, baseline = _of_run(context, resume)
    images = prepare(config)
    if resume is None:  # earlier versions took any
        config.check_length(len(images.train_x))
    if config.executor == "distributed":
        return processes.start(config.stages * config.dp, context.obj)
    config = settled(config, images)
    return _train(config, images, directory(config, images), baseline, resume is not None, profile)


def _runs(config: TrainConfig, baseline: bool) -> dict[str, TrainConfig]:
    """By name: what a command trains."""
    runs = {"pipeline": config}
    if baseline and (config.stages > 1 or config.schedule != "sequential"):
        runs["sequential"] = sequential(config)
    return runs


def _train(
    config: TrainConfig, images: Images, directory: RunDirectory, baseline: bool, resumed: bool, profile: bool
) -> int:
    console = Console()
    runs = _runs(config, baseline)
    results: dict[str, Result] = {}
    with directory:
        if not resumed:
            directory.config(config, baseline=baseline)
        console.print(
            f"{config.model} of width {config.width} on {config.data} with {config.optimizer}: {config.stages} stages, "
            f"{config.schedule}, past weights by {config.past}, {config.executor}; "
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
        if results["pipeline"].stages:
            console.print(report.stage_table(results["pipeline"]))
            console.print(report.memory_table(results["pipeline"]))
        else:
            console.print("What the stages measured is not known: not every process has said it.")
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
    return read_config(path)


def _write_plots(path: Path, results: dict[str, Result], config: TrainConfig) -> None:
    pipeline = results["pipeline"]
    plots.loss(path / "loss.png", results)
    plots.reconstruction(path / "past_weights.png", pipeline, config.past)
    if pipeline.stages:
        plots.timeline(path / "timeline.png", pipeline.trace, [s.layers for s in pipeline.stages])


def _status(console: Console, found: Collection[Result]) -> int:
    if any(r.interrupted for r in found):
        console.print("Interrupted; what was measured until then is written.")
        return exit_status(max(r.signal for r in found if r.signal is not None))
    return 1 if any(r.diverged for r in found) else 0


app.command()(comparison.compare)
app.command()(planning.plan)
app.command()(studies.study)
