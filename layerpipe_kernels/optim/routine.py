"""A step like the one before it: nothing is new but the gradients, the learning rate and the clock.

Looking at every option and every array again takes longer than the step of a small layer. A routine remembers how a
group was when everything was looked at, says whether it still is so, and makes the step and past weights in one call of
the compiled kernels each.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels.history import Clock, History, Mixture
from layerpipe_kernels.native import NativeRunner
from layerpipe_kernels.optim.arguments import Group
from layerpipe_kernels.plan import StepPlan

#: What may differ from step to step.
_MOVING = ("lr", "updates", "last_lr")


class Routine:
    """One parameter group after a step that looked at everything.

    Args:
        group: whose parameters all have a gradient; its clock is the host's.
        plan: of the compiled kernels, configured by that step.
        collector: of the plan.
        past: how the group has its past weights.
        state: the optimizer's.
    """

    def __init__(self, group: Group, plan: StepPlan, collector: Any, past: History | None, state: Any) -> None:
        assert isinstance(plan.runner, NativeRunner)
        self._group, self._params, self._state = group, group["params"], state
        self._runner, self._versioned, self._collector = plan.runner, plan.versioned, collector
        self._likes = [p.detach() for p in self._params]  # of their shapes, and cheaper to look at
        self._settings = operator.itemgetter(*[key for key in group if key not in _MOVING])
        self._values = self._settings(group)
        self._on_host = plan.device.type == "cpu"
        self._past = past
        # Kinds that keep something of their own make their past weights themselves.
        self.makes_past = past is not None and type(past).past is History.past and not group["materialize"]
        self._clock: Clock | None = None
        self._mixture: Mixture | None = None

    @staticmethod
    def possible(group: Group, past: History | None) -> bool:
        """Whether nothing besides the plan takes part in the group's step."""
        return (
            type(group["updates"]) is int
            and (past is None or not past.needs_states)
            and group["past_norm"] is None
            and not any(isinstance(value, Tensor) for value in group.values())
            and not any(isinstance(beta, Tensor) for beta in group.get("betas", ()))
        )

    def fits(self) -> bool:
        """Whether the group's options are as they were, and its learning rate a number that can be used."""
        lr = self._group["lr"]
        return type(lr) is float and math.isfinite(lr) and self._unchanged()

    def _unchanged(self) -> bool:
        return bool(self._settings(self._group) == self._values)

    def step(self) -> bool:
        """Make the step, or say false, with nothing written, where an array or a gradient is not what it was."""
        if not self._on_host and self._past is not None and torch.cuda.is_current_stream_capturing():
            return False
        group = self._group
        t, lr = group["updates"] + 1, group["lr"]
        stream, threads = self._runner.current()
        if not self._collector.step(self._runner.plan, self._params, self._state, lr, t, stream, threads):
            return False
        torch.autograd.graph.increment_version(self._versioned)
        group["updates"], group["last_lr"] = t, lr
        return True

    def past(self, i: int) -> Tensor | None:
        """The past weights of the group's ``i``-th parameter, or nothing where it is not what it was."""
        group = self._group
        clock = self._clock
        if clock is None or clock.t != group["updates"] or clock.lr != group["last_lr"]:
            if not self._unchanged() or self._past is None or type(group["updates"]) is not int:
                return None
            clock = self._clock = Clock(group["updates"], group["last_lr"])
            self._mixture = self._past.mixture(clock)
        mixture = self._mixture
        assert mixture is not None
        out = torch.empty_like(self._likes[i])
        stream, threads = self._runner.current()
        made = self._collector.past(
            self._runner.plan,
            i,
            self._params,
            self._state,
            out.data_ptr(),
            mixture.velocity,
            mixture.emas,
            stream,
            threads,
        )
        return out if made else None
