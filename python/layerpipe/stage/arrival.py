"""The gradients of a stage's inputs, as the stage's layers made them.

Where a gradient lies in memory otherwise than the leaf that it belongs to (in another order, with gaps, the same memory
for many elements), autograd puts down a copy that lies as the leaf does. In a network that is not cut there is no leaf
and nothing copies: the layers before see the gradient as it was made, may take other kernels for it and round
differently. So that one is handed on; autograd's copy is made in vain.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

Seen = dict[int, Tensor | None]


class Arrival:
    """Watches a stage's backwards, until autograd has once put down an input's gradient as it was made."""

    def __init__(self) -> None:
        self._as_made: dict[int, torch.Size] = {}  # of each input whose gradient autograd did not copy: its shape

    def watch(self, inputs: Sequence[Tensor]) -> Seen:
        """Before the backward: what it will fill in, for :meth:`gradients`."""
        seen: Seen = {}
        as_made = self._as_made
        for i, x in enumerate(inputs):
            if as_made.get(i) != x.shape and x.requires_grad:
                x.register_hook(functools.partial(_note, seen, i))
        return seen

    def gradients(self, inputs: Sequence[Tensor], seen: Seen) -> tuple[Tensor | None, ...]:
        """After it: of all inputs, ``None`` where there is none."""
        grads = [x.grad for x in inputs]
        for i, made in seen.items():
            kept = grads[i]
            if made is not None and kept is not None:
                copied = made.layout == torch.strided and made.stride() != kept.stride()
                if copied:
                    grads[i] = made
                    self._as_made.pop(i, None)
                else:
                    self._as_made[i] = inputs[i].shape
        return tuple(grads)


def _note(seen: Seen, i: int, grad: Tensor) -> None:
    seen[i] = None if i in seen else grad  # a backward inside of the backward: each of them sees a part
