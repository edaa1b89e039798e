"""A minibatch between its forward and its backward in one stage."""

from __future__ import annotations

from torch import Tensor

from layerpipe.stage.in_place import AsLeft

Tensors = tuple[Tensor, ...]


class Flight:
    """A minibatch in flight, as a stage keeps it.

    Args:
        version: how many updates the stage had made before the forward.
        inputs: of the forward.

    Attributes:
        outputs: of the forward, with their graph; in the last stage the loss, once it is there.
        saved: bytes that autograd keeps for the backward by address, weights apart, where the stage's hooks saw them.
        saved_bytes: their sum.
        left: the stage as the forward left it, where autograd keeps what the stage's hooks have not seen.
        buffers: the stage's buffers' versions behind the forward, where its backward may be late.
    """

    __slots__ = ("buffers", "inputs", "left", "outputs", "saved", "saved_bytes", "version")

    def __init__(self, version: int, inputs: Tensors) -> None:
        self.version, self.inputs = version, inputs
        self.outputs: Tensors = ()
        self.saved: dict[int, int] | None = None
        self.saved_bytes = 0
        self.left: AsLeft | None = None
        self.buffers: list[int] = []
