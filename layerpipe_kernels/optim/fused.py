"""What SGD and Adam share: one fused step per parameter group, from a plan that is kept from step to step."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.optim.optimizer as _torch_optimizer
from torch import Tensor
from torch._compile import _disable_dynamo

from layerpipe_kernels import backend, native, reference
from layerpipe_kernels.history import Clock, History, MomentumHistory
from layerpipe_kernels.optim.arrays import Kept, complete
from layerpipe_kernels.optim.base import PastOptimizer
from layerpipe_kernels.optim.options import Group, past_of, refuse_capture, scalar_on
from layerpipe_kernels.optim.prediction import horizon_of, keep_horizon_on_device, predicts
from layerpipe_kernels.optim.routine import PastMaker, Routine
from layerpipe_kernels.options import NO_PAST, Moment, Options
from layerpipe_kernels.plan import Arrays, StepPlan

_empty_like = torch.empty_like


class _Ready(NamedTuple):
    """A group as it was in the last step; if nothing has changed, the next one is a few calls."""

    kept: Kept
    plan: StepPlan
    moving: list[Tensor]  # parameters with a gradient
    still: list[Tensor]  # parameters without
    collector: Any  # gathers the gradients for compiled kernels; None for other backends


class _Found(NamedTuple):
    """What a step of a group needs besides its options."""

    past: History | None
    ready: _Ready | None  # None where no parameter has a gradient
    grads: Sequence[Tensor]  # none where the plan has them
    horizon_before: float  # which the weights are predicted with


class FusedOptimizer(PastOptimizer):
    """A :class:`PastOptimizer` that steps a whole parameter group in one pass over memory."""

    rule: ClassVar[str]  # the kernels' name for it
    collects: ClassVar[bool] = True  # compiled kernels may gather the parameters' gradients themselves

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Told by torch.amp.GradScaler, in attributes ``grad_scale`` and ``found_inf``, it unscales gradients itself
        and skips an update that overflowed, both on the device; with ``fused=False`` the scaler does that."""
        return self.defaults.get("fused") is not False

    @abstractmethod
    def _options(self, group: Group) -> Options:
        """The group's hyperparameters as the kernels take them; those that would spoil the weights are refused."""

    @abstractmethod
    def _states(self, group: Group) -> tuple[str, ...]:
        """The names of the optimizer's own arrays, in the kernels' order."""

    @abstractmethod
    def _counts(self, group: Group, told: bool) -> bool:
        """Whether each parameter counts its own steps, under torch's name ``step``; ``told`` if only the device knows
        whether there is one."""

    def _keeps_state(self, group: Group) -> bool:
        return bool(self._states(group))

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._ready_groups: dict[int, _Ready] = {}
        self._routines: dict[int, Routine] = {}
        self._past_makers: dict[int, PastMaker] = {}  # by the parameter's id, which is cheaper to hash

    def tables(self) -> list[object]:
        """What steps and past weights read besides weights and their state. A graph that captured them reads it at
        every replay and does not keep it; the optimizer may drop it when a group or a state changes."""
        horizons = [group["horizon_at"] for group in self.param_groups]
        kept = (self._ready_groups, self._clocks, self._norms, self._moved)
        return [*(table for tables in kept for table in tables.values()), *horizons]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights, and with them what their past is made of.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.
        """
        # The step is one kernel already: a traced function calls it as it is. is_compiling() is true here, too,
        # while another thread compiles.
        if torch.compiler.is_dynamo_compiling():
            return _uncompiled_step(self, closure)
        if self._watched():
            return self._watched_step(closure)
        return self._step(closure)

    # torch wraps every optimizer's step for its profiler and hooks, at the price of a small step; this one calls that
    # wrapper when somebody looks.
    step.hooked = True  # type: ignore[attr-defined]

    def _watched(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _torch_optimizer._global_optimizer_pre_hooks
            or _torch_optimizer._global_optimizer_post_hooks
            or torch._C._autograd._profiler_enabled()
        )

    def _watched_step(self, closure: Callable[[], Any] | None) -> Any:
        return torch.optim.Optimizer.profile_hook_step(type(self)._step)(self, closure)

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None and found_inf is None and self._step_as_before():
            return loss
        self._refuse_evaluation("a step")
        # All groups are looked at before any weight is written.
        self._check_changed()
        options = [self._options(group) for group in self.param_groups]
        before = [group["horizon"] for group in self.param_groups]
        try:
            found = [
                self._find_arrays(index, group, found_inf is not None or group["capturable"])
                for index, group in enumerate(self.param_groups)
            ]
        except Exception:
            for group, horizon in zip(self.param_groups, before, strict=True):
                group["horizon"] = horizon
            raise
        for index, group in enumerate(self.param_groups):
            self._step_group(index, group, options[index], found[index], scale, found_inf)
        return loss

    def _step_as_before(self) -> bool:
        """Step by routine; false, with nothing written, where something has changed in a group."""
        routines, state = self._routines, self.state
        if len(routines) != len(self.param_groups):
            return False
        for index, group in enumerate(self.param_groups):
            routine = routines.get(index)
            if routine is None or routine.group is not group or routine.state is not state or not routine.ready():
                return False
        for index in range(len(routines)):
            routines[index].step()
        return True

    def past_view(self, param: Tensor, n: int | None = None) -> Tensor:
        maker = self._past_makers.get(id(param)) if n is None else None
        if maker is not None and maker.param is param and maker.state is self.state:
            past = _empty_like(maker.like)
            if maker.write(maker.i, past):
                return past
        return self._past(param, None, n)

    def _begin_routine(
        self, index: int, group: Group, ready: _Ready | None, past: History | None, before: float
    ) -> None:
        """After a step that looked at everything, if the next one need not."""
        old = self._routines.get(index)
        if old is not None and ready is not None and old.made_from(ready.collector, past) and old.fits():
            return  # only the gradients were not where it looks for them
        if (old := self._routines.pop(index, None)) is not None:
            for maker in old.makers:
                self._past_makers.pop(id(maker.param), None)
        if ready is None or ready.collector is None or ready.still or not Routine.possible(group, past):
            return
        if before != group["horizon"]:
            return  # the next step begins with what this one has predicted
        routine = self._routines[index] = Routine(
            group, ready.plan, ready.collector, past, self.state, float(group["horizon"])
        )
        self._past_makers.update((id(maker.param), maker) for maker in routine.makers)

    def _step_group(
        self,
        index: int,
        group: Group,
        options: Options,
        found: _Found,
        scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        params = group["params"]
        if not params:
            return
        device = params[0].device
        scale, found_inf = (None if told is None else scalar_on(told, device) for told in (scale, found_inf))
        past, ready, grads, before = found
        clock = self.device_clock(group)
        moving, still = (ready.moving, ready.still) if ready is not None else ([], params)
        norms = self._norms_of(group)
        at = clock if clock is not None else group["updates"]
        if past is not None and past.needs_states:
            past.before_update(params, [self.state[p] for p in params], at, found_inf)
        if norms is not None:
            norms.record(params, at, found_inf)
        horizon_at = group["horizon_at"]
        if still:
            self._unpredict(still, before if horizon_at is None else horizon_at, found_inf)
        if ready is not None:
            first = [p in self._fresh for p in moving] if self._fresh else ()
            design = past.design if past is not None else NO_PAST
            t, counted = (0, clock.t) if clock is not None else (group["updates"] + 1, None)
            moment = Moment(t, counted, scale, found_inf, group["horizon"], before, horizon_at)
            ready.plan.step(grads, options, design, moment, first)
            if self._fresh:
                self._fresh.difference_update(moving)
        if clock is not None:
            clock.tick(options.lr, found_inf, counted=ready is not None)
            self._mark_moved(moving, still, clock, found_inf)
        else:
            lr = options.lr
            if past is not None and isinstance(lr, Tensor):
                lr = lr.clone()  # a schedule may fill it before the past is asked for
            group["updates"], group["last_lr"] = group["updates"] + 1, lr
        self._begin_routine(index, group, ready, past, before)
        if past is None:
            return
        if clock is None:
            self._mark_still(moving, still)
        self._age(still, past, clock or Clock(group["updates"], float(options.lr)), found_inf)
        if norms is not None and past_of(group).materialize:
            states = [self.state[p] for p in params if "past" in self.state[p]]
            norms.match([state["past"] for state in states], states, clock or group["updates"], found_inf)

    def _find_arrays(self, index: int, group: Group, told: bool) -> _Found:
        """What a step needs, its plan made anew where an array has moved. Refuses what cannot be stepped.

        Args:
            index: of the group.
            group: one of the optimizer's.
            told: whether only the device knows whether there is an update.
        """
        if told and group["params"]:
            keep_horizon_on_device(group)
        previous, before = predicts(group), group["horizon"]
        group["horizon"] = horizon_of(group)
        past, params = self.history(group), list(group["params"])
        if not params:
            return _Found(past, None, (), before)
        if (
            isinstance(past, MomentumHistory)
            and past.settings.momentum != group["momentum"]
            and type(group["updates"]) is int
        ):
            group["designed_for"] = None
            past = self.history(group)
        if told and past is not None:
            self._keep_clock_on_device(group)
        elif past is not None and params[0].device.type == "cuda" and not isinstance(group["updates"], Tensor):
            refuse_capture()
        kept = Kept(
            self._states(group),
            past.emas if past is not None else 0,
            past is not None and past_of(group).materialize,
            group["master_weights"] and reference.state_dtype(params[0].dtype) != params[0].dtype,
            self._counts(group, told),
            previous,
        )
        ready = self._ready_groups.get(index)
        if ready is not None and ready.kept != kept:
            ready = None
        if ready is not None and ready.collector is not None:
            assert isinstance(ready.plan.runner, native.NativeRunner)
            if ready.collector.collect(ready.plan.runner.plan, params, self.state):
                return _Found(past, ready, (), before)
        moving = [p for p in params if p.grad is not None]
        if not moving:
            return _Found(past, None, (), before)
        if ready is None or not self._unchanged(ready, moving):
            ready = self._ready_groups[index] = self._prepare(group, kept, moving)
        return _Found(past, ready, self._grads(ready, moving), before)

    def _grads(self, ready: _Ready, moving: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients of these, checked, as the plan takes them."""
        return ready.plan.check_grads([p.grad for p in moving if p.grad is not None])

    def _grad_dtype(self, param: Tensor) -> torch.dtype | None:
        """Of what the plan takes as a parameter's gradient."""
        return param.grad.dtype if param.grad is not None else None

    def _unchanged(self, ready: _Ready, moving: Sequence[Tensor]) -> bool:
        if len(moving) != len(ready.moving) or not all(map(operator.is_, moving, ready.moving)):
            return False
        if self._grad_dtype(moving[0]) != ready.plan.grad_dtype:
            return False
        arrays = [self.state[p].get(key) for key in ready.kept.names() for p in moving]
        if any(array is None for array in arrays):
            return False  # somebody took an array away, as torch's checkpoints have an empty one: begin it anew
        return ready.plan.fits([*moving, *arrays])

    @torch.no_grad()
    def _prepare(self, group: Group, kept: Kept, moving: list[Tensor]) -> _Ready:
        params = list(group["params"])
        states = [complete(self.state[p], p, kept, past_of(group).dtype, self._fresh) for p in moving]
        arrays = Arrays(
            moving,
            tuple([state[name] for state in states] for name in kept.states),
            *([state[key] for state in states] if wanted else [] for key, wanted in (
                ("ema", kept.emas), ("past", kept.past), ("master", kept.master), ("step", kept.counts),
                ("previous_update", kept.previous))),
        )  # fmt: skip
        chosen = backend.choose(moving[0], group["backend"])
        plan = StepPlan(
            self.rule,
            arrays,
            names=[self.name(group, i) for i, p in enumerate(params) if p.grad is not None],
            backend=chosen,
            grad_dtype=self._grad_dtype(moving[0]),
        )
        collector = None
        if self.collects and chosen in ("cpp", "cuda"):
            flags = [p.grad is not None for p in params]
            collector = backend.extension().Collector(params, flags, self.state, kept.names(), native.EXCHANGE)
        return _Ready(kept, plan, moving, [p for p in params if p.grad is None], collector)


@_disable_dynamo  # torch.compiler.disable would import the compiler here and now, which takes seconds
def _uncompiled_step(optimizer: FusedOptimizer, closure: Callable[[], Any] | None) -> Any:
    return optimizer.step(closure)
