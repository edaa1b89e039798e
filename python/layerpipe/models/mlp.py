"""A fully connected network: few activations, many weights, where past weights cost the most."""

from __future__ import annotations

import itertools

from torch import nn


def mlp(*, width: int = 64, channels: int = 1, size: int = 28, classes: int = 10, depth: int = 12) -> nn.Sequential:
    """``depth`` hidden layers of ``8 * width`` units."""
    hidden = 8 * width
    sizes = [channels * size * size, *[hidden] * depth]
    blocks: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise(sizes):
        blocks.append(nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU()))
    return nn.Sequential(*blocks, nn.Linear(hidden, classes))
