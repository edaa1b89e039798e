"""This process's links to those of neighbouring stages, under ``torch.distributed``, whoever runs the stages here.

Every process runs the same program and makes the same pipeline; each does its own stages' work. Tensors cross while the
processes compute (:mod:`layerpipe.executors.remote`), so a stage waits for its neighbours only where the schedule has
no register left. A loss travels with the gradients that come of it: every process gets every loss, once its backward
has reached the first stage.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import torch
from torch import Tensor

from layerpipe.executors.channels import Channel
from layerpipe.executors.ranks import Ranks
from layerpipe.executors.remote import Incoming, Outgoing, Peer

Losses = collections.deque[Tensor]


class Links:
    """Makes the channels that lead to other processes, and ends them.

    Args:
        names: of all stages.
        ranks: who holds which.
        losses: what the caller will be handed.
        answers: whether a neighbour that has said its last word is told ours: a worker thread here may still wait for
            one of that neighbour's own.
    """

    def __init__(self, names: Sequence[str], ranks: Ranks, losses: Losses, *, answers: bool) -> None:
        self._names, self._ranks, self._losses, self._answers = names, ranks, losses, answers
        self._to_pass_on: Losses = collections.deque()
        self._outgoing: list[Outgoing] = []
        self._incoming: list[Incoming] = []
        self._closed = False

    def computed(self, loss: Tensor) -> None:
        """The last stage, in this process, has a loss."""
        if self._ranks.rank:
            self._to_pass_on.append(loss)

    def received(self, loss: Tensor) -> None:
        """A loss has come with its gradients."""
        self._losses.append(loss)
        self.computed(loss)

    def channel(self, name: str, sender: int, receiver: int, device: torch.device | None) -> Channel | None:
        """This process's end of the channel between two stages; ``None`` where it holds both, or neither.

        Args:
            device: where the receiver wants its tensors; ``None`` for the CPU, where they arrive.
        """
        ours, theirs = self._ranks.rank, [self._ranks.of(stage) for stage in (sender, receiver)]
        if theirs[0] == theirs[1] or ours not in theirs:
            return None
        backward = receiver < sender
        sends = theirs[0] == ours
        peer = Peer(
            self._ranks.group,
            rank=theirs[1] if sends else theirs[0],
            tag=max(sender, receiver),
            name=self._names[receiver if sends else sender],
        )
        if sends:
            outgoing = _Gradients(name, peer, self._to_pass_on) if backward else Outgoing(name, peer)
            self._outgoing.append(outgoing)
            return outgoing
        incoming = _GradientsAndLosses(name, peer, device, self) if backward else Incoming(name, peer, device)
        self._incoming.append(incoming)
        return incoming

    def drained(self, fed: int) -> None:
        """The pipe is empty after ``fed`` minibatches here, and shall be so there.

        Raises:
            StageError: it is not.
        """
        for outgoing in self._outgoing:
            outgoing.finish(fed)
        for incoming in self._incoming:
            incoming.finish()

    def close(self, failure: BaseException | None) -> None:
        """Say that nothing will follow, and why if that is an error. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for channel in (*self._incoming, *self._outgoing):
            channel.close()
        ended = {incoming.peer.rank for incoming in self._incoming if incoming.ended}
        for outgoing in self._outgoing:
            if self._answers or outgoing.peer.rank not in ended:
                outgoing.end(failure)


class _Gradients(Outgoing):
    """Sends each minibatch's loss with them."""

    def __init__(self, name: str, peer: Peer, losses: Losses) -> None:
        super().__init__(name, peer)
        self._losses = losses

    def put(self, item: Sequence[Tensor | None]) -> None:
        super().put((self._losses.popleft(), *item))


class _GradientsAndLosses(Incoming):
    """Takes the losses out."""

    def __init__(self, name: str, peer: Peer, device: torch.device | None, links: Links) -> None:
        super().__init__(name, peer, device)
        self._links = links

    def get(self) -> tuple[Tensor | None, ...]:
        loss, *grads = super().get()
        assert loss is not None
        self._links.received(loss.clone())  # the gradients' memory shall go before it does
        return tuple(grads)
