"""Finds the values of a traced forward that are single tensors: only those cross a boundary between stages."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from layerpipe.partition import regions

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


def is_tensor(model: nn.Module, node: fx.Node) -> bool:
    """Return whether a value is one tensor: by what :func:`noting` saw, or as far as its making and its use show."""
    if "val" in node.meta:  # of torch.export
        return regions.is_tensor(node)
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
