"""Policies that let minibatches follow each other through the pipe, or wait for the one before.

A late gradient does most harm where the weights still move fast: at the beginning of training, or where it goes wrong.
A policy says of every minibatch whether it may enter while others are under way (*asynchronous*: the delays are those
of the schedule) or only when the pipe is empty (*synchronous*: all delays are 0, and stages wait for each other). The
pipeline empties itself where that changes, and delays fill up from 0 again::

    pipe = layerpipe.Pipeline(..., delay_policy=layerpipe.delays.AfterSteps(100))     # the same as sync_steps=100
"""

from __future__ import annotations

import collections
from abc import ABC, abstractmethod
from typing import Any, ClassVar


class DelayPolicy(ABC):
    """Says which minibatches are trained on asynchronously.

    What it says may depend on the number of the minibatch and on the losses that it has been shown, and on nothing
    else: all processes of a pipeline must come to the same answers, and a resumed run to those of one that goes on.
    """

    needs_losses: ClassVar[bool] = False  # whether :meth:`observe` wants to be called: that reads every loss

    @abstractmethod
    def asynchronous(self, minibatch: int) -> bool:
        """Return whether a minibatch may enter a pipe that is not empty. Asked once about each, in order.

        Args:
            minibatch: how many have entered before it since training began, also before a checkpoint.
        """

    def observe(self, loss: float) -> None:  # noqa: B027
        """Called with the losses of all minibatches, in order, each as many minibatches late as one is under way under
        the asynchronous schedule, whatever the executor; or when the pipe is drained."""

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint: numbers, strings, lists and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from what :meth:`state_dict` gave."""


class Fixed(DelayPolicy):
    """All minibatches alike."""

    def __init__(self, asynchronous: bool = True) -> None:
        self._asynchronous = asynchronous

    def asynchronous(self, minibatch: int) -> bool:
        return self._asynchronous


class AfterSteps(DelayPolicy):
    """The first minibatches one at a time, all others asynchronously.

    Args:
        steps: minibatches, not updates.

    Raises:
        ValueError: less than 0.
    """

    def __init__(self, steps: int) -> None:
        if steps < 0:
            raise ValueError(f"the number of synchronous minibatches must not be negative, got {steps}")
        self.steps = steps

    def asynchronous(self, minibatch: int) -> bool:
        return minibatch >= self.steps


class OnLoss(DelayPolicy):
    """Asynchronous from when the loss falls slowly; synchronous again when it has risen.

    The loss is smoothed by an exponential moving average over about ``window`` minibatches. On an accelerator, reading
    it makes the host wait for the device once per minibatch.

    Args:
        window: minibatches, of the average and of the comparison.
        decrease: asynchronous once the smoothed loss is not this share below its value of ``window`` minibatches ago.
        rise: synchronous, for at least ``window`` minibatches, once it is more than this share above the lowest that it
            has been since then; ``None``: never again.

    Raises:
        ValueError: a window of less than 1, or a share that is negative.
    """

    needs_losses = True

    def __init__(self, window: int = 50, decrease: float = 0.05, rise: float | None = 0.2) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 minibatch, got {window}")
        if decrease < 0 or (rise is not None and rise < 0):
            raise ValueError(f"decrease and rise are shares of the loss, at least 0, got {decrease} and {rise}")
        self.window, self.decrease, self.rise = window, decrease, rise
        self._asynchronous = False
        self._begin()

    def _begin(self) -> None:
        self._sum = self._weight = 0.0  # of the average, whose weights add up to the latter
        self._recent: collections.deque[float] = collections.deque(maxlen=self.window)
        self._lowest = float("inf")

    def asynchronous(self, minibatch: int) -> bool:
        return self._asynchronous

    def observe(self, loss: float) -> None:
        keep = 1 - 1 / self.window
        self._sum = keep * self._sum + (1 - keep) * loss
        self._weight = keep * self._weight + 1 - keep
        smooth = self._sum / self._weight
        self._lowest = min(self._lowest, smooth)
        if self._asynchronous:
            limit = self._lowest + (self.rise or 0.0) * abs(self._lowest)
            if self.rise is not None and not smooth <= limit:  # NaN is no smaller either
                self._asynchronous = False
                self._begin()
            return
        if len(self._recent) == self.window:
            before = self._recent[0]
            self._asynchronous = before - smooth < self.decrease * abs(before)
        self._recent.append(smooth)

    def state_dict(self) -> dict[str, Any]:
        return {
            "asynchronous": self._asynchronous,
            "sum": self._sum,
            "weight": self._weight,
            "recent": list(self._recent),
            "lowest": self._lowest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._asynchronous, self._lowest = state["asynchronous"], state["lowest"]
        self._sum, self._weight = state["sum"], state["weight"]
        self._recent = collections.deque(state["recent"], maxlen=self.window)


def make(policy: DelayPolicy | None, sync_steps: int) -> DelayPolicy:
    """The policy that a pipeline is given by one of its two options.

    Raises:
        TypeError: the policy is something else.
        ValueError: both options.
    """
    if policy is None:
        return AfterSteps(sync_steps) if sync_steps else Fixed()
    if not isinstance(policy, DelayPolicy):
        raise TypeError(f"delay_policy is a layerpipe.delays.DelayPolicy, got {type(policy).__name__}")
    if sync_steps:
        raise ValueError(f"sync_steps={sync_steps} is delay_policy=layerpipe.delays.AfterSteps({sync_steps}); give one")
    return policy
