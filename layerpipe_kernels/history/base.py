"""What every kind of history has in common."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from layerpipe_kernels import ops
from layerpipe_kernels.decay import DecayRule

State = dict[str, Any]


class Settings(NamedTuple):
    """How past weights are to be had; one per parameter group."""

    delay: int  # n, in updates
    order: int = 2
    ema_decay: DecayRule | tuple[float, ...] | None = None
    ema_of: str = "update"
    momentum: float = 0.0
    nesterov: bool = False
    materialize: bool = False
    backend: str = "auto"


class Clock(NamedTuple):
    """Where a group stands: ``t`` updates since the delays began to fill, the last one with ``lr``."""

    t: int
    lr: float


class Taps(NamedTuple):
    """``What = W + update * u(t) + sum_k emas[k] * E_k(t)``."""

    update: float
    emas: tuple[float, ...]


class Mixture(NamedTuple):
    """How the past weights are made after some update, the same for all parameters of a group."""

    clock: Clock
    velocity: float  # what the momentum buffer is multiplied with
    emas: tuple[float, ...]  # what the first EMAs are


class History(ABC):
    """The past weights of one parameter group.

    Subclasses say which EMAs the optimizer's step must keep (:attr:`emas`, :meth:`decays`) and how to mix them
    (:meth:`taps`), or keep something of their own (:meth:`before_update`, :meth:`past`).

    While ``t <= n`` the weights asked for are ``W(0)``: a pipeline that fills has no older ones.
    """

    kind: ClassVar[str]
    emas: int = 0

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.n = settings.delay
        if settings.materialize and self.kind not in ("ema", "momentum", "blend"):
            raise ValueError(f"materialize=True has nothing to write for past={self.kind!r}")
        if settings.ema_of != "update" and self.kind != "ema":
            raise ValueError(f"ema_of={settings.ema_of!r} goes with past='ema', not past={self.kind!r}")

    def decays(self, t: int) -> tuple[float, ...]:
        """The decay of each EMA in the update that makes version ``t`` (counted from 1)."""
        return ()

    def taps(self, clock: Clock) -> Taps:
        """How to mix the newest update and the EMAs after ``clock.t`` updates."""
        return Taps(0.0, ())

    def before_update(self, params: Sequence[Tensor], states: Sequence[State], t: int) -> None:  # noqa: B027
        """Called with the weights of version ``t``, before they change. Most kinds have nothing to do here."""

    def mixture(self, clock: Clock) -> Mixture:
        """Everything about :meth:`past` that does not depend on the parameter."""
        taps = self.taps(clock)
        emas = taps.emas
        while emas and not emas[-1]:  # while the delays fill, one average knows it all
            emas = emas[:-1]
        return Mixture(clock, taps.update * clock.lr, emas)

    def past(
        self, param: Tensor, state: State, mixture: Mixture, *, moved: bool = True, out: Tensor | None = None
    ) -> Tensor:
        """``What(t - min(t, n))``: fresh or ``out``, or memory of this history that lives until the next update.

        ``moved`` says whether the last update reached this parameter; one without a gradient stood still.
        """
        velocity = state.get("momentum_buffer") if mixture.velocity and moved else None
        ema = state.get("ema") if mixture.emas else None
        return ops.mix(param, velocity, mixture.velocity, ema, mixture.emas, out=out, backend=self.settings.backend)


def running_mean_until(n: int, t: int, decay: float) -> float:
    """The decay of update ``t``: an exact mean of all updates while ``t <= n``, so that the sum of ``n`` is exact, then
    ``decay``, reached from below so that no early update keeps too much weight."""
    mean = (t - 1) / t
    return mean if t <= n else min(decay, mean)


def copy_into(out: Tensor | None, source: Tensor) -> Tensor:
    with torch.no_grad():
        return source if out is None else out.copy_(source)
