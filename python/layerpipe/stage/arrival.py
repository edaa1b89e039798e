"""The gradients of a stage's inputs, as the stage's layers made them.

Where a gradient lies in memory in another order than the leaf that it belongs to, autograd copies it into the leaf's
order. In a network that is not cut there is no leaf and nothing copies: the layers before see the other order, may take
other kernels for it and round differently.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


class Arrival:
    """Watches backwards from one moment at which the pipe is empty to the next; the first shows which need it."""

    def __init__(self) -> None:
        self._relaid: list[int] | None = None  # the inputs whose gradients autograd copies; None: not known yet
        self._seen: dict[int, Tensor] | None = None

    def watch(self, inputs: Sequence[Tensor]) -> None:
        """Before a backward."""
        self._seen = seen = dict[int, Tensor]()
        for i in range(len(inputs)) if self._relaid is None else self._relaid:
            if inputs[i].requires_grad:
                inputs[i].register_hook(functools.partial(seen.__setitem__, i))

    def gradients(self, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """After it: of all inputs, ``None`` where there is none."""
        grads = [x.grad for x in inputs]
        seen, self._seen = self._seen, None
        if seen is None:  # there was no backward
            return tuple(grads)
        if self._relaid is None:
            self._relaid = [i for i, g in seen.items() if _other_order(g, grads[i])]
        for i in self._relaid:
            grads[i] = seen.get(i)
        return tuple(grads)


def _other_order(made: Tensor, kept: Tensor | None) -> bool:
    return kept is not None and made.layout is kept.layout is torch.strided and made.stride() != kept.stride()
