"""The stages and replicas of each process, and collectives for what only one process knows."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from layerpipe.errors import StageError

if TYPE_CHECKING:
    from layerpipe.executors.notices import Notices

T = TypeVar("T")


class Ranks:
    """The processes of a pipeline; one alone unless ``group`` is given. Each holds neighbouring stages.

    Where there are replicas, ``group`` has the processes of one, this process's, and all processes are in ``everyone``.

    Args:
        stages: in all.
        group: of the processes that hold the stages, used by nothing else; whatever one of them calls here, all of them
            call.
        everyone: of the processes of all replicas; by default there is one replica.
        replica: this process's.
        replicas: how many there are.
        averaging: per stage of this process, the group of those that hold it in all replicas; empty for one replica.
        notices: what processes of other replicas leave each other.
    """

    def __init__(
        self,
        stages: int,
        group: Any = None,
        *,
        everyone: Any = None,
        replica: int = 0,
        replicas: int = 1,
        averaging: Sequence[Any] = (),
        notices: Notices | None = None,
    ) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self._stages = stages
        self.own = self.held_by(self.rank)
        self.everyone = group if everyone is None else everyone
        self.replica, self.replicas = replica, replicas
        self.process = dist.get_rank(self.everyone) if group is not None else 0  # among all
        self.processes = dist.get_world_size(self.everyone) if group is not None else 1
        self.notices = notices
        self.averaging = dict(zip(self.own, averaging, strict=True)) if averaging else {}

    def of(self, stage: int) -> int:
        """The process that holds a stage, among those of a replica."""
        return holder(stage, self._stages, self.size)

    def held_by(self, rank: int) -> range:
        """The stages of a process of a replica."""
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
        """The value of every process of this replica, in their order."""
        return self._gather(value, self.group, self.size)

    def gather_all(self, value: T) -> list[T]:
        """The value of every process of all replicas, in their order."""
        return self._gather(value, self.everyone, self.processes)

    def _gather(self, value: T, group: Any, size: int) -> list[T]:
        if group is None:
            return [value]
        values: list[Any] = [None] * size
        reached("another stage", lambda: dist.all_gather_object(values, value, group=group))
        return values

    def mean(self, number: float) -> float:
        """The mean of a number over all replicas; the same in all processes."""
        return number if self.replicas == 1 else sum(self.gather_all(number)) / self.processes

    def agree(self, error: Exception | None, kind: type[Exception]) -> None:
        """Raise where any process has an error: its own, or ``kind`` with what the first one's says, and where."""
        said = None
        if error is not None:
            message = str(error) if isinstance(error, kind) else f"{type(error).__name__}: {error}"
            said = f"{message} (process {self.process}, on {socket.gethostname()})"
        others = [e for e in self.gather_all(said) if e]
        if error is not None:
            raise error
        if others:
            raise kind(others[0])

    def meet(self) -> None:
        """Wait for the other replicas, whose pipes are empty after as many minibatches as this one's.

        Raises:
            StageError: they are not, or another process has ended.
        """
        if self.notices is not None:
            work = dist.all_reduce(torch.zeros(1), group=self.everyone, async_op=True)
            self.notices.wait(work, "another replica")
            self.notices.drained()

    def first(self, condition: bool) -> int | None:
        """The first of all processes where this is so."""
        return next((process for process, true in enumerate(self.gather_all(condition)) if true), None)

    def by_stage(self, own: Sequence[T]) -> list[T]:
        """One value per stage from the own ones of every process of this replica."""
        return [value for values in self.gather(list(own)) for value in values]

    def told(self, value: Any, by: int) -> Any:
        """Broadcast what one process of this replica has."""
        return self._told(value, self.rank == by, by, self.group)

    def told_all(self, value: Any, by: int) -> Any:
        """Broadcast what one of all processes has."""
        return self._told(value, self.process == by, by, self.everyone)

    def _told(self, value: Any, tells: bool, by: int, group: Any) -> Any:
        if group is None:
            return value
        box = [value if tells else None]
        reached("another stage", lambda: dist.broadcast_object_list(box, group_src=by, group=group))
        return box[0]


def holder(stage: int, stages: int, processes: int) -> int:
    """Return which of so many processes holds a stage of so many."""
    return stage * processes // stages


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
