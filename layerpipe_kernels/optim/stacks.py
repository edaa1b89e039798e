"""State of matrices of one shape, stacked so that one batched product serves all of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from layerpipe_kernels.optim.directions import AdamDirections
from layerpipe_kernels.optim.matrices import sides

State = dict[str, Any]

#: Elements of a stack: what stays in a core's cache from one product to the next; on other devices, what keeps them
#: busy.
_ELEMENTS = {"cpu": 1 << 17}
_ELEMENTS_ELSEWHERE = 1 << 24


class Array(NamedTuple):
    """Shape and dtype of what a parameter's state holds under a name."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Stack:
    """State of ``k`` matrices of one shape: ``(k, *)`` per name.

    Every parameter's state holds views of the stack: a checkpoint has them as it has other state, and replacing one
    makes :meth:`fits` false.

    Args:
        device: of the parameters.
        states: theirs; what ``arrays`` names is taken over from them, zeros where there is none.
        arrays: per name, what the state of one parameter holds.
    """

    def __init__(self, device: torch.device, states: Sequence[State], arrays: dict[str, Array]) -> None:
        self.states = list(states)
        self.adam: tuple[Tensor, AdamDirections] | None = None  # and what it writes into
        self.arrays: dict[str, Tensor] = {}
        self._held: list[tuple[State, str, Tensor]] = []
        for name, (shape, dtype) in arrays.items():
            stack = torch.zeros(len(states), *shape, dtype=dtype, device=device)
            for state, view in zip(states, stack.unbind(0), strict=True):
                if (old := state.get(name)) is not None and old.shape == view.shape:
                    view.copy_(old)
                state[name] = view
                self._held.append((state, name, view))
            self.arrays[name] = stack

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def fits(self, states: Sequence[State]) -> bool:
        """Returns whether these states hold what is stacked here."""
        return (
            len(states) == len(self.states)
            and all(map(operator.is_, states, self.states))
            and all(state.get(name) is view for state, name, view in self._held)
        )

    def views(self, name: str) -> list[Tensor]:
        """Returns the views that the states hold, the same objects each time."""
        return [view for _, held, view in self._held if held == name]


def gather(grads: Sequence[Tensor], out: Tensor) -> Tensor:
    """Returns gradients as ``(k, rows, cols)``: copied into ``out``, or a view of a single one."""
    if len(grads) == 1 and grads[0].dtype == out.dtype and grads[0].is_contiguous():
        return grads[0].view(out.shape)
    torch._foreach_copy_([r.view(g.shape) for r, g in zip(out.unbind(0), grads, strict=True)], list(grads))
    return out


def split(params: Sequence[Tensor]) -> list[list[int]]:
    """Returns indices of parameters of one shape, device and dtype, as many as one stack should hold."""
    alike: dict[Any, list[int]] = {}
    for i, param in enumerate(params):
        alike.setdefault((sides(param), param.device, param.dtype), []).append(i)
    parts = []
    for indices in alike.values():
        param = params[indices[0]]
        most = max(1, _ELEMENTS.get(param.device.type, _ELEMENTS_ELSEWHERE) // max(1, param.numel()))
        parts += [indices[start : start + most] for start in range(0, len(indices), most)]
    return parts


class Scratch:
    """Temporary memory of products, used again in every step."""

    def __init__(self) -> None:
        self._memory: dict[Any, Tensor] = {}
        self._views: dict[Any, Tensor] = {}

    def __call__(self, name: str, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a tensor of ``shape`` on the device of ``like``, the same one as long as it is large enough.

        What was written under this name before, in any shape, is lost.
        """
        key = name, like.device, dtype or like.dtype
        view = self._views.get((key, shape))
        if view is not None:
            return view
        numel, memory = math.prod(shape), self._memory.get(key)
        if memory is None or memory.numel() < numel:
            memory = self._memory[key] = torch.empty(numel, dtype=key[2], device=like.device)
            self._views = {at: view for at, view in self._views.items() if at[0] != key}
        view = self._views[key, shape] = memory[:numel].view(shape)
        return view
