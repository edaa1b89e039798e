"""``--executor distributed``: a process for every stage, started here; or as many as torchrun starts, on any hosts."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import logging
import os
import pickle
import socket
import struct
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from layerpipe.cli.signals import exit_status
from layerpipe.errors import UsageError
from layerpipe.executors.ranks import Ranks, reached

T = TypeVar("T")
#: Where processes leave their last words, once they have joined.
_store: Any = None
_PATIENCE = 10.0  # seconds


def started(alone: bool) -> bool:
    """Return whether torchrun has started this process beside others, or ``alone`` where that matters, too."""
    return "RANK" in os.environ and (alone or int(os.environ.get("WORLD_SIZE", "1")) > 1)


def restarted() -> bool:
    """Return whether torchrun has started the processes again, after one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def start(count: int, arguments: list[str]) -> int:
    """Run this command in so many processes, as torchrun would; the exit status of the first that failed.

    A signal that ends this process is handed on to those, which have half a minute to write their report.
    """
    if not dist.is_available():
        raise UsageError("--executor distributed needs a torch that was built with torch.distributed")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // count)))  # torchrun would give each one
    sys.stdout.flush()
    sys.stderr.flush()
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # each process has said what there is to say
    for name in [*logging.root.manager.loggerDict]:
        if name.startswith("torch.distributed."):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(uuid.uuid4()),
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "layerpipe.cli", *arguments)
    except SignalException as error:
        return exit_status(error.sigval)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else exit_status(-status)
    return 0


@contextmanager
def joined(timeout: float) -> Iterator[bool]:
    """Among the processes that torchrun has started; whether this is the one that reports.

    That is the last one, which has the losses first. It alone reads and writes the run's directory.

    Args:
        timeout: seconds that a process waits for another before it takes it for lost.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := _interface(os.environ["MASTER_ADDR"])):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    limit = timedelta(seconds=timeout)

    def join() -> Any:
        store, rank, size = next(rendezvous("env://", timeout=limit))
        # Where torchrun has started the processes again, the store may still hold the addresses of those before.
        store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
        return store

    global _store
    _store = reached("another stage", join)
    yield dist.get_rank() == dist.get_world_size() - 1
    dist.destroy_process_group()


def gather_after_interrupt(value: T) -> list[T | None]:
    """Gather what each process has, in the one that reports; ``None`` of those that did not say it within seconds.

    For processes that were interrupted, each wherever it was: what they tell each other otherwise may be half said.
    """
    assert _store is not None
    rank, size = dist.get_rank(), dist.get_world_size()
    words: Any = dist.PrefixStore("last words", _store)  # type: ignore[attr-defined]
    found: list[T | None] = [None] * size
    found[rank] = value

    def said(key: str, limit: float) -> bool:
        while not words.check([key]):
            if time.monotonic() > limit:
                return False
            time.sleep(0.05)
        return True

    with contextlib.suppress(RuntimeError):  # the process that holds the store is gone
        end = time.monotonic() + _PATIENCE
        if rank == size - 1:
            for other in range(size - 1):
                if said(str(other), end):
                    found[other] = pickle.loads(base64.b64decode(words.get(str(other))))
            words.set("heard", "")
        else:
            words.set(str(rank), base64.b64encode(pickle.dumps(value)))
            said("heard", end + 2)  # the store may be this process's
    return found


def check_same(options: dict[str, Any]) -> None:
    """Refuse processes that were started with other options, in all of them alike.

    Raises:
        UsageError: names the first option that differs, and the process.
    """
    first, *others = _all_of("distributed").gather(options)
    for rank, other in enumerate(others, start=1):
        for name, value in first.items():
            if other[name] != value:
                said = f"--{name.replace('_', '-')} is {other[name]!r} in process {rank} and {value!r} in process 0"
                raise UsageError(f"{said}; start all processes with the same options")


def check(executor: str, stages: int, replicas: int = 1) -> None:
    """Refuse a run that is not for as many processes as there are.

    Raises:
        UsageError: it is for one process, or has fewer stages.
    """
    if executor != "distributed":
        raise UsageError(f"a run with --executor {executor} is in one process: start it without torchrun")
    size = dist.get_world_size()
    if size % replicas:
        raise UsageError(f"--dp {replicas}: {size} processes are not as many in each replica")
    if stages < size // replicas:
        raise UsageError(f"--stages {stages}: {size // replicas} processes need at least as many stages")


def _interface(address: str) -> str | None:
    """The network interface that leads there. Gloo by itself takes the one of the host's name: often the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 1))  # sends nothing
        except OSError:
            return None
        ours = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                request = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:
                continue  # has no IPv4 address
            if socket.inet_ntoa(request[20:24]) == ours:
                return name
    return None


def call_on_all_ranks(executor: str, call: Callable[[], T]) -> T:
    """Return what ``call`` returns in this process, or in all of them an error where it raises in one.

    Raises:
        UsageError: what another process raised.
    """
    value, error = None, None
    try:
        value = call()
    except Exception as caught:
        error = caught
    _all_of(executor).agree(error, UsageError)
    return cast(T, value)


def call_on_each_host(call: Callable[[], T]) -> T:
    """As :func:`call_on_all_ranks`; one process of each host goes first, so that the others find what it downloads."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    value = call_on_all_ranks("distributed", lambda: call() if first else None)
    rest = call_on_all_ranks("distributed", lambda: None if first else call())
    return cast(T, value if first else rest)


def alone(executor: str) -> None:
    """Take the cores of the other processes, which have nothing left to do."""
    if executor == "distributed":
        torch.set_num_threads(_cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def broadcast(executor: str, value: T) -> T:
    """Broadcast a value of the process that reports."""
    ranks = _all_of(executor)
    return cast(T, ranks.told(value, by=ranks.size - 1))


def _all_of(executor: str) -> Ranks:
    return Ranks(dist.get_world_size(), dist.group.WORLD) if executor == "distributed" else Ranks(1)
