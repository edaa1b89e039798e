"""Schedules of a chain of stages, one processor each, as tasks and the order in which a processor does its own.

``F2`` is the forward of minibatch 2, ``B2`` both its gradients and the update, as one task::

    sequential  0 F0       B0 F1            gpipe  0 F0 F1 F2          B2 B1 B0    (F0 F1 F2: parts of a minibatch)
                1    F0 B0       F1 B1             1    F0 F1 F2 B2 B1 B0

    1f1b        0 F0 F1    B0 F2 B1 F3 B2   lockstep  0 F0 F1 F2 B0 F3 B1 F4 B2
                1    F0 B0 F1 B1 F2 B2                1    F0 B0 F1 B1 F2 B2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from layerpipe.theory.simulate.events import Key, Task, Wait, in_order


@dataclasses.dataclass(frozen=True)
class StageCost:
    """One minibatch in one stage: seconds, and bytes."""

    forward: float
    backward: float = 0.0  # gradient of the input
    gradient: float = 0.0  # gradient of the weights
    update: float = 0.0
    received: int = 0  # comes in at the front, and goes back there as a gradient

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.gradient + self.update

    def shared(self, parts: int) -> StageCost:
        """The cost of one of ``parts`` equal parts of a minibatch; the update is not made in parts."""
        return StageCost(
            self.forward / parts, self.backward / parts, self.gradient / parts, self.update,
            -(-self.received // parts),
        )  # fmt: skip


def together(costs: Sequence[StageCost]) -> StageCost:
    """Consecutive layers as one."""
    return StageCost(
        sum(c.forward for c in costs), sum(c.backward for c in costs), sum(c.gradient for c in costs),
        sum(c.update for c in costs), costs[0].received,
    )  # fmt: skip


#: Stages, minibatches, parts of a minibatch, minibatches per update -> tasks.
Builder = Callable[[Sequence[StageCost], int, int, int], list[Task]]


def sequential(stages: Sequence[StageCost], minibatches: int, parts: int = 1, accumulate: int = 1) -> list[Task]:
    """One minibatch at a time, through all stages and back: ordinary training of a model that is spread out."""

    def order(stage: int) -> Iterator[tuple[str, int]]:
        for m in range(minibatches):
            yield from (("F", m), ("B", m))

    return _tasks(stages, order, accumulate)


def one_f_one_b(stages: Sequence[StageCost], minibatches: int, parts: int = 1, accumulate: int = 1) -> list[Task]:
    """As many forwards as stages follow, then one forward and one backward in turn (PipeDream)."""

    def order(stage: int) -> Iterator[tuple[str, int]]:
        return _alternate(len(stages) - 1 - stage, minibatches)

    return _tasks(stages, order, accumulate)


def lockstep(stages: Sequence[StageCost], minibatches: int, parts: int = 1, accumulate: int = 1) -> list[Task]:
    """A forward and a backward per tick, from the first tick that has both (LayerPipe2)."""

    def order(stage: int) -> Iterator[tuple[str, int]]:
        return _alternate(2 * (len(stages) - 1 - stage), minibatches)

    return _tasks(stages, order, accumulate)


def gpipe(stages: Sequence[StageCost], minibatches: int, parts: int = 1, accumulate: int = 1) -> list[Task]:
    """All parts of a minibatch forward, then all back, then the update: synchronous (Huang et al., 2019)."""
    costs = [stage.shared(parts) for stage in stages]
    tasks = []
    for stage in range(len(stages)):
        ordered: list[Task] = []
        for m in range(minibatches):
            ordered += [_forward(costs, Key("F", stage, m, part)) for part in range(parts)]
            due = (m + 1) % accumulate == 0
            ordered += [
                _backward(costs, Key("B", stage, m, part), updates=due and not part) for part in reversed(range(parts))
            ]
        tasks += in_order(ordered)
    return tasks


def _alternate(ahead: int, minibatches: int) -> Iterator[tuple[str, int]]:
    """``ahead`` forwards, then one forward and one backward in turn, then the backwards that are left."""
    for tick in range(minibatches + ahead):
        if tick < minibatches:
            yield "F", tick
        if tick >= ahead:
            yield "B", tick - ahead


def _tasks(
    stages: Sequence[StageCost], order: Callable[[int], Iterator[tuple[str, int]]], accumulate: int
) -> list[Task]:
    def task(key: Key) -> Task:
        if key.kind == "F":
            return _forward(stages, key)
        return _backward(stages, key, updates=(key.minibatch + 1) % accumulate == 0)

    tasks = []
    for stage in range(len(stages)):
        tasks += in_order([task(Key(kind, stage, m)) for kind, m in order(stage)])
    return tasks


def _forward(costs: Sequence[StageCost], key: Key) -> Task:
    cost = costs[key.stage]
    before = (Wait(key._replace(stage=key.stage - 1), cost.received),) if key.stage else ()
    return Task(key, key.stage, cost.forward, before)


def _backward(costs: Sequence[StageCost], key: Key, *, updates: bool) -> Task:
    cost, after = costs[key.stage], [Wait(key._replace(kind="F"))]
    if key.stage + 1 < len(costs):
        after.append(Wait(key._replace(stage=key.stage + 1), costs[key.stage + 1].received))
    seconds = cost.backward + cost.gradient + (cost.update if updates else 0.0)
    return Task(key, key.stage, seconds, tuple(after), updates=updates)
