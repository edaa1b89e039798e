"""How neighbouring stages hand tensors to each other inside one process."""

from __future__ import annotations

import queue
from typing import Any


class ChannelClosed(Exception):
    """The other side is gone."""


class Channel:
    """A first-in-first-out queue between two stages, or between a stage and the caller.

    How much it holds is bounded by the schedule, which lets no stage run further ahead than its registers allow.
    """

    _CLOSED = object()

    def __init__(self, name: str, *, blocking: bool) -> None:
        self.name = name
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
        return item

    def close(self) -> None:
        self._queue.put(self._CLOSED)
