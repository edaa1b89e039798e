"""Channels through which neighbouring stages of one process hand tensors to each other."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from layerpipe_kernels.layout import replica


class ChannelClosed(Exception):
    """The other side is gone."""


class Lent(tuple[Any, ...]):
    """Tensors that their owner will overwrite, but not before ``read``, an event; ``None`` where something else says
    when that may be."""

    read: Any

    def __new__(cls, tensors: Iterable[Any], read: Any = None) -> Lent:
        lent = super().__new__(cls, tensors)
        lent.read = read
        return lent

    def was_read(self, stream: Any) -> None:
        """Note that the receiver has read them, once this stream has done what it was given."""
        if self.read is not None:
            self.read.record(stream)


class Channel:
    """A first-in-first-out queue between two stages, or between a stage and the caller.

    How much it holds is bounded by the schedule, which lets no stage run further ahead than its registers allow.

    Args:
        name: what messages call it.
        blocking: whether a reader may have to wait.
        device: where the reader wants its tensors; ``None`` to take them where they are.
    """

    _CLOSED = object()

    def __init__(self, name: str, *, blocking: bool, device: torch.device | None = None) -> None:
        self.name, self.device = name, device
        self._blocking = blocking
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def put(self, item: Any) -> None:
        self._queue.put(item)

    def get(self) -> Any:
        """The next item; waits for it where another thread may still send it.

        Raises:
            ChannelClosed: the sender closed the channel.
            RuntimeError: nothing is there, and nobody could send it any more.
        """
        try:
            item = self._queue.get(block=self._blocking)
        except queue.Empty:
            raise RuntimeError(f"channel {self.name} is empty: the schedule asks for what was not sent") from None
        if item is self._CLOSED:
            self._queue.put(item)  # for whoever asks next
            raise ChannelClosed(self.name)
        return item if self.device is None else moved(item, self.device)

    def close(self) -> None:
        self._queue.put(self._CLOSED)


def moved(item: Any, device: torch.device) -> Any:
    """The item with its tensors on this device; itself where they are there. The host does not wait for a copy."""
    if all(tensor.device == device for tensor in tensors_in(item)):
        return item
    item = tuple(item) if isinstance(item, Lent) else item
    return pytree.tree_map_only(Tensor, lambda t: t if t.device == device else sent(t, device), item)


def sent(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A copy on a device, its own by default, that needs a gradient where the tensor does."""
    return replica(tensor, device).requires_grad_(tensor.requires_grad)


def tensors_in(item: Any) -> Iterator[Tensor]:
    """A tensor, or those in a tuple, which is what stages exchange; of anything else, what torch's trees find there."""
    if isinstance(item, Tensor):
        yield item
        return
    values = item if isinstance(item, tuple) else pytree.tree_leaves(item)
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list | dict):
            yield from tensors_in(tuple(pytree.tree_leaves(value)))
