"""Small networks for tests."""

from __future__ import annotations

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
