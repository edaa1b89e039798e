"""The processors and links of a pipeline, and the time that a layer takes there."""

from __future__ import annotations

import dataclasses

from layerpipe.partition.layers import Layer
from layerpipe.theory.simulate import Link, StageCost
from layerpipe_kernels.traffic import Traffic

#: A pipeline's default: momentum SGD, a blend of two averages. Past weights are made in the backward and not costed.
STEP = Traffic(states=1, emas=2, past=False)
#: PCIe 4.0 x16, each way.
A100_LINK = Link(bandwidth=32e9, latency=5e-6)


@dataclasses.dataclass(frozen=True)
class Machine:
    """One processor of the pipeline and the links between them.

    The defaults are an NVIDIA A100 of 40 GB (data sheet: 19.5 TFLOP/s in float32, 1,555 GB/s memory, PCIe 4.0 x16 with
    32 GB/s each way), every rate as if all of it could be had.
    """

    flops: float = 19.5e12  # per second
    memory: float = 1.555e12  # bytes per second
    link: Link = A100_LINK

    def cost(self, layer: Layer, received: int) -> StageCost:
        """Seconds of one layer: measured where it was, else the slower of arithmetic and memory (a roofline)."""
        if layer.seconds is not None:
            forward, backward, gradient = layer.seconds
        else:
            read, written = layer.input_bytes + layer.weights, layer.output_bytes
            kept = layer.saved + written  # what the backward reads beside the weights
            forward = max(layer.forward_flops / self.flops, (read + written) / self.memory)
            backward = max(layer.backward_flops / self.flops, (kept + read) / self.memory)
            gradient = max(layer.gradient_flops / self.flops, (kept + layer.weights) / self.memory)
            gradient *= bool(layer.parameters)
        update = STEP.one_pass() / STEP.weight.itemsize * layer.weights / self.memory
        return StageCost(forward, backward, gradient, update, received)


A100 = Machine()
