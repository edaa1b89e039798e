"""Parameters and gradients that depend on them, for optimizers whose formulas are written down once more."""

from __future__ import annotations

import torch
from torch import Tensor

SHAPES = ((3,), (5, 4))


def gradient(weight: Tensor, t: int, scale: float) -> Tensor:
    """Of a quadratic whose minimum moves."""
    return scale * (weight - torch.sin(torch.arange(weight.numel(), dtype=weight.dtype).view_as(weight) + t))


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for s in SHAPES]


def give_gradients(params: list[Tensor], t: int, scale: float = 1.0) -> None:
    for param in params:
        param.grad = gradient(param.detach(), t, scale)
