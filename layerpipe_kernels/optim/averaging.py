"""Optimizers whose step makes its updates as tensors, which are then averaged one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels import checks, layout, ops, reference
from layerpipe_kernels.history import fade
from layerpipe_kernels.optim.base import PastOptimizer
from layerpipe_kernels.optim.options import Group, averages_gradients, past_of, refuse_capture


class AveragingOptimizer(PastOptimizer):
    """A :class:`PastOptimizer` without a fused step. Its clocks are on the host: it is not captured in a CUDA graph,
    and a :class:`torch.amp.GradScaler` decides on the host whether it steps."""

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        if averages_gradients(group):
            raise ValueError(f"an EMA of='gradient' is not for {type(self).__name__}, which averages its updates")
        if group["master_weights"]:
            raise ValueError(f"master_weights=True is for SGD, Adam and AdamW, not for {type(self).__name__}")
        if group["delay"]:
            for i, param in enumerate(group["params"]):
                checks.check_tensor(self.name(group, i), param, "parameter")

    def _before_step(self, group: Group) -> None:
        """Record what a history needs of the weights before their update."""
        past, params = self.history(group), group["params"]
        if params:
            self._refuse_capture(params[0].device, group)
        if past is not None and past.needs_states:
            past.before_update(params, [self.state[p] for p in params], group["updates"])
        norms = self._norms_of(group)
        if norms is not None:
            norms.record(params, group["updates"])

    def _refuse_capture(self, device: torch.device, group: Group) -> None:
        if group["delay"] and device.type == "cuda":
            refuse_capture(f"a {type(self).__name__} with a delay cannot be captured in a CUDA graph")

    @torch.no_grad()
    def _after_step(self, group: Group, updates: Sequence[Tensor | None]) -> None:
        """Average the updates ``u``, in the state's dtype, of all parameters; ``None`` where there was none."""
        group["updates"], group["last_lr"] = group["updates"] + 1, float(group.get("lr", 0.0))
        past, t = self.history(group), group["updates"]
        if past is None:
            return
        decays, taps, update_tap = past.design.at(t)
        turn = past.design.turn_at(t)
        for i, (param, update) in enumerate(zip(group["params"], updates, strict=True)):
            state = self._aligned_state(param)
            emas = self._emas(param, state, past.emas, past_of(group).dtype)
            if update is not None:
                update = layout.like(update, param)
            if emas and update is not None:
                seed = reference.hash32(past.design.seed ^ reference.hash32(t)) + i
                ops.ema_update_(emas, update, decays, seed=seed, turn=turn, backend=group["backend"])
            elif emas:
                fade(emas, decays, turn)
            if past_of(group).materialize:
                terms, factors = ([], []) if update is None else ([update], [update_tap])
                state["past"] = ops.reconstruct(
                    param, [*terms, *emas], [*factors, *taps], out=state.get("past"), backend=group["backend"]
                )
        norms = self._norms_of(group)
        if norms is not None and past_of(group).materialize:
            states = [self.state[p] for p in group["params"]]
            norms.match([state["past"] for state in states], states, t)

    @staticmethod
    def _emas(param: Tensor, state: dict[str, Any], count: int, dtype: torch.dtype | None) -> list[Tensor]:
        if not count:
            return []
        full, ema = reference.state_dtype(param.dtype), state.get("ema")
        kept = isinstance(ema, Tensor) and ema.shape == (count, *param.shape) and ema.dtype in (full, torch.bfloat16)
        if not kept:
            dtype = dtype or full
            memory = torch.zeros(count * param.numel(), dtype=dtype, device=param.device)
            state["ema"] = layout.arrange(memory, param, count)
        return list(state["ema"].unbind(0))
