"""Layers whose gradients lie in memory otherwise than their values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Strides = list[tuple[int, ...]]


Minibatches = list[tuple[Tensor, Tensor]]


class Watched(nn.Module):
    """A convolution that notes how the gradients of its output lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(6, 6, 3, padding=1)
        self.strides: Strides = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        if y.requires_grad:
            y.register_hook(lambda g: self.strides.append(g.stride()))
        return y


class Transposed(nn.Module):
    """Its input's gradient comes out with the last two dimensions the other way round in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2).contiguous()  # type: ignore[no-any-return]


class Shift(nn.Module):
    """Hands its output's gradient on as it is; saves nothing for its backward, so that it may run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


class Summed(nn.Module):
    """Its input's gradient is an expanded one: the same memory along the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.sum(2))  # type: ignore[no-any-return]


class Joined(nn.Module):
    """Its input's gradient is a part of a larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.cat([x, x.new_ones(4, 6, 6)], 2))  # type: ignore[no-any-return]


def turning() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Watched(), Transposed(), Watched(), Transposed(), nn.Sequential(nn.Flatten(), nn.Linear(30, 3))]


def summing() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Watched(), Shift(), Summed()]


def joining() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Watched(), Shift(), Joined(), Summed()]


def data(count: int) -> Minibatches:
    torch.manual_seed(1)
    return [(torch.randn(4, 6, 5), torch.randint(0, 3, (4,))) for _ in range(count)]
