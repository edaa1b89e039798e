"""Adam and AdamW, their past weights kept by the same pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels.decay import DecayRule
from layerpipe_kernels.optim.base import PAST_DEFAULTS, Group, require_finite
from layerpipe_kernels.optim.fused import FusedOptimizer
from layerpipe_kernels.options import AdamOptions


class Adam(FusedOptimizer):
    """:class:`torch.optim.Adam` with a memory of its past weights.

    torch's names, defaults and results, to a few units in the last place. The step counts lie beside the weights, as
    in torch's fused implementation.

    Args:
        params: parameters, named parameters, or dicts of groups.
        lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in torch.
        capturable, foreach, fused, differentiable: accepted for torch's sake; every step here is fused, none is
            differentiable.
        delay, past, order, ema_decay, ema_of, ema_dtype, materialize, master_weights, seed, backend: as in
            :class:`layerpipe_kernels.SGD`. ``past="momentum"`` is SGD's alone. The newest update is gone after an Adam
            step, so a blend does without it unless ``materialize`` lets the step itself write the past weights.

    Raises:
        ValueError: an option out of its range, or options that contradict each other.
    """

    rule = "adam"
    counts = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        delay: int = 0,
        past: str = "blend",
        order: int = 2,
        ema_decay: DecayRule | tuple[float, ...] | None = None,
        ema_of: str = "update",
        ema_dtype: torch.dtype | None = None,
        materialize: bool = False,
        master_weights: bool = False,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        if differentiable:
            raise ValueError(f"differentiable=True is not supported; use torch.optim.{type(self).__name__}")
        defaults = {
            **PAST_DEFAULTS,
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "delay": delay,
            "past": past,
            "order": order,
            "ema_decay": ema_decay,
            "ema_of": ema_of,
            "ema_dtype": ema_dtype,
            "materialize": materialize,
            "master_weights": master_weights,
            "seed": seed,
            "backend": backend,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Group) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if not float(group[name]) >= 0.0:
                raise ValueError(f"Invalid {name} value: {group[name]}")
        for i, beta in enumerate(group["betas"]):
            if not 0.0 <= float(beta) < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
        require_finite(group, ("lr", "eps", "weight_decay"))
        if group["past"] == "momentum" and group["delay"]:
            raise ValueError("past='momentum' extrapolates SGD's momentum buffer; use past='ema' or past='blend'")
        super()._check_group(group)

    def _options(self, group: Group) -> AdamOptions:
        require_finite(group, ("lr", "eps", "weight_decay"))
        beta1, beta2 = map(float, group["betas"])
        return AdamOptions(
            float(group["lr"]),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["decoupled_weight_decay"],
            group["maximize"],
        )

    def _states(self, group: Group) -> tuple[str, ...]:
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return names if group["amsgrad"] else names[:2]


class AdamW(Adam):
    """:class:`torch.optim.AdamW` with a memory of its past weights; :class:`Adam` with decoupled weight decay."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **options)
