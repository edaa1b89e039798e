"""What SGD and Adam share: one fused step per parameter group, from a plan that is kept from step to step."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.optim.optimizer as _torch_optimizer
from torch import Tensor

from layerpipe_kernels import backend, native, reference
from layerpipe_kernels.history import Clock, History
from layerpipe_kernels.optim.base import Group, PastOptimizer
from layerpipe_kernels.options import NO_PAST, Moment, Options
from layerpipe_kernels.plan import Arrays, StepPlan

#: torch's C functions for looking at a tensor (DLPack), where it has them.
_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)


class Kept(NamedTuple):
    """Which arrays a group's options ask for, by their names in a parameter's state."""

    states: tuple[str, ...]  # the optimizer's own, in the kernels' order
    emas: int
    past: bool
    master: bool
    counts: bool

    def names(self) -> tuple[str, ...]:
        """In the order of :meth:`layerpipe_kernels.plan.Arrays.written`."""
        optional = (("ema", self.emas), ("past", self.past), ("master", self.master), ("step", self.counts))
        return (*self.states, *(key for key, kept in optional if kept))


class _Ready(NamedTuple):
    """A group as it was in the last step; if nothing has changed, the next one is a few calls."""

    kept: Kept
    plan: StepPlan
    moving: list[Tensor]  # parameters with a gradient
    still: list[Tensor]  # parameters without
    collector: Any  # gathers the gradients for compiled kernels; None for other backends


class FusedOptimizer(PastOptimizer):
    """A :class:`PastOptimizer` that steps a whole parameter group in one pass over memory."""

    rule: ClassVar[str]  # the kernels' name for it
    counts: ClassVar[bool] = False  # whether each parameter counts its own steps, under torch's name ``step``

    @abstractmethod
    def _options(self, group: Group) -> Options:
        """The group's hyperparameters as the kernels take them; those that would spoil the weights are refused."""

    @abstractmethod
    def _states(self, group: Group) -> tuple[str, ...]:
        """The names of the optimizer's own arrays, in the kernels' order."""

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._ready_groups: dict[int, _Ready] = {}
        self._fresh: set[Tensor] = set()  # parameters whose momentum buffer holds nothing yet

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights, and with them what their past is made of.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.
        """
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
        options = [self._options(group) for group in self.param_groups]  # all of them before any weight is written
        for index, group in enumerate(self.param_groups):
            self._step_group(index, group, options[index])
        return loss

    def _step_group(self, index: int, group: Group, options: Options) -> None:
        past = self.history(group)
        clock = Clock(group["updates"] + 1, float(options.lr))
        ready, grads = self._gather(index, group, past)
        if past is not None:
            params = group["params"]
            past.before_update(params, [self.state[p] for p in params] if past.needs_states else (), clock.t - 1)
            self._mark_still(ready.moving if ready else [], ready.still if ready else params)
            self._age(ready.still if ready else params, past, clock)
        if ready is not None:
            first = [p in self._fresh for p in ready.moving] if self._fresh else ()
            design = past.design if past is not None else NO_PAST
            ready.plan.step(grads, options, design, Moment(clock.t), first)
            if self._fresh:
                self._fresh.difference_update(ready.moving)
        group["updates"], group["last_lr"] = clock.t, clock.lr

    def _gather(self, index: int, group: Group, past: History | None) -> tuple[_Ready | None, Sequence[Tensor]]:
        """The group's plan, made anew when an array has moved, and its gradients; none where the plan has them."""
        params = group["params"]
        kept = Kept(
            self._states(group),
            past.emas if past is not None else 0,
            past is not None and group["materialize"],
            group["master_weights"],
            self.counts,
        )
        ready = self._ready_groups.get(index)
        if ready is not None and ready.kept != kept:
            ready = None
        if ready is not None and ready.collector is not None:
            assert isinstance(ready.plan.runner, native.NativeRunner)
            if ready.collector.collect(ready.plan.runner.plan, params, self.state):
                return ready, ()
        moving = [p for p in params if p.grad is not None]
        if not moving:
            return None, ()
        if ready is None or not self._unchanged(ready, moving):
            ready = self._ready_groups[index] = self._prepare(group, kept, moving)
        return ready, ready.plan.check_grads([p.grad for p in moving if p.grad is not None])

    def _unchanged(self, ready: _Ready, moving: Sequence[Tensor]) -> bool:
        if len(moving) != len(ready.moving) or not all(map(operator.is_, moving, ready.moving)):
            return False
        states = [self.state[p] for p in moving]
        try:
            return ready.plan.fits([*moving, *(state[key] for key in ready.kept.names() for state in states)])
        except KeyError:
            return False  # somebody took an array away: begin it anew

    @torch.no_grad()
    def _prepare(self, group: Group, kept: Kept, moving: list[Tensor]) -> _Ready:
        params = group["params"]
        states = [self._state(p, group, kept) for p in moving]
        arrays = Arrays(
            moving,
            tuple([state[name] for state in states] for name in kept.states),
            *([state[key] for state in states] if wanted else [] for key, wanted in (
                ("ema", kept.emas), ("past", kept.past), ("master", kept.master), ("step", kept.counts))),
        )  # fmt: skip
        chosen = backend.choose(moving[0], group["backend"])
        grad = moving[0].grad
        plan = StepPlan(
            self.rule,
            arrays,
            names=[self.name(group, i) for i, p in enumerate(params) if p.grad is not None],
            backend=chosen,
            grad_dtype=grad.dtype if grad is not None else None,
        )
        collector = None
        if chosen in ("cpp", "cuda"):
            flags = [p.grad is not None for p in params]
            collector = backend.extension().Collector(params, flags, self.state, kept.names(), _EXCHANGE)
        return _Ready(kept, plan, moving, [p for p in params if p.grad is None], collector)

    def _state(self, param: Tensor, group: Group, kept: Kept) -> dict[str, Any]:
        """The parameter's state, with zeros where an array is missing."""
        state: dict[str, Any] = self.state[param]
        full = reference.state_dtype(param.dtype)
        if kept.counts and not isinstance(state.get("step"), Tensor):
            state["step"] = torch.full((), float(state.get("step", 0.0)), dtype=torch.float32, device=param.device)
        if kept.counts and state["step"].device != param.device:  # torch keeps it on the CPU
            state["step"] = state["step"].to(param.device)
        for name in kept.states:
            if state.get(name) is None:
                state[name] = torch.zeros_like(param, dtype=full)
                self._fresh.add(param)
        if kept.emas and ("ema" not in state or len(state["ema"]) != kept.emas):
            dtype = group["ema_dtype"] or full
            state["ema"] = torch.zeros((kept.emas, *param.shape), dtype=dtype, device=param.device)
        if kept.past and "past" not in state:
            state["past"] = torch.empty_like(param)
        if kept.master and "master" not in state:
            state["master"] = param.detach().to(torch.float32, copy=True)
        return state

    def _mark_still(self, moving: Sequence[Tensor], still: Sequence[Tensor]) -> None:
        if self._still:
            self._still.difference_update(moving)
        self._still.update(still)

    @torch.no_grad()
    def _age(self, still: Sequence[Tensor], past: History, clock: Clock) -> None:
        """A parameter without a gradient was updated by zero: its averages fade, its weights stay."""
        for param in still:
            state = self.state[param]
            for e, decay in zip(state.get("ema", ()), past.design.at(clock.t)[0], strict=False):
                e.mul_(decay)
            if "past" in state:
                past.past(param, state, past.mixture(clock), moved=False, out=state["past"])
