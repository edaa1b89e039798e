"""Models whose Python torch.fx cannot follow: it looks at shapes, asserts, takes ``*args`` and keyword defaults."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def heads(x: Tensor, count: int) -> Tensor:
    """(b, t, c) -> (b, heads, t, c / heads)."""
    b, t, c = x.shape
    assert c % count == 0, f"{c} is no multiple of {count}"
    return x.view(b, t, count, c // count).transpose(1, 2)


class Attention(nn.Module):
    """As GPT-2 is written for inference and training alike: a mask that may be given, a buffer for the causal one."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.qkv, self.out, self.drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(0.2)
        self.register_buffer("causal", torch.tril(torch.ones(32, 32, dtype=torch.bool)), persistent=False)

    def forward(self, x: Tensor, *unused: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
        t = x.shape[1]
        if t > len(self.causal):
            raise ValueError("too long")
        q, k, v = (heads(z, self.count) for z in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / k.size(-1) ** 0.5
        scores = scores.masked_fill(~self.causal[:t, :t], torch.finfo(scores.dtype).min)
        if mask is not None:
            scores = scores + mask
        y = (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).reshape(x.shape)
        return (F.dropout(self.out(y), 0.2, self.training),)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln1, self.attention, self.ln2 = nn.LayerNorm(width), Attention(width, 2), nn.LayerNorm(width)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, *unused: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.ln1(x), *unused, mask=mask)[0]
        return x + self.down(self.act(self.up(self.ln2(x))))


class ShapedGPT(nn.Module):
    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions, self.drop = nn.Embedding(11, width), nn.Embedding(32, width), nn.Dropout(0.1)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 11, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, **options: Tensor) -> Tensor:
        b, t = tokens.size()
        if positions is None:
            positions = torch.arange(t, device=tokens.device).expand(b, t)
        x = self.drop(self.tokens(tokens) + self.positions(positions))
        for block in self.blocks:
            x = block(x, **options)
        return self.head(x)


class ShapedConv(nn.Module):
    """BatchNorm, an operation in place, a skip connection that is there where shapes allow it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1))
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        z = F.relu(self.bn2(self.conv2(y)))
        z = z + y if z.shape == y.shape else z
        assert z.size(1) == self.fc.in_features
        return self.fc(self.drop(F.adaptive_avg_pool2d(z, 1).flatten(1)))


class ShapedBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.deeper, self.join, self.scale = nn.Linear(8, 8), nn.Linear(16, 8), nn.Parameter(torch.rand(8))

    def forward(self, *inputs: Tensor) -> Tensor:
        y = torch.relu(self.stem(inputs[0]) * self.scale)
        branches = [branch(y) for branch in (self.left, self.right)]
        if y.dim() > 1:
            branches[1] = self.deeper(torch.relu(branches[1]))
        return self.join(torch.cat(branches, -1)) + y


class ShapedLayers(nn.Module):
    """Layers of torch that are themselves many operations, with modes and sizes inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.lstm, self.last = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if y.dim() != 3:
            raise ValueError("three dimensions")
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.last(self.lstm(y)[0])
