"""The base of all kinds of history, and what their past weights are made with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from layerpipe_kernels import layout, ops
from layerpipe_kernels.history.device import DeviceClock
from layerpipe_kernels.options import PastDesign
from layerpipe_kernels.past import Past

State = dict[str, Any]

#: ``undo(param, state, lr)`` returns the weights before an update of this learning rate, ``(*)`` in the state's dtype.
Undo = Callable[[Tensor, State, float | Tensor], Tensor]


class Settings(NamedTuple):
    """Options of a parameter group's history."""

    delay: int  # n, in updates
    past: Past
    momentum: float = 0.0  # SGD's; 0 without a momentum buffer
    nesterov: bool = False
    correlation: float = 0.0  # of successive updates: SGD's momentum, Adam's beta1
    newest: bool = False  # the newest update is still at hand after the step, as lr times the momentum buffer
    backend: str = "auto"
    designed_horizon: float = 0.0  # of weight prediction where gradients are as late as the past is old
    horizon: float = 0.0  # which the present weights are predicted with
    undo: Undo | None = None  # where the optimizer can undo its last update


class Clock(NamedTuple):
    """A group's count of updates: ``t`` since the delays began to fill, the last one with ``lr``."""

    t: int
    lr: float


class Mixture(NamedTuple):
    """The factors of past weights after some update, the same for all parameters of a group."""

    clock: Clock
    newest: float  # what the newest update is multiplied with, or the momentum buffer that tells it
    emas: tuple[float, ...]  # what the first EMAs are
    n: int  # how many updates ago the past weights are of


class History:
    """Estimates the past weights of one parameter group.

    Subclasses say what the optimizer's step must keep and how to mix it (:attr:`design`), or keep something of their
    own (:meth:`before_update`, :meth:`past`).

    While ``t <= n`` the weights asked for are ``W(0)``: a pipeline that fills has no older ones.

    Of predicted weights ``F = W - p u`` the past is ``F(t-n) = F(t) + p u(t) + (the last n updates' sum) - p u(t-n)``.
    Averages are of ``u``; the newest is kept as ``previous_update``, the one of ``n`` updates ago is estimated.
    """

    needs_states: ClassVar[bool] = False  # in :meth:`before_update`

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.n = settings.delay
        self.design = PastDesign(delay=self.n)

    @property
    def newest_key(self) -> str:
        """The name in a parameter's state from which the newest update is made."""
        return "previous_update" if self.settings.horizon else "momentum_buffer"

    @property
    def emas(self) -> int:
        """The number of averages that the step keeps."""
        return len(self.design.decays)

    def remembers(self, state: State) -> bool:
        """Returns whether a parameter's state has what this history keeps."""
        return not self.emas or ("ema" in state and len(state["ema"]) == self.emas)

    def averages(self, param: Tensor, state: State) -> Tensor | None:
        """Returns the averages ``(K, *)``; ``None`` where the state has none, or those of other options."""
        ema: Tensor | None = state.get("ema")
        return ema if ema is not None and ema.shape == (self.emas, *param.shape) else None

    def before_update(
        self,
        params: Sequence[Tensor],
        states: Sequence[State],
        at: int | DeviceClock,
        found_inf: Tensor | None = None,
    ) -> None:
        """Called with the weights of the version ``at``, before they change, unless ``found_inf`` says that they will
        not. Most kinds have nothing to do here."""

    def restart(self, param: Tensor, state: State) -> None:
        """Called where the clock is set to 0 while ``param`` has its present value."""

    def taps(self, t: int, n: int) -> tuple[tuple[float, ...], float]:
        """Returns the factors of averages and newest update after update ``t`` for the weights of ``n`` updates ago,
        ``n <= min(t, delay)``."""
        if not n:
            return (0.0,) * self.emas, 0.0
        if n == min(t, self.n):
            return self.design.taps_at(t)
        if not self.emas:
            return (), self.design._replace(delay=n).taps_at(n)[1]
        if t <= self.n:  # every average is still the mean of all updates
            horizon = self.settings.horizon
            return (n - horizon, *[0.0] * (self.emas - 1)), horizon
        return self.retapped(n)

    def retapped(self, n: int) -> tuple[tuple[float, ...], float]:
        """Returns :meth:`taps` of averages once the delay has filled, for an ``n`` that they are not designed for."""
        raise NotImplementedError

    def mixture(self, clock: Clock, n: int | None = None) -> Mixture:
        """Returns everything about :meth:`past` that does not depend on the parameter.

        Args:
            clock: where the group stands.
            n: how many updates ago; by default the delay, or as many as there have been.

        Raises:
            ValueError: more updates ago than the delay, or than there have been.
        """
        most = min(clock.t, self.n)
        if n is None:
            n = most
        elif not 0 <= n <= most:
            raise ValueError(f"after {clock.t} updates with a delay of {self.n} there is no past of {n} updates ago")
        emas, update = self.taps(clock.t, n)
        while emas and not emas[-1]:  # while the delays fill, one average knows it all
            emas = emas[:-1]
        return Mixture(clock, update if self.settings.horizon else update * clock.lr, emas, n)

    def past(
        self, param: Tensor, state: State, mixture: Mixture, *, updated: bool = True, out: Tensor | None = None
    ) -> Tensor:
        """Returns ``What(t - mixture.n)`` ``(*)``: fresh or ``out``, or this history's memory until the next update.

        ``updated`` says whether the last update reached this parameter; one without a gradient did not change.
        """
        newest = state.get(self.newest_key) if mixture.newest and updated else None
        if newest is not None and newest.shape != param.shape:
            newest = None
        ema = self.averages(param, state) if mixture.emas else None
        if out is None:
            out = torch.empty_like(param, requires_grad=False)
        if layout.order(param) is None:  # no step takes it, so it never moved
            return copy_into(out, param)
        weight = state.get("master", param)
        return ops.mix(weight, newest, mixture.newest, ema, mixture.emas, out=out, backend=self.settings.backend)

    def past_on_device(
        self,
        param: Tensor,
        state: State,
        clock: DeviceClock,
        *,
        n: int | None = None,
        updated: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Returns :meth:`past` where only the device knows the clock.

        ``updated`` is then 1 or 0, a float32 scalar there, and ``n`` the most updates ago, by default the delay.
        """
        terms, taps = [], clock.taps if n is None else clock.taps_of(n)
        newest = state.get(self.newest_key) if clock.has_newest else None
        if newest is None or newest.shape != param.shape:
            taps = taps[1:]
        else:
            terms.append(newest)
            if updated is not None:
                taps = torch.cat((taps[:1] * updated, taps[1:]))
        ema = self.averages(param, state)
        if ema is not None:
            terms += ema.unbind(0)
        if out is None:
            out = torch.empty_like(param, requires_grad=False)
        if layout.order(param) is None:
            return copy_into(out, param)
        weight = state.get("master", param)
        return ops.reconstruct(weight, terms, taps[: len(terms)], out=out, backend=self.settings.backend)


@torch.no_grad()
def fade(emas: Sequence[Tensor], decays: Sequence[float | Tensor], turn: float | Tensor) -> None:
    """Average an update of zero into EMAs ``(*)``, in place."""
    turns = isinstance(turn, Tensor) or turn != 0.0
    before = [e.clone() for e in emas[:2]] if turns and len(emas) > 1 else []
    for e, decay in zip(emas, decays, strict=True):
        e.mul_(decay)
    if before:
        emas[0].sub_(before[1] * turn)
        emas[1].add_(before[0] * turn)


def copy_into(out: Tensor | None, source: Tensor) -> Tensor:
    with torch.no_grad():
        return source if out is None else out.copy_(source)
