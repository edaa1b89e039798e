"""Parameters without a gradient: an update by zero, which the others' clock counts and their averages must see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels.history import Clock, DeviceClock, History, fade


class ParametersWithoutGrad:
    """The part of an optimizer that keeps track of parameters that the last update did not reach."""

    state: defaultdict[Tensor, Any]
    _aligned_state: Callable[[Tensor], dict[str, Any]]
    _without_grad: set[Tensor]  # parameters without a gradient in the last step
    #: Of parameters that were ever without a gradient while the device kept the clock: 1 if the last update that did
    #: not overflow had one, else 0.
    _updated: dict[Tensor, Tensor]

    def _updated_on_device(self, param: Tensor, clock: DeviceClock) -> Tensor | None:
        if param in self._without_grad and param not in self._updated:  # known from before the device kept the clock
            self._updated[param] = torch.zeros_like(clock.lr)
        return self._updated.get(param)

    def _mark_without_grad(self, with_grad: Sequence[Tensor], without_grad: Sequence[Tensor]) -> None:
        if self._without_grad:
            self._without_grad.difference_update(with_grad)
        self._without_grad.update(without_grad)

    def _mark_updated(
        self, with_grad: Sequence[Tensor], without_grad: Sequence[Tensor], clock: DeviceClock, found_inf: Tensor | None
    ) -> None:
        """As :meth:`_mark_without_grad`, where only the device knows whether there was an update."""
        if not clock.has_newest:
            return
        for param in self._without_grad:
            self._updated_on_device(param, clock)
        for param in without_grad:
            if param not in self._updated:
                self._updated[param] = torch.ones_like(clock.lr)
        for params, value in ((with_grad, 1.0), (without_grad, 0.0)):
            for param in params:
                updated = self._updated.get(param)
                if updated is not None:
                    updated.fill_(value) if found_inf is None else updated.masked_fill_(found_inf == 0, value)

    @torch.no_grad()
    def _age(
        self, without_grad: Sequence[Tensor], past: History, clock: Clock | DeviceClock, found_inf: Tensor | None
    ) -> None:
        """Average an update of zero for parameters without a gradient."""
        if not without_grad:
            return
        decays: Sequence[float | Tensor]
        turn: float | Tensor
        if isinstance(clock, DeviceClock):
            decays = clock.decays(found_inf).unbind()
            turn = clock.turn(found_inf) if past.design.turn else 0.0
        else:
            decays, turn = past.design.at(clock.t)[0], past.design.turn_at(clock.t)
        for param in without_grad:
            state = self._aligned_state(param)
            ema = past.averages(param, state)
            if ema is not None:
                fade(ema.unbind(0), decays, turn)
            else:
                state.pop("ema", None)
            if "past" not in state:
                continue
            if isinstance(clock, Clock):
                past.past(param, state, past.mixture(clock), updated=False, out=state["past"])
                continue
            made = past.past_on_device(param, state, clock, updated=self._updated_on_device(param, clock))
            if found_inf is not None:  # else the step has written what may hold more than can be made now
                made = torch.where(found_inf == 0, made, state["past"])
            state["past"].copy_(made)
