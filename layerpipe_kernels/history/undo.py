"""The weights before the last update, where the optimizer can undo it."""

from __future__ import annotations

import torch
from torch import Tensor

from layerpipe_kernels.history.base import History, Mixture, State, copy_into
from layerpipe_kernels.history.device import DeviceClock


class UndoHistory(History):
    """Past weights ``W(t-1)`` by ``settings.undo``: exact to rounding, and nothing kept. For a delay of 1."""

    def past(
        self, param: Tensor, state: State, mixture: Mixture, *, updated: bool = True, out: Tensor | None = None
    ) -> Tensor:
        if not mixture.n or not updated or "step" not in state:
            return copy_into(out, param.detach())
        assert self.settings.undo is not None
        return copy_into(out, self.settings.undo(param, state, mixture.clock.lr).to(param.dtype))

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
        if n == 0 or "step" not in state:
            return copy_into(out, param.detach())
        assert self.settings.undo is not None
        before = self.settings.undo(param, state, clock.lr)
        began = clock.t > 0 if updated is None else (clock.t > 0) & (updated > 0)
        return copy_into(out, torch.where(began, before, state.get("master", param)).to(param.dtype))
