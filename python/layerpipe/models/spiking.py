"""A spiking network: leaky integrate-and-fire neurons, trained with surrogate gradients (Neftci et al., 1901.09948)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class Repeat(nn.Module):
    """Shows an image as the same input current in each of ``steps`` time steps: ``(b, ...)`` to ``(steps, b, c)``."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).unsqueeze(0).expand(self.steps, -1, -1)


class LeakyIntegrateAndFire(nn.Module):
    """Input currents ``(steps, b, c)`` to spikes of 0 and 1, with potentials that start at 0 in every forward::

        v(t) = decay v(t-1) + x(t)        s(t) = [v(t) > 1]        v(t) ← v(t) − s(t)

    The backward takes ``1 / (1 + slope |v − 1|)²`` for the derivative of a spike (Zenke and Ganguli, 1705.11146), and
    none for that of the reset.
    """

    def __init__(self, steps: int, decay: float = 0.9, slope: float = 5.0) -> None:
        super().__init__()
        self.steps, self.decay, self.slope = steps, decay, slope

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x[0])
        spikes = []
        for t in range(self.steps):
            v = self.decay * v + x[t]
            distance = v - 1
            soft = distance / (1 + self.slope * distance.abs())
            fired = (distance > 0).to(x.dtype)
            spikes.append(soft + (fired - soft).detach())
            v = v - fired
        return torch.stack(spikes)


class Rate(nn.Module):
    """The mean over time steps, ``(steps, b, c)`` to ``(b, c)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0)


def spiking(
    *, width: int = 32, channels: int = 1, size: int = 28, classes: int = 10, depth: int = 4, steps: int = 8
) -> nn.Sequential:
    """``depth`` fully connected layers of ``8 * width`` spiking neurons; logits are the mean output over time."""
    hidden = 8 * width
    sizes = [channels * size * size, *[hidden] * depth]
    blocks: list[nn.Module] = [Repeat(steps)]
    for a, b in itertools.pairwise(sizes):
        blocks.append(nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b), LeakyIntegrateAndFire(steps)))
    return nn.Sequential(*blocks, nn.Linear(hidden, classes), Rate())
