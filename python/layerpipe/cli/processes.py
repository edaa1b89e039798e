"""``--executor distributed``: a process for every stage, started here or by torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from layerpipe.errors import UsageError


def start(stages: int, arguments: list[str]) -> None:
    """Run this command in one process per stage, in place of this process; returns where torchrun has started it."""
    if "RANK" in os.environ:
        return
    if not dist.is_available():
        raise UsageError("--executor distributed needs a torch that was built with torch.distributed")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // stages)))  # torchrun would give each one
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={stages}"]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*torchrun, "-m", "layerpipe.cli", *arguments])


@contextmanager
def joined(executor: str) -> Iterator[bool]:
    """Among the processes of this executor; whether this is the one that reports: the last, which has the losses."""
    if executor != "distributed":
        yield True
        return
    dist.init_process_group("gloo")
    yield dist.get_rank() == dist.get_world_size() - 1
    dist.destroy_process_group()


def alone(executor: str) -> None:
    """Take the cores of the other processes, which have nothing left to do."""
    if executor == "distributed":
        torch.set_num_threads(_cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def told(executor: str, value: Any) -> Any:
    """What the process that reports has."""
    if executor != "distributed":
        return value
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_world_size() - 1)
    return box[0]
