"""Gradients of several minibatches in one update, and which updates each minibatch meets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerpipe.schedule import most_updates_between, updates_between


class Accumulation:
    """A stage's count of minibatches and updates.

    Autograd adds up the gradients in ``.grad``. The loss's own gradient is ``1 / every`` in the place of 1, so that
    they add up to the mean, as those of ``(loss / every).backward()`` do.

    Args:
        lag: minibatches whose backwards lie between a minibatch's forward and its backward once the pipe is full.
        every: minibatches per update.

    Attributes:
        waiting: minibatches whose gradients are in ``.grad`` and wait for the update.
        synchronous: whether minibatches go through the pipe one at a time at present, and no backward is late.
        late: whether a backward of the full pipe comes after updates that its forward did not see.
    """

    def __init__(self, lag: int, every: int) -> None:
        self.lag, self.every = lag, every
        self.waiting = 0
        self.pace(synchronous=False)
        self._begun = 0  # gradients that waited when the pipe was last empty
        self._done = 0  # backwards that have begun since

    @property
    def delay(self) -> int:
        """The most updates between a forward and its backward."""
        return most_updates_between(self.lag, self.every)

    def pace(self, *, synchronous: bool) -> None:
        """Let minibatches go through the pipe one at a time from now on, or follow each other."""
        self.synchronous = synchronous
        self._lag = 0 if synchronous else self.lag
        self.late = self._lag > 0

    @property
    def mean_delay(self) -> float:
        """Updates between a forward and its backward, on average over the minibatches of a full pipe."""
        return self._lag / self.every

    def backward_begins(self) -> int:
        """Updates that the schedule puts between the forward of the minibatch that comes back now and this moment."""
        minibatch = self._done
        self._done += 1
        if self.every == 1:
            return self._lag if minibatch >= self._lag else minibatch
        return updates_between(minibatch, self._lag, self.every, self._begun)

    def complete(self) -> bool:
        """Count one more minibatch's gradients; returns whether the update is due."""
        if self.every == 1:
            return True
        self.waiting = (self.waiting + 1) % self.every
        return self.waiting == 0

    def restart(self) -> None:
        """The pipe is empty; gradients that wait go on waiting."""
        self._begun, self._done = self.waiting, 0

    def state(self, params: Sequence[Tensor]) -> tuple[int, list[Tensor | None]]:
        """For a checkpoint: how many minibatches' gradients of these parameters wait, and their sums so far."""
        return self.waiting, [None if p.grad is None else p.grad.detach() for p in params] if self.waiting else []

    def load_state(self, state: tuple[int, list[Tensor | None]], params: Sequence[Tensor]) -> None:
        """Go on from what :meth:`state` gave."""
        self.waiting, grads = state
        for param, grad in zip(params, grads or [None] * len(params), strict=True):
            param.grad = None if grad is None else grad.to(param.device, copy=True)

    def loss_gradient(self, loss: Tensor) -> Tensor | None:
        """Return the gradient that the backward of a loss begins with; ``None`` stands for 1."""
        return None if self.every == 1 else torch.full_like(loss, 1 / self.every)
