"""One training run of a command: made sure of, trained, written down."""

from __future__ import annotations

import dataclasses
import os
import sys

from rich.console import Console

from layerpipe import data as datasets
from layerpipe.cli.config import TrainConfig
from layerpipe.cli.output import RunDirectory
from layerpipe.cli.processes import broadcast
from layerpipe.cli.progress import TrainingBar
from layerpipe.cli.training import Earlier, Result, Step, make_pipeline, make_stages, train
from layerpipe.data import Images
from layerpipe.errors import UsageError
from layerpipe.models.sizes import out_of_memory, reason
from layerpipe.partition import cut_at


def import_from_here() -> None:
    """``package.module:function`` may be a file in the current directory, as with ``python -m``."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def sequential(config: TrainConfig) -> TrainConfig:
    """Ordinary training with the same weights, data and learning rates: one stage."""
    return dataclasses.replace(config, stages=1, at=None, schedule="sequential", executor="serial", dp=1)


def prepare(config: TrainConfig) -> Images:
    """The data, once everything that could be wrong with the options has been found out."""
    import_from_here()
    images = datasets.load(config.data, config.data_dir)
    next(images.batches(config.batch_size, config.seed))
    alone = config.executor in ("threads", "distributed")
    quiet = dataclasses.replace(config, executor="serial", dp=1) if alone else config
    if config.balance == "time":
        quiet = dataclasses.replace(quiet, balance="flops")  # measuring comes later, once
    try:
        make_pipeline(quiet, images, lambda output, target: output.sum()).close()
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UsageError(f"{config.model} of width {config.width} does not fit here: {reason(error)}") from error
    return images


def settled(config: TrainConfig, images: Images, *, reports: bool = True) -> TrainConfig:
    """The same with a cut that one process has measured: another one, or a later one, might find another."""
    if config.balance != "time" or config.at is not None or config.stages == 1:
        return config
    at = tuple(cut_at(make_stages(config, images))) if reports else None
    return dataclasses.replace(config, at=broadcast(config.executor, at))


def follow(config: TrainConfig, images: Images, *, profile: bool) -> Result:
    """A process's part of a run that another one reports, see :func:`run`."""
    resume = broadcast(config.executor, False)
    return train(config, images, resume=Earlier(None, [], []) if resume else None, profile=profile)


def run(
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
        earlier = directory.earlier(name)
        broadcast(config.executor, earlier is not None)
        result = train(
            config, images, on_step=on_step, on_test=on_test,
            checkpoint=checkpoint, resume=earlier, profile=profile,
            noted=lambda: {"metrics": directory.metrics_so_far(name), "data": images.checksum()},
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
