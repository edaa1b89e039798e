"""Tracers of :mod:`torch.fx`, which see a model's Python and no numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from layerpipe.partition.fixed import hooked
from layerpipe.partition.guard import Inputs


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is compiled, as a whole."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


class Layers(fx.Tracer):
    """Looks into all modules but torch's own, and those that change their buffers or attributes, are compiled or have
    hooks: they are taken ``whole``."""

    proxy_buffer_attributes = True  # else what changes a buffer is run while tracing, and no part of the trace

    def __init__(self, given: Mapping[str, Any], exactly: bool) -> None:
        """Args:
        given: arguments by name.
        exactly: whether these are all, so that others have their defaults.
        """
        super().__init__()
        self.whole = set[str]()
        self._given, self._exactly = given, exactly
        self._fixed: dict[str, Any] = {}
        self._without = _surroundings()

    def inputs(self, graph: fx.Graph) -> Inputs | None:
        """Return what the trace may be given: ``None`` where the examples had that."""
        if not self._fixed:
            return None
        names = tuple(str(node.target) for node in graph.find_nodes(op="placeholder"))
        return Inputs(names, tuple(self._fixed.get(name, Any) for name in names), flat=False)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Arguments that a forward is called without have their defaults, so that ``if mask is None`` means what it
        says: torch.fx gives them a stand-in. Without examples these are all that have a default."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        self._without = _surroundings()
        for i, arg in enumerate(args[1:], start=1):
            if not isinstance(arg, fx.Proxy):
                continue
            name = str(arg.node.target)
            if name not in self._given and arg.node.args:
                args[i] = arg.node.args[0]
                self.graph.erase_node(arg.node)
            elif name in self._given and self._given[name] is None:
                args[i] = self._fixed[name] = None
        return function, args

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self._without:
            raise ValueError("its code runs a part under torch.no_grad() or torch.autocast")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        kept = module_qualified_name in self.whole or hooked(m) or is_compiled(m)
        return kept or super().is_leaf_module(m, module_qualified_name)


def _surroundings() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class Blocks(Layers):
    """Looks into the model and its nn.Sequential parts, and takes every other module as one layer."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, nn.Sequential) or hooked(m) or is_compiled(m)
