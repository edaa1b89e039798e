"""A momentum buffer that is taken away (``None``, as torch's checkpoints have an empty one, or deleted) begins anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerpipe_kernels as lk


def empty(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    for p in params:
        optimizer.state[p]["momentum_buffer"] = None


def empty_one(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.state[params[0]]["momentum_buffer"] = None


def delete(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    del optimizer.state[params[0]]["momentum_buffer"]


def clear(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    optimizer.state.clear()


def load_empty(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry["momentum_buffer"] = None
    optimizer.load_state_dict(state)


def stepped(optimizer: Any, params: list[nn.Parameter], change: Any) -> list[Tensor]:
    for t in range(7):
        for p in params:
            p.grad = torch.full_like(p, 1.0 + t / 10)
        if t == 3:
            change(optimizer, params)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(
    "options", [{}, {"dampening": 0.3}, {"nesterov": True}, {"weight_decay": 0.1}], ids=lambda options: str(options)
)
@pytest.mark.parametrize("change", [empty, empty_one, delete, clear, load_empty])
def test_a_momentum_buffer_taken_away_begins_anew_as_torchs_does(change: Any, options: dict[str, Any]) -> None:
    def made(kind: Any, **more: Any) -> list[Tensor]:
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
        return stepped(kind(params, lr=0.1, momentum=0.9, **options, **more), params, change)

    wanted = made(torch.optim.SGD)
    pasts: list[dict[str, Any]] = [{}, {"past": "momentum"}, {"past": "stash"}, {"past": lk.Blend(materialize=True)}]
    for more in [{}, {"backend": "reference"}, {"capturable": True}, *({"delay": 2, **past} for past in pasts)]:
        for got, right in zip(made(lk.SGD, **more), wanted, strict=True):
            assert torch.allclose(got, right, atol=1e-6), more


@pytest.mark.parametrize("change", [empty, empty_one, delete, clear])
def test_inside_past_weights_it_begins_anew_too(change: Any) -> None:
    results = []
    for wrapped in (False, True):
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
        inner = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        outer = lk.PastWeights(inner, delay=2) if wrapped else inner
        results.append(stepped(outer, params, lambda _, params, inner=inner: change(inner, params)))
    assert all(map(torch.equal, *results))
