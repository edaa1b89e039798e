"""Values that a stage makes from the tensors it receives, instead of being given them: sizes, and their device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from layerpipe.partition.forward import constants


def derivable(node: fx.Node, tensors: Sequence[fx.Node]) -> bool:
    """Return whether a stage that gets these tensors need not be given this value: a size of theirs, or their
    device."""
    if constants(node) or _is_device(node) or _size_of(node, tensors) is not None:
        return True
    is_size = isinstance(node.meta.get("val"), int | torch.SymInt)
    return is_size and all(derivable(source, tensors) for source in node.all_input_nodes)


def made_again(
    graph: fx.Graph, node: fx.Node, received: Sequence[fx.Node], values: Mapping[fx.Node, fx.Node]
) -> fx.Node | None:
    """A value that no stage before hands on, made from what this one receives."""
    if _is_device(node):
        return graph.call_function(getattr, (values[received[0]], "device"))
    if (found := _size_of(node, received)) is not None:
        return graph.call_function(torch.ops.aten.sym_size.int, (values[found[0]], found[1]))
    return None


def _is_device(node: fx.Node) -> bool:
    return node.target is getattr and bool(node.args[1] == "device")


def _size_of(node: fx.Node, tensors: Sequence[fx.Node]) -> tuple[fx.Node, int] | None:
    """A tensor and its dimension that are as long as this value says."""
    if isinstance(size := node.meta.get("val"), torch.SymInt):
        for tensor in tensors:
            for dimension, length in enumerate(tensor.meta["val"].shape):
                if str(length) == str(size):
                    return tensor, dimension
    return None
