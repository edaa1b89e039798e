"""The past weights that a backward sees, simulated: the formulas of docs/past_weights.md in plain torch.

``W(t−n) = W(t) + u(t) + … + u(t−n+1)``, and an average ``E`` of the updates ``u`` stands for their sum, ``n E``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layerpipe_kernels import decay as decays
from layerpipe_kernels import past as kinds
from layerpipe_kernels.past import EMA, Blend, Latest, Past, Stash

#: The part of an average that PipeMare forgets over a delay, the ``D`` of its ``γ = D^(1/n)`` (arXiv 1910.05124).
PIPEMARE = math.exp(-2)

PIPEMARE_KIND = "pipemare"


def parse(text: str) -> Past:
    """Parse a string: a kind of :mod:`layerpipe_kernels.past` without a dtype and a norm, or ``pipemare``.

    Raises:
        ValueError: an unknown kind or option, or one that is not simulated.
    """
    if text == PIPEMARE_KIND:
        return EMA(decay=lambda n: PIPEMARE ** (1 / n))
    made = kinds.parse(text)
    simulated = (Stash, Latest, EMA, Blend)
    fixed = isinstance(made, Blend) and made.decay not in (None, decays.COUPLED)
    if not isinstance(made, simulated) or made.norm or made.dtype or fixed or getattr(made, "of", "update") != "update":
        names = ", ".join(kind.kind for kind in simulated)
        raise ValueError(
            f"past {text!r} is not simulated; there are: {names}, {PIPEMARE_KIND}, ema:decay=0.9, blend:order=3"
        )
    return made


class PastWeights:
    """Estimates a stage's weights of some updates ago from its newest ones and averages of its updates.

    Args:
        past: a kind with its options, as :func:`parse` takes them.
        like: the stage's weights.
        delay: the largest number of updates between a forward and its backward, for which averages are designed.
        correlation: of successive updates: the ``β₁`` of the optimizer.
        horizon: ``p``: the forward sees ``F = W − p u``, weights predicted by so many of the last update.
    """

    def __init__(
        self, past: str, like: Sequence[Tensor], delay: int, *, correlation: float, horizon: float = 0.0
    ) -> None:
        self.kind = kind = parse(past)
        self.exact = isinstance(kind, Stash) or delay == 0
        self.delay, self.correlation, self.horizon, self.count = delay, correlation, horizon, 0
        self.design = decays.Blend((), (), 0.0, 0.0)
        if not self.exact and isinstance(kind, Blend):
            order = decays.useful_order(delay, kind.order, newest=True, predicted=horizon > 0)
            coupled = kind.decay == decays.COUPLED
            self.design = decays.blend(delay, order, correlation, True, coupled=coupled, horizon=horizon)
        elif not self.exact and isinstance(kind, EMA):
            beta = decays.resolve(kind.decay, delay)
            self.design = decays.Blend((beta,), (1 - horizon / delay,), horizon / delay, 0.0)
        self.averages = [[torch.zeros_like(w) for w in like] for _ in self.design.decays]
        self.newest = [torch.zeros_like(w) for w in like]

    def see(self, updates: Sequence[Tensor]) -> None:
        """Takes an update of ``W`` into the averages; while the delay fills, all of them are the mean."""
        self.count += 1
        self.newest = list(updates)
        mean, turn = (self.count - 1) / self.count, self.design.turn
        if self.count <= self.delay:
            betas, turn = [mean] * len(self.averages), 0.0
        else:
            betas = [min(beta, mean) for beta in self.design.decays]
        for i, u in enumerate(self.newest):
            before = [average[i] for average in self.averages]
            after = [u + beta * (e - u) for beta, e in zip(betas, before, strict=True)]
            if turn:
                after[:2] = after[0] + turn * (u - before[1]), after[1] - turn * (u - before[0])
            for average, e in zip(self.averages, after, strict=True):
                average[i] = e

    def at(self, newest: Sequence[Tensor], n: int) -> list[Tensor]:
        """Return what the forward of ``n`` updates ago saw, estimated from what the newest one sees."""
        if not n or isinstance(self.kind, Latest):
            return list(newest)
        taps, update_tap = self._taps(n)
        estimate = [w.view_as(u) + update_tap * u for w, u in zip(newest, self.newest, strict=True)]
        for tap, average in zip(taps, self.averages, strict=True):
            estimate = [w + tap * e for w, e in zip(estimate, average, strict=True)]
        return estimate

    def _taps(self, n: int) -> tuple[list[float], float]:
        design, count = self.design, len(self.averages)
        if self.count <= self.delay and count:
            return [float(n), *[0.0] * (count - 1)], self.horizon
        if not isinstance(self.kind, Blend):
            return [n - self.horizon], self.horizon
        if n != self.delay:
            design = decays.retapped(n, design.decays, self.correlation, True, design.turn, horizon=self.horizon)
        return [n * tap for tap in design.taps], n * design.update_tap
