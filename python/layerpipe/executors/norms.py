"""A channel that carries the norms of :mod:`layerpipe.stage.network_norm` beside the tensors."""

from __future__ import annotations

from typing import Any

from layerpipe.executors.channels import Channel
from layerpipe.stage.network_norm import NetworkNorm


class NormChannel(Channel):
    """Sends a stage's norms along with its tensors.

    Args:
        inner: what carries them.
        sender, receiver: the stages' norms; ``None`` of a stage in another process.
        before: whether the sender is the stage before the receiver.
    """

    def __init__(
        self, inner: Channel, sender: NetworkNorm | None, receiver: NetworkNorm | None, *, before: bool
    ) -> None:
        super().__init__(inner.name, blocking=True)
        self._inner, self._sender, self._receiver, self._before = inner, sender, receiver, before

    def put(self, item: tuple[Any, ...]) -> None:
        assert self._sender is not None
        self._inner.put((*item, self._sender.known.clone()))

    def get(self) -> tuple[Any, ...]:
        assert self._receiver is not None
        *item, norms = self._inner.get()
        self._receiver.heard(norms, before=self._before)
        return tuple(item)

    def close(self) -> None:
        self._inner.close()
