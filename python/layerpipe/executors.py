"""The executors by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from layerpipe.executor import Executor, Run, Serial, Threads
from layerpipe.graphs import Graphs
from layerpipe.stage import Stage
from layerpipe.streams import Streams

NAMES = ("serial", "threads", "streams", "graphs")


def check(name: str) -> None:
    """Refuse an unknown name with a ValueError."""
    if name not in NAMES:
        raise ValueError(f"executor={name!r} is unknown; there are: {', '.join(NAMES)}")


def make(
    name: str,
    run: Run,
    stages: Sequence[Stage],
    devices: Sequence[torch.device],
    *,
    close_channels: Callable[[], None],
    threads_per_stage: Sequence[int],
) -> Executor:
    """The executor of this name.

    Args:
        run: does the work of one action.
        stages: whose work.
        devices: where they are.
        close_channels, threads_per_stage: as :class:`layerpipe.executor.Threads` takes them.

    Raises:
        ValueError: it needs another device.
    """
    names = [stage.name for stage in stages]
    executor: Executor
    if name in ("streams", "graphs"):
        return (Streams if name == "streams" else Graphs)(names, run, stages, devices)
    if name == "threads":
        executor = Threads(names, run, close_channels=close_channels, threads_per_stage=threads_per_stage)
    else:
        executor = Serial(names, run)
    if len(set(devices)) > 1:
        executor.devices = devices
    return executor
