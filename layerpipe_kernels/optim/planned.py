"""The arrays and the plan of a group's step, kept from step to step as long as they fit."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from layerpipe_kernels import backend, native, reference
from layerpipe_kernels.history import History, MomentumHistory
from layerpipe_kernels.optim.arrays import Kept, complete
from layerpipe_kernels.optim.base import PastOptimizer
from layerpipe_kernels.optim.options import Group, past_of, refuse_capture
from layerpipe_kernels.optim.prediction import horizon_of, keep_horizon_on_device, predicts
from layerpipe_kernels.plan import Arrays, StepPlan


class Ready(NamedTuple):
    """A group as it was in the last step; if nothing has changed, the next one is a few calls."""

    kept: Kept
    plan: StepPlan
    with_grad: list[Tensor]  # parameters with a gradient
    without_grad: list[Tensor]  # parameters without
    collector: Any  # gathers the gradients for compiled kernels; None for other backends


class Found(NamedTuple):
    """The inputs of a group's step besides its options."""

    past: History | None
    ready: Ready | None  # None where no parameter has a gradient
    grads: Sequence[Tensor]  # none where the plan has them
    horizon_before: float  # which the weights are predicted with


class PlannedOptimizer(PastOptimizer):
    """A :class:`PastOptimizer` with a :class:`layerpipe_kernels.plan.StepPlan` per parameter group."""

    rule: ClassVar[str]  # the kernels' name for it
    collects: ClassVar[bool] = True  # compiled kernels may gather the parameters' gradients themselves

    @abstractmethod
    def _states(self, group: Group) -> tuple[str, ...]:
        """Returns the names of the optimizer's own arrays, in the kernels' order."""

    @abstractmethod
    def _counts(self, group: Group, on_device: bool) -> bool:
        """Returns whether each parameter counts its own steps, under torch's name ``step``; ``on_device`` if only the
        device knows whether there is one."""

    def _keeps_state(self, group: Group) -> bool:
        return bool(self._states(group))

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._ready_groups: dict[int, Ready] = {}

    def _find_arrays(self, index: int, group: Group, on_device: bool) -> Found:
        """Returns the inputs of a step, with a new plan where an array has moved. Refuses what cannot be stepped.

        Args:
            index: of the group.
            group: one of the optimizer's.
            on_device: whether only the device knows whether there is an update.
        """
        if on_device and group["params"]:
            keep_horizon_on_device(group)
        previous, before = predicts(group), group["horizon"]
        group["horizon"] = horizon_of(group)
        past, params = self.history(group), list(group["params"])
        if not params:
            return Found(past, None, (), before)
        if (
            isinstance(past, MomentumHistory)
            and past.settings.momentum != group["momentum"]
            and type(group["updates"]) is int
        ):
            group["designed_for"] = None
            past = self.history(group)
        if on_device and past is not None:
            self._keep_clock_on_device(group)
        elif past is not None and params[0].device.type == "cuda" and not isinstance(group["updates"], Tensor):
            refuse_capture()
        kept = Kept(
            self._states(group),
            past.emas if past is not None else 0,
            past is not None and past_of(group).materialize,
            group["master_weights"] and reference.state_dtype(params[0].dtype) != params[0].dtype,
            self._counts(group, on_device),
            previous,
        )
        ready = self._ready_groups.get(index)
        if ready is not None and ready.kept != kept:
            ready = None
        if ready is not None and ready.collector is not None:
            assert isinstance(ready.plan.runner, native.NativeRunner)
            if ready.collector.collect(ready.plan.runner.plan, params, self.state):
                return Found(past, ready, (), before)
        with_grad = [p for p in params if p.grad is not None]
        if not with_grad:
            return Found(past, None, (), before)
        if ready is None or not self._unchanged(ready, with_grad):
            ready = self._ready_groups[index] = self._prepare(group, kept, with_grad)
        return Found(past, ready, self._grads(ready, with_grad), before)

    def _grads(self, ready: Ready, with_grad: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the gradients of these, checked, as the plan takes them."""
        return ready.plan.check_grads([p.grad for p in with_grad if p.grad is not None])

    def _grad_dtype(self, param: Tensor) -> torch.dtype | None:
        """Returns the dtype of what the plan takes as a parameter's gradient."""
        return param.grad.dtype if param.grad is not None else None

    def _unchanged(self, ready: Ready, with_grad: Sequence[Tensor]) -> bool:
        if len(with_grad) != len(ready.with_grad) or not all(map(operator.is_, with_grad, ready.with_grad)):
            return False
        if self._grad_dtype(with_grad[0]) != ready.plan.grad_dtype:
            return False
        arrays = [self.state[p].get(key) for key in ready.kept.names() for p in with_grad]
        if any(array is None for array in arrays):
            return False  # an array is gone, as torch's checkpoints have an empty one: begin it anew
        return ready.plan.fits([*with_grad, *arrays])

    @torch.no_grad()
    def _prepare(self, group: Group, kept: Kept, with_grad: list[Tensor]) -> Ready:
        params = list(group["params"])
        states = [complete(self.state[p], p, kept, past_of(group).dtype, self._fresh) for p in with_grad]
        arrays = Arrays(
            with_grad,
            tuple([state[name] for state in states] for name in kept.states),
            *([state[key] for state in states] if wanted else [] for key, wanted in (
                ("ema", kept.emas), ("past", kept.past), ("master", kept.master), ("step", kept.counts),
                ("previous_update", kept.previous))),
        )  # fmt: skip
        chosen = backend.choose(with_grad[0], group["backend"])
        plan = StepPlan(
            self.rule,
            arrays,
            names=[self.name(group, i) for i, p in enumerate(params) if p.grad is not None],
            backend=chosen,
            grad_dtype=self._grad_dtype(with_grad[0]),
        )
        collector = None
        if self.collects and chosen in ("cpp", "cuda"):
            flags = [p.grad is not None for p in params]
            collector = backend.extension().Collector(params, flags, self.state, kept.names(), native.EXCHANGE)
        return Ready(kept, plan, with_grad, [p for p in params if p.grad is None], collector)
