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
    """Which work of which minibatch. ``part`` tells pieces of a minibatch, or of a layer's work, apart."""

    kind: str  # F, B, G
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


def run(tasks: Iterable[Task], link: Link = Link()) -> Timeline:  # noqa: B008 (immutable)
    """Simulate.

    Raises:
        ValueError: two tasks of one key, a wait for a task that does not exist, or tasks that wait for each other.
    """
    by_key: dict[Key, Task] = {}
    for task in tasks:
        if by_key.setdefault(task.key, task) is not task:
            raise ValueError(f"two tasks are called {task.key!r}")
    missing = {key: {wait.key for wait in task.after} for key, task in by_key.items()}
    readers: dict[Key, list[Key]] = defaultdict(list)
    parcels: dict[Key, dict[int, int]] = defaultdict(dict)  # a task's result goes to each processor once
    for task in by_key.values():
        for wait in dict.fromkeys(task.after):
            if wait.key not in by_key:
                raise ValueError(f"{task.key!r} waits for {wait.key!r}, which does not exist")
            readers[wait.key].append(task.key)
            if by_key[wait.key].processor != task.processor:
                known = parcels[wait.key]
                known[task.processor] = max(known.get(task.processor, 0), wait.bytes)

    processors = 1 + max((task.processor for task in by_key.values()), default=-1)
    ready: list[list[tuple[tuple[int, ...], int, Key]]] = [[] for _ in range(processors)]
    free, link_free = [True] * processors, defaultdict[tuple[int, int], float](float)
    count = itertools.count()  # equal times and priorities: first come, first served
    agenda: list[tuple[float, int, str, Key, int]] = []
    ran: list[Event] = []
    messages: list[Event] = []

    def resolved(reader: Key, key: Key) -> None:
        missing[reader].discard(key)
        if not missing[reader]:
            task = by_key[reader]
            heapq.heappush(ready[task.processor], (task.priority, next(count), reader))

    def start(processor: int, now: float) -> None:
        if free[processor] and ready[processor]:
            task = by_key[heapq.heappop(ready[processor])[2]]
            free[processor] = False
            ran.append(Event(task.key, processor, now, now + task.seconds, updates=task.updates))
            heapq.heappush(agenda, (now + task.seconds, next(count), "end", task.key, processor))

    def send(key: Key, source: int, target: int, size: int, now: float) -> None:
        begin = max(now, link_free[source, target])
        link_free[source, target] = done = begin + size / link.bandwidth
        messages.append(Event(key, source, begin, done + link.latency, target, size))
        heapq.heappush(agenda, (done + link.latency, next(count), "arrived", key, target))

    for key, waits in missing.items():
        if not waits:
            resolved(key, key)
    for processor in range(processors):
        start(processor, 0.0)
    while agenda:
        now = agenda[0][0]
        touched: set[int] = set()
        while agenda and agenda[0][0] == now:  # all that happens at once, before anybody chooses
            _, _, what, key, processor = heapq.heappop(agenda)
            touched.add(processor)
            if what == "end":
                free[processor] = True
                for target, size in (*parcels[key].items(), *by_key[key].sends):
                    send(key, processor, target, size, now)
            for reader in readers[key]:
                if by_key[reader].processor == processor:
                    resolved(reader, key)
        for processor in sorted(touched):
            start(processor, now)
    if len(ran) < len(by_key):
        stuck = next(key for key in by_key if missing[key])
        raise ValueError(f"{stuck!r} and others wait for each other, first for {min(missing[stuck])!r}")
    return Timeline(ran, messages, processors)
