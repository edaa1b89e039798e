"""The momentum buffer as a history: it decays geometrically, so past updates are its extrapolation."""

from __future__ import annotations

from layerpipe_kernels.history.base import History, Settings
from layerpipe_kernels.options import PastDesign


class MomentumHistory(History):
    """Past weights ``What(t-n) = W(t) + lr v(t) (1 - mu**n) / (1 - mu)``: no state beyond the momentum buffer.

    ``mu`` is the last update's momentum; the first one's where the device counts updates, as what is captured keeps it.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if not 0 < settings.momentum < 1:
            raise ValueError(
                f"past='momentum' extrapolates the momentum buffer and needs a momentum in (0, 1), "
                f"got {settings.momentum}; use past='ema' or past='blend'"
            )
        if settings.nesterov and settings.past.materialize:
            raise ValueError("past='momentum' with nesterov cannot be materialized by the step")
        mu = settings.momentum
        self.design = PastDesign(delay=self.n, update_tap=(1 - mu**self.n) / (1 - mu), fill_ratio=mu)
