"""Checks that a stage's step can be captured in a graph."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from layerpipe.stage import Stage
from layerpipe_kernels.optim.fused import FusedOptimizer


def groups(stage: Stage) -> list[dict[str, Any]]:
    """The parameter groups of a stage's optimizer; none if it has none."""
    found: list[dict[str, Any]] = stage.optimizer.param_groups if stage.optimizer is not None else []
    return found


def check_optimizer(stage: Stage) -> None:
    """Refuse an optimizer whose step would do the same every time it is replayed.

    Raises:
        ValueError: it counts its updates on the host, or has hooks.
    """
    optimizer = stage.optimizer
    if optimizer is not None and (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks):
        raise ValueError(
            f"{stage.name}: executor='graphs' replays the optimizer's step, and no replay calls a hook; use "
            "executor='streams'"
        )
    for group in groups(stage):
        counts_there = isinstance(stage.optimizer, FusedOptimizer) or not group.get("delay")
        if not group.get("capturable") or not counts_there:
            raise ValueError(
                f"{stage.name}: executor='graphs' replays the optimizer's step, so the device must count the updates: "
                "use layerpipe_kernels' SGD, Adam or AdamW with capturable=True"
            )


def own_learning_rates(stage: Stage, device: torch.device) -> None:
    """Every learning rate a tensor of the stage's own that a graph reads and a tick's options are copied into."""
    for group in groups(stage):
        lr = group["lr"]
        if not isinstance(lr, Tensor) or lr.device != device:
            group["lr"] = torch.full((), float(lr), dtype=torch.float32, device=device)


def addresses(stage: Stage) -> list[Any]:
    """Return what a captured graph depends on: where things are, and the modes of the layers."""
    module, optimizer = stage.module, stage.optimizer
    found: list[Any] = [m.training for m in module.modules()]
    found += [t.data_ptr() for t in (*stage.all_params, *module.buffers())]
    if optimizer is not None:
        places = [*(g for g in optimizer.param_groups), *(optimizer.state[p] for p in stage.all_params)]
        found += [v.data_ptr() for values in places for v in values.values() if isinstance(v, Tensor)]
    return found


def count_update(stage: Stage) -> None:
    """Count a step that was replayed, on the host: of a group without a past, whose clock nobody reads."""
    for group in groups(stage):
        if isinstance(group.get("updates"), int):
            group["updates"] += 1


@contextmanager
def uncounted(stage: Stage) -> Iterator[None]:
    """A capture runs nothing: what the host has counted in it is taken back."""
    counts = [group.get("updates") for group in groups(stage)]
    try:
        yield
    finally:
        for group, count in zip(groups(stage), counts, strict=True):
            if count is not None:
                group["updates"] = count


def held_by(stage: Stage) -> list[Any]:
    """Return tensors that a captured step reads and its graph does not keep: for as long as that is replayed."""
    optimizer = stage.optimizer
    states = [dict(s) for s in optimizer.state.values() if isinstance(s, dict)] if optimizer is not None else []
    return [*states, *optimizer.tables()] if isinstance(optimizer, FusedOptimizer) else states


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the garbage collector from running: it may wait for the device, which breaks a capture."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
