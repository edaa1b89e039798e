"""A stage's optimizer: its options as they change from tick to tick, and what it must be like."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: Of one stage: a dict per parameter group.
Options = list[dict[str, Any]]


def set_options(group: dict[str, Any], values: dict[str, Any]) -> None:
    """Give a stage's parameter group its options; a learning rate that is a tensor stays one and changes its value."""
    lr = group.get("lr")
    group.update(values)
    if isinstance(lr, torch.Tensor):
        group["lr"] = lr.fill_(values["lr"])


def check_stage(stage: str, module: nn.Module, optimizer: Any, delay: int) -> None:
    """Refuse an optimizer that a stage's factory made and that cannot serve it.

    Raises:
        ValueError: it lacks a parameter, or a group was made for another delay or for none.
        TypeError: a delay needs past weights, and it does not know them or cannot begin them anew.
    """
    held = {p for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in module.named_parameters() if p.requires_grad and p not in held]
    if missing:
        raise ValueError(f"{stage}: the optimizer was given {missing[0]}, but holds it in no parameter group")
    if not delay:
        return
    advice = "optimizer=lambda params, **past: layerpipe_kernels.SGD(params, lr=..., **past)"
    for method in ("past_view", "restart_history"):
        if not hasattr(optimizer, method):
            raise TypeError(
                f"{stage} gets its gradients {delay} updates late, and {type(optimizer).__name__} does not know its "
                f"past weights: it has no {method}; use layerpipe_kernels.SGD and pass it the pipeline's keywords: "
                f"{advice}"
            )
    for group in optimizer.param_groups:
        if group.get("delay") != delay:
            raise ValueError(
                f"{stage} has a delay of {delay}, a parameter group of its optimizer one of {group.get('delay')}; pass "
                f"the pipeline's keywords on: {advice}"
            )
