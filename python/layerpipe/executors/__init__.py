"""The executors by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from layerpipe import accelerator
from layerpipe.executors.base import Executor, Run
from layerpipe.executors.graphs import Graphs
from layerpipe.executors.links import Links, Losses
from layerpipe.executors.ranks import Ranks
from layerpipe.executors.serial import Serial
from layerpipe.executors.streams import Streams
from layerpipe.executors.threads import Threads
from layerpipe.partition.split_stage import uncompiled
from layerpipe.stage import Stage
from layerpipe.stage.other_generators import OtherGenerators, check_not_shared
from layerpipe.stage.random_numbers import HandedIn, RandomNumbers, Swapped, seed

NAMES = ("serial", "threads", "streams", "graphs", "distributed")


def check(name: str) -> None:
    """Refuse an unknown name with a ValueError. Where CUDA has not started, prepare it for an executor of streams."""
    if name not in NAMES:
        raise ValueError(f"executor={name!r} is unknown; there are: {', '.join(NAMES)}")
    if name in ("streams", "graphs"):
        accelerator.ask_for_connections()


def per_stage(threads: int | Sequence[int] | None, stages: int) -> list[int] | None:
    """Threads for each stage, given as one number for all or one for each; ``None`` if it is left open.

    Raises:
        ValueError: fewer than 1, or another number of stages.
    """
    if threads is None:
        return None
    each = [threads] * stages if isinstance(threads, int) else list(threads)
    if len(each) != stages or min(each) < 1:
        raise ValueError(f"threads_per_stage must be at least 1, for all or for each of {stages} stages, got {threads}")
    return each


def random_numbers(name: str, stages: Sequence[nn.Module], ranks: Ranks) -> list[RandomNumbers | None]:
    """Return the random numbers that each stage draws from, the same numbers under every executor; ``None`` where that
    is torch's generator.

    Which it is for a stage alone, whose training is a plain loop's; for graphs, which refuse to draw; and for compiled
    stages in threads.
    """
    common = ranks.gather_all(seed())[0] + ranks.replica * len(stages)
    if (len(stages) == 1 and ranks.replicas == 1) or name == "graphs":
        return [None] * len(stages)
    if name == "threads" or ranks.size > 1:
        check_not_shared(stages, [f"stage {i} ({type(stage).__name__})" for i, stage in enumerate(stages)])
    if name == "threads":
        drawn = [i for i in ranks.own if uncompiled(stages[i]) is stages[i]]
        others = OtherGenerators(drawn)
        return [HandedIn(common, i, others) if i in drawn else None for i in range(len(stages))]
    return [Swapped(common, i) for i in range(len(stages))]


def make(
    name: str,
    run: Run,
    names: Sequence[str],
    stages: Sequence[Stage],
    devices: Sequence[torch.device],
    *,
    ranks: Ranks,
    losses: Losses,
    close_channels: Callable[[], None],
    threads_per_stage: Sequence[int],
) -> Executor:
    """The executor of this name.

    Args:
        run: does the work of one action.
        names: of all stages.
        stages: those of this process.
        devices: one for each of all stages.
        ranks: which process holds which stages.
        losses: where the caller finds them.
        close_channels, threads_per_stage: of this process, as :class:`layerpipe.executors.threads.Threads` takes them.

    Raises:
        ValueError: it needs another device.
    """
    executor: Executor
    if name in ("streams", "graphs"):
        return (Streams if name == "streams" else Graphs)(names, run, stages, devices)
    if name == "threads":
        executor = Threads(
            names, run, own=ranks.own, close_channels=close_channels, threads_per_stage=threads_per_stage
        )
        executor.others = next((s.random.others for s in stages if isinstance(s.random, HandedIn)), None)
    else:
        executor = Serial(names, run)
    if ranks.size > 1:
        executor.links = Links(names, ranks, losses, answers=name == "threads")
    executor.notices = ranks.notices
    if len(set(devices)) > 1 or (ranks.size > 1 and devices[0].type != "cpu"):
        executor.devices = devices
    return executor
