"""Weight stashing: keep every version that a delayed backward will need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerpipe_kernels import layout
from layerpipe_kernels.history.base import History, Mixture, State, copy_into
from layerpipe_kernels.history.device import DeviceClock, put


class StashHistory(History):
    """Stored weights, exact, in ``n`` copies: a ring in ``state["stash"]``, version ``t`` in slot ``t mod n``."""

    needs_states = True

    def remembers(self, state: State) -> bool:
        return "stash" in state and len(state["stash"]) == self.n

    @torch.no_grad()
    def before_update(
        self,
        params: Sequence[Tensor],
        states: Sequence[State],
        at: int | DeviceClock,
        found_inf: Tensor | None = None,
    ) -> None:
        for param, state in zip(params, states, strict=True):
            if not self.remembers(state):
                memory = torch.empty(self.n * param.numel(), dtype=param.dtype, device=param.device)
                state["stash"] = layout.arrange(memory, param, self.n).copy_(param)
        if isinstance(at, int):
            torch._foreach_copy_([s["stash"][at % self.n] for s in states], list(params))
            return
        slot = at.newest_slot()
        for param, state in zip(params, states, strict=True):
            put(state["stash"], 0, slot, param.detach()[None], found_inf)

    @torch.no_grad()
    def restart(self, param: Tensor, state: State) -> None:
        if "stash" in state:
            state["stash"][0].copy_(param)

    def past(
        self, param: Tensor, state: State, mixture: Mixture, *, updated: bool = True, out: Tensor | None = None
    ) -> Tensor:
        if not mixture.n or "stash" not in state:
            return copy_into(out, param.detach())
        return copy_into(out, state["stash"][(mixture.clock.t - mixture.n) % self.n])

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
        if n == 0 or "stash" not in state:
            return copy_into(out, param.detach())
        out = torch.empty_like(param, requires_grad=False) if out is None else out
        return copy_into(out, state["stash"].index_select(0, clock.past_slot(n))[0])
