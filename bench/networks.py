"""What the benches train: ResNet-18 on small images, and a small GPT."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
from layerpipe import models

VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class Case:
    """One network and batch; ``width`` and ``size`` are a GPT's model dimension and sequence length."""

    network: str
    width: int
    batch: int
    size: int

    def __str__(self) -> str:
        return f"{self.network} {self.width}, batch {self.batch}"

    def model(self) -> nn.Module:
        """The same weights every time."""
        torch.manual_seed(0)
        if self.network == "gpt":
            return gpt(self.width, self.size)
        return models.make(self.network, width=self.width, channels=1, size=self.size, classes=10)

    def minibatch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        if self.network == "gpt":
            tokens = torch.randint(VOCABULARY, (self.batch, self.size + 1), generator=generator)
            return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        x = torch.randn(self.batch, 1, self.size, self.size, generator=generator)
        return x, torch.randint(10, (self.batch,), generator=generator)

    def stages(self, count: int, balance: str = "time") -> list[nn.Module]:
        model, (x, _) = self.model(), self.minibatch()
        if not isinstance(model, nn.Sequential):
            return layerpipe.split(model, count, (x,), balance=balance)
        # A GPT's blocks are all alike; the embedding and the head are small beside them.
        blocks = len(model) - 2
        cuts = [0, *(1 + round(blocks * s / count) for s in range(1, count)), len(model)]
        return [model[a:b] for a, b in itertools.pairwise(cuts)]


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


class Embedding(nn.Module):
    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Parameter(0.02 * torch.randn(length, width))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        return self.token(tokens) + self.position


class Block(nn.Module):
    """Causal attention and an MLP, both behind a LayerNorm and beside a skip connection."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, C/H)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(x)


def gpt(width: int, length: int, layers: int = 4) -> nn.Sequential:
    """Embedding, blocks, head: a chain that can be cut between any two."""
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, VOCABULARY))
    return nn.Sequential(Embedding(width, length), *(Block(width) for _ in range(layers)), head)
