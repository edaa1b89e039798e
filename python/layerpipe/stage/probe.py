"""Measures how far reconstructed past weights are from the true ones, while training on a sample of them."""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerpipe.stage.stage import Stage


class Reading(NamedTuple):
    """One comparison in one stage: squared errors summed over the sampled weights."""

    update: int
    full: bool  # the delay is what it is in steady state
    error: float  # |What - W(t-n)|^2
    moved: float  # |W(t) - W(t-n)|^2, the error of using the latest weights

    @property
    def relative(self) -> float:
        return self.error / self.moved if self.moved else 0.0


class ReconstructionProbe:
    """Keeps true past values of a sample of a stage's weights and compares reconstructions with them.

    Reads only: training is bitwise the same with and without it.

    Args:
        stage: to watch; called by it before each backward.
        samples: weights to follow, shared among parameters by their size.
        every: compare in every ``every``-th update.
    """

    def __init__(self, stage: Stage, *, samples: int = 2048, every: int = 10, seed: int = 0) -> None:
        self.stage, self.every = stage, every
        self.readings: list[Reading] = []
        generator = torch.Generator().manual_seed(seed)
        params = [p for p in stage.module.parameters() if p.requires_grad and p not in stage.without_past]
        total = sum(p.numel() for p in params)
        self._chosen = [
            (p, torch.randint(p.numel(), (max(8, samples * p.numel() // total),), generator=generator).to(p.device))
            for p in params
            if p.numel()
        ]
        self._past: collections.deque[tuple[int, Tensor]] = collections.deque(maxlen=stage.delay + 1)
        stage.probe = self

    def __call__(self, stage: Stage) -> None:
        if not self._chosen:
            return
        now = self._sample([p for p, _ in self._chosen])
        if not self._past or self._past[-1][0] != stage.version:
            self._past.append((stage.version, now))
        n = stage.n
        if not n or stage.version % self.every or len(self._past) <= n:  # it may have come to a running pipe
            return
        version, true = self._past[-1 - n]
        assert version == stage.version - n
        optimizer: Any = stage.optimizer
        # Without a number for stages whose n never changes: their optimizers may know no other.
        which = () if stage.accumulation.every == 1 else (n,)
        estimate = self._sample([optimizer.past_view(p, *which) for p, _ in self._chosen])
        self.readings.append(
            Reading(
                stage.version,
                n == stage.delay and stage.version - stage.base > n,
                float((estimate - true).square().sum()),
                float((now - true).square().sum()),
            )
        )

    def relative_error(self) -> float | None:
        """Mean-square error over all comparisons in steady state, relative to using the latest weights (1.0)."""
        readings = [r for r in self.readings if r.full]
        moved = sum(r.moved for r in readings)
        return sum(r.error for r in readings) / moved if moved else None

    @torch.no_grad()
    def _sample(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1)[i].double() for t, (_, i) in zip(tensors, self._chosen, strict=True)])
