"""Optimizers whose groups change between their steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from layerpipe_kernels.optim.routine import Routine

Optimizer = Callable[..., Any]


KINDS: list[tuple[Optimizer, dict[str, Any]]] = [
    (lk.SGD, {"momentum": 0.9, "past": "blend"}),
    (lk.SGD, {"momentum": 0.9, "past": "momentum"}),
    (lk.SGD, {"past": lk.EMA(of="gradient")}),
    (lk.SGD, {"momentum": 0.9, "nesterov": True, "past": lk.Blend(order=3, dtype=torch.bfloat16)}),
    (lk.SGD, {"momentum": 0.9, "past": lk.Blend(materialize=True)}),
    (lk.SGD, {"momentum": 0.9, "past": "stash"}),
    (lk.SGD, {"momentum": 0.9, "past": lk.Blend(norm="match")}),
    (lk.AdamW, {"past": "blend"}),
    (lk.SGD, {"momentum": 0.9, "past": lk.Blend(decay="coupled")}),
    (lk.Adam, {"past": "latest", "amsgrad": True}),
]


def parameters(device: str = "cpu") -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(device)) for shape in ((3, 5), (7,), (2, 2, 2))]


def fill(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device)


def changes(optimizer: Any, params: list[torch.nn.Parameter], step: int) -> None:
    """What may happen to a group between its steps."""
    first, last = optimizer.param_groups
    first["lr"] = 0.1 / (1 + step)
    match step:
        case 4:
            last["weight_decay"] = 0.05
        case 6:
            params[0].grad = None
        case 9:
            params[0].data = params[0].detach().clone()
        case 11 if "momentum_buffer" in optimizer.state[params[1]]:
            state = optimizer.state[params[1]]
            state["momentum_buffer"] = state["momentum_buffer"].clone()
        case 13:
            last["lr"] = torch.tensor(0.02)
        case 15:
            last["lr"] = 0.03
        case 17:
            optimizer.restart_history()
        case 19:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def changes_before_the_past(optimizer: Any, params: list[torch.nn.Parameter], step: int) -> None:
    """What may happen to a group between a step and a backward."""
    match step:
        case 8:
            params[1].data = params[1].detach() * 2
        case 10 if "ema" in optimizer.state[params[2]]:
            optimizer.state[params[2]]["ema"] = optimizer.state[params[2]]["ema"] * 2
        case 12:
            optimizer.param_groups[1]["delay"] = 2


def trajectory(kind: Optimizer, options: dict[str, Any], device: str = "cpu") -> list[Tensor]:
    params = parameters(device)
    groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.05}]
    optimizer = kind(groups, delay=3, backend="cpp" if device == "cpu" else device, weight_decay=0.01, **options)
    seen = []
    for step in range(24):
        fill(params, step)
        changes(optimizer, params, step)
        optimizer.step()
        changes_before_the_past(optimizer, params, step)
        for param in params:
            seen += [optimizer.past_view(param).clone(), param.detach().clone()]
    return seen


def check(kind: Optimizer, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> None:
    quick = trajectory(kind, options, device)
    monkeypatch.setattr(Routine, "possible", staticmethod(lambda group, past: False))
    slow = trajectory(kind, options, device)
    assert all(map(torch.equal, quick, slow))
