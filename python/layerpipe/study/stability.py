"""The largest stable delayed step on a quadratic, with spike compensation and weight prediction.

Gradients come ``n`` updates late and are averaged with decay ``β``, the newest one weighs ``b = 1 − β^(c n)``, and the
forward is at ``F = W − h n u``. Solutions are sums of powers of the roots ``z`` of::

    z^(n+1) (z − 1) (z − β) + lr λ (z + h n (z − 1)) ((a (1 − β) + b) z − b β) = 0        a = β^(c n)
"""

from __future__ import annotations

import numpy as np


def radius(step: float, n: int, beta: float, c: float = 0.0, h: float = 0.0) -> float:
    """The largest root's absolute value, by which the slowest part of a solution changes with every update.

    Args:
        step: the product of learning rate and curvature.
    """
    a = beta ** (c * n)
    newest = np.array([a * (1 - beta) + 1 - a, -(1 - a) * beta])
    free = np.append(np.poly([1.0, beta]), np.zeros(n + 1))
    return float(np.abs(np.roots(np.polyadd(free, step * np.polymul([1 + h * n, -h * n], newest)))).max())


def largest_stable_step(n: int, beta: float, c: float = 0.0, h: float = 0.0) -> float:
    """By bisection between a step that is stable and one that is not."""
    below, above = 0.0, 1e4
    for _ in range(60):
        middle = (below + above) / 2
        below, above = (middle, above) if radius(middle, n, beta, c, h) <= 1 + 1e-9 else (below, middle)
    return below
