"""torch's autograd engine, without what :func:`torch.autograd.backward` checks again in every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_run = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None)


def backward(
    outputs: Sequence[Any],
    grads: Sequence[Tensor | None],
    *,
    inputs: Sequence[Tensor] = (),
    keep_graph: bool = False,
) -> None:
    """Add gradients to the ``.grad`` of the graph's leaves.

    The gradients of a stage's outputs are those of the next stage's inputs, which autograd made itself: their shapes
    and dtypes need no second look, which would take longer than the backward of a small layer.

    Args:
        outputs: tensors or gradient edges.
        grads: of their shapes; ``None`` stands for 1 where the output is one number.
        inputs: the only leaves to compute gradients of; all if empty.
        keep_graph: whether the graph will be walked again.
    """
    if _run is None:  # a torch that has renamed it
        torch.autograd.backward(list(outputs), list(grads), retain_graph=keep_graph, inputs=list(inputs) or None)
        return
    filled = [torch.ones_like(y) if g is None else g for y, g in zip(outputs, grads, strict=True)]
    _run(tuple(outputs), tuple(filled), keep_graph, False, tuple(inputs), allow_unreachable=True, accumulate_grad=True)
