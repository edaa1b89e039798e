"""Measurements of a pipeline's stages: delays and memory, which :mod:`layerpipe.theory.planning.memory` predicts."""

from __future__ import annotations

from typing import Any, NamedTuple

from layerpipe.schedule import Action
from layerpipe.stage import Stage


class Event(NamedTuple):
    """Something a stage did; times in seconds of ``time.perf_counter``."""

    tick: int
    action: Action
    start: float
    end: float


class StageMemory(NamedTuple):
    """Bytes that one stage keeps."""

    weights: int
    history: int  # for past weights
    optimizer: int  # momentum and the like
    scratch: int  # the largest past weight made for a backward
    activations: int  # the most that was kept between forwards and backwards
    stash: int  # what weight stashing under the same schedule would keep as history


def stage_memory(stage: Stage) -> StageMemory:
    """Bytes that a stage has kept so far, counted on the tensors themselves; optimizers of another kind count as 0
    bytes."""
    weights = sum(p.nbytes for p in stage.all_params)
    with_past = sum(p.nbytes for p in stage.params if p not in stage.without_past)
    optimizer: Any = stage.optimizer
    return StageMemory(
        weights=weights,
        history=optimizer.history_bytes() if hasattr(optimizer, "history_bytes") else 0,
        optimizer=optimizer.optimizer_bytes() if hasattr(optimizer, "optimizer_bytes") else 0,
        scratch=stage.scratch_bytes,
        activations=stage.activation_bytes,
        stash=stage.delay * with_past,
    )
