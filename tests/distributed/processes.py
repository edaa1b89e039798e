"""Processes that tests run functions in, as ranks of a process group; started once."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests import forks
from tests.distributed.hosts import ADDRESSES, INTERFACE, enter

#: No task takes that long: whoever is not done then hangs.
SECONDS = 60


class Failure(NamedTuple):
    """What a function raised."""

    kind: str
    message: str
    where: str


class Processes:
    """``run(function, ...)`` calls it in every process, with the rank first, and returns what each returned or raised.

    A process that has died is ``None`` among the results, and all are started anew for the next call.

    Args:
        hosts: where each runs, of :func:`tests.distributed.hosts.hosts`; the first has the first address. ``None`` for
            all of them here.
    """

    def __init__(self, size: int, hosts: Sequence[str] | None = None) -> None:
        self.size, self._hosts = size, hosts
        self._directory = tempfile.TemporaryDirectory(prefix="layerpipe-test-")
        self._runs = 0
        self._workers: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        self._start()
        self._runs += 1
        store = f"file://{self._directory.name}/store{self._runs}"
        if self._hosts is not None:
            store = f"tcp://{ADDRESSES[0]}:{29000 + self._runs}"
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__name__, args, store))
        results: list[Any] = []
        died = False
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(SECONDS):
                self.close()
                raise AssertionError(f"rank {rank} hangs in {function.__name__}")
            try:
                results.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                results.append(None)
                died = True
        if died:
            self.close()
        return results

    def all(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As :meth:`run`, where none may fail."""
        results = self.run(function, *args)
        for rank, result in enumerate(results):
            assert not isinstance(result, Failure), f"rank {rank}: {result.where}"
            assert result is not None, f"rank {rank} died"
        return results

    def _start(self) -> None:
        if self._workers:
            return
        for rank in range(self.size):
            host = self._hosts[rank] if self._hosts is not None else None
            worker, pipe = forks.start(_work, rank, self.size, host)
            self._pipes.append(pipe)
            self._workers.append(worker)

    def close(self) -> None:
        for worker, pipe in zip(self._workers, self._pipes, strict=True):
            pipe.close()
            worker.kill()
            worker.join()
        self._workers, self._pipes = [], []


def _work(rank: int, size: int, host: str | None, pipe: Any) -> None:
    if host is not None:
        enter(host)
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            module, name, args, store = pipe.recv()
            function = getattr(importlib.import_module(module), name)
            dist.init_process_group(
                "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
            )
            dist.barrier()  # whoever left the group before the others are in it would fail them
            try:
                result = function(rank, *args)
            except BaseException as error:
                result = Failure(type(error).__name__, str(error), traceback.format_exc())
            pipe.send(result)
            if dist.is_initialized():
                dist.destroy_process_group()
