"""SGD with momentum, its past weights kept by the same pass over memory."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels import backend, reference
from layerpipe_kernels.decay import DecayRule
from layerpipe_kernels.history import Clock, History, Taps
from layerpipe_kernels.optim.base import PAST_DEFAULTS, Group, PastOptimizer, require_finite
from layerpipe_kernels.plan import SgdPlan
from layerpipe_kernels.reference import SgdOptions


class SGD(PastOptimizer):
    """:class:`torch.optim.SGD` with a memory of its past weights.

    torch's names, defaults and results: a float32 step on the CPU equals torch's for-loop implementation bit for bit.
    With ``delay=n`` the step also keeps what the weights of ``n`` updates ago are reconstructed from.

    Args:
        params: parameters, named parameters, or dicts of groups.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.
        delay: ``n``, how many updates lie between a forward and its backward; 0 keeps no history.
        past: ``"blend"``, ``"ema"``, ``"momentum"``, ``"latest"`` or ``"stash"``; see :mod:`layerpipe_kernels.history`.
        order: number of EMAs of a blend, 1 to 3.
        ema_decay: a rule's name, a number, a function of the delay, or for a blend a tuple; default: designed.
        ema_of: ``"update"``, or ``"gradient"`` for the paper's literal form.
        materialize: let the step itself write the past weights, at one more copy of memory.
        backend: ``"auto"``, ``"cpp"`` or ``"reference"``.
        foreach, fused, differentiable: accepted for torch's sake; every step here is fused, none is differentiable.

    Raises:
        ValueError: an option out of its range, or options that contradict each other.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        delay: int = 0,
        past: str = "blend",
        order: int = 2,
        ema_decay: DecayRule | tuple[float, ...] | None = None,
        ema_of: str = "update",
        materialize: bool = False,
        backend: str = "auto",
    ) -> None:
        if differentiable:
            raise ValueError("differentiable=True is not supported; use torch.optim.SGD")
        defaults = {
            **PAST_DEFAULTS,
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "delay": delay,
            "past": past,
            "order": order,
            "ema_decay": ema_decay,
            "ema_of": ema_of,
            "materialize": materialize,
            "backend": backend,
        }
        super().__init__(params, defaults)

    def _reset_caches(self) -> None:
        super()._reset_caches()
        self._plans: dict[int, SgdPlan] = {}
        self._fresh: set[Tensor] = set()  # parameters whose momentum buffer holds nothing yet

    def _check_group(self, group: Group) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            if not float(group[name]) >= 0.0:
                raise ValueError(f"Invalid {name} value: {group[name]}")
        require_finite(group, ("lr", "momentum", "dampening", "weight_decay"))
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        super()._check_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights, and with them what their past is made of."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # all of them before any weight is written
            require_finite(group, ("lr", "momentum", "dampening", "weight_decay"))
        for i, group in enumerate(self.param_groups):
            self._step_group(i, group)
        return loss

    def _step_group(self, index: int, group: Group) -> None:
        params: list[Tensor] = group["params"]
        grads = [p.grad for p in params]
        still = [p for p, g in zip(params, grads, strict=True) if g is None]
        moving = [p for p, g in zip(params, grads, strict=True) if g is not None] if still else params
        past = self.history(group)
        clock = Clock(group["updates"] + 1, float(group["lr"]))
        plan = self._plan(index, group, moving, past) if moving else None
        present = plan.check_grads([g for g in grads if g is not None]) if plan is not None else []
        if past is not None:
            past.before_update(params, [self.state[p] for p in params], clock.t - 1)
            if self._still:
                self._still.difference_update(moving)
            self._still.update(still)
            self._age_still(still, past, clock)
        if plan is not None:
            taps = past.taps(clock) if past is not None else Taps(0.0, ())
            options = SgdOptions(
                lr=clock.lr,
                momentum=group["momentum"],
                dampening=group["dampening"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                ema_of_gradient=group["ema_of"] == "gradient",
                decays=past.decays(clock.t) if past is not None else (),
                taps=taps.emas,
                update_tap=taps.update,
            )
            plan.step(present, [p in self._fresh for p in moving] if self._fresh else [False] * len(moving), options)
            if self._fresh:
                self._fresh.difference_update(moving)
        group["updates"], group["last_lr"] = clock.t, clock.lr

    def _plan(self, index: int, group: Group, moving: Sequence[Tensor], past: History | None) -> SgdPlan:
        """The plan of this group's parameters with gradients, made anew when an array has moved."""
        plan = self._plans.get(index)
        keys = [key for key, kept in self._arrays(group, past) if kept]
        count = past.emas if past is not None else 0
        if (
            plan is not None
            and plan.ema_count == count
            and len(plan.weights) == len(moving)
            and all(map(operator.is_, plan.weights, moving))
        ):
            states = [self.state[p] for p in moving]
            try:
                if plan.fits(moving, [s[key] for key in keys for s in states]):
                    return plan
            except KeyError:
                pass  # somebody took an array away: begin it anew
        states = [self._state(p, group, past) for p in moving]
        velocities, emas, pasts = (
            [s[key] for s in states] if kept else None for key, kept in self._arrays(group, past)
        )
        names = [self.name(group, i) for i, p in enumerate(group["params"]) if p.grad is not None]
        chosen = backend.choose(moving[0], group["backend"])
        plan = self._plans[index] = SgdPlan(moving, velocities, emas, pasts, names=names, backend=chosen)
        return plan

    @staticmethod
    def _arrays(group: Group, past: History | None) -> tuple[tuple[str, bool], ...]:
        """What a parameter's state holds for the step, in the plan's order."""
        return (
            ("momentum_buffer", bool(group["momentum"])),
            ("ema", past is not None and past.emas > 0),
            ("past", past is not None and bool(group["materialize"])),
        )

    def _state(self, param: Tensor, group: Group, past: History | None) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        dtype = reference.state_dtype(param.dtype)
        if group["momentum"] and state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(param, dtype=dtype)
            self._fresh.add(param)
        if past is not None and past.emas and ("ema" not in state or len(state["ema"]) != past.emas):
            state["ema"] = torch.zeros((past.emas, *param.shape), dtype=dtype, device=param.device)
        if past is not None and group["materialize"] and "past" not in state:
            state["past"] = torch.empty_like(param)
        return state

    def _age_still(self, still: Sequence[Tensor], past: History, clock: Clock) -> None:
        """A parameter without a gradient was updated by zero: its averages fade, its weights stay."""
        for param in still:
            state = self.state[param]
            for e, decay in zip(state.get("ema", ()), past.decays(clock.t), strict=False):
                e.mul_(decay)
            if "past" in state:
                past.past(param, state, past.mixture(clock), moved=False, out=state["past"])
