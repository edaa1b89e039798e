"""A model's forward as a list of operations: :mod:`torch.fx` where it can, :mod:`torch.export` where it cannot."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from layerpipe.partition.aliasing import overwritten
from layerpipe.partition.exported import exported
from layerpipe.partition.operations import check_same, run_without_data
from layerpipe.partition.tensors import note_tensors


class Forward(NamedTuple):
    """What a forward does, in order."""

    root: nn.Module  # has everything that the nodes name: the model's own layers, and what tracing adds
    nodes: list[fx.Node]


class ByMode(nn.Module):
    """A constant that is another one in training, such as the rate of a dropout called as a function."""

    def __init__(self, training: Any, evaluating: Any) -> None:
        super().__init__()
        self.values = evaluating, training

    def forward(self) -> Any:
        return self.values[self.training]


@contextlib.contextmanager
def _evaluating(root: nn.Module) -> Iterator[None]:
    """The constants that differ as the model is."""
    constants = [module for module in root.modules() if isinstance(module, ByMode)]
    for constant in constants:
        constant.training = False
    try:
        yield
    finally:
        for constant in constants:
            constant.training = True


def trace(model: nn.Module, example_inputs: Sequence[Any] | None = None, *, blocks: bool = True) -> Forward:
    """As deep as the model's code allows, in the order in which it runs.

    ``torch.fx`` goes first: it needs no inputs and keeps every module call as it is. Code that depends on shapes, takes
    ``*args`` or asserts something is run by ``torch.export`` instead, on fake tensors.

    Both freeze ``self.training``, so the model is traced in both modes. Constants that differ become
    :class:`ByMode`; where the operations differ, the trace goes less deep or is refused.

    Args:
        model: left as it is.
        example_inputs: arguments of a forward; without them there is no ``torch.export``.
        blocks: whether to be content with whole blocks, where ``torch.fx`` cannot look into them.

    Raises:
        ValueError: the model cannot be traced.
    """
    training = {module: module.training for module in model.modules()}
    reasons: list[str] = []
    cause: Exception | None = None
    try:
        for name, capture in _captures(model, example_inputs, blocks):
            try:
                model.train()
                trained = capture()
                model.eval()
                evaluated = capture()
                forward = _both_modes(model, trained, evaluated)
                if example_inputs is not None:
                    with _evaluating(forward.root):
                        operations = note_tensors(*forward, example_inputs)
                    if name == "torch.fx":  # torch.export runs the code itself
                        check_same(run_without_data(model, example_inputs), operations)
                return forward
            except Exception as error:  # whatever the model's own code raises under tracing
                cause = error
                reason = f"{name}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
                if reason not in reasons:
                    reasons.append(reason)
    finally:
        for module, mode in training.items():
            module.training = mode
    hint = "" if example_inputs is not None else "give example_inputs, so that torch.export can try; or "
    raise ValueError(
        f"{type(model).__name__} cannot be traced ({'; '.join(reasons)}); {hint}give the stages by hand, as a list of "
        "modules"
    ) from cause


def constants(node: fx.Node) -> bool:
    """Whether a node is a parameter, a buffer or a constant: had wherever it is needed, and never handed on."""
    return node.op == "get_attr" or "by_mode" in node.meta


class _Captured(NamedTuple):
    graph: fx.Graph
    extra: dict[str, nn.Module | Tensor]  # that the nodes name and the model has not


def _captures(
    model: nn.Module, inputs: Sequence[Any] | None, blocks: bool
) -> Iterator[tuple[str, Callable[[], _Captured]]]:
    given = inputs or ()
    for tracer in (_Layers(given), _Blocks(given)) if blocks else (_Layers(given),):
        yield "torch.fx", functools.partial(_symbolic, tracer, model)
    if inputs is not None:
        yield "torch.export", lambda: _Captured(*exported(model, inputs))


def _symbolic(tracer: _Layers, model: nn.Module) -> _Captured:
    while True:
        graph = tracer.trace(model)
        changed = {str(value.target) for node in graph.nodes for value in overwritten(model, node)
                   if value.op == "get_attr"}  # fmt: skip
        owners = {name.rpartition(".")[0] for name in changed}
        if "" in owners or owners <= tracer.whole:
            break
        tracer.whole |= owners
    if changed:
        raise ValueError(f"its forward changes its buffer {min(changed)}")
    return _Captured(graph, {})


class _Layers(fx.Tracer):
    """Looks into all modules but torch's own, and those that change their buffers: they are taken ``whole``."""

    proxy_buffer_attributes = True  # else what changes a buffer is run while tracing, and no part of the trace

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.whole = set[str]()
        self._inputs = inputs

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Arguments that a forward is called without have their defaults, so that ``if mask is None`` means what it
        says: torch.fx gives them a stand-in. Without examples these are all that have a default."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        for i, arg in enumerate(args[1:], start=1):
            if not isinstance(arg, fx.Proxy):
                continue
            given = i <= len(self._inputs)
            if not given and arg.node.args:
                args[i] = arg.node.args[0]
                self.graph.erase_node(arg.node)
            elif given and self._inputs[i - 1] is None:
                args[i] = None  # and whatever is handed in there is not looked at
        return function, args

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.whole or super().is_leaf_module(m, module_qualified_name)


