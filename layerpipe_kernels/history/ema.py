"""One exponential moving average that follows the pipeline's delay (LayerPipe2, arXiv 2512.08160)."""

from __future__ import annotations

from layerpipe_kernels import decay
from layerpipe_kernels.history.base import Clock, History, Mixture, Settings
from layerpipe_kernels.options import PastDesign
from layerpipe_kernels.past import EMA


class EmaHistory(History):
    """Past weights ``W(t) + n E(t)``; of predicted weights ``F(t) + p u(t) + (n - p) E(t)``.

    With ``of="gradient"`` the average runs over gradients and is scaled by the last learning rate, as the paper writes
    it: the same for plain SGD at a constant learning rate, and wrong with momentum or a schedule.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        past = settings.past
        assert isinstance(past, EMA)
        self.design = PastDesign(
            delay=self.n,
            decays=(decay.resolve(past.decay, self.n),),
            taps=(self.n - settings.horizon,),
            update_tap=settings.horizon,
            fill_tap=settings.horizon,
            ema_of_gradient=past.of == "gradient",
            seed=past.seed,
        )

    def retapped(self, n: int) -> tuple[tuple[float, ...], float]:
        return (n - self.settings.horizon,), self.settings.horizon

    def mixture(self, clock: Clock, n: int | None = None) -> Mixture:
        made = super().mixture(clock, n)
        return made._replace(emas=tuple(tap * clock.lr for tap in made.emas)) if self.design.ema_of_gradient else made
