"""Channels between processes: tensors as messages of a gloo group.

A receiver always has a buffer waiting for the next message, of the layout of the last one, so that tensors cross while
both processes compute. A message is one buffer: a header, then the tensors, each at a multiple of 64 bytes. Where the
layout changes, a message without tensors says so, the new layout follows, and then the tensors.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import functools
import json
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from layerpipe.errors import StageError, StageInterrupted
from layerpipe.executors.channels import Channel, ChannelClosed, moved
from layerpipe.executors.notices import described, raised
from layerpipe.executors.ranks import Ranks, reached
from layerpipe_kernels.layout import distinct, fill, order

_HEADER = 4096  # bytes: what follows, a number that depends on it, and room for what an error says
_TENSORS, _LAYOUT, _EMPTY, _END = range(4)
_UNSENT = 4  # messages that may be on their way at once
_LAST_WORDS = datetime.timedelta(seconds=5)  # for a message that nobody may be there to take


class _Kind(NamedTuple):
    """A tensor without its numbers; its strides, too, which decide what kernels the receiving stage runs."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    needed: bool  # whether a gradient of it is

    @classmethod
    def of(cls, tensor: Tensor) -> _Kind:
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad)

    def packed(self) -> _Kind:
        """As it crosses: every element once and no gaps, in the same order."""
        lies = torch.empty_strided(self.shape, self.stride, device="meta")
        if order(lies) is not None:
            return self
        once = distinct(lies)
        return self._replace(shape=tuple(once.shape), stride=torch.empty_like(once).stride())


