"""Who does what in which tick.

Lockstep, three stages; ``F3`` is the forward of minibatch 3, ``B3`` its backward and the update after it::

    tick      0    1    2      3      4      5      6
    stage 0   F0   F1   F2     F3     F4 B0  F5 B1  F6 B2      n = 4
    stage 1        F0   F1     F2 B0  F3 B1  F4 B2  F5 B3      n = 2
    stage 2             F0 B0  F1 B1  F2 B2  F3 B3  F4 B4      n = 0
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

from layerpipe import retiming


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
        """What happens in a tick when ``fed`` minibatches have entered; in an order that one worker can follow."""

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
    """Every stage runs one forward and one backward per tick (LayerPipe2): ``n(s) = 2 (P - 1 - s)``."""

    name = "lockstep"

    def tick(self, tick: int, fed: int) -> list[Action]:
        actions = []
        for s in range(self.stages):
            for kind, minibatch in (("F", tick - s), ("B", tick - 2 * (self.stages - 1) + s)):
                if 0 <= minibatch < fed:
                    actions.append(Action(s, kind, minibatch))  # type: ignore[arg-type]
        return actions

    def delays(self) -> list[int]:
        return retiming.lockstep_delays(self.stages)

    @property
    def latency(self) -> int:
        return self.stages - 1

    def ticks(self, fed: int) -> int:
        return fed + 2 * (self.stages - 1) if fed else 0


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


SCHEDULES: dict[str, type[Schedule]] = {kind.name: kind for kind in (Lockstep, Sequential)}


def make(name: str, stages: int) -> Schedule:
    """The schedule of this name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name!r} is unknown; there are: {', '.join(SCHEDULES)}")
    return SCHEDULES[name](stages)
