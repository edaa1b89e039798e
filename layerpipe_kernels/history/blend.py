"""A few EMAs and the newest update, mixed to come closest to a sum over the last ``n`` updates."""

from __future__ import annotations

from layerpipe_kernels import decay
from layerpipe_kernels.history.base import Clock, History, Settings, Taps, running_mean_until


class Blend(History):
    """``What(t-n) = W(t) + n (c_0 u(t) + sum_k c_k E_k(t))`` with ``order`` EMAs, designed by :func:`decay.blend`.

    Short delays keep fewer: with the newest update at hand ``n - 1`` EMAs are enough, none at all for ``n = 1``.

    ``u(t)`` comes free from the momentum buffer as ``lr v(t)``. Without momentum, and with Nesterov's, it is gone after
    the step, and the EMAs do without it. ``ema_decay`` fixes the decays: one per EMA, or a rule for ``order=1``.
    """

    kind = "blend"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if settings.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3 EMAs, got {settings.order}")
        if not 0 <= settings.momentum < 1:
            raise ValueError(f"past='blend' needs a momentum in [0, 1), got {settings.momentum}")
        newest = settings.momentum > 0 and not settings.nesterov
        self.emas = decay.useful_order(self.n, settings.order, newest)
        decays: tuple[float, ...] | None = None
        if isinstance(settings.ema_decay, tuple):
            decays = settings.ema_decay
        elif settings.ema_decay is not None:
            if settings.order > 1:
                raise ValueError(
                    f"past='blend' of order {settings.order} designs its decays; give a tuple of "
                    f"{settings.order} to fix them, got ema_decay={settings.ema_decay!r}"
                )
            decays = (decay.resolve(settings.ema_decay, self.n),)
        decays = decays[: self.emas] if decays is not None else None
        self.design = decay.blend(self.n, self.emas, settings.momentum, newest, decays)

    def decays(self, t: int) -> tuple[float, ...]:
        return tuple(running_mean_until(self.n, t, b) for b in self.design.decays)

    def taps(self, clock: Clock) -> Taps:
        if clock.t <= self.n:  # all EMAs are still the mean of all updates: exact, and the first is enough
            if not self.emas:  # n = 1
                return Taps(float(clock.t), ())
            return Taps(0.0, (float(clock.t), *[0.0] * (self.emas - 1)))
        return Taps(self.n * self.design.update_tap, tuple(self.n * c for c in self.design.taps))
