"""A clock that is counted on the device: the host never learns it, and so never waits for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from layerpipe_kernels.history.base import History


class DeviceClock:
    """A :class:`~layerpipe_kernels.history.base.Clock` and its mixture as tensors beside the weights.

    An update that overflows is not counted, and only the device knows which do. Every tensor is written in place, so
    that a replayed CUDA graph leaves here what the next reconstruction needs.

    Args:
        history: of the group.
        t: int64 scalar, updates so far; counted up by the step.
        lr: float32 scalar, the learning rate of the last one.
    """

    def __init__(self, history: History, t: Tensor, lr: Tensor) -> None:
        self.n, self.t, self.lr = history.n, t, lr
        design = history.design
        self._history = history
        self._tables: dict[int, Tensor] = {}  # by how many updates ago: (delay + 2, 1 + K), taps by the clock
        by_lr = [not history.settings.horizon, *[design.ema_of_gradient] * len(design.decays)]
        self._by_lr = torch.tensor(by_lr, device=t.device)
        self._decays = torch.tensor(design.decays, dtype=torch.float64, device=t.device)
        self._turn = design.turn
        self.has_newest = design.update_tap != 0.0
        self.taps = torch.empty(1 + len(design.decays), dtype=torch.float32, device=t.device)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute ``taps``, the newest update's first, for the update that the clock shows."""
        row = self._row(self.n)
        torch.where(self._by_lr, row * self.lr, row, out=self.taps)

    @torch.no_grad()
    def taps_of(self, n: int) -> Tensor:
        """Returns :attr:`taps` for the weights of ``n`` updates ago, or of as many as there have been."""
        row = self._row(n)
        return torch.where(self._by_lr, row * self.lr, row)

    def _row(self, n: int) -> Tensor:
        table = self._tables.get(n)
        if table is None:
            rows = []
            for at in range(self.n + 2):  # before the first update the weights are what they were
                taps, update_tap = self._history.taps(at, min(n, at))
                rows.append([update_tap, *taps])
            table = self._tables[n] = torch.tensor(rows, dtype=torch.float32, device=self.t.device)
        return table.index_select(0, self.t.clamp(max=self.n + 1).view(1))[0]

    @torch.no_grad()
    def tick(self, lr: float | Tensor, found_inf: Tensor | None, *, counted: bool) -> None:
        """Move on by an update, which ``counted`` says the step has counted already."""
        if not counted:
            self.t.add_(1 if found_inf is None else (found_inf == 0).view(()))
        if found_inf is None:
            self.lr.copy_(lr.view(())) if isinstance(lr, Tensor) else self.lr.fill_(lr)
        else:
            rate = lr.view(()) if isinstance(lr, Tensor) else torch.full_like(self.lr, lr)
            self.lr.copy_(torch.where(found_inf.view(()) == 0, rate, self.lr))
        self.refresh()

    def decays(self, found_inf: Tensor | None) -> Tensor:
        """Returns the decays ``(K,)`` of a parameter without a gradient in the update just counted."""
        mean = (self.t - 1) / self.t.double()
        faded = torch.where(self.t <= self.n, mean, torch.minimum(self._decays, mean))
        return faded if found_inf is None else torch.where(found_inf.view(()) == 0, faded, 1.0)

    def turn(self, found_inf: Tensor | None) -> Tensor:
        """Returns the coupling of its first two averages in that update."""
        turned = torch.where(self.t <= self.n, 0.0, self._turn)
        return turned if found_inf is None else torch.where(found_inf.view(()) == 0, turned, 0.0)

    def newest_slot(self) -> Tensor:
        """Returns the slot ``(1,)`` of a ring of ``n`` for the version that the clock shows."""
        return (self.t % self.n).view(1)

    def past_slot(self, n: int | None = None) -> Tensor:
        """Returns the slot ``(1,)`` of the version of ``n`` updates ago, by default that of the delay."""
        return ((self.t - self.t.clamp(max=self.n if n is None else n)) % self.n).view(1)


def put(ring: Tensor, dim: int, slot: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Overwrite the oldest entry of a ring, unless the update overflowed."""
    if found_inf is not None:
        value = torch.where(found_inf.view(()) == 0, value, ring.index_select(dim, slot))
    ring.index_copy_(dim, slot, value)
