"""Who runs the stages: one after the other in the caller's thread, or each in a worker of its own."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from layerpipe.channels import Channel, ChannelClosed
from layerpipe.errors import StageError
from layerpipe.interrupts import Held
from layerpipe.schedule import Action, Schedule
from layerpipe.spans import Clock, HostClock


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

    def __init__(self, names: Sequence[str], run: Run) -> None:
        self.names, self._run = names, run
        self._failure: BaseException | None = None
        self._closed = False

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
        """What times each stage's work in a trace that begins now.

        :meth:`settle` comes before, and again before what they have marked is read.
        """
        return [HostClock()] * len(self.names)

    def channel(self, name: str, sender: int, receiver: int) -> Channel:
        """What one stage hands tensors to another through; the caller counts as the stage it feeds."""
        device = self.devices[receiver] if self.devices is not None else None
        return Channel(name, blocking=self.blocking, device=device)

    def acting(self, stages: Sequence[Any]) -> Sequence[Any]:
        """What does the stages' work: they themselves, or others in their place."""
        return stages

    def latency(self, schedule: Schedule) -> int:
        """Calls of ``step`` before the first that returns a loss."""
        return schedule.latency + self.lookahead

    def computed(self, loss: Tensor) -> None:  # noqa: B027
        """Called with each minibatch's loss where its stage has computed it."""

    def drained(self, fed: int) -> None:  # noqa: B027
        """Called when the pipe is empty after ``fed`` minibatches."""

    def before_update(self, stage: int) -> None:  # noqa: B027
        """Called in a backward's action, before the optimizer changes the stage's weights."""

    def hand_over(self, losses: Iterable[Tensor]) -> list[Tensor]:
        """Losses for the caller, once :meth:`wait` or :meth:`synchronize` has returned."""
        return list(losses)

    def close(self) -> None:
        """Stop; idempotent."""
        self._closed = True

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


class Serial(Executor):
    """All stages in the caller's thread, one after the other. Easy to follow and to debug."""

    name = "serial"
    blocking = False
    lookahead = 0

    def submit(self, tick: Tick) -> None:
        self.check()
        with Held() as interrupt:
            for action in tick.actions:
                try:
                    self._run(action, tick)
                    if interrupt.came:
                        interrupt.release()
                except BaseException as error:
                    self._failure = self._named(action.stage, error)
                    raise self._failure from self._failure.__cause__

    def wait(self, done: Callable[[], bool]) -> None:
        if not done():
            raise RuntimeError("the schedule promised a result that no stage produced")

    def synchronize(self) -> None:
        pass  # a tick is done when submit returns


class Threads(Executor):
    """A worker thread per stage. Stages wait for each other's tensors, never for a common barrier.

    Args:
        close_channels: called when a worker failed or the pipeline is closed, so that nobody waits for it.
        threads_per_stage: torch's intra-op threads of every worker.
    """

    name = "threads"
    blocking = True
    lookahead = 1

    def __init__(
        self,
        names: Sequence[str],
        run: Run,
        *,
        close_channels: Callable[[], None],
        threads_per_stage: Sequence[int],
    ) -> None:
        super().__init__(names, run)
        self._close_channels = close_channels
        _RUNNING.add(self)
        self._commands: list[Commands] = [queue.SimpleQueue() for _ in names]
        self._events: Events = queue.SimpleQueue()
        mine = torch.get_num_threads()
        ready = threading.Barrier(len(names) + 1)
        self._workers = [
            threading.Thread(
                target=_work,
                args=(s, threads_per_stage[s], ready, self._commands[s], self._events, weakref.ref(self)),
                name=f"layerpipe {name}",
                daemon=True,
            )
            for s, name in enumerate(names)
        ]
        for worker in self._workers:
            worker.start()
        ready.wait()
        torch.set_num_threads(mine)  # the last caller's number is what threads started later begin with

    def submit(self, tick: Tick) -> None:
        self.check()
        self._take_events(block=False)
        by_stage: list[list[Action]] = [[] for _ in self._commands]
        for action in tick.actions:
            by_stage[action.stage].append(action)
        for commands, actions in zip(self._commands, by_stage, strict=True):
            commands.put((tick, actions))

    def wait(self, done: Callable[[], bool]) -> None:
        self.check()
        while not done():
            self._take_events(block=True)

    def synchronize(self) -> None:
        if self._closed:
            return  # nothing runs any more, after an error too, and the weights may still be read
        idle: list[int] = []
        for commands in self._commands:
            commands.put(idle)
        self.wait(lambda: len(idle) == len(self._commands))

    def close(self) -> None:
        super().close()
        for commands in self._commands:
            commands.put(None)
        self._close_channels()
        for worker in self._workers:
            if worker is not threading.current_thread():
                worker.join()

    def _take_events(self, *, block: bool) -> None:
        """Wait for news from the workers, or take what is there, and raise if one of them failed."""
        while True:
            try:
                failure = self._events.get(block=block)
            except queue.Empty:
                return
            if failure is not None:
                self._failure = failure
                self.close()
                raise failure
            block = False


_RUNNING: weakref.WeakSet[Threads] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Workers still inside torch when the interpreter goes down would abort the process."""
    for executor in list(_RUNNING):
        executor.close()


Commands = queue.SimpleQueue[tuple[Tick, list[Action]] | list[int] | None]
Events = queue.SimpleQueue[BaseException | None]


def _work(
    stage: int,
    threads: int,
    ready: threading.Barrier,
    commands: Commands,
    events: Events,
    executor: weakref.ref[Threads],
) -> None:
    """A worker's life. Idle, it holds no reference to the pipeline, so a forgotten pipeline can be collected."""
    try:
        torch.get_num_threads()  # a thread's first use of torch takes over the global number: let that come before ours
        torch.set_num_threads(threads)
    except BaseException:
        ready.abort()
        raise
    ready.wait()
    while (command := commands.get()) is not None:
        if isinstance(command, list):
            command.append(stage)
            events.put(None)
            continue
        owner = executor()
        if owner is None:
            return
        tick, actions = command
        try:
            for action in actions:
                owner._run(action, tick)
        except ChannelClosed:
            return  # a neighbour failed, or the pipeline was closed; the cause is reported from there
        except BaseException as error:
            events.put(owner._named(stage, error))
            return
        if stage == len(owner.names) - 1:
            events.put(None)  # a loss may be ready
        del owner, command, tick, actions
