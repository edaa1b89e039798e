"""Optimizers that keep other weights in the parameters while they train than those to evaluate and to save.

Weight prediction does (docs/optimizers.md): a forward sees ``F``, evaluation is to see ``W``. So do optimizers that
average their weights. Both have ``train()`` and ``eval()``, which bring one and the other into the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class CurrentWeights:
    """Switches a pipeline's parameters between predicted and current weights. No stage may be at work where that
    changes.

    Args:
        optimizers: of the stages; those without ``train()`` and ``eval()`` have one kind of weights only.
        synchronize: returns when no stage is at work.

    Attributes:
        shown: whether those to evaluate have been brought into the parameters.
        training: whether minibatches are in the pipe; in an empty one predicted weights are the weights themselves.
    """

    def __init__(self, optimizers: Sequence[Any], synchronize: Callable[[], None]) -> None:
        self._optimizers = [o for o in optimizers if hasattr(o, "eval") and hasattr(o, "train")]
        self._synchronize = synchronize
        self.shown = self.training = False

    def show(self) -> None:
        """Bring the weights to evaluate into the parameters."""
        self._synchronize()
        for optimizer in self._optimizers:
            optimizer.eval()
        self.shown = True

    def hide(self) -> None:
        """Bring back those to train with, bit for bit as they were."""
        if self.shown:
            self._synchronize()
            for optimizer in self._optimizers:
                optimizer.train()
        self.shown = False

    @contextmanager
    def during(self) -> Iterator[None]:
        """Show them for a while, unless they are shown already."""
        shown = self.shown
        self.show()
        try:
            yield
        finally:
            if not shown:
                self.hide()

    @property
    def predicted(self) -> bool:
        """Return whether the parameters hold predicted weights."""
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        found = any(group.get("horizon") or group.get("horizon_at") is not None for group in groups)
        return found and self.training and not self.shown
