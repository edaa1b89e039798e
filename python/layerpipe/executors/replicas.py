"""Replicas of a stage in several processes: one gradient for all of them, and one set of buffers.

Gradients are averaged where the update is due, so once in ``accumulate`` minibatches, in buckets of one buffer each. A
bucket is on its way to the other replicas while the next one is filled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from layerpipe.executors.notices import Notices
from layerpipe.executors.ranks import reached
from layerpipe_kernels.layout import arrange

#: Bytes of a bucket, at least one parameter's.
BUCKET = 25 << 20


class _Bucket:
    """Some parameters' gradients in one buffer, and after them for each whether a replica has one: 1 or 0."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        numbers = [p.numel() for p in params]
        self._values = sum(numbers)
        self._buffer = torch.empty(self._values + len(params), dtype=params[0].dtype, device=params[0].device)
        parts = self._buffer[: self._values].split(numbers)
        self._views = [arrange(part, p) for part, p in zip(parts, params, strict=True)]

    def fill(self) -> Tensor:
        """The buffer, with the gradients as they are here.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        for param, view in zip(self.params, self._views, strict=True):
            if param.grad is None:
                view.zero_()
            elif param.grad.layout != torch.strided:
                raise RuntimeError("sparse gradients are not averaged over replicas; make the embedding sparse=False")
            else:
                view.copy_(param.grad)
        there = [float(param.grad is not None) for param in self.params]
        self._buffer[self._values :] = torch.tensor(there, dtype=self._buffer.dtype)
        return self._buffer

    def take(self, replicas: int) -> None:
        """Put the mean into the gradients; ``None`` where no replica has one."""
        self._buffer[: self._values].div_(replicas)
        there = self._buffer[self._values :].tolist()
        for param, view, count in zip(self.params, self._views, there, strict=True):
            param.grad = view if count else None


class Replicas:
    """The replicas of one stage.

    Args:
        group: of the processes that hold them.
        notices: of all processes.
        params: whose gradients are averaged.
        buffers: that all replicas have of the first one, when the pipe is empty.
        name: of the stage, for messages.
    """

    def __init__(
        self, group: Any, notices: Notices, params: Sequence[Tensor], buffers: Sequence[Tensor], name: str
    ) -> None:
        self._group, self._notices, self._buffers, self._name = group, notices, buffers, name
        self._size = dist.get_world_size(group)
        self._buckets = [_Bucket(bucket) for bucket in _buckets(params)]

    def average(self) -> None:
        """Replace the gradients by their means over all replicas, the same bits in each. A replica without one counts
        as 0 where others have one.

        Raises:
            StageError: a replica is gone, or was given fewer minibatches.
            RuntimeError: a gradient is sparse.
        """
        works = [self._begin(bucket.fill()) for bucket in self._buckets]
        for bucket, work in zip(self._buckets, works, strict=True):
            self._notices.wait(work, self._others)
            bucket.take(self._size)

    def share_buffers(self) -> None:
        """Give all replicas the first one's."""
        for tensors in _by_dtype(self._buffers):
            flat = torch.cat([t.detach().reshape(-1) for t in tensors])
            reached(self._others, functools.partial(dist.broadcast, flat, group_src=0, group=self._group))
            for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.detach().copy_(values.view(tensor.shape))

    def _begin(self, buffer: Tensor) -> Any:
        """Begin to add a buffer up over all replicas; returns what to wait for."""
        return reached(self._others, lambda: dist.all_reduce(buffer, group=self._group, async_op=True))

    @property
    def _others(self) -> str:
        return f"{self._name} in another replica"


def _by_dtype(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(tensor)
    yield from found.values()


def _buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """From the last parameter, whose gradient comes first."""
    for same in _by_dtype(reversed(params)):
        bucket: list[Tensor] = []
        size = 0
        for param in same:
            size += param.dtype.itemsize * math.prod(param.shape)
            if bucket and size > BUCKET:
                yield bucket
                bucket, size = [], param.dtype.itemsize * math.prod(param.shape)
            bucket.append(param)
        if bucket:
            yield bucket
