"""The last update of Adam and AdamW undone: the weights before it, from what the optimizer keeps anyway.

``W(t-1) = (W(t) + lr mhat / (sqrt(qhat) + eps)) / (1 - lr weight_decay)`` with decoupled decay, and without the
division where the decay is part of the gradient. Exact to rounding, and no memory of its own; what a delay of 1 needs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels.options import AdamOptions


def bias_correction(step: Tensor, beta: float) -> Tensor:
    """Returns Adam's ``1 - beta**step``, a float64 scalar ``()`` where the count lies."""
    return -torch.expm1(step.double() * (math.log(beta) if beta else -math.inf))


@torch.no_grad()
def adam_undone(param: Tensor, state: dict[str, Any], lr: float | Tensor, o: AdamOptions) -> Tensor:
    """Returns the weights before the last update, a fresh tensor ``(*)`` in the dtype of the state.

    Args:
        param: ``(*)``, as that update left it; a float32 master in the state counts instead.
        state: the optimizer's, of this parameter.
        lr: of that update; a tensor may lie on a device.
        o: of that update, but for the learning rate.
    """
    mean, square, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
    largest = state.get("max_exp_avg_sq", square)
    correction1, correction2 = bias_correction(step, o.beta1), bias_correction(step, o.beta2)
    root, rate = correction2.sqrt().to(mean.dtype), (lr / correction1).to(mean.dtype)
    before: Tensor = (largest.sqrt() / root).add_(o.eps).reciprocal_().mul_(mean).mul_(rate)
    before.add_(state.get("master", param))
    return before.div_(1 - lr * o.weight_decay) if o.decoupled and o.weight_decay else before
