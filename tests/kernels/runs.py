"""A run whose past weights are known."""

from __future__ import annotations

from typing import Any

import torch

import layerpipe_kernels as lk


class Run:
    """An optimizer on one parameter with AR(1) gradients, and the true versions of its weights."""

    def __init__(self, size: int = 50, dtype: torch.dtype = torch.float64, noise: float = 1.0, **options: Any) -> None:
        self.param = torch.randn(size, dtype=dtype, requires_grad=True)
        self.optimizer = lk.SGD([self.param], **{"lr": 0.1, "momentum": 0.9, **options})
        self.versions = [self.param.detach().clone()]
        self.drift, self.noise = torch.randn(size, dtype=dtype), noise

    def step(self, count: int = 1, grad: bool = True) -> None:
        for _ in range(count):
            self.param.grad = self.drift + self.noise * torch.randn_like(self.param) if grad else None
            self.optimizer.step()
            self.versions.append(self.param.detach().clone())

    def error(self, n: int) -> float:
        """Mean-square error of the past weights, relative to using the latest."""
        true, past = self.versions[-1 - n], self.optimizer.past_weight(self.param)
        return float((past - true).square().sum() / (self.versions[-1] - true).square().sum())
