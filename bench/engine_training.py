"""The trainings of ``bench.staleness`` by the engine: the same network, first weights, minibatches and options.

Stages run one after the other in one thread, which gives the weights of every executor. Every update has the learning
rate of its minibatch, as in the simulation, except for those of the last few, which are made while the pipe drains.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import layerpipe
import layerpipe_kernels as lk
from layerpipe.study.settings import Settings
from layerpipe.study.training import Horizon, Task


def pipeline(
    task: Task, stages: int, schedule: str, settings: Settings, *, microbatches: int, sync_steps: int, past: str
) -> layerpipe.Pipeline:
    """The task's network, cut where the simulation cuts it.

    Raises:
        ValueError: a setting that no optimizer of :mod:`layerpipe_kernels` has.
    """
    s = settings
    names = sorted((name for name, _ in task.model.named_parameters()), key=task.stage_of)
    stage_of = [task.stage_of(name) * stages // task.pieces for name in names]
    at = [names[stage_of.index(k)].rpartition(".")[0] for k in range(1, stages)]
    matrices = {param for name, param in task.model.named_parameters() if task.matrices(name)}
    common: dict[str, Any] = {"lr": s.lr, "weight_decay": s.weight_decay}
    knobs = {"spike_compensation": s.spike_compensation, "weight_prediction": s.weight_prediction}
    adam: dict[str, Any] = {"betas": (s.beta1, s.beta2), "eps": s.eps, "beta1_delay": s.beta1_delay}
    theirs = Settings(
        s.optimizer, s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.spike_compensation,
        weight_prediction=s.weight_prediction, beta1_delay=s.beta1_delay, refresh=s.refresh, sides=s.sides,
        max_norm=s.max_norm,
    )  # fmt: skip
    if theirs != s or s.optimizer not in ("adam", "soap"):
        raise ValueError(f"the engine trains with adam and soap, and with none of the study's other options: {s}")

    def make(params: list[Tensor], **past: Any) -> torch.optim.Optimizer:
        if s.optimizer == "adam":
            return lk.AdamW(params, **common, **adam, **knobs, **past)
        groups = [
            {"params": [p for p in params if (p in matrices) is wanted], "precondition": wanted}
            for wanted in (True, False)
        ]
        return lk.SOAP(
            [group for group in groups if group["params"]],
            precondition_frequency=s.refresh,
            one_sided=s.sides == 1,
            **common,
            **adam,
            **knobs,
            **past,
        )

    first = next(task.minibatches)
    task.minibatches = itertools.chain([first], task.minibatches)
    return layerpipe.Pipeline(
        layerpipe.split(task.model, stages, (first[0][:1],), at=at),
        lambda output, target: torch.nn.functional.cross_entropy(output.flatten(0, -2), target.flatten()),
        make,
        past=past,
        schedule=schedule,
        accumulate=microbatches,
        sync_steps=sync_steps * microbatches,
        max_norm=s.max_norm or None,
    )


def ticks_late(pipe: layerpipe.Pipeline) -> Iterator[int]:
    """Of each parameter group, the ticks from a minibatch's entry to its update."""
    last = len(pipe.stages) - 1
    for stage in pipe.stages:
        late = {"sequential": 0, "1f1b": last, "lockstep": 2 * last - stage.index}[pipe.schedule.name]
        for _ in stage.optimizer.param_groups if stage.optimizer is not None else ():
            yield late


def parts(task: Task, minibatches: int, microbatches: int) -> Iterator[tuple[Tensor, ...]]:
    """Microbatches of so many minibatches."""
    for whole in itertools.islice(task.minibatches, minibatches):
        yield from zip(*(each.chunk(microbatches) for each in whole), strict=True)


def train(
    task: Task,
    stages: int,
    schedule: str,
    settings: Settings,
    horizon: Horizon,
    *,
    every: int = 50,
    microbatches: int = 1,
    sync_steps: int = 0,
    past: str = "blend",
) -> dict[str, Any]:
    """Trains to the horizon; the result is as of :func:`layerpipe.study.training.train`."""
    options: dict[str, Any] = {"microbatches": microbatches, "sync_steps": sync_steps, "past": past}
    losses: list[float] = []
    with pipeline(task, stages, schedule, settings, **options) as pipe:
        late = list(ticks_late(pipe))
        for tick, part in enumerate(parts(task, horizon.steps, microbatches)):
            for group, ticks in zip(pipe.optimizer.param_groups, late, strict=True):
                updated = max(tick - (0 if pipe.synchronous else ticks), 0) // microbatches
                group["lr"] = settings.lr * horizon.factor(updated)
            if (loss := pipe.step(*part)) is not None:
                losses.append(loss.item())
        losses += [loss.item() for loss in pipe.drain()]
        delays = [lag / microbatches for lag in pipe.schedule.delays()]
        pipe.weights.show()
    width = every * microbatches
    curve = [statistics.fmean(losses[i : i + width]) for i in range(0, len(losses), width)]
    return {"delays": delays, "curve": curve, "quality": task.quality(task.model)}
