"""A step like the one before it: nothing is new but the gradients, the learning rate and the clock.

Checking every option and every array again takes longer than the step of a small layer. A routine keeps a group's
options and arrays from when all were checked; the compiled kernels compare them, and make the step and past weights in
one call each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerpipe_kernels import backend
from layerpipe_kernels.history import Clock, History
from layerpipe_kernels.native import EXCHANGE, NativeRunner
from layerpipe_kernels.optim.options import Group, past_of
from layerpipe_kernels.plan import StepPlan

#: What may differ from step to step; the list of parameters the collector looks at.
_MOVING = ("lr", "updates", "last_lr", "params")


class PastMaker(NamedTuple):
    """A parameter whose past ``write(i, out)`` puts into a tensor like ``like``; false where an array has changed."""

    param: Tensor
    like: Tensor  # of its shape, and cheaper to look at
    write: Callable[[int, Tensor], bool]
    i: int
    state: Any  # the optimizer's when it was made


class Routine:
    """The compiled step of one parameter group, made after a step that checked everything.

    Args:
        group: whose parameters all have a gradient; its clock is the host's.
        plan: of the compiled kernels, configured by that step.
        collector: of the plan.
        past: how the group has its past weights.
        state: the optimizer's.
        horizon: of the weights' prediction, before the step and after it.

    Attributes:
        fits: ``fits()`` says whether the group's options are as they were, and its learning rate a number.
        ready: ``ready()`` says whether it fits and arrays and gradients are what they were, too.
        step: ``step()`` makes the step of a group that is ready.
    """

    def __init__(
        self, group: Group, plan: StepPlan, collector: Any, past: History | None, state: Any, horizon: float = 0.0
    ) -> None:
        assert isinstance(plan.runner, NativeRunner)
        on_host = plan.device.type == "cpu"
        # Kinds that keep something of their own make their past weights themselves.
        makes_past = past is not None and type(past).past is History.past
        makes_past = makes_past and not past_of(group).materialize
        routine = backend.extension().Routine(
            group,
            tuple(key for key in group if key not in _MOVING),
            state,
            collector,
            plan.runner.plan,
            torch.get_num_threads if on_host else plan.runner.current,
            functools.partial(torch.autograd.graph.increment_version, plan.versioned),
            functools.partial(_mixture, past) if past is not None and makes_past else None,
            past.n if past is not None else 0,
            horizon,
            EXCHANGE,
        )
        self.group, self.state, self._collector, self._past = group, state, collector, past
        self.fits: Callable[[], bool] = routine.fits
        self.ready: Callable[[], bool] = routine.ready
        self.step: Callable[[], None] = routine.step
        if not on_host and past is not None:
            self.ready = functools.partial(_ready_outside_captures, routine.ready)
        params = group["params"] if makes_past else ()
        self.makers = [PastMaker(p, p.detach(), routine.past, i, state) for i, p in enumerate(params)]

    def made_from(self, collector: Any, past: History | None) -> bool:
        return self._collector is collector and self._past is past

    @staticmethod
    def possible(group: Group, past: History | None) -> bool:
        """Returns whether nothing besides the plan takes part in the group's step."""
        return (
            type(group["updates"]) is int
            and (past is None or not past.needs_states)
            and past_of(group).norm is None
            and not any(isinstance(value, Tensor) for value in group.values())
            # A list may be changed in place; a tuple only where it holds tensors.
            and isinstance(group.get("betas", ()), tuple)
            and not any(isinstance(beta, Tensor) for beta in group.get("betas", ()))
        )


def _mixture(past: History, t: int, lr: float) -> tuple[float, tuple[float, ...]]:
    mixture = past.mixture(Clock(t, lr))
    return mixture.newest, mixture.emas


def _ready_outside_captures(ready: Callable[[], bool]) -> bool:
    return not torch.cuda.is_current_stream_capturing() and ready()
