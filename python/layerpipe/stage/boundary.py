"""Tensors that cross a stage's boundaries: tensors cut off from the graph of the stage before, to which they were
tied."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels.layout import replica

Tensors = tuple[Tensor, ...]


class _Computed(torch.autograd.Function):
    """A leaf as something computed, which layers may change in place."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class StageInputs:
    """Makes a stage's inputs of what arrives, and finds out whether its layers change that in place."""

    def __init__(self) -> None:
        self.settled = False  # whether the layers have run and change nothing in place: they get the leaves
        self._changed: dict[int, bool] = {}  # of each input that needs a gradient, once its layers have run

    def given(self, leaves: Tensors) -> Tensors:
        """Return what the layers get: the leaves, or what may be changed in place; at first all of them may."""
        return tuple(
            [_Computed.apply(x) if x.requires_grad and self._changed.get(i, True) else x for i, x in enumerate(leaves)]
        )

    def after(self, leaves: Tensors, given: Tensors) -> None:
        """The layers have run: look what they have done.

        Raises:
            RuntimeError: they have changed memory in place that another input shares.
        """
        for i, (leaf, x) in enumerate(zip(leaves, given, strict=True)):
            if x is leaf:
                continue
            self._changed[i] = self._changed.get(i, False) or x._version > 0
            if x._version:
                torch.autograd.graph.increment_version(leaf)  # whoever has kept it sees that it is another
                _check_alone(i, leaves)
        self.settled = not any(self._changed.values())


def _check_alone(changed: int, leaves: Tensors) -> None:
    memory = leaves[changed].untyped_storage().data_ptr()
    for i, other in enumerate(leaves):
        if i != changed and other.layout == torch.strided and other.untyped_storage().data_ptr() == memory:
            raise RuntimeError(
                f"the layers change input {changed} in place, which lies in the same memory as input {i}; let the "
                "stage before return a clone of one of them, or use an operation that is not in place"
            )


def handed_on(output: Tensor, given: Tensors) -> Tensor:
    """An output cut off from the graph; a copy of what is a weight or a buffer, or was not computed.

    The stage will change that when its neighbour has not come to it yet.
    """
    made = output if output._base is None else output._base
    if made.is_leaf and not any(made is x for x in given):
        return replica(output).requires_grad_(output.requires_grad)
    cut = output.detach()
    return cut.requires_grad_() if output.requires_grad else cut
