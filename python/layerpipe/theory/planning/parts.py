"""Bytes that any part of a network would keep, for all parts at once."""

from __future__ import annotations

import numpy as np

from layerpipe.partition.balance import Array, sums
from layerpipe.partition.layers import LayerGraph


class Parts:
    """Bytes of the layers ``start`` to ``end``, as arrays ``[start, end]``, each ``(layers + 1, layers + 1)``.

    Attributes:
        weights: of the parameters.
        no_past: of those whose past a first stage does without.
        largest: of the largest parameter.
        largest_past: of the largest one but for those.
        activations: kept of one minibatch from its forward to its backward, and at the end of the network what a cross
            entropy keeps, as much as the output.
        empty: where there are no layers.
    """

    def __init__(self, layers: LayerGraph) -> None:
        each, count = layers.layers, len(layers)
        self.empty = ~np.triu(np.ones((count + 1, count + 1), dtype=bool), 1)
        self.weights = self._sums([layer.weights for layer in each])
        self.no_past = self._sums([layer.no_past for layer in each])
        self.largest = self._largest([layer.largest for layer in each])
        self.largest_past = self._largest([layer.largest_past for layer in each])
        self.activations = np.zeros(self.empty.shape)
        for before, layer, size in layers.kept:  # the first to keep it of a part that begins between the two
            self.activations[before + 1 : layer + 1, layer + 1 :] += size
        self.activations[:count, count] += each[-1].output_bytes

    def _sums(self, values: list[int]) -> Array:
        return np.where(self.empty, 0, sums(np.array(values, dtype=float)))

    def _largest(self, values: list[int]) -> Array:
        found = np.zeros(self.empty.shape)
        for start in range(len(values)):
            found[start, start + 1 :] = np.maximum.accumulate(values[start:])
        return found
