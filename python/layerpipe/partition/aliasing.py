"""Values of a traced forward: single tensors, sizes, and memory that they share."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn

_IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.imatmul, operator.ipow)
#: Methods and functions whose result may lie in the memory of their first argument.
_VIEWS = frozenset(
    (
        "chunk", "contiguous", "detach", "diagonal", "expand", "expand_as", "flatten", "getitem", "movedim", "narrow",
        "permute", "ravel", "reshape", "select", "split", "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "to",
        "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as",
    )
)  # fmt: skip


def overwritten(model: nn.Module, node: fx.Node) -> Iterator[fx.Node]:
    """The value that a node changes in place, and those that it is a view of."""
    target = _overwrites(model, node)
    while target is not None:
        yield target
        target = _overwrites(model, target) or _viewed(model, target)


def _viewed(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """The value in whose memory a node's result may lie."""
    if not node.all_input_nodes:
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        shares = [argument.alias_info is not None for argument in node.target._schema.arguments]
        found = [a for a, is_shared in zip(node.args, shares, strict=False) if is_shared and isinstance(a, fx.Node)]
        return found[0] if found else None
    if node.op == "call_module":
        layer = model.get_submodule(str(node.target))
        return node.all_input_nodes[0] if isinstance(layer, nn.Flatten | nn.Unflatten | nn.Identity) else None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.all_input_nodes[0] if name in _VIEWS else None


def written(node: fx.Node) -> fx.Node | None:
    """The value that one of torch's operations changes in place."""
    if isinstance(node.target, torch._ops.OpOverload):
        for place, argument in enumerate(node.target._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
                if isinstance(found, fx.Node):
                    return found
    return None


def _overwrites(model: nn.Module, node: fx.Node) -> fx.Node | None:
    """The value that a node changes in place."""
    if not node.all_input_nodes or isinstance(node.target, torch._ops.OpOverload):
        return written(node)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_module":
        in_place = bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    else:
        in_place = (
            bool(node.kwargs.get("inplace"))
            or (name.endswith("_") and not name.endswith("__"))
            or getattr(operator, name, None) in _IN_PLACE_OPERATORS
        )
    return node.all_input_nodes[0] if in_place else None
