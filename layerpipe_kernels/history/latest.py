"""No history: the backward uses whatever weights are there."""

from __future__ import annotations

from torch import Tensor

from layerpipe_kernels.history.base import History, Mixture, State, copy_into
from layerpipe_kernels.history.device import DeviceClock


class LatestHistory(History):
    """Present weights in the place of past ones: the baseline that the others must beat."""

    def past(
        self, param: Tensor, state: State, mixture: Mixture, *, updated: bool = True, out: Tensor | None = None
    ) -> Tensor:
        return copy_into(out, param.detach())

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
        return copy_into(out, param.detach())