class _Blocks(_Layers):
    """Looks into the model and its nn.Sequential parts, and takes every other module as one layer."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, nn.Sequential)


def _both_modes(model: nn.Module, trained: _Captured, evaluated: _Captured) -> Forward:
    """The trained forward, with the constants that evaluation changes.

    Raises:
        ValueError: evaluation does something else.
    """
    nodes, others = list(trained.graph.nodes), list(evaluated.graph.nodes)
    added = dict(trained.extra)

    def either(a: Any, b: Any, at: fx.Node) -> Any:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a.name == b.name:
            return a
        if isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
            return type(a)(either(x, y, at) for x, y in zip(a, b, strict=True))
        if isinstance(a, slice) and isinstance(b, slice):
            return slice(*(either(getattr(a, end), getattr(b, end), at) for end in ("start", "stop", "step")))
        if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: either(value, b[key], at) for key, value in a.items()}
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            raise ValueError("its code depends on self.training")
        if type(a) is type(b) and a == b:
            return a
        name = f"by_mode_{len(added)}"
        added[name] = ByMode(a, b)
        with trained.graph.inserting_before(at):
            node = trained.graph.create_node("call_module", name)
        node.meta["by_mode"] = True
        return node

    if [_spelled(node) for node in nodes] != [_spelled(node) for node in others]:
        raise ValueError("its code depends on self.training")
    for name, body in trained.extra.items():
        if isinstance(body, fx.GraphModule) and body.code != getattr(evaluated.extra[name], "code", None):
            raise ValueError("its code under torch.autocast depends on self.training")
    for node, other in zip(nodes, others, strict=True):
        count = max(len(node.args), len(other.args))
        node.args = either(_arguments(node, count), _arguments(other, count), node)
        node.kwargs = either(dict(node.kwargs), dict(other.kwargs), node)
    root = nn.Module()
    # The model's own modules and tensors, in dictionaries of our own: what is added stays out of the model.
    root.__dict__.update(model.__dict__)
    root._modules, root._buffers = dict(model._modules), dict(model._buffers)
    root._non_persistent_buffers_set = set(model._non_persistent_buffers_set)
    for name, value in added.items():
        if isinstance(value, nn.Module):
            root.add_module(name, value)
        else:
            root.register_buffer(name, value, persistent=False)
    return Forward(root, list(trained.graph.nodes))


def _spelled(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.name, str(node.target), sorted(node.kwargs)


def _arguments(node: fx.Node, count: int) -> tuple[Any, ...]:
    """A node's arguments, ``count`` of them where it leaves out some that have defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args
    left_out = node.target._schema.arguments[len(node.args) : count]
    return (*node.args, *(argument.default_value for argument in left_out))
