"""Hyperparameters as torch takes them: what is refused, and what is left where it lies."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


def check_flags(foreach: bool | None, fused: bool | None, differentiable: bool, name: str) -> None:
    """torch's ways to compute a step: every step here is fused, and none is differentiable.

    Raises:
        RuntimeError: ``fused`` beside ``foreach`` or ``differentiable``, as in torch.
        ValueError: ``differentiable``.
    """
    if fused and differentiable:
        raise RuntimeError("`fused` does not support `differentiable`")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if differentiable:
        raise ValueError(f"differentiable=True is not supported; use torch.optim.{name}")


def check_learning_rate(group: Group) -> None:
    """As torch does, and a NaN; one that only a device knows is taken as it is."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not _only_a_device_knows(group, lr):
        refuse_negative(lr)


def refuse_negative(lr: float | Tensor) -> None:
    """Refuse a learning rate below 0 or NaN. Reads a tensor, which waits for its device."""
    if not float(lr) >= 0.0:
        raise ValueError(f"Invalid learning rate: {lr}; lr must be a number of at least 0")


def _only_a_device_knows(group: Group, value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and (bool(group.get("capturable")) or not value.is_cpu)


def require_finite(group: Group, names: Iterable[str]) -> None:
    """Refuse a NaN hyperparameter before it reaches the weights; one that only a device knows is taken as it is."""
    for name in names:
        value = group[name]
        if _only_a_device_knows(group, value):
            continue
        value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}; refusing to step")


def check_adam_group(group: Group) -> None:
    """Refuse, in torch's words, what neither Adam nor LAMB can work with."""
    check_learning_rate(group)
    for name, called in (("eps", "epsilon"), ("weight_decay", "weight_decay")):
        if not float(group[name]) >= 0.0:
            raise ValueError(f"Invalid {called} value: {group[name]}")
    for i, beta in enumerate(group["betas"]):
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    require_finite(group, ("lr", "eps", "weight_decay"))


def learning_rate(group: Group) -> float | Tensor:
    """A number, or the tensor itself where it lies beside the weights and looking at it would wait for them."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return float(lr)
    device = group["params"][0].device if group["params"] else lr.device
    if lr.device == device and (group["capturable"] or not lr.is_cpu):
        return scalar_on(lr, device)
    return float(lr)


def scalar_on(value: Tensor, device: torch.device) -> Tensor:
    return value if value.device == device and value.dtype == torch.float32 else value.to(device, torch.float32)
