"""How near past weights should come: what their filters leave out of a sum of correlated updates."""

from __future__ import annotations

import math

import numpy as np

from layerpipe.study import past
from layerpipe_kernels import decay as decays


def theory(kind: str, n: int, correlation: float = 0.9) -> float:
    """The mean square error of past weights, relative to the latest ones, where successive updates correlate so.

    Args:
        kind: as in :func:`layerpipe.study.past.parse`.
        n: delay in updates.
    """
    name, options = past.parse(kind)
    if name == "stash" or n == 0:
        return 0.0
    if name == "latest":
        return 1.0
    if name == "blend":
        order = decays.useful_order(n, int(options["order"]), newest=True)
        return decays.blend(n, order, correlation, True, coupled=options["decay"] == decays.COUPLED).error
    beta = past.PIPEMARE ** (1 / n) if name == "pipemare" else past.decay_of(options["decay"], n)
    length = n + 1 if not beta else n + math.ceil(-20 / math.log(beta))
    wanted = (np.arange(length) < n).astype(float)
    missed = wanted - n * (1 - beta) * beta ** np.arange(length)
    correlations = correlation ** np.abs(np.arange(length)[:, None] - np.arange(length))
    return float(missed @ correlations @ missed / (wanted @ correlations @ wanted))
