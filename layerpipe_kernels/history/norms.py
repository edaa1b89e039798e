"""Norm matching: past weights are scaled to the norm that the true ones had."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels.history.device import DeviceClock, put
from layerpipe_kernels.reference import state_dtype

State = dict[str, Any]


class Norms:
    """Keeps the norms of every tensor's last ``n`` versions, version ``t`` in slot ``t mod n``: no copies of weights.

    An estimate that overshoots amplifies the activations' gradient, stage after stage; scaled, it cannot
    (docs/past_weights.md). Nothing here waits for a device.

    Args:
        n: the delay, in updates.
        params: of one group, on one device.
        states: of those parameters; each keeps its row, float32 ``(n,)``, as ``state["norms"]``.
    """

    def __init__(self, n: int, params: Sequence[Tensor], states: Sequence[State]) -> None:
        self.n, self._params = n, [*params]
        self.dtype = max((state_dtype(p.dtype) for p in params), key=lambda dtype: dtype.itemsize)
        # A parameter without a row has not been updated, and its norm was always the present one.
        now = torch.stack(torch._foreach_norm([p.detach() for p in params], 2, dtype=self.dtype))
        self.ring = now[:, None].repeat(1, n)
        for row, state in zip(self.ring, states, strict=True):
            if "norms" in state and state["norms"].shape == row.shape:
                row.copy_(state["norms"])
            state["norms"] = row

    def are_of(self, params: Sequence[Tensor]) -> bool:
        """Returns whether these are the parameters that it was made for."""
        return len(params) == len(self._params) and all(map(operator.is_, params, self._params))

    @torch.no_grad()
    def record(self, params: Sequence[Tensor], at: int | DeviceClock, found_inf: Tensor | None = None) -> None:
        """Record the norms of the version that ``at`` shows, before an update."""
        norms = torch.stack(torch._foreach_norm(list(params), 2, dtype=self.dtype))
        if isinstance(at, DeviceClock):
            put(self.ring, 1, at.newest_slot(), norms[:, None], found_inf)
        else:
            self.ring[:, at % self.n] = norms

    @torch.no_grad()
    def match(
        self,
        estimates: Sequence[Tensor],
        states: Sequence[State],
        at: int | DeviceClock,
        found_inf: Tensor | None = None,
        n: int | None = None,
    ) -> None:
        """Scale every ``What``, in place, after an update, to the norm of the version that it estimates, of ``n``
        updates ago or of the delay."""
        n = self.n if n is None else n
        if n == 0 or (isinstance(at, int) and at == 0):
            return  # nothing has been recorded
        norms = torch._foreach_norm(list(estimates), 2, dtype=self.dtype)
        if isinstance(at, DeviceClock):
            slot = at.past_slot(n)
            targets = [state["norms"].index_select(0, slot)[0] for state in states]
        else:
            targets = [state["norms"][(at - min(at, n)) % self.n] for state in states]
        for estimate, norm, target in zip(estimates, norms, targets, strict=True):
            matched = norm > 0
            if isinstance(at, DeviceClock):
                matched = matched & (at.t > 0)
            if found_inf is not None:  # what an earlier step has scaled stays as it is, to the bit
                matched = matched & (found_inf.view(()) == 0)
            estimate.mul_(torch.where(matched, target / norm, 1.0))
