"""Steps of optimizers that may do something else than to update the weights with every gradient."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels.optim import PastOptimizer, PastWeights


def check_step(stage: str, optimizer: Any) -> None:
    """Refuse an optimizer that evaluates the loss itself, which no stage can do alone.

    Raises:
        TypeError: its step, or that of an optimizer within it, has a closure that is not optional.
    """
    for each in _within(optimizer):
        try:
            parameters = list(inspect.signature(each.step).parameters.values())
        except (TypeError, ValueError):  # compiled
            continue
        for p in parameters:
            if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                raise TypeError(
                    f"{stage}: {type(each).__name__}.step needs its {p.name!r}: a closure evaluates the whole network "
                    "again, and a stage has only its own part of it; use an optimizer that steps on gradients, such as "
                    "layerpipe_kernels.SGD or layerpipe_kernels.PastWeights around one of torch's"
                )


def _within(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those that it wraps."""
    yield optimizer
    for value in vars(optimizer).values():
        if isinstance(value, torch.optim.Optimizer):
            yield from _within(value)


def unknown(optimizer: Any) -> bool:
    """Return whether an optimizer may step in some minibatches only, or keep gradients from one to the next: neither
    ours nor torch's do."""
    inner = _innermost(optimizer)
    return type(inner).__module__.partition(".optim")[0] not in ("torch", "layerpipe_kernels") or _clears(inner)


def _innermost(optimizer: Any) -> Any:
    while type(optimizer) is PastWeights:
        optimizer = optimizer.optimizer
    return optimizer


def _clears(optimizer: Any) -> bool:
    """Return whether it has a ``zero_grad`` of its own."""
    zero_grad = getattr(optimizer, "zero_grad", None)
    return getattr(zero_grad, "__func__", zero_grad) is not torch.optim.Optimizer.zero_grad


class WatchedStep:
    """The step of an optimizer of unknown making.

    A plain loop calls ``zero_grad()``, a backward and ``step()``, and so does a stage. Where a step does nothing, the
    gradient may be meant to wait for those of the next minibatches, or to be left out. Only an optimizer with a
    ``zero_grad`` of its own says which; of others such a step is refused.

    Args:
        optimizer: a stage's.
        params: what it steps.
    """

    def __init__(self, optimizer: Any, params: Sequence[Tensor]) -> None:
        self._optimizer, self._params = optimizer, params
        self._name = type(_innermost(optimizer)).__name__
        self._says = _clears(_innermost(optimizer))
        self._counts = isinstance(optimizer, PastOptimizer)
        self._bumps: bool | None = None  # whether a step shows in the weights' versions; not known before the first

    def clear_gradients(self) -> None:
        if self._says:
            self._optimizer.zero_grad()
            return
        for param in self._params:
            param.grad = None

    def __call__(self) -> None:
        """Step.

        Raises:
            RuntimeError: nothing has been updated although there are gradients, and the optimizer has no ``zero_grad``
                that says what becomes of them; or its past weights have not counted the step.
        """
        groups = [group for group in self._optimizer.param_groups if self._counts and group.get("delay")]
        updates = [group["updates"] for group in groups]
        if self._says:
            self._optimizer.step()
        else:
            copies = [] if self._bumps else [p.detach().clone() for p in self._params]
            versions = [p._version for p in self._params]
            self._optimizer.step()
            if versions == [p._version for p in self._params]:
                self._check_values(copies)
            elif self._bumps is None:
                self._bumps = True
        if any(isinstance(n, int) and group["updates"] == n for group, n in zip(groups, updates, strict=True)):
            raise RuntimeError(
                f"{self._name} left out an update that its past weights should have counted; let it be a torch "
                "optimizer, and wrap it: layerpipe_kernels.PastWeights counts every step"
            )

    def _check_values(self, copies: Sequence[Tensor]) -> None:
        """After a step that shows in no version, as of an optimizer that writes to ``param.data``."""
        grads = [p.grad for p in self._params if p.grad is not None]
        if copies and not all(map(torch.equal, copies, self._params)):
            self._bumps = False
        elif any(bool((g._values() if g.is_sparse else g).any()) for g in grads) and any(
            float(group.get("lr", 1.0)) for group in self._optimizer.param_groups
        ):
            raise RuntimeError(
                f"{self._name}.step() left all weights as they were, and it is not known whether their gradients are "
                "to be added to those of the next minibatch or dropped; accumulate with Pipeline(accumulate=m), "
                "or give the optimizer a zero_grad() of its own, which is called before every backward and keeps or "
                "clears them"
            )
