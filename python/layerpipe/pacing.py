"""Decides which minibatches may follow each other: a policy, asked about each of them and shown what it may know."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from layerpipe.delays import DelayPolicy


class Pacing:
    """Asks a policy about each minibatch.

    Executors hand out a minibatch's loss after different numbers of further ones. The policy sees it after ``lag`` of
    them, so that it decides the same under all.

    Args:
        policy: who decides.
        lag: minibatches that enter before the loss of one is known to every process, at most.
        mean: of a loss over all replicas, which decide alike.
    """

    def __init__(self, policy: DelayPolicy, lag: int, mean: Callable[[float], float] = lambda loss: loss) -> None:
        self.policy, self._lag, self._mean = policy, lag, mean
        self.minibatches = 0  # that have entered since training began
        self._shown = 0  # of their losses
        self._known: collections.deque[Tensor] = collections.deque()  # and not shown yet

    def next(self) -> bool:
        """Return whether the next minibatch may follow the one before it; counts it."""
        if self.policy.needs_losses:
            self._show(self.minibatches - self._lag)
        self.minibatches += 1
        return self.policy.asynchronous(self.minibatches - 1)

    def returned(self, loss: Tensor) -> None:
        """A loss that the caller gets, and may change."""
        if self.policy.needs_losses:
            self._known.append(loss.clone())

    def drained(self, left: Iterable[Tensor]) -> None:
        """All losses have come; these had still to."""
        for loss in left:
            self.returned(loss)
        self._show(self.minibatches)
        self._shown = self.minibatches

    def _show(self, until: int) -> None:
        while self._shown < until and self._known:
            self.policy.observe(self._mean(self._known.popleft().item()))
            self._shown += 1

    def state_dict(self) -> dict[str, Any]:
        """Of a drained pipe."""
        return {
            "minibatches": self.minibatches,
            "policy": type(self.policy).__name__,
            "state": self.policy.state_dict(),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Refuse the state of another policy.

        Raises:
            ValueError: it is.
        """
        if state["policy"] != type(self.policy).__name__:
            raise ValueError(
                f"of a pipeline whose delays {state['policy']} decides, here {type(self.policy).__name__} does; give "
                "the same sync_steps or delay_policy"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.minibatches = self._shown = state["minibatches"]
        self._known.clear()
        self.policy.load_state_dict(state["state"])
