"""Which process holds which stages, and how the processes tell each other what only one of them knows."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from layerpipe.errors import StageError

T = TypeVar("T")


class Ranks:
    """The processes of a pipeline; one alone unless ``group`` is given. Each holds neighbouring stages.

    Args:
        stages: in all.
        group: of all processes, used by nothing else; whatever one of them calls here, all of them call.
    """

    def __init__(self, stages: int, group: Any = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self._stages = stages
        self.own = self.held_by(self.rank)

    def of(self, stage: int) -> int:
        """The process that holds a stage."""
        return stage * self.size // self._stages

    def held_by(self, rank: int) -> range:
        """The stages of a process."""
        held = [stage for stage in range(self._stages) if self.of(stage) == rank]
        return range(held[0], held[-1] + 1)

    def check_trained(self, stages: Sequence[nn.Module]) -> None:
        """Refuse a process that has nothing to train, in all processes alike.

        Raises:
            ValueError: it has no parameters that require gradients.
        """
        for rank in range(self.size):
            held = self.held_by(rank)
            if not any(p.requires_grad for stage in held for p in stages[stage].parameters()):
                where = f" in process {rank}: its stages are {held.start} to {held.stop - 1}" if self.size > 1 else ""
                raise ValueError(f"no stage has parameters to train{where}")

    def gather(self, value: T) -> list[T]:
        """Every process's value, in their order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        reached("another stage", lambda: dist.all_gather_object(values, value, group=self.group))
        return values

    def agree(self, error: Exception | None, kind: type[Exception]) -> None:
        """Raise where any process has an error: its own, or ``kind`` with what the first one's says, and where."""
        said = None
        if error is not None:
            message = str(error) if isinstance(error, kind) else f"{type(error).__name__}: {error}"
            said = f"{message} (process {self.rank}, on {socket.gethostname()})"
        others = [e for e in self.gather(said) if e]
        if error is not None:
            raise error
        if others:
            raise kind(others[0])

    def first(self, condition: bool) -> int | None:
        """The first process where this is so."""
        return next((rank for rank, true in enumerate(self.gather(condition)) if true), None)

    def by_stage(self, own: Sequence[T]) -> list[T]:
        """One value per stage from every process's own."""
        return [value for values in self.gather(list(own)) for value in values]

    def told(self, value: Any, by: int) -> Any:
        """What one process has."""
        if self.group is None:
            return value
        box = [value if self.rank == by else None]
        reached("another stage", lambda: dist.broadcast_object_list(box, src=by, group=self.group))
        return box[0]


def reached(stage: str, call: Callable[[], T]) -> T:
    """Call what needs the process of another stage.

    Raises:
        StageError: that process, or the network to it, is gone.
    """
    try:
        return call()
    except (RuntimeError, ValueError) as error:  # the latter of a group that was destroyed
        reason = next(iter(str(error).splitlines()), "").partition("] ")  # [a line of gloo's source] what happened
        raise StageError(stage, f"its process cannot be reached any more ({reason[2] or reason[0]})") from None


def make(executor: str, stages: int) -> Ranks:
    """The processes of this executor: one, or for ``"distributed"`` all of torch's default group.

    Raises:
        RuntimeError: ``"distributed"``, and there is no default group.
        ValueError: fewer stages than processes.
    """
    if executor != "distributed":
        return Ranks(stages)
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "executor='distributed' has a process for each stage: start them with torchrun, and call "
            "torch.distributed.init_process_group() in each before the pipeline is made"
        )
    # Before a group is made: one that connects while another process is already leaving it fails in gloo's words.
    if stages < (size := dist.get_world_size()):
        raise ValueError(f"{size} processes need at least as many stages, got {stages}")
    # The group lives as long as the default one: when close() returns, another process may still have to take the last
    # message, and a receive for which none will come cannot be called off.
    return Ranks(stages, dist.new_group(backend="gloo", timeout=_timeout(dist.group.WORLD)))


def _timeout(group: Any) -> datetime.timedelta:
    """What :func:`torch.distributed.init_process_group` was given; new groups have torch's default otherwise."""
    try:
        timeout: datetime.timedelta = group._get_backend(group._device_types[0]).options._timeout
    except AttributeError:  # a torch that has renamed it
        from torch.distributed.constants import default_pg_timeout  # not every torch has it

        return default_pg_timeout
    return timeout
