"""A process for every stage, or for a few neighbouring ones, under ``torch.distributed``.

Every process runs the same program and makes the same pipeline; each does its own stages' work in the caller's thread.
Tensors cross while the processes compute (:mod:`layerpipe.executors.remote`), so a stage waits for its neighbours only
where the schedule has no register left. A loss travels with the gradients that come of it: every process gets every
loss, once its backward has reached the first stage.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import torch
from torch import Tensor

from layerpipe.executors.base import Run, Tick
from layerpipe.executors.channels import Channel
from layerpipe.executors.ranks import Ranks
from layerpipe.executors.remote import Incoming, Outgoing, Peer
from layerpipe.executors.serial import Serial
from layerpipe.schedule import Schedule

Losses = collections.deque[Tensor]


class Distributed(Serial):
    """This process's part of a pipeline whose stages are in several.

    Args:
        names: of all stages.
        ranks: who holds which.
        losses: what the caller will be handed.
    """

    name = "distributed"

    def __init__(self, names: Sequence[str], run: Run, *, ranks: Ranks, losses: Losses) -> None:
        super().__init__(names, run)
        self._ranks, self._losses = ranks, losses
        self._to_pass_on: Losses = collections.deque()
        self._outgoing: list[Outgoing] = []
        self._incoming: list[Incoming] = []

    def latency(self, schedule: Schedule) -> int:
        return schedule.ticks(1) - 1

    def submit(self, tick: Tick) -> None:
        super().submit(tick._replace(actions=[action for action in tick.actions if action.stage in self._ranks.own]))

    def computed(self, loss: Tensor) -> None:
        if self._ranks.rank:
            self._to_pass_on.append(loss)

    def received(self, loss: Tensor) -> None:
        """A loss has come with its gradients."""
        self._losses.append(loss)
        self.computed(loss)

    def channel(self, name: str, sender: int, receiver: int) -> Channel:
        ours, theirs = self._ranks.rank, [self._ranks.of(stage) for stage in (sender, receiver)]
        if theirs[0] == theirs[1] or ours not in theirs:
            return super().channel(name, sender, receiver)
        backward = receiver < sender
        sends = theirs[0] == ours
        peer = Peer(
            self._ranks.group,
            rank=theirs[1] if sends else theirs[0],
            tag=max(sender, receiver),
            name=self.names[receiver if sends else sender],
        )
        if sends:
            outgoing = _Gradients(name, peer, self._to_pass_on) if backward else Outgoing(name, peer)
            self._outgoing.append(outgoing)
            return outgoing
        device = self.devices[receiver] if self.devices is not None else None
        incoming = _GradientsAndLosses(name, peer, device, self) if backward else Incoming(name, peer, device)
        self._incoming.append(incoming)
        return incoming

    def drained(self, fed: int) -> None:
        super().drained(fed)
        self.check()
        for outgoing in self._outgoing:
            outgoing.finish(fed)
        for incoming in self._incoming:
            incoming.finish()

    def close(self) -> None:
        first = not self._closed
        super().close()
        if first:
            for channel in (*self._incoming, *self._outgoing):
                channel.close()
            ended = {incoming.peer.rank for incoming in self._incoming if incoming.ended}
            for outgoing in self._outgoing:
                if outgoing.peer.rank not in ended:
                    outgoing.end(self._failure)


class _Gradients(Outgoing):
    """Sends each minibatch's loss with them."""

    def __init__(self, name: str, peer: Peer, losses: Losses) -> None:
        super().__init__(name, peer)
        self._losses = losses

    def put(self, item: Sequence[Tensor | None]) -> None:
        super().put((self._losses.popleft(), *item))


class _GradientsAndLosses(Incoming):
    """Takes the losses out."""

    def __init__(self, name: str, peer: Peer, device: torch.device | None, executor: Distributed) -> None:
        super().__init__(name, peer, device)
        self._executor = executor

    def get(self) -> tuple[Tensor | None, ...]:
        loss, *grads = super().get()
        assert loss is not None
        self._executor.received(loss.clone())  # the gradients' memory shall go before it does
        return tuple(grads)
