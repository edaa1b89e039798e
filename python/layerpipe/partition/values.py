"""Values of a traced forward: which are single tensors, which are sizes of others, and which share memory.

Only single tensors cross a boundary between stages. A stage makes sizes, and the device, from the tensors that it
receives. No cut is legal where a value that crosses is changed in place on its other side.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

_SIZES = frozenset(("dim", "numel", "size"))
#: Methods and functions that return several tensors. Those that do only with a ``dim``, such as ``max``, show it by
#: what is done with their result.
_SEVERAL = frozenset(
    (
        "aminmax", "chunk", "cummax", "cummin", "kthvalue", "mode", "sort", "split", "std_mean", "tensor_split", "topk",
        "unbind", "unsafe_chunk", "unsafe_split", "var_mean",
    )
)  # fmt: skip
_FIELDS = ("values", "indices")
_IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.imatmul, operator.ipow)
#: Methods and functions whose result may lie in the memory of their first argument.
_VIEWS = frozenset(
    (
        "chunk", "contiguous", "detach", "diagonal", "expand", "expand_as", "flatten", "getitem", "movedim", "narrow",
        "permute", "ravel", "reshape", "select", "split", "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "to",
        "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as",
    )
)  # fmt: skip


def is_constant(node: fx.Node) -> bool:
    """Return whether a node is a parameter, a buffer or a constant: had wherever it is needed, and never handed on."""
    return node.op == "get_attr" or "mode_constant" in node.meta


def holds_tensor(node: fx.Node) -> bool:
    """Return whether a node that ``torch.export`` made is one tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def is_tensor(model: nn.Module, node: fx.Node) -> bool:
    """Return whether a value is one tensor: by what :func:`noting` saw, or as far as its making and its use show."""
    if "val" in node.meta:  # of torch.export
        return holds_tensor(node)
    if "is_tensor" in node.meta:
        return bool(node.meta["is_tensor"])
    if node.op == "placeholder":
        return True
    if node.op == "call_module" and isinstance(
        model.get_submodule(str(node.target)), nn.RNNBase | nn.MultiheadAttention
    ):
        return False
    if _name(node) in _SIZES | _SEVERAL or any(_is_part(user) and user.args[0] is node for user in node.users):
        return False
    if node.target is getattr:
        return _is_part(node)
    if node.target is operator.getitem:
        source = node.all_input_nodes[0]
        return is_tensor(model, source) or (_is_part(node) and not _is_size(source))
    return not _is_size(node)


def noting(root: nn.Module, nodes: Sequence[fx.Node]) -> nn.Module:
    """A forward as a module that notes of every value, as far as it gets, whether it is a tensor."""
    return _Noting(root, nodes[0].graph)


class _Noting(nn.Module):
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        self.root, self._graph = root, graph

    def forward(self, *inputs: Any) -> Any:
        class Interpreter(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                n.meta["is_tensor"] = isinstance(value, Tensor)
                return value

        return Interpreter(self.root, graph=self._graph).run(*inputs)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_part(node: fx.Node) -> bool:
    """Return whether a value is, by number or name, one of several."""
    if node.target is operator.getitem:
        return isinstance(node.args[1], int)
    return node.target is getattr and node.args[1] in _FIELDS


def _is_size(node: fx.Node) -> bool:
    """Return whether a value is a tensor's size or made of such."""
    sources = node.all_input_nodes
    made_of_sizes = node.op == "call_function" and bool(sources) and all(map(_is_size, sources))
    return node.target is getattr or _name(node) in _SIZES or made_of_sizes


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


def derivable(node: fx.Node, tensors: Sequence[fx.Node]) -> bool:
    """Return whether a stage that gets these tensors need not be given this value: a size of theirs, or their
    device."""
    if is_constant(node) or _is_device(node) or _size_of(node, tensors) is not None:
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