class _Layout:
    """The layout of a message's tensors."""

    def __init__(self, kinds: Sequence[_Kind | None]) -> None:
        self.kinds = list(kinds)
        self._packed = [None if kind is None else kind.packed() for kind in self.kinds]
        self._starts, at = [], _HEADER
        for kind in self._packed:
            self._starts.append(at)
            if kind is not None:
                at += -(-kind.dtype.itemsize * math.prod(kind.shape) // 64) * 64
        self.bytes = at

    def put(self, buffer: Tensor, tensors: Sequence[Tensor | None]) -> None:
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                self._view(buffer, i).copy_(distinct(tensor.detach()))

    def get(self, buffer: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [None if kind is None else self._tensor(buffer, i, kind) for i, kind in enumerate(self.kinds)]
        for tensor, kind in zip(tensors, self.kinds, strict=True):
            if tensor is not None and kind is not None and kind.needed:
                tensor.requires_grad_()
        return tuple(tensors)

    def _tensor(self, buffer: Tensor, i: int, kind: _Kind) -> Tensor:
        packed = self._view(buffer, i)
        if kind is self._packed[i]:
            return packed
        return fill(torch.empty_strided(kind.shape, kind.stride, dtype=kind.dtype), packed.expand(kind.shape))

    def _view(self, buffer: Tensor, i: int) -> Tensor:
        start, kind = self._starts[i], self._packed[i]
        assert kind is not None
        end = start + kind.dtype.itemsize * math.prod(kind.shape)
        return buffer[start:end].view(kind.dtype).as_strided(kind.shape, kind.stride)

    def to_bytes(self) -> bytes:
        return json.dumps([k and (str(k.dtype).removeprefix("torch."), *k[1:]) for k in self.kinds]).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> _Layout:
        return cls([k and _Kind(getattr(torch, k[0]), tuple(k[1]), tuple(k[2]), k[3]) for k in json.loads(text)])


class Peer(NamedTuple):
    """The other end of a channel."""

    group: Any
    rank: int  # within the group
    tag: int  # of messages across this boundary, for training or not
    name: str  # the stage there, for messages


class _End(Channel):
    """This process's end of a channel."""

    _open = True

    def close(self) -> None:
        """The other process has been told that nothing follows, and tells nothing more itself."""
        self._open = False

    def _check(self) -> None:
        if not self._open:
            raise ChannelClosed(self.name)


class Outgoing(_End):
    """The sending end. Tensors may be changed once :meth:`put` has returned; those of a device come by the host.

    One thread puts, and another one may end."""

    def __init__(self, name: str, peer: Peer) -> None:
        super().__init__(name, blocking=True)
        self.peer, self._layout = peer, _Layout([])
        self._unsent: collections.deque[tuple[Any, Tensor]] = collections.deque()
        self._alone = threading.Lock()

    def put(self, item: Any) -> None:
        """Send tensors; does not wait for them to arrive, unless several messages are still under way.

        Raises:
            ChannelClosed: this process has closed its pipeline.
            StageError: the other process is gone.
        """
        kinds = [None if t is None else _Kind.of(t) for t in item]
        with self._alone:
            self._check()
            if kinds != self._layout.kinds:
                layout = _Layout(kinds)
                text = _bytes(layout.to_bytes())
                self._send(self._buffer(_LAYOUT, len(text)))
                self._send(text)
                self._layout = layout
            buffer = self._buffer(_TENSORS)
            self._layout.put(buffer, item)
            self._send(buffer)

    def finish(self, fed: int) -> None:
        """Say that the pipe is empty after so many minibatches."""
        self._send(self._buffer(_EMPTY, fed))

    def end(self, error: BaseException | None) -> None:
        """Tell the other process that nothing will follow, and why if that is an error; that waits seconds at most."""
        # A character is 6 bytes of JSON at worst.
        text = json.dumps(described(error)).encode()
        with self._alone, contextlib.suppress(StageError):
            buffer = self._buffer(_END, len(text), wait=False)
            buffer[16 : 16 + len(text)] = _bytes(text)
            self._send(buffer)
            interrupted = isinstance(
                error, KeyboardInterrupt | StageInterrupted
            )  # as others are, who take nothing more
            limit = _LAST_WORDS / 5 if interrupted else _LAST_WORDS
            for work, _ in self._unsent if error is not None else ():
                reached(self.peer.name, functools.partial(work.wait, limit))

    def _buffer(self, kind: int, number: int = 0, *, wait: bool = True) -> Tensor:
        buffer = None
        while wait and len(self._unsent) >= _UNSENT:
            work, buffer = self._unsent.popleft()
            reached(self.peer.name, work.wait)
        if buffer is None or len(buffer) != self._layout.bytes:
            buffer = torch.empty(self._layout.bytes, dtype=torch.uint8)
        buffer[:16].view(torch.int64).copy_(torch.tensor((kind, number)))
        return buffer

    def _send(self, buffer: Tensor) -> None:
        group, rank, tag, name = self.peer
        work = reached(name, lambda: dist.isend(buffer, group=group, tag=tag, group_dst=rank))
        self._unsent.append((work, buffer))


class Incoming(_End):
    """The receiving end.

    Args:
        name: what messages call it.
        peer: who sends.
        device: where the tensors are wanted.
    """

    def __init__(self, name: str, peer: Peer, device: torch.device | None = None) -> None:
        super().__init__(name, blocking=True, device=device)
        self.ended = False  # whether the other process has said that nothing will follow, or is gone
        self.peer, self._layout = peer, _Layout([])
        self._post()

    def get(self) -> tuple[Tensor | None, ...]:
        """The next message's tensors, once they are there.

        Raises:
            ChannelClosed: this process has closed its pipeline.
            StageError: the other process failed, with its error's message; or it is gone, or has fewer minibatches.
        """
        self._check()
        buffer, layout = self._next(_TENSORS), self._layout
        self._post()
        tensors = layout.get(buffer)
        return tensors if self.device is None else moved(tensors, self.device)

    def finish(self) -> None:
        """Make sure that the other side's pipe is empty, too, now that every message that was due has come.

        Raises:
            StageError: it is not.
        """
        self._next(_EMPTY)
        self._post()

    def _next(self, wanted: int) -> Tensor:
        while True:
            self._wait()
            kind, number = self._buffer[:16].view(torch.int64).tolist()
            if kind == wanted:
                return self._buffer
            if kind == _LAYOUT:
                text = torch.empty(number, dtype=torch.uint8)
                self._receive(text)
                self._wait()
                self._layout = _Layout.from_bytes(bytes(text.tolist()))
                self._post()
            elif kind == _END:
                raise self._ended(json.loads(bytes(self._buffer[16 : 16 + number].tolist())))
            elif kind == _EMPTY:
                raise self._differ(f"was drained after {number} minibatches, this process was fed more")
            else:
                raise self._differ("got more minibatches than this process was drained after")

    def _differ(self, what: str) -> StageError:
        return StageError(self.peer.name, f"{what}: every process must be given the same number of minibatches")

    def _ended(self, content: dict[str, Any]) -> StageError:
        self.ended = True
        return raised(content, self.peer.name)

    def _wait(self) -> None:
        try:
            reached(self.peer.name, self._work.wait)
        except StageError:
            self.ended = True
            raise

    def _post(self) -> None:
        self._buffer = torch.empty(self._layout.bytes, dtype=torch.uint8)
        self._receive(self._buffer)

    def _receive(self, buffer: Tensor) -> None:
        group, rank, tag, name = self.peer
        self._work: Any = reached(name, lambda: dist.irecv(buffer, group=group, tag=tag, group_src=rank))


class Evaluation:
    """Passes a network's inputs and output between processes outside training; nothing to do where there is one."""

    def __init__(self, ranks: Ranks, names: Sequence[str], device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._from: Incoming | None = None
        self._to: Outgoing | None = None
        start, stop = ranks.own.start, ranks.own.stop
        if start:
            peer = Peer(ranks.group, ranks.rank - 1, len(names) + start, names[start - 1])
            self._from = Incoming("evaluation", peer, device)
        if stop < len(names):
            self._to = Outgoing("evaluation", Peer(ranks.group, ranks.rank + 1, len(names) + stop, names[stop]))

    def inputs(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what this process's stages take, where the network takes ``given``."""
        return given if self._from is None else self._from.get()

    def output(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The network's, where this process's stages returned ``values``."""
        if self._ranks.size == 1:
            return values
        if self._to is not None:
            self._to.put(values)
        values = pytree.tree_map_only(Tensor, lambda x: x.detach().cpu(), values)
        last = self._ranks.told(values, by=self._ranks.size - 1)
        there: tuple[Any, ...] = pytree.tree_map_only(Tensor, lambda x: x.to(self._device), last)
        return there


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
