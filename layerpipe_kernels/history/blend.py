"""A few EMAs and the newest update, mixed to come closest to a sum over the last ``n`` updates."""

from __future__ import annotations

from layerpipe_kernels import decay
from layerpipe_kernels.history.base import History, Settings
from layerpipe_kernels.options import PastDesign
from layerpipe_kernels.past import Blend


class BlendHistory(History):
    """Past weights ``W(t) + n (c_0 u(t) + sum_k c_k E_k(t))`` with ``order`` EMAs, designed by :func:`decay.blend`.

    Short delays keep fewer: with the newest update at hand ``n - 1`` EMAs are enough, none at all for ``n = 1``; nor
    where the optimizer can undo its last update, see :mod:`layerpipe_kernels.history.undo`.

    ``u(t)`` comes free from SGD's momentum buffer as ``lr v(t)``. Without momentum, with Nesterov's, and with Adam, it
    is gone after the step, and the EMAs do without it, unless the step itself writes the past weights
    (``materialize``). Of predicted weights the newest update is always at hand.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        past = settings.past
        assert isinstance(past, Blend)
        if not 0 <= settings.correlation < 1:
            raise ValueError(f"past='blend' needs a momentum in [0, 1), got {settings.correlation}")
        horizon = settings.designed_horizon
        # The step itself always has the newest update.
        newest = bool(horizon) or settings.newest or past.materialize
        emas = decay.useful_order(self.n, past.order, newest, bool(horizon))
        coupled = past.decay == decay.COUPLED
        decays: tuple[float, ...] | None = None
        if isinstance(past.decay, tuple):
            decays = past.decay
        elif past.decay is not None and not coupled:
            decays = (decay.resolve(past.decay, self.n),)
        decays = decays[:emas] if decays is not None else None
        blend = decay.blend(self.n, emas, settings.correlation, newest, decays, coupled, horizon)
        if horizon != settings.horizon:  # for a while: averages stay what they are
            at_hand = bool(settings.horizon) or past.materialize
            blend = decay.retapped(
                self.n, blend.decays, settings.correlation, at_hand, blend.turn, horizon=settings.horizon
            )
        self.design = PastDesign(
            delay=self.n,
            decays=blend.decays,
            taps=tuple(self.n * tap for tap in blend.taps),
            update_tap=self.n * blend.update_tap,
            seed=past.seed,
            turn=blend.turn,
            fill_tap=settings.horizon,
        )

    def taps(self, t: int, n: int) -> tuple[tuple[float, ...], float]:
        if n == 1 and self.settings.newest and not self.settings.horizon:
            return (0.0,) * self.emas, 1.0  # exact
        return super().taps(t, n)

    def retapped(self, n: int) -> tuple[tuple[float, ...], float]:
        s = self.settings
        newest = bool(s.horizon) or (s.newest and not s.designed_horizon)
        made = decay.retapped(n, self.design.decays, s.correlation, newest, self.design.turn, horizon=s.horizon)
        return tuple(n * tap for tap in made.taps), n * made.update_tap
