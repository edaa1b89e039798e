"""Tasks on processors, joined by links: what starts when.

A list scheduler driven by events. A task is ready when all it waits for has ended and, from other processors, arrived.
A free processor starts the ready task of lowest ``priority``. A directed link carries one message at a time, in the
order in which they were ready; sending costs its processor nothing.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Key(NamedTuple):
    """Identifies one task of one minibatch. ``part`` tells pieces of a minibatch, or of a layer's work, apart."""

    kind: str  # F, B, W
    stage: int
    minibatch: int
    part: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.minibatch}" + (f".{self.part}" if self.part else "")


class Wait(NamedTuple):
    """For a task to have ended and, where that ran elsewhere, for ``bytes`` of it to have come over the link."""

    key: Key
    bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    key: Key
    processor: int
    seconds: float
    after: tuple[Wait, ...] = ()
    priority: tuple[int, ...] = (0,)
    updates: bool = False  # whether its end makes a new version of its stage's weights
    sends: tuple[tuple[int, int], ...] = ()  # (processor, bytes) that nobody waits for


class Link(NamedTuple):
    """Between any two processors, each way."""

    bandwidth: float = float("inf")  # bytes per second
    latency: float = 0.0  # seconds


class Event(NamedTuple):
    """A task as it ran, or a message from ``processor`` to ``target``; seconds since the start."""

    key: Key
    processor: int
    start: float
    end: float
    target: int | None = None
    bytes: int = 0
    updates: bool = False


@dataclasses.dataclass(frozen=True)
class Timeline:
    tasks: list[Event]  # by start
    messages: list[Event]
    processors: int

    @property
    def makespan(self) -> float:
        return max((event.end for event in self.tasks), default=0.0)


def in_order(tasks: Sequence[Task]) -> list[Task]:
    """One processor's tasks, each made to wait for the one before it."""
    chained = list(tasks[:1])
    for before, task in itertools.pairwise(tasks):
        chained.append(dataclasses.replace(task, after=(*task.after, Wait(before.key))))
    return chained


def run(
    tasks: Iterable[Task],
    link: Link = Link(),  # noqa: B008 (immutable)
    processors: int = 0,
) -> Timeline:
    """Simulate, on as many ``processors`` as the tasks name or more.

    Raises:
        ValueError: two tasks of one key, a wait for a task that does not exist, or tasks that wait for each other.
    """
    work = list(tasks)
    readers, missing, parcels = _connect(work)
    processors = max(processors, 1 + max((task.processor for task in work), default=-1))
    ready: list[list[tuple[tuple[int, ...], int, int]]] = [[] for _ in range(processors)]
    free = [True] * processors
    link_free: dict[tuple[int, int], float] = defaultdict(float)
    count = itertools.count()  # equal times and priorities: first come, first served
    agenda: list[tuple[float, int, bool, int, int]] = []  # when, _, whether a task ended or came by link, which, where
    ran: list[Event] = []
    messages: list[Event] = []

    def start(processor: int, now: float) -> None:
        if free[processor] and ready[processor]:
            number = heapq.heappop(ready[processor])[2]
            task, end = work[number], now + work[number].seconds
            free[processor] = False
            ran.append(Event(task.key, processor, now, end, updates=task.updates))
            heapq.heappush(agenda, (end, next(count), True, number, processor))

    def send(number: int, source: int, target: int, size: int, now: float) -> None:
        begin = max(now, link_free[source, target])
        link_free[source, target] = done = begin + size / link.bandwidth
        messages.append(Event(work[number].key, source, begin, done + link.latency, target, size))
        heapq.heappush(agenda, (done + link.latency, next(count), False, number, target))

    for number, task in enumerate(work):
        if not missing[number]:
            heapq.heappush(ready[task.processor], (task.priority, next(count), number))
    for processor in range(processors):
        start(processor, 0.0)
    while agenda:
        now, touched = agenda[0][0], set()
        while agenda and agenda[0][0] == now:  # all that happens at once, before anybody chooses
            _, _, ended, number, processor = heapq.heappop(agenda)
            touched.add(processor)
            if ended:
                free[processor] = True
                for target, size in (*parcels[number].items(), *work[number].sends):
                    send(number, processor, target, size, now)
            for reader in readers[number].get(processor, ()):
                missing[reader] -= 1
                if not missing[reader]:
                    heapq.heappush(ready[processor], (work[reader].priority, next(count), reader))
            if not ended:
                readers[number].pop(processor, None)  # what nobody waits for may come there, too
        for processor in sorted(touched):
            start(processor, now)
    if len(ran) < len(work):
        stuck = next(number for number, left in enumerate(missing) if left)
        others = ", ".join(repr(wait.key) for wait in work[stuck].after)
        raise ValueError(f"tasks wait for each other: {work[stuck].key!r} for {others}")
    return Timeline(ran, messages, processors)


def _connect(work: Sequence[Task]) -> tuple[list[dict[int, list[int]]], list[int], list[dict[int, int]]]:
    """By task number: who waits for it, by processor; for how many it waits; bytes it sends, by processor.

    A result goes to each processor once, whoever reads it there.
    """
    numbers: dict[Key, int] = {}
    for number, task in enumerate(work):
        if numbers.setdefault(task.key, number) != number:
            raise ValueError(f"two tasks are called {task.key!r}")
    readers: list[dict[int, list[int]]] = [{} for _ in work]
    parcels: list[dict[int, int]] = [{} for _ in work]
    missing = []
    for number, task in enumerate(work):
        sources: dict[int, int] = {}
        for wait in task.after:
            if wait.key not in numbers:
                raise ValueError(f"{task.key!r} waits for {wait.key!r}, which does not exist")
            source = numbers[wait.key]
            sources[source] = max(sources.get(source, 0), wait.bytes)
        missing.append(len(sources))
        for source, size in sources.items():
            readers[source].setdefault(task.processor, []).append(number)
            if work[source].processor != task.processor:
                parcels[source][task.processor] = max(parcels[source].get(task.processor, 0), size)
    return readers, missing, parcels
