"""Bytes that a step moves through memory per parameter: what benches, tests and documents read.

One pass reads ``W, g``, the optimizer's states, the averages and, of predicted weights, the last update, and writes all
but ``g``; the past weights are only written. Separate passes are torch's fused optimizer, then one pass per average
(read it and the update, write it), then one that reads the weights and all averages and writes the past weights
(docs/maths.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Traffic(NamedTuple):
    """The arrays that a step reads and writes, those of :class:`layerpipe_kernels.plan.Arrays`."""

    weight: torch.dtype = torch.float32
    grad: torch.dtype | None = None  # the weights' unless given
    average: torch.dtype | None = None  # the states' unless given
    states: int = 1  # SGD: 1 with momentum, else 0; Adam: 2, with AMSGrad 3
    emas: int = 1
    past: bool = True
    master: bool = False
    previous: bool = False  # the weights are predicted

    def _sizes(self) -> tuple[int, int, int, int]:
        w = self.weight.itemsize
        full = max(w, 4)
        grad = w if self.grad is None else self.grad.itemsize
        return w, grad, full, full if self.average is None else self.average.itemsize

    def one_pass(self) -> int:
        """Returns the bytes per parameter of the fused step."""
        w, grad, full, average = self._sizes()
        weights = w + 2 * full if self.master else 2 * w  # with a master the rounded weights are not read
        kept = self.states + self.previous
        return weights + grad + 2 * full * kept + 2 * average * self.emas + (w if self.past else 0)

    def optimizer(self) -> int:
        """Returns the bytes per parameter of the optimizer's own step."""
        return self._replace(emas=0, past=False, previous=False).one_pass()

    def separate_passes(self) -> int:
        """Returns the bytes per parameter of torch's fused optimizer, then averages and reconstruction; without the
        prediction of weights."""
        w, _, full, average = self._sizes()
        averages = self.emas * (full + 2 * average)
        reconstruct = 2 * w + self.emas * average if self.past else 0
        return self.optimizer() + averages + reconstruct
