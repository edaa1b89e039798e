"""The interface of executors, which run the stages."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from layerpipe.errors import StageError
from layerpipe.executors.channels import Channel
from layerpipe.executors.links import Links
from layerpipe.executors.notices import Notices
from layerpipe.schedule import Action, Schedule
from layerpipe.tracing.spans import Clock, HostClock


class Tick(NamedTuple):
    """One tick's work: actions in an order that one worker can follow, and each stage's optimizer options."""

    number: int
    actions: Sequence[Action]
    options: Mapping[int, list[dict[str, Any]]]


Run = Callable[[Action, Tick], None]


class Executor(ABC):
    """Runs ticks. ``run(action, tick)`` does the work of one action of one stage.

    A stage's actions run in the order they are submitted, whoever runs them: that is why all executors give the same
    weights.
    """

    name: ClassVar[str]
    blocking: ClassVar[bool]  # whether a stage may have to wait for a neighbour's tensor
    lookahead: ClassVar[int]  # ticks that may be submitted before the first of them is done
    issues: ClassVar[bool] = False  # whether submit only issues work, which devices do in their own time
    devices: Sequence[torch.device] | None = None  # of the stages, where tensors must be copied between them
    links: Links | None = None  # to other processes, where those hold some of the stages
    notices: Notices | None = None  # for other processes, where those hold replicas

    def __init__(self, names: Sequence[str], run: Run) -> None:
        self.names, self._run = names, run
        self._failure: BaseException | None = None
        self._closed = False
        self._acts: int | None = None  # the thread that submits, while it is inside an action

    @abstractmethod
    def submit(self, tick: Tick) -> None:
        """Start a tick; returns when it may go on in the background."""

    @abstractmethod
    def wait(self, done: Callable[[], bool]) -> None:
        """Return once ``done()``, which a stage's work makes true, or raise what a stage raised."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return once everything submitted is done, or raise what a stage raised."""

    def settle(self) -> None:
        """As :meth:`synchronize`, and the host waits for devices, too."""
        self.synchronize()

    def clocks(self) -> Sequence[Clock]:
        """Return the clocks that time each stage's work in a trace that begins now.

        :meth:`settle` comes before, and again before what they have marked is read.
        """
        return [HostClock()] * len(self.names)

    def channel(self, name: str, sender: int, receiver: int) -> Channel:
        """Return the channel through which one stage hands tensors to another; the caller counts as the stage it
        feeds."""
        device = self.devices[receiver] if self.devices is not None else None
        if self.links is not None and (link := self.links.channel(name, sender, receiver, device)) is not None:
            return link
        return Channel(name, blocking=self.blocking, device=device)

    def acting(self, stages: Sequence[Any]) -> Sequence[Any]:
        """Return what does the stages' work: they themselves, or others in their place."""
        return stages

    def latency(self, schedule: Schedule) -> int:
        """Calls of ``step`` before the first that returns a loss."""
        if self.links is not None:
            return schedule.ticks(1) - 1 + self.lookahead
        return schedule.latency + self.lookahead

    def computed(self, loss: Tensor) -> None:
        """Called with each minibatch's loss where its stage has computed it."""
        if self.links is not None:
            self.links.computed(loss)

    def drained(self, fed: int) -> None:
        """Called when the pipe is empty after ``fed`` minibatches."""
        if self.links is not None:
            self.check()
            self.links.drained(fed)

    def before_update(self, stage: int) -> None:  # noqa: B027
        """Called in a backward's action, before the optimizer changes the stage's weights."""

    def hand_over(self, losses: Iterable[Tensor]) -> list[Tensor]:
        """Losses for the caller, once :meth:`wait` or :meth:`synchronize` has returned."""
        return list(losses)

    def inside_stage(self) -> bool:
        """Return whether the caller is inside an action: called by a stage's module, the loss or an optimizer."""
        return self._acts == threading.get_ident()

    def check_outside(self) -> None:
        """Refuse what waits for the stages where one of them would wait for itself.

        Raises:
            RuntimeError: inside an action.
        """
        if self.inside_stage():
            raise RuntimeError(
                "the pipeline was asked, from inside a stage's forward, backward, update or loss_fn, for what waits "
                "for all stages (a step, a drain, its output, state, mode, measurements); ask between calls of step()"
            )

    def close(self) -> None:
        """Stop; idempotent. From inside an action it returns at once, and the other stages end theirs."""
        self._closed = True
        if self.links is not None:
            self.links.close(self._failure)
        if self.notices is not None:
            self.notices.end(self._failure)

    def abort(self, error: BaseException) -> None:
        """Stop for good: the stages may be in different ticks."""
        self._failure = self._failure or error
        self.close()

    def check(self) -> None:
        """Refuse to go on with stages that an error left in different ticks."""
        if self._failure is not None:
            raise RuntimeError(f"the pipeline stopped after an error: {self._failure}") from self._failure
        if self._closed:
            raise RuntimeError("the pipeline is closed")

    def _named(self, stage: int, error: BaseException) -> BaseException:
        if isinstance(error, StageError) or not isinstance(error, Exception):
            return error
        hint = f"; {_MEMORY_HINT}" if _out_of_memory(error) else ""
        named = StageError(self.names[stage], f"{type(error).__name__}: {error}{hint}")
        named.__cause__ = error
        return named


_MEMORY_HINT = (
    "out of memory: try smaller minibatches, more stages, torch.utils.checkpoint around this stage's layers, or fewer "
    "copies for past weights (past='blend' with a lower order)"
)


def _out_of_memory(error: Exception) -> bool:
    """torch has a type of its own for it on accelerators only."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
