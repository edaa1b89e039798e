"""Weights that a forward uses only as a copy: autocast's casts, weight norm, spectral norm.

Autograd then saves the copy, which shares no memory with the parameter. The stage cannot tell it from an activation and
keeps it whole for every minibatch in flight: the backward is right, but that weight is stashed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

#: Nodes whose result shares its input's memory, or is a lookup in it that is not kept as a weight.
_NOT_COPIES = {
    *("T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand", "Unsqueeze", "Squeeze", "Slice"),
    *("Select", "Alias", "AsStrided", "Split", "SplitWithSizes", "Chunk", "Unbind", "Unfold"),
    *("ViewAsComplex", "ViewAsReal", "Conj", "NegView"),
    *("Embedding", "EmbeddingBag", "Index", "IndexSelect", "Gather"),
}


def copied_parameters(outputs: Iterable[Tensor]) -> Iterator[nn.Parameter]:
    """The parameters from which something was computed that then met an activation, in a graph that ends in
    ``outputs``."""
    order = depth_first([y.grad_fn for y in outputs if y.grad_fn is not None])
    # Of nodes reached from parameters alone: those parameters, and whether anything was computed from them.
    weights: dict[Any, tuple[set[nn.Parameter], bool]] = {}
    for node in order:
        parents = [parent for parent, _ in node.next_functions]
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            weights[node] = {node.variable}, False
        elif parents and all(parent in weights for parent in parents):
            name = node.name().rstrip("0123456789").removesuffix("Backward")
            computed = name not in _NOT_COPIES or any(weights[parent][1] for parent in parents)
            weights[node] = set().union(*(weights[parent][0] for parent in parents)), computed
        else:
            for parent in parents:
                if parent in weights and weights[parent][1]:
                    yield from weights[parent][0]


def depth_first(roots: list[Any]) -> list[Any]:
    """Every node after those it was computed from."""
    order, seen = [], set()
    todo = [(root, False) for root in roots]
    while todo:
        node, expanded = todo.pop()
        if expanded:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            todo.append((node, True))
            todo.extend((parent, False) for parent, _ in node.next_functions)
    return order


def warn_of_copies(stage: str, module: nn.Module, outputs: Iterable[Tensor]) -> None:
    """Say once which weights of a stage are stashed, by name."""
    names = {param: name for name, param in module.named_parameters()}
    copied = [names[p] for p in dict.fromkeys(copied_parameters(outputs)) if p in names]
    if copied:
        warnings.warn(
            f"{stage}: the forward works on copies of {', '.join(copied)} (autocast or weight norm?), which are kept "
            "for every minibatch in flight; their past values are exact, but stashed",
            stacklevel=2,
        )
