"""The base of optimizers with one fused step per parameter group."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.optim.optimizer as _torch_optimizer
from torch import Tensor
from torch._compile import _disable_dynamo

from layerpipe_kernels.history import Clock, History
from layerpipe_kernels.optim.options import Group, past_of, scalar_on
from layerpipe_kernels.optim.planned import Found, PlannedOptimizer, Ready
from layerpipe_kernels.optim.routine import PastMaker, Routine
from layerpipe_kernels.options import NO_PAST, Options, StepArguments

_empty_like = torch.empty_like


class FusedOptimizer(PlannedOptimizer):
    """A :class:`PastOptimizer` that steps a whole parameter group in one pass over memory."""

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """True if a :class:`torch.amp.GradScaler` hands over ``grad_scale`` and ``found_inf``, by which the step
        unscales gradients and skips an update that overflowed on the device; with ``fused=False`` the scaler does."""
        return self.defaults.get("fused") is not False

    @abstractmethod
    def _options(self, group: Group) -> Options:
        """Returns the group's hyperparameters as the kernels take them; refuses those that would spoil the weights."""

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._routines: dict[int, Routine] = {}
        self._past_makers: dict[int, PastMaker] = {}  # by the parameter's id, which is cheaper to hash

    def tables(self) -> list[object]:
        """Returns what steps and past weights read besides weights and their state. A captured graph reads it at
        every replay and does not keep it; the optimizer may drop it when a group or a state changes."""
        horizons = [group["horizon_at"] for group in self.param_groups]
        kept = (self._ready_groups, self._clocks, self._norms, self._updated)
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
    # wrapper when there are hooks or a profiler.
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
        """Step by routine, if nothing has changed in any group; else return false, with nothing written."""
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
        self, index: int, group: Group, ready: Ready | None, past: History | None, before: float
    ) -> None:
        """Make a routine for the next step, if that need not check everything again."""
        old = self._routines.get(index)
        if old is not None and ready is not None and old.made_from(ready.collector, past) and old.fits():
            return  # only the gradients were not where it looks for them
        if (old := self._routines.pop(index, None)) is not None:
            for maker in old.makers:
                self._past_makers.pop(id(maker.param), None)
        if ready is None or ready.collector is None or ready.without_grad or not Routine.possible(group, past):
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
        found: Found,
        scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        params = group["params"]
        if not params:
            return
        device = params[0].device
        scale, found_inf = (None if value is None else scalar_on(value, device) for value in (scale, found_inf))
        past, ready, grads, before = found
        clock = self.device_clock(group)
        with_grad, without_grad = (ready.with_grad, ready.without_grad) if ready is not None else ([], params)
        norms = self._norms_of(group)
        at = clock if clock is not None else group["updates"]
        if past is not None and past.needs_states:
            past.before_update(params, [self.state[p] for p in params], at, found_inf)
        if norms is not None:
            norms.record(params, at, found_inf)
        horizon_at = group["horizon_at"]
        if without_grad:
            self._unpredict(without_grad, before if horizon_at is None else horizon_at, found_inf)
        if ready is not None:
            first = [p in self._fresh for p in with_grad] if self._fresh else ()
            design = past.design if past is not None else NO_PAST
            t, counted = (0, clock.t) if clock is not None else (group["updates"] + 1, None)
            args = StepArguments(t, counted, scale, found_inf, group["horizon"], before, horizon_at)
            ready.plan.step(grads, options, design, args, first)
            if self._fresh:
                self._fresh.difference_update(with_grad)
        if clock is not None:
            clock.tick(options.lr, found_inf, counted=ready is not None)
            self._mark_updated(with_grad, without_grad, clock, found_inf)
        else:
            lr = options.lr
            if past is not None and isinstance(lr, Tensor):
                lr = lr.clone()  # a schedule may fill it before the past is asked for
            group["updates"], group["last_lr"] = group["updates"] + 1, lr
        self._begin_routine(index, group, ready, past, before)
        if past is None:
            return
        if clock is None:
            self._mark_without_grad(with_grad, without_grad)
        self._age(without_grad, past, clock or Clock(group["updates"], float(options.lr)), found_inf)
        if norms is not None and past_of(group).materialize:
            states = [self.state[p] for p in params if "past" in self.state[p]]
            norms.match([state["past"] for state in states], states, clock or group["updates"], found_inf)


@_disable_dynamo  # torch.compiler.disable would import the compiler here and now, which takes seconds
def _uncompiled_step(optimizer: FusedOptimizer, closure: Callable[[], Any] | None) -> Any:
    return optimizer.step(closure)
