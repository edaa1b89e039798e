"""A backward in two parts: the gradients of the activations, which a neighbour waits for, then those of the weights.

LayerPipe's intra-layer step (arXiv 2512.08160), done on autograd's graph. A linear layer or convolution is one node
there, and autograd computes only those of its gradients that somebody asked for: the first part asks for the stage's
inputs and remembers what arrived at such nodes, the second starts at each of them and asks for its weights. What does
not come apart, such as BatchNorm's or attention's own gradients, or weights used more than once, is computed in the
first part: every number is the one of the plain backward. Hooks on the output of a layer that comes apart are called in
both parts, and what they return counts once; ``retain_grad`` of such an output adds up both, and a hook that changes
its argument in place, which torch forbids, changes it twice.

torch.distributed.pipelining splits its backward alike, but starts one second part at all nodes of a shared weight,
which counts twice what one of them passes to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from layerpipe.stage.autograd import backward

#: Nodes whose weight gradient is work of its own.
_SEPARABLE = ("ConvolutionBackward", "AddmmBackward", "MmBackward", "LinearBackward", "MkldnnConvolutionBackward")
#: Nodes between a parameter and its layer that only look at it differently.
_VIEWS = ("TBackward", "TransposeBackward", "ViewBackward", "PermuteBackward", "UnsafeViewBackward", "AliasBackward")


class _Arrived:
    """Gradients that arrive at a node, its hooks included: noted in the first part, and in the second, in which the
    hooks run again, put in the place of what they make of it then."""

    __slots__ = ("grads",)

    def __init__(self) -> None:
        self.grads: tuple[Tensor | None, ...] | None = None

    def __call__(self, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        if self.grads is None:
            self.grads = grads
            return None
        return self.grads


class _Layer(NamedTuple):
    """A node whose weight gradients wait."""

    node: Any
    params: list[Tensor]
    arrived: _Arrived


class SplitBackward:
    """One minibatch's backward in one stage.

    Args:
        outputs: of the stage, those that need gradients.
        inputs: of the stage, leaves that gradients are wanted of.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._outputs, self._inputs = outputs, inputs
        wanted = set(inputs)
        leaves, self._layers = _separate(outputs, wanted)
        waiting = {p for layer in self._layers for p in layer.params}
        self._now = [*inputs, *(leaf for leaf in leaves if leaf not in waiting and leaf not in wanted)]

    def activations(self, grads: Sequence[Tensor | None]) -> None:
        """The first part: gradients of the stage's inputs and of all weights that cannot wait."""
        for layer in self._layers:
            layer.node.register_prehook(layer.arrived)
        backward(self._outputs, grads, inputs=self._now, keep_graph=bool(self._layers))

    def weights(self) -> None:
        """The second part: gradients of the other weights."""
        for layer in self._layers:
            arrived = [(i, g) for i, g in enumerate(layer.arrived.grads or ()) if g is not None]
            if arrived:
                edges = [GradientEdge(layer.node, i) for i, _ in arrived]
                backward(edges, [g for _, g in arrived], inputs=layer.params)
        self._layers = []


def _separate(outputs: Sequence[Tensor], inputs: set[Tensor]) -> tuple[list[Tensor], list[_Layer]]:
    """All leaves of the graph, and the nodes whose weights can wait, from the outputs down to the inputs."""
    leaves: list[Tensor] = []
    uses: dict[Any, int] = {}
    found: list[tuple[Any, list[Any]]] = []
    roots = [get_gradient_edge(y).node for y in outputs]
    for root in roots:  # a gradient arrives there besides those that come from other nodes
        uses[root] = uses.get(root, 0) + 1
    seen = set(roots)
    todo = [*dict.fromkeys(roots)]
    while todo:
        node = todo.pop()
        following = [child for child, _ in node.next_functions if child is not None]
        if not following and (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        for child in following:
            uses[child] = uses.get(child, 0) + 1
            if child not in seen:
                seen.add(child)
                todo.append(child)
        if node.name().startswith(_SEPARABLE):
            chains = [chain for child in following if (chain := _to_weight(child, inputs))]
            if chains and len(chains) < len(following):  # and a gradient goes on to what came before
                found.append((node, chains))
    layers = []
    for node, chains in found:
        if all(uses[step] == 1 for chain in chains for step in chain):
            layers.append(_Layer(node, [chain[-1].variable for chain in chains], _Arrived()))
    return leaves, layers


def _to_weight(node: Any, inputs: set[Tensor]) -> list[Any]:
    """The nodes from here to the one weight behind them, if only views are between."""
    chain = [node]
    while node.name().startswith(_VIEWS) and len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
        chain.append(node)
    return chain if getattr(node, "variable", None) is not None and node.variable not in inputs else []
