"""A worker thread for every stage."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence

import torch

from layerpipe.executors.base import Executor, Run, Tick
from layerpipe.executors.channels import ChannelClosed
from layerpipe.schedule import Action
from layerpipe.stage.other_generators import OtherGenerators
from layerpipe.stage.random_numbers import share_torchs_generator


class Threads(Executor):
    """A worker thread per stage. Stages wait for each other's tensors, never for a common barrier.

    Args:
        own: the numbers of the stages in this process.
        close_channels: called when a worker failed or the pipeline is closed, so that nobody waits for it.
        threads_per_stage: torch's intra-op threads of every worker here.
    """

    name = "threads"
    blocking = True
    lookahead = 1

    def __init__(
        self,
        names: Sequence[str],
        run: Run,
        *,
        own: range,
        close_channels: Callable[[], None],
        threads_per_stage: Sequence[int],
    ) -> None:
        super().__init__(names, run)
        share_torchs_generator()
        self._close_channels = close_channels
        self.others: OtherGenerators | None = None
        self._process = os.getpid()
        _RUNNING.add(self)
        self.own = own
        self._commands: list[Commands] = [queue.SimpleQueue() for _ in own]
        self._events: Events = queue.SimpleQueue()
        mine = torch.get_num_threads()
        ready = threading.Barrier(len(own) + 1)
        self._workers = [
            threading.Thread(
                target=_work,
                args=(s, threads, ready, commands, self._events, weakref.ref(self)),
                name=f"layerpipe {names[s]}",
                daemon=True,
            )
            for s, threads, commands in zip(own, threads_per_stage, self._commands, strict=True)
        ]
        for worker in self._workers:
            worker.start()
        ready.wait()
        torch.set_num_threads(mine)  # the last caller's number is what threads started later begin with

    def check(self) -> None:
        super().check()
        if os.getpid() != self._process:
            raise RuntimeError(
                "a fork leaves the pipeline's threads behind; make the pipeline in the process that uses it"
            )

    def submit(self, tick: Tick) -> None:
        self.check()
        self._take_events(block=False)
        looking = self.others is not None and self.others.wanted
        if self.others is not None and looking:  # nobody else may draw random numbers for as long as this tick takes
            self.synchronize()
            self.others.looking = True
        by_stage: list[list[Action]] = [[] for _ in self._commands]
        for action in tick.actions:
            by_stage[action.stage - self.own.start].append(action)
        for commands, actions in zip(self._commands, by_stage, strict=True):
            commands.put((tick, actions))
        if self.others is not None and looking:
            self.synchronize()
            self.others.done()

    def wait(self, done: Callable[[], bool]) -> None:
        self.check()
        while not done():
            self._take_events(block=True)
            if self._closed and not done():
                self._events.put(None)  # whoever else waits shall not wait on, either
                self.check()

    def synchronize(self) -> None:
        if self._closed:
            self._join()  # after an error too: the weights may still be read
            return
        self.check_outside()
        self.check()
        idle: list[int] = []
        for commands in self._commands:
            commands.put(idle)
        self.wait(lambda: len(idle) == len(self._commands))

    def close(self) -> None:
        super().close()
        for commands in self._commands:
            commands.put(None)
        self._close_channels()
        self._events.put(None)  # the workers end without a word, and another thread may wait for one
        self._join()

    def inside_stage(self) -> bool:
        return threading.current_thread() in self._workers

    def _join(self) -> None:
        """Wait for the workers to end. A worker does not: it would wait for one that waits for it."""
        if not self.inside_stage():
            for worker in self._workers:
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
            if not (owner._closed and isinstance(error, Exception)):  # else what is missing was let go of
                events.put(owner._named(stage, error))
            return
        if stage == owner.own[-1]:
            events.put(None)  # a loss may be ready
        del owner, command, tick, actions
