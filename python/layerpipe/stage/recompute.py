"""Activation checkpointing inside a stage: the forward that a backward runs again must see the past weights.

:func:`torch.utils.checkpoint.checkpoint` saves no weights that could be unpacked as past ones; it calls the layers once
more, which take whatever is in the parameters. So that has to be the past, for as long as the backward runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


class Recomputation(TorchFunctionMode):
    """Notices whether a backward runs layers again: something records gradients of these parameters in it."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self._params = set(params)
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.seen and torch.is_grad_enabled():
            used = pytree.tree_leaves((args, kwargs))
            self.seen = any(isinstance(value, Tensor) and value in self._params for value in used)
        return func(*args, **(kwargs or {}))


@contextmanager
def past_in_place(params: Sequence[Tensor], past_view: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Put every parameter's past weights in its place, all of the stage at once, and the current ones back after."""
    now = [p.data for p in params]
    past = [past_view(p) for p in params]
    try:
        for param, values in zip(params, past, strict=True):
            param.data = values
        yield
    finally:
        for param, values in zip(params, now, strict=True):
            param.data = values
