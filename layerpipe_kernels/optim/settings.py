"""The options that every optimizer here takes besides torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from layerpipe_kernels import backend, history
from layerpipe_kernels.optim.arguments import Group

PAST_DEFAULTS: dict[str, Any] = {
    "delay": 0,
    "past": "blend",
    "order": 2,
    "ema_decay": None,
    "ema_of": "update",
    "ema_dtype": None,
    "past_norm": None,
    "materialize": False,
    "master_weights": False,
    "backend": "auto",
    "seed": 0,
    "spike_compensation": 0.0,
    "weight_prediction": 0.0,
}

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: The options that decide how a group has its past weights.
DESIGNED_BY = (
    *("delay", "past", "order", "ema_decay", "ema_of", "materialize", "backend", "seed", "nesterov"),
    *("spike_compensation", "weight_prediction", "horizon"),
)


def past_given(arguments: dict[str, Any]) -> Group:
    """Of a constructor's arguments, those about the past; the defaults of what it does not take."""
    return {key: arguments.get(key, default) for key, default in PAST_DEFAULTS.items()}


def check_past(group: Group, names: Sequence[str]) -> None:
    """Refuse a group whose options or parameters cannot have a past; ``names`` are the parameters'."""
    delay = group["delay"]
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
        if param.dtype == torch.float64 and delay and group["ema_dtype"] is not None:
            raise ValueError(
                f"parameter {names[i]} of dtype torch.float64 has averages of the same dtype; leave out "
                f"ema_dtype={group['ema_dtype']}"
            )
    if not isinstance(group["seed"], int):
        raise ValueError(f"seed must be a whole number, got {group['seed']!r}")
    if group["ema_dtype"] not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"ema_dtype must be torch.float32 or torch.bfloat16, got {group['ema_dtype']}")
    if group["past"] not in history.KINDS:
        raise ValueError(f"past={group['past']!r} is unknown; there are: {', '.join(history.KINDS)}")
    if group["past_norm"] not in (None, "match"):
        raise ValueError(f"past_norm must be None or 'match', got {group['past_norm']!r}")
    if group["params"]:
        backend.choose(group["params"][0], group["backend"])


def settings_of(group: Group) -> history.Settings:
    """What a group's history is made with: for the correlation that its averages were designed for, if they were."""
    momentum, betas, correlation = group.get("momentum", 0.0), group.get("betas"), group.get("designed_for")
    if correlation is None:
        correlation = float(betas[0] if betas else momentum)
    return history.Settings(
        delay=group["delay"],
        order=group["order"],
        ema_decay=group["ema_decay"],
        ema_of=group["ema_of"],
        momentum=correlation if momentum else 0.0,
        nesterov=group.get("nesterov", False),
        correlation=correlation,
        newest=momentum > 0 and not group.get("nesterov", False) and not group["spike_compensation"],
        materialize=group["materialize"],
        backend=group["backend"],
        seed=group["seed"],
        designed_horizon=float(group["weight_prediction"]) * group["delay"],
        horizon=float(group["horizon"]),
    )
