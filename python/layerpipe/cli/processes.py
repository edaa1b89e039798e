"""``--executor distributed``: a process for every stage, started here; or as many as torchrun starts, on any hosts."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from layerpipe.errors import UsageError
from layerpipe.executors.ranks import Ranks, reached

T = TypeVar("T")


def started() -> bool:
    """Whether torchrun has started this process, beside others."""
    return "RANK" in os.environ


def start(stages: int, arguments: list[str]) -> NoReturn:
    """Run this command in one process per stage, in place of this process."""
    if not dist.is_available():
        raise UsageError("--executor distributed needs a torch that was built with torch.distributed")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // stages)))  # torchrun would give each one
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={stages}"]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*torchrun, "-m", "layerpipe.cli", *arguments])


@contextmanager
def joined(timeout: float) -> Iterator[bool]:
    """Among the processes that torchrun has started; whether this is the one that reports.

    That is the last one, which has the losses first. It alone reads and writes the run's directory.

    Args:
        timeout: seconds that a process waits for another before it takes it for lost.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := _interface(os.environ["MASTER_ADDR"])):
        os.environ["GLOO_SOCKET_IFNAME"] = name
    reached("another stage", lambda: dist.init_process_group("gloo", timeout=timedelta(seconds=timeout)))
    yield dist.get_rank() == dist.get_world_size() - 1
    dist.destroy_process_group()


def check(executor: str, stages: int) -> None:
    """Refuse a run that is not for as many processes as there are.

    Raises:
        UsageError: it is for one process, or has fewer stages.
    """
    if executor != "distributed":
        raise UsageError(f"a run with --executor {executor} is in one process: resume it without torchrun")
    if stages < (size := dist.get_world_size()):
        raise UsageError(f"--stages {stages}: {size} processes need at least as many stages")


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


def agreed(executor: str, call: Callable[[], T]) -> T:
    """What ``call`` returns in this process, or in all of them an error where it raises in one.

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


def agreed_on_each_host(call: Callable[[], T]) -> T:
    """As :func:`agreed`; in one process of each host before the others, which find what that one downloads."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    value = agreed("distributed", lambda: call() if first else None)
    rest = agreed("distributed", lambda: None if first else call())
    return cast(T, value if first else rest)


def alone(executor: str) -> None:
    """Take the cores of the other processes, which have nothing left to do."""
    if executor == "distributed":
        torch.set_num_threads(_cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def told(executor: str, value: T) -> T:
    """What the process that reports has."""
    ranks = _all_of(executor)
    return cast(T, ranks.told(value, by=ranks.size - 1))


def _all_of(executor: str) -> Ranks:
    return Ranks(dist.get_world_size(), dist.group.WORLD) if executor == "distributed" else Ranks(1)
