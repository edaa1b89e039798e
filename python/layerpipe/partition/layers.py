"""A model's layers and what they cost: arithmetic, bytes and time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import networkx as nx

#: What writing an activation costs beside arithmetic, as seen on one core with ResNet-18's layers.
FLOPS_PER_ELEMENT = 200


@dataclasses.dataclass(frozen=True)
class Layer:
    """One minibatch's worth of a layer. FLOPs count a multiplication and an addition as two."""

    name: str
    parameters: int = 0
    weights: int = 0  # bytes of the parameters
    largest: int = 0  # bytes of the largest parameter
    no_past: int = 0  # bytes of the parameters whose past the first stage does without: they only meet data
    largest_past: int = 0  # bytes of the largest one of the others
    forward_flops: float = 0.0
    backward_flops: float = 0.0  # gradient of the input; 0 in the first layer, where nobody wants it
    gradient_flops: float = 0.0  # gradient of the weights
    elements: int = 0  # that the forward puts out
    input_bytes: int = 0
    output_bytes: int = 0
    saved: int = 0  # bytes kept for the backward, weights and what an earlier layer keeps not counted
    seconds: tuple[float, float, float] | None = None  # measured: forward, input's gradient, weights' gradient

    @property
    def flops(self) -> float:
        """Forward and backward."""
        return self.forward_flops + self.backward_flops + self.gradient_flops


class Flow(NamedTuple):
    """A value that one layer makes and another reads; layers by number, ``None`` the model's input."""

    source: int | None
    target: int
    bytes: int


class Kept(NamedTuple):
    """A value that a layer keeps for its backward, and the layer before that keeps it, too; -1 if there is none."""

    before: int
    layer: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class LayerGraph:
    """A model's layers in the order in which the forward runs them, and what flows between them."""

    layers: list[Layer]
    flows: list[Flow]
    crossing: list[int]  # bytes that cross a cut before each layer: [layers + 1], the first the input's, the last 0
    tied: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)  # a weight that two layers use
    kept: list[Kept] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.layers)

    def graph(self) -> nx.DiGraph:
        """For :mod:`layerpipe.theory.retiming`: layers by name."""
        graph = nx.DiGraph()
        graph.add_nodes_from(layer.name for layer in self.layers)
        for flow in self.flows:
            if flow.source is not None:
                graph.add_edge(self.layers[flow.source].name, self.layers[flow.target].name, bytes=flow.bytes)
        return graph


def chain(layers: Sequence[Layer]) -> LayerGraph:
    """Layers one after the other, each handing its output on, and keeping what it has received."""
    flows = [Flow(i, i + 1, layer.output_bytes) for i, layer in enumerate(layers[:-1])]
    sizes = [layers[0].input_bytes if layers else 0, *(layer.output_bytes for layer in layers[:-1]), 0]
    kept = [Kept(-1, i, layer.saved) for i, layer in enumerate(layers)]
    kept += [Kept(i - 1, i, size) for i, size in enumerate(sizes[:-1]) if i]
    return LayerGraph(list(layers), flows, sizes, kept=kept)
