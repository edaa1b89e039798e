"""Weight stashing: keep every version that a delayed backward will need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerpipe_kernels.history.base import History, Mixture, State, copy_into


class Stash(History):
    """Exact, and ``n`` copies of the weights: a ring in ``state["stash"]``, version ``t`` in slot ``t mod n``."""

    kind = "stash"
    needs_states = True

    @torch.no_grad()
    def before_update(self, params: Sequence[Tensor], states: Sequence[State], t: int) -> None:
        for param, state in zip(params, states, strict=True):
            if "stash" not in state or state["stash"].shape[0] != self.n:
                state["stash"] = param.new_empty((self.n, *param.shape))
        torch._foreach_copy_([s["stash"][t % self.n] for s in states], list(params))

    def past(
        self, param: Tensor, state: State, mixture: Mixture, *, moved: bool = True, out: Tensor | None = None
    ) -> Tensor:
        t = mixture.clock.t
        back = min(t, self.n)
        if not back:
            return copy_into(out, param.detach())
        return copy_into(out, state["stash"][(t - back) % self.n])
