"""The largest stable step when gradients come late: the classical answer for a quadratic.

Along an eigenvector with curvature ``h`` gradient descent with momentum and a gradient that is ``n`` updates old is

.. code-block:: text

    v(t+1) = momentum v(t) + h W(t - n)
    W(t+1) = W(t) - lr (nesterov ? h W(t - n) + momentum v(t+1) : v(t+1))

whose solutions are sums of powers of the roots of ``(z - 1) (z - momentum) z^n + lr h (nesterov ? 1 + momentum : 1) z -
(nesterov ? lr h momentum : 0)``. They do not grow while all roots lie within the unit circle.
"""

from __future__ import annotations

import numpy as np


def largest_stable_step(delay: int, momentum: float = 0.0, *, nesterov: bool = False) -> float:
    """The largest product of learning rate and curvature at which SGD on a quadratic does not diverge.

    ``2 (1 + momentum)`` without a delay and without ``nesterov``, ``2 sin(pi / (4 delay + 2))`` without momentum. An
    average of gradients, as Adam has it, takes steps ``1 - momentum`` times as long, so divide by that.

    Args:
        delay: ``n``, in updates.
        momentum: as in :class:`torch.optim.SGD`.
        nesterov: as there.

    Raises:
        ValueError: a negative delay, or a momentum outside ``[0, 1)``.
    """
    if delay < 0:
        raise ValueError(f"delay must not be negative, got {delay}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")

    def stable(step: float) -> bool:
        polynomial = np.append(np.poly([1.0, momentum]), np.zeros(delay))
        polynomial[-2] += step * (1 + momentum if nesterov else 1)
        polynomial[-1] -= step * momentum if nesterov else 0
        return bool(np.abs(np.roots(polynomial)).max() <= 1 + 1e-9)

    below, above = 0.0, 4.0  # stable only at a momentum of 1, without a delay
    for _ in range(60):
        middle = (below + above) / 2
        below, above = (middle, above) if stable(middle) else (below, middle)
    return below
