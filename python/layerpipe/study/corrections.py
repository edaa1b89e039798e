"""Published corrections of a late gradient or update, one tensor each.

``W`` are a stage's weights when a gradient ``g`` arrives, ``W'`` those at which it was taken, ``n`` updates before.
"""

from __future__ import annotations

import collections

import torch
from torch import Tensor


class GapAware:
    """Divides late gradients, element by element (Barkai, Hakimi and Schuster, arXiv 1909.10802)::

        g ← g / (1 + |W − W'| / C)        C = a step's mean length: the root of the mean of squared updates

    Args:
        decay: of the updates' average, bias-corrected.
    """

    def __init__(self, like: Tensor, decay: float = 0.999) -> None:
        self.squares, self.decay, self.count = torch.zeros_like(like), decay, 0

    def __call__(self, g: Tensor, now: Tensor, then: Tensor) -> Tensor:
        if not self.count:
            return g
        length = (self.squares / (1 - self.decay**self.count)).sqrt() + 1e-12
        return g / (1 + (now - then).abs() / length)

    def see(self, update: Tensor) -> None:
        """Takes an update into the average."""
        self.squares.lerp_(update.square(), 1 - self.decay)
        self.count += 1


class DelayCompensation:
    """The gradient at the newest weights, to first order, with ``g²`` for the curvature (DC-ASGD-a, Zheng et al., arXiv
    1609.08326, equation 14 and its adaptive scale)::

        g ← g + λ g² (W − W')        λ = λ₀ / √(q + 1e-7)        q ← .95 q + .05 g²
    """

    def __init__(self, like: Tensor, scale: float, decay: float = 0.95) -> None:
        self.squares, self.scale, self.decay = torch.zeros_like(like), scale, decay

    def __call__(self, g: Tensor, now: Tensor, then: Tensor) -> Tensor:
        self.squares.lerp_(g.square(), 1 - self.decay)
        return g + self.scale * g.square() * (now - then) / (self.squares + 1e-7).sqrt()


class ErrorFeedback:
    """Corrects an earlier step once its own gradient has come::

        u(t) ← u(t) + θ (u(t) − u(t−n))

    The step of ``n`` updates ago was made with ``u(t−n)``, and would have been made with ``u(t)`` had its gradient been
    there. That is our reading of Zmushko et al. (arXiv 2606.30634), from their abstract; theirs is for ``n = 1``.
    """

    def __init__(self, theta: float) -> None:
        self.theta = theta
        self.recent: collections.deque[Tensor] = collections.deque()

    def __call__(self, update: Tensor, n: int) -> Tensor:
        """The corrected update; unchanged where ``n`` is 0 or no update is that old."""
        self.recent.append(update.clone())
        while len(self.recent) > n + 1:
            self.recent.popleft()
        earlier = self.recent[0] if len(self.recent) == n + 1 else update
        return update + self.theta * (update - earlier)
