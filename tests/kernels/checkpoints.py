"""Parameters, steps and state dicts for tests of checkpoints."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def parameters(dtype: torch.dtype = F32) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((5, 4), (7,), (2,))]


def steps(optimizer: torch.optim.Optimizer, params: list[Tensor], count: int, seed: int, late: bool = False) -> None:
    """``late``: the last parameter has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if late:
            params[-1].grad = None
        optimizer.step()


def saved(optimizer: torch.optim.Optimizer) -> Any:
    """Through a file, as it is read by default."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def take(params: list[Tensor], source: list[Tensor]) -> None:
    with torch.no_grad():
        for param, value in zip(params, source, strict=True):
            param.copy_(value)
