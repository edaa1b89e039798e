"""A parameter group's options: torch's hyperparameters, and those about late gradients and past weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from layerpipe_kernels import backend, history
from layerpipe_kernels.decay import of_gradients
from layerpipe_kernels.past import EMA, Past, option, parse

Group = dict[str, Any]


class PastOptions(TypedDict, total=False):
    """Keyword arguments of every optimizer's constructor, described in :class:`layerpipe_kernels.SGD`."""

    delay: int
    past: str | Past
    spike_compensation: float
    weight_prediction: float
    master_weights: bool
    backend: str


PAST_DEFAULTS: PastOptions = {
    "delay": 0,
    "past": "blend",
    "master_weights": False,
    "backend": "auto",
    "spike_compensation": 0.0,
    "weight_prediction": 0.0,
}

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: The options that decide how a group has its past weights.
DESIGNED_BY = ("delay", "past", "backend", "nesterov", "spike_compensation", "weight_prediction", "horizon")


def past_options(optimizer: str, options: PastOptions) -> Group:
    """Returns a constructor's options about the past, with the defaults of those that are not given.

    Raises:
        TypeError: an option that there is not, as from every function.
        ValueError: a past that there is not.
    """
    for name in options:
        if name not in PAST_DEFAULTS:
            raise TypeError(f"{optimizer}.__init__() got an unexpected keyword argument {name!r}")
    given: Group = {**PAST_DEFAULTS, **options}
    return {**given, "past": option(given["past"])}


def past_of(group: Group) -> Past:
    """Returns a group's kind of past weights, which the group has spelled in a string where that can be."""
    return parse(group["past"])


def beta1_at(group: Group, staleness: float) -> float:
    """Returns the decay of a group's average of gradients that come so many updates late, by its ``beta1_delay``."""
    least, factor = float(group["betas"][0]), group.get("beta1_delay", 0.0)
    return of_gradients(staleness, least, factor) if factor else least


def averages_gradients(group: Group) -> bool:
    """Returns whether past weights are made of an EMA of gradients."""
    past = past_of(group)
    return isinstance(past, EMA) and past.of == "gradient"


def check_past(group: Group, names: Sequence[str]) -> None:
    """Refuse a group whose options or parameters cannot have a past; ``names`` are the parameters'."""
    group["past"] = option(group["past"])
    delay, past = group["delay"], past_of(group)
    if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
        raise ValueError(f"delay must be a whole number of updates, at least 0, got {delay!r}")
    for i, param in enumerate(group["params"]):
        if hasattr(param, "to_local"):
            raise TypeError(
                f"parameter {names[i]} is a DTensor, which is not supported; use torch.optim's "
                "optimizer for sharded parameters"
            )
        if param.dtype not in _DTYPES:
            raise TypeError(
                f"parameter {names[i]} of dtype {param.dtype} is not supported; only real floating-point parameters of "
                "16, 32 or 64 bits are"
            )
        if param.dtype == torch.float64 and delay and past.dtype is not None:
            raise ValueError(
                f"parameter {names[i]} of dtype torch.float64 has averages of the same dtype; leave out "
                f"dtype={past.dtype} of past={past.kind!r}"
            )
    if group["params"]:
        backend.choose(group["params"][0], group["backend"])


def settings_of(group: Group) -> history.Settings:
    """Returns the settings of a group's history, with the correlation that its averages are designed for."""
    momentum, correlation = group.get("momentum", 0.0), group.get("designed_for")
    if correlation is None:
        correlation = beta1_at(group, group["delay"]) if group.get("betas") else float(momentum)
    return history.Settings(
        delay=group["delay"],
        past=past_of(group),
        momentum=correlation if momentum else 0.0,
        nesterov=group.get("nesterov", False),
        correlation=correlation,
        newest=momentum > 0 and not group.get("nesterov", False) and not group["spike_compensation"],
        backend=group["backend"],
        designed_horizon=float(group["weight_prediction"]) * group["delay"],
        horizon=float(group["horizon"]),
    )


def check_flags(foreach: bool | None, fused: bool | None, differentiable: bool, name: str) -> None:
    """Check torch's choice of implementations: every step here is fused, and none is differentiable.

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
    """Refuse what torch refuses, and a NaN; a tensor on a device is not read."""
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
    """Returns a number, or the tensor itself where it is on the weights' device and reading it would wait for that."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return float(lr)
    device = group["params"][0].device if group["params"] else lr.device
    if lr.device == device and (group["capturable"] or not lr.is_cpu):
        return scalar_on(lr, device)
    return float(lr)


def scalar_on(value: Tensor, device: torch.device) -> Tensor:
    return value if value.device == device and value.dtype == torch.float32 else value.to(device, torch.float32)


def refuse_capture(remedy: str = "give the optimizer capturable=True, so that the device counts them") -> None:
    """Refuse a step with a past whose clock the host keeps, on a stream that is being captured.

    Raises:
        RuntimeError: with the remedy.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a captured step would count its updates only once; {remedy}")
