"""The error that past weights should have: what their filters leave out of a sum of correlated updates."""

from __future__ import annotations

import math

import numpy as np

from layerpipe.study import past
from layerpipe_kernels import decay as decays
from layerpipe_kernels.past import EMA, Blend, Stash


def theory(kind: str, n: int, correlation: float = 0.9) -> float:
    """The mean square error of past weights, relative to the latest ones, where successive updates correlate so.

    Args:
        kind: as in :func:`layerpipe.study.past.parse`.
        n: delay in updates.
    """
    made = past.parse(kind)
    if isinstance(made, Stash) or n == 0:
        return 0.0
    if isinstance(made, Blend):
        order = decays.useful_order(n, made.order, newest=True)
        return decays.blend(n, order, correlation, True, coupled=made.decay == decays.COUPLED).error
    if not isinstance(made, EMA):
        return 1.0
    beta = decays.resolve(made.decay, n)
    length = n + 1 if not beta else n + math.ceil(-20 / math.log(beta))
    wanted = (np.arange(length) < n).astype(float)
    missed = wanted - n * (1 - beta) * beta ** np.arange(length)
    correlations = correlation ** np.abs(np.arange(length)[:, None] - np.arange(length))
    return float(missed @ correlations @ missed / (wanted @ correlations @ wanted))
