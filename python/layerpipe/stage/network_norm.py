"""The norm of all stages' gradients together, which no stage waits for.

Every stage knows a norm of each stage's last update that it has heard of: its own, and what came with the tensors from
its neighbours. Activations carry the norms of the stages before, gradients those of the stages behind, as the sender
knew them. So what a stage knows of another one is as many actions old as their tensors take from one to the other, and
the same under every executor.
"""

from __future__ import annotations

import torch
from torch import Tensor


class NetworkNorm:
    """The norm of the network's gradient, as one stage knows it.

    Args:
        stage: its index.
        stages: how many there are.

    Attributes:
        known: norms ``(stages)``, float32; 0 where none has been heard of yet.
    """

    def __init__(self, stage: int, stages: int) -> None:
        self.stage = stage
        self.known = torch.zeros(stages)

    def of_all(self, own: Tensor) -> Tensor:
        """The norm of all gradients, where that of the stage's own ones, a scalar, is ``own``."""
        self.known[self.stage] = own
        norm: Tensor = torch.linalg.vector_norm(self.known)
        return norm

    def heard(self, norms: Tensor, *, before: bool) -> None:
        """Take what a neighbour knew of the stages on its side: those before this one, or those behind it."""
        part = slice(0, self.stage) if before else slice(self.stage + 1, None)
        self.known[part] = norms[part]
