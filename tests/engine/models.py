"""Small networks for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def chain(stages: int = 4, width: int = 6, seed: int = 0) -> list[nn.Module]:
    """Fully connected stages ending in 3 classes, with BatchNorm so that state in the forward counts."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = [
        nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh()) for _ in range(stages - 1)
    ]
    return [*parts, nn.Linear(width, 3)]


def minibatches(count: int, size: int = 8, width: int = 6, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, width, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def images(count: int, size: int = 8, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(count)
    ]


def sequential() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 8),
        nn.Sequential(nn.Tanh(), nn.Linear(8, 8)),
        nn.Linear(8, 2),
    )


def through(stages: Sequence[nn.Module], *values: Any, **kwargs: Any) -> Any:
    """The first output of stages that are called one after the other."""
    for stage in stages:
        out = stage(*values, **kwargs)
        values, kwargs = out if isinstance(out, tuple) else (out,), {}
    return values[0]


class CallsAt(nn.Module):
    """Applies a function to its ``at``-th input, or to the gradient of its ``at``-th output."""

    def __init__(self, function: Callable[[Tensor], Tensor], where: str, at: int) -> None:
        super().__init__()
        self.function, self.where, self.at, self.calls = function, where, at, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward":
            return self.count(x)
        y = x * 1.0
        y.register_hook(self.count)
        return y

    def count(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.function(x) if self.calls == self.at else x
