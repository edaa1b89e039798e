"""Schedules: the forwards and backwards of each tick.

Lockstep, three stages; ``F3`` is the forward of minibatch 3, ``B3`` its backward and the update after it::

    tick      0    1    2      3      4      5      6
    stage 0   F0   F1   F2     F3     F4 B0  F5 B1  F6 B2      n = 4
    stage 1        F0   F1     F2 B0  F3 B1  F4 B2  F5 B3      n = 2
    stage 2             F0 B0  F1 B1  F2 B2  F3 B3  F4 B4      n = 0

1F1B (PipeDream): a backward goes through all stages in the tick of its forward in the last one, half as late::

    tick      0    1    2      3      4
    stage 0   F0   F1   F2 B0  F3 B1  F4 B2      n = 2
    stage 1        F0   F1 B0  F2 B1  F3 B2      n = 1
    stage 2             F0 B0  F1 B1  F2 B2      n = 0

``auto`` is 1F1B where one processor does a stage's forward and backward in turn, as serial and threads do: both
schedules then keep it equally busy, and 1F1B's weights are half as old. Its price is slack: in lockstep a stage may be
a whole tick late before a neighbour waits for it; in 1F1B the loop from a stage to the end and back is always taut.

``auto`` is lockstep where a stage's forward and backward may run at the same time, as on streams: nothing in a lockstep
tick waits for anything else in it but an update for its own stage, while the backwards of 1F1B's tick are a chain
through all stages.

The delays here are the closed forms of those that :mod:`layerpipe.theory.retiming` derives.

*Accumulation*: with one update per minibatch, a backward that comes ``d`` minibatches after its forward finds its
weights ``d`` updates old. With one update in ``m``, minibatch ``k`` (the first is 0) was sent forward after
``floor((k - d) / m)`` updates and comes back after ``floor(k / m)``::

    d = 2, m = 4     k           0  1  2  3 | 4  5  6  7 | 8  9 10 11
                     updates     0  0  0  0 | 1  1  1  1 | 2  2  2  2     before its backward
                     updates     0  0  0  0   0  0 | 1  1   1  1 | 2  2   before its forward
                     n           0  0  0  0   1  1  0  0   1  1  0  0

So ``n`` is ``d / m``, rounded down for some minibatches and up for others, and ``d / m`` in the mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple


class Action(NamedTuple):
    stage: int
    kind: Literal["F", "B"]  # B includes the update
    minibatch: int


class Schedule(ABC):
    """The order of work of ``stages`` stages. Minibatches and ticks count from 0 since the pipe was last empty."""

    name: ClassVar[str]

    def __init__(self, stages: int) -> None:
        self.stages = stages

    @abstractmethod
    def tick(self, tick: int, fed: int) -> list[Action]:
        """Return the actions of a tick when ``fed`` minibatches have entered; in an order that one worker can
        follow."""

    @abstractmethod
    def delays(self) -> list[int]:
        """``n`` per stage: updates between a minibatch's forward and its backward, once the pipe is full."""

    @property
    @abstractmethod
    def latency(self) -> int:
        """Ticks between a minibatch's entry and its loss."""

    @abstractmethod
    def ticks(self, fed: int) -> int:
        """Ticks until ``fed`` minibatches have been fully processed."""

    def phase(self, tick: int, fed: int) -> str:
        """``fill``, ``steady`` or ``drain``, as a person watching wants to know it."""
        if tick >= fed:
            return "drain"
        return "fill" if tick < self.ticks(1) - 1 else "steady"


class Lockstep(Schedule):
    """Every stage runs one forward and one backward per tick (LayerPipe2): ``n(s) = 2 (P - 1 - s)``.

    Whoever runs all stages in one thread does the forwards first: torch's code for them then stays in the caches, which
    saved a sixth of a tick of tiny layers.
    """

    name = "lockstep"

    def tick(self, tick: int, fed: int) -> list[Action]:
        forwards = [Action(s, "F", tick - s) for s in range(self.stages) if 0 <= tick - s < fed]
        first = tick - 2 * (self.stages - 1)
        return forwards + [Action(s, "B", first + s) for s in range(self.stages) if 0 <= first + s < fed]

    def delays(self) -> list[int]:
        return [2 * after for after in reversed(range(self.stages))]

    @property
    def latency(self) -> int:
        return self.stages - 1

    def ticks(self, fed: int) -> int:
        return fed + 2 * (self.stages - 1) if fed else 0


class OneFOneB(Schedule):
    """Every stage runs one forward, then one backward (PipeDream): ``n(s) = P - 1 - s``."""

    name = "1f1b"

    def tick(self, tick: int, fed: int) -> list[Action]:
        minibatches = ((s, tick - s) for s in range(self.stages))
        forwards = [Action(s, "F", m) for s, m in minibatches if 0 <= m < fed]
        m = tick - (self.stages - 1)
        return forwards + [Action(s, "B", m) for s in reversed(range(self.stages)) if 0 <= m < fed]

    def delays(self) -> list[int]:
        return list(reversed(range(self.stages)))

    @property
    def latency(self) -> int:
        return self.stages - 1

    def ticks(self, fed: int) -> int:
        return fed + self.stages - 1 if fed else 0


class Sequential(Schedule):
    """One minibatch at a time through all stages and back: ordinary training, ``n = 0``."""

    name = "sequential"

    def tick(self, tick: int, fed: int) -> list[Action]:
        if tick >= fed:
            return []
        forwards = [Action(s, "F", tick) for s in range(self.stages)]
        return forwards + [Action(s, "B", tick) for s in reversed(range(self.stages))]

    def delays(self) -> list[int]:
        return [0] * self.stages

    @property
    def latency(self) -> int:
        return 0

    def ticks(self, fed: int) -> int:
        return fed


SCHEDULES: dict[str, type[Schedule]] = {kind.name: kind for kind in (Lockstep, OneFOneB, Sequential)}
#: What ``auto`` stands for, by the executor's name.
AUTO = {
    "serial": OneFOneB.name,
    "threads": OneFOneB.name,
    "distributed": OneFOneB.name,
    "streams": Lockstep.name,
    "graphs": Lockstep.name,
}
NAMES = (*SCHEDULES, "auto")


def make(name: str, stages: int, executor: str = "serial") -> Schedule:
    """The schedule of this name; ``auto`` is the one for this executor.

    Raises:
        ValueError: an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"schedule={name!r} is unknown; there are: {', '.join(NAMES)}")
    return SCHEDULES[AUTO[executor] if name == "auto" else name](stages)


def updates_between(minibatch: int, lag: int, accumulate: int = 1, begun: int = 0) -> int:
    """Return the number of updates that a stage makes between a minibatch's forward and its backward.

    Args:
        minibatch: its number since the pipe was last empty, from 0.
        lag: minibatches whose backwards lie between the two, once the pipe is full: ``d``.
        accumulate: minibatches per update: ``m``.
        begun: gradients that were waiting for an update when the pipe was last empty.
    """
    k = begun + minibatch
    return k // accumulate - (k - min(minibatch, lag)) // accumulate


def most_updates_between(lag: int, accumulate: int = 1) -> int:
    """The most that :func:`updates_between` gives for any minibatch: ``d / m`` rounded up."""
    return -(-lag // accumulate)
