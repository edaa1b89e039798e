"""How large a delayed step may be on a quadratic, with spike compensation and weight prediction.

    python -m bench.stable_steps

The largest stable product of learning rate and curvature for gradients that are ``n`` updates late, averaged with decay
``β``, with the newest gradient weighing ``b = 1 − β^(c n)`` and the forward at ``F = W − h n u``. Solutions are sums of
powers of the roots ``z`` of::

    z^(n+1) (z − 1) (z − β) + lr λ (z + h n (z − 1)) ((a (1 − β) + b) z − b β) = 0        a = β^(c n)
"""

from __future__ import annotations

import argparse

import numpy as np

DELAYS = (0, 1, 3, 7, 14)
KNOBS = ((0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0))


def radius(step: float, n: int, beta: float, c: float = 0.0, h: float = 0.0) -> float:
    """The largest root's absolute value, by which the slowest part of a solution changes with every update."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beta", type=float, nargs="+", default=[0.9, 0.95, 0.98, 0.99])
    given = parser.parse_args()
    print("| β | c, h | " + " | ".join(f"n = {n}" for n in DELAYS) + " |")
    print("| --- " * (len(DELAYS) + 2) + "|")
    for beta in given.beta:
        for c, h in KNOBS:
            cells = " | ".join(f"{largest_stable_step(n, beta, c, h):.2f}" for n in DELAYS)
            print(f"| {beta:g} | {c:g}, {h:g} | {cells} |")


if __name__ == "__main__":
    main()
