"""What SGD and Adam share: one fused step per parameter group, from a plan that is kept from step to step."""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.optim.optimizer as _torch_optimizer
from torch import Tensor

from layerpipe_kernels import backend, native, reference
from layerpipe_kernels.history import Clock, DeviceClock, History, fade
from layerpipe_kernels.optim.base import Group, PastOptimizer
from layerpipe_kernels.options import NO_PAST, Moment, Options
from layerpipe_kernels.plan import Arrays, StepPlan

#: Elements from which the allocator gives an array pages of its own.
_LARGE = 1 << 15

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

    #: Told by torch.amp.GradScaler, in attributes ``grad_scale`` and ``found_inf``, it unscales gradients itself and
    #: skips an update that overflowed, both on the device.
    _step_supports_amp_scaling = True

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

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights, and with them what their past is made of.

        Args:
            closure: reevaluates the model and returns the loss, which is then returned.
        """
        if torch.compiler.is_compiling():  # the step is one kernel already: a compiled function calls it as it is
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
        options = [self._options(group) for group in self.param_groups]  # all of them before any weight is written
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for index, group in enumerate(self.param_groups):
            self._step_group(index, group, options[index], scale, found_inf)
        return loss

    def _step_group(
        self, index: int, group: Group, options: Options, scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        past, params = self.history(group), group["params"]
        if not params:
            return
        device = params[0].device
        scale, found_inf = (None if told is None else _scalar_on(told, device) for told in (scale, found_inf))
        told = found_inf is not None or group["capturable"]
        if told and past is not None:
            self._keep_clock_on_device(group)
        elif past is not None and device.type == "cuda" and not isinstance(group["updates"], Tensor):
            _refuse_capture()
        clock = self.device_clock(group)
        ready, grads = self._gather(index, group, past, told)
        moving, still = (ready.moving, ready.still) if ready is not None else ([], params)
        norms = self._norms_of(group)
        at = clock if clock is not None else group["updates"]
        if past is not None and past.needs_states:
            past.before_update(params, [self.state[p] for p in params], at, found_inf)
        if norms is not None:
            norms.record(params, at, found_inf)
        if ready is not None:
            first = [p in self._fresh for p in moving] if self._fresh else ()
            design = past.design if past is not None else NO_PAST
            moment = Moment(
                0 if clock is not None else group["updates"] + 1, clock.t if clock else None, scale, found_inf
            )
            ready.plan.step(grads, options, design, moment, first)
            if self._fresh:
                self._fresh.difference_update(moving)
        if clock is not None:
            clock.tick(options.lr, found_inf, counted=ready is not None)
            self._mark_moved(moving, still, clock, found_inf)
        else:
            group["updates"], group["last_lr"] = group["updates"] + 1, options.lr
        if past is None:
            return
        if clock is None:
            self._mark_still(moving, still)
        self._age(still, past, clock or Clock(group["updates"], float(options.lr)), found_inf)
        if norms is not None and group["materialize"]:
            states = [self.state[p] for p in params if "past" in self.state[p]]
            norms.match([state["past"] for state in states], states, clock or group["updates"], found_inf)

    def _gather(
        self, index: int, group: Group, past: History | None, told: bool
    ) -> tuple[_Ready | None, Sequence[Tensor]]:
        """The group's plan, made anew when an array has moved, and its gradients; none where the plan has them."""
        params = group["params"]
        kept = Kept(
            self._states(group),
            past.emas if past is not None else 0,
            past is not None and group["materialize"],
            group["master_weights"],
            self._counts(group, told),
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
            begun = state.get("momentum_buffer") is not None and param not in self._fresh
            made = float(state.get("step", begun))
            state["step"] = torch.full((), made, dtype=torch.float32, device=param.device)
        if kept.counts and state["step"].device != param.device:  # torch keeps it on the CPU
            state["step"] = state["step"].to(param.device)
        for name in kept.states:
            if state.get(name) is None:
                state[name] = _zeros_apart(param.shape, full, param.device, 1 + kept.states.index(name))
                self._fresh.add(param)
        if kept.emas and ("ema" not in state or len(state["ema"]) != kept.emas):
            dtype = group["ema_dtype"] or full
            state["ema"] = _zeros_apart((kept.emas, *param.shape), dtype, param.device, 4)
        if kept.past and "past" not in state:
            state["past"] = _zeros_apart(param.shape, param.dtype, param.device, 5).copy_(param)
        if kept.master and "master" not in state:
            state["master"] = _zeros_apart(param.shape, torch.float32, param.device, 6).copy_(param)
        return state

    def _mark_still(self, moving: Sequence[Tensor], still: Sequence[Tensor]) -> None:
        if self._still:
            self._still.difference_update(moving)
        self._still.update(still)

    def _mark_moved(
        self, moving: Sequence[Tensor], still: Sequence[Tensor], clock: DeviceClock, found_inf: Tensor | None
    ) -> None:
        """As :meth:`_mark_still`, where only the device knows whether there was an update."""
        if not clock.has_velocity:
            return
        for param in self._still:
            self._moved_on_device(param, clock)
        for param in still:
            if param not in self._moved:
                self._moved[param] = torch.ones_like(clock.lr)
        for params, value in ((moving, 1.0), (still, 0.0)):
            for param in params:
                moved = self._moved.get(param)
                if moved is not None:
                    moved.fill_(value) if found_inf is None else moved.masked_fill_(found_inf == 0, value)

    @torch.no_grad()
    def _age(
        self, still: Sequence[Tensor], past: History, clock: Clock | DeviceClock, found_inf: Tensor | None
    ) -> None:
        """A parameter without a gradient was updated by zero: its averages fade, its weights stay."""
        if not still:
            return
        decays: Sequence[float | Tensor]
        turn: float | Tensor
        if isinstance(clock, DeviceClock):
            decays = clock.decays(found_inf).unbind()
            turn = clock.turn(found_inf) if past.design.turn else 0.0
        else:
            decays, turn = past.design.at(clock.t)[0], past.design.turn_at(clock.t)
        for param in still:
            state = self.state[param]
            if "ema" in state:
                fade(state["ema"].unbind(0), decays, turn)
            if "past" not in state:
                continue
            if isinstance(clock, Clock):
                past.past(param, state, past.mixture(clock), moved=False, out=state["past"])
                continue
            made = past.past_on_device(param, state, clock, moved=self._moved_on_device(param, clock))
            if found_inf is not None:  # else the step has written what may hold more than can be made now
                made = torch.where(found_inf == 0, made, state["past"])
            state["past"].copy_(made)


def _zeros_apart(shape: Sequence[int], dtype: torch.dtype, device: torch.device, place: int) -> Tensor:
    """Zeros that begin elsewhere in a page of memory than the group's other arrays.

    Large arrays all begin at the same offset in a page, and a step that walks through five of them at once then meets
    loads whose addresses look to the processor like those of stores in flight (4 KiB aliasing): 105 ms, not 73, for
    67 million parameters on a 2.5 GHz Xeon, 2026-11-22.
    """
    numel = math.prod(shape)
    skip = 64 * place if device.type == "cpu" and numel >= _LARGE else 0
    return torch.zeros(numel + skip, dtype=dtype, device=device)[skip:].view(tuple(shape))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled_step(optimizer: FusedOptimizer, closure: Callable[[], Any] | None) -> Any:
    return optimizer.step(closure)


def _scalar_on(value: Tensor, device: torch.device) -> Tensor:
    return value if value.device == device and value.dtype == torch.float32 else value.to(device, torch.float32)


def _refuse_capture() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a captured step would count its updates only once; give the optimizer capturable=True, so that the device "
            "counts them"
        )


def learning_rate(group: Group) -> float | Tensor:
    """A number, or the tensor itself where it lies beside the weights and looking at it would wait for them."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return float(lr)
    device = group["params"][0].device if group["params"] else lr.device
    if lr.device == device and (group["capturable"] or not lr.is_cpu):
        return _scalar_on(lr, device)
    return float(lr)


def check_flags(foreach: bool | None, fused: bool | None, differentiable: bool, name: str) -> None:
    """torch's ways to compute a step: every step here is fused, and none is differentiable.

    Raises:
        RuntimeError: ``fused`` beside ``foreach`` or ``differentiable``, as in torch.
        ValueError: ``differentiable``.
    """
    if fused and differentiable:
        raise RuntimeError("`fused` does not support `differentiable`")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if differentiable:
        raise ValueError(f"differentiable=True is not supported; use torch.optim.{name}")


def check_learning_rate(lr: float | Tensor) -> None:
    """As torch does, and a NaN."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not float(lr) >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}; lr must be a number of at least 0")
