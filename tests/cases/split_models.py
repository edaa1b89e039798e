"""Models for tests of what layerpipe.split fixes in its trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.engine.models import through


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.gain = nn.Linear(6, 6), nn.Linear(6, 6), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.b(torch.tanh(self.a(x)))


class Blocks(nn.Module):
    def __init__(self, kind: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(kind() for _ in range(4)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def drawn_alike(model: nn.Module, stages: Sequence[nn.Module], x: Tensor) -> bool:
    outputs = []
    for run in (model, lambda x: through(stages, x)):
        torch.manual_seed(0)
        outputs.append(run(x))
    return bool(torch.allclose(*outputs, atol=1e-6))


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Long(nn.Module):
    """Code that asks for sizes, which torch.export traces."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.layers = nn.Embedding(16, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head, self.gain = nn.Linear(6, 3), 1.0

    def forward(self, x: Tensor, mask: Tensor | None = None, repeat: int = 1, mean: bool = True) -> Tensor:
        if x.shape[1] > 16:
            x = x[:, :16]
        x = x + self.positions(torch.arange(x.shape[1]))
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.gain
        if mask is not None:
            x = x * mask
        x = x.sum(1) / x.shape[1] if mean else x.sum(1)
        return self.head(x) * repeat
