"""A model's forward as a list of operations: :mod:`torch.fx` where it can, :mod:`torch.export` where it cannot."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from layerpipe.partition.draws import no_draws
from layerpipe.partition.examples import Examples, in_order
from layerpipe.partition.exported import exported, kind_of
from layerpipe.partition.fixed import Fixed, hooked, hooks_in, innermost
from layerpipe.partition.guard import Guard, Inputs
from layerpipe.partition.operations import alike, check_same, run_without_data
from layerpipe.partition.reads import Reads
from layerpipe.partition.symbolic import Blocks, Layers, is_compiled
from layerpipe.partition.values import noting, overwritten


class Forward(NamedTuple):
    """A traced forward: its operations, in order.

    Attributes:
        root: has everything that the nodes name: the model's own layers, and what tracing adds.
        nodes: in order.
        fixed: what is only so as long as nobody changes the model.
        inputs: what it may be given; ``None`` for anything that the model itself takes.
        exported: whether ``torch.export`` has seen it, which fixes sizes.
    """

    root: nn.Module
    nodes: list[fx.Node]
    fixed: Fixed
    inputs: Inputs | None = None
    exported: bool = False

    def guard(self, nodes: Sequence[fx.Node], received: Sequence[fx.Node]) -> Guard:
        """For a stage of these nodes that receives these values, or, the first one, the model's inputs."""
        inputs = self.inputs
        if received and inputs is not None and self.exported:
            kinds = tuple(kind_of(node, any_dtype=inputs.any_dtype) for node in received)
            inputs = inputs._replace(names=tuple(node.name for node in received), kinds=kinds, conditions={})
        elif received:
            inputs = None
        return Guard(inputs, self.fixed.stage(nodes, first=not received), self.fixed.modes)


class ModeConstant(nn.Module):
    """A constant that is another one in training, such as the rate of a dropout called as a function."""

    def __init__(self, training: Any, evaluating: Any) -> None:
        super().__init__()
        self.values = evaluating, training

    def forward(self) -> Any:
        return self.values[self.training]


@contextlib.contextmanager
def _in_mode(root: nn.Module, mode: bool) -> Iterator[None]:
    """The constants that differ as the model is."""
    before = {module: module.training for module in root.modules() if isinstance(module, ModeConstant)}
    for constant in before:
        constant.training = mode
    try:
        yield
    finally:
        for constant, training in before.items():
            constant.training = training


def trace(
    model: nn.Module, example_inputs: Examples | Sequence[Any] | Mapping[str, Any] | None = None, *, blocks: bool = True
) -> Forward:
    """As deep as the model's code allows, in the order in which it runs.

    ``torch.fx`` goes first: it needs no inputs and keeps every module call as it is. Code that depends on shapes, takes
    ``*args`` or asserts something is run by ``torch.export`` instead, on fake tensors.

    Both freeze ``self.training``, so the model is traced in both modes. Constants that differ become
    :class:`ModeConstant`; where the operations differ, the trace goes less deep or is refused. Modules with hooks,
    compiled ones and those that set attributes of their own are called as they are.

    Args:
        model: left as it is.
        example_inputs: arguments of a forward; without them there is no ``torch.export``.
        blocks: whether to be content with whole blocks, where ``torch.fx`` cannot look into them.

    Raises:
        ValueError: the model cannot be traced.
    """
    examples = example_inputs if isinstance(example_inputs, Examples) else Examples.of(example_inputs)
    _refuse_wrapped(model)
    given = {} if examples is None else examples.by_name(model)
    training = {module: module.training for module in model.modules()}
    reasons: list[str] = []
    cause: Exception | None = None
    try:
        for name, capture in _captures(model, examples, given, blocks):
            try:
                reads = Reads(model)
                model.train()
                trained = capture(reads)
                model.eval()
                evaluated = capture(reads)
                forward = _both_modes(model, trained, evaluated, training, Fixed(model, reads))
                return forward if examples is None else _checked(model, forward, examples)
            except Exception as error:  # whatever the model's own code raises under tracing
                cause = error
                reason = f"{name}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
                if reason not in reasons:
                    reasons.append(reason)
    finally:
        for module, mode in training.items():
            module.training = mode
    hint = "" if examples is not None else "give example_inputs, so that torch.export can try; or "
    raise ValueError(
        f"{type(model).__name__} cannot be traced ({'; '.join(reasons)}); {hint}give the stages by hand, as a list of "
        "modules"
    ) from cause


def _refuse_wrapped(model: nn.Module) -> None:
    kind = type(model).__name__
    if is_compiled(model):
        raise ValueError(
            "the model is compiled, and its stages would not be: split it as it was before torch.compile, with "
            "layerpipe.split(..., wrap=torch.compile)"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(f"a {kind} cannot be cut into stages, which would not do its work; split its .module")
    if hooked(model):
        raise ValueError(
            f"{kind} has a hook of its own, which no stage would call: register it on a layer or block, or on a stage "
            "after the split"
        )


def _checked(model: nn.Module, forward: Forward, examples: Examples) -> Forward:
    """A forward that does with the examples, on fake tensors, what the model does in evaluation; and for which other
    inputs a trace of ``torch.export`` does so, too.

    Raises:
        ValueError: it does not.
    """
    graph = noting(forward.root, forward.nodes)

    def both(
        mode: bool, examples: Examples, change: Callable[[Tensor], Tensor] | None = None
    ) -> list[list[str] | None]:
        model.train(mode)
        found = []
        with _in_mode(forward.root, mode):
            for module, args, kwargs in (
                (graph, in_order(forward.nodes, examples.by_name(model)), {}),
                (model, *examples),
            ):
                with forward.fixed.reads.undone():
                    found.append(run_without_data(module, args, kwargs, change))
        return found

    found, wanted = both(False, examples)
    if not forward.exported or any(map(hooked, model.modules())):  # torch.export runs the code itself, but for hooks
        check_same(wanted, found)
    inputs = forward.inputs
    if inputs is not None and forward.exported:
        if all(alike(*both(mode, examples, _of_another_dtype)) for mode in (True, False)):
            inputs = inputs.of_any_dtype()
        one = Examples(*pytree.tree_map(_one, tuple(examples)))
        if all(alike(*both(mode, one)) for mode in (True, False)):
            inputs = inputs._replace(at_least=1)
    return forward._replace(inputs=inputs)


def _one(x: Any) -> Any:
    """The first of a minibatch's examples."""
    return x[:1] if isinstance(x, Tensor) and x.dim() else x


def _of_another_dtype(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.dtype is torch.float64 else torch.float64) if x.is_floating_point() else x


class _Captured(NamedTuple):
    graph: fx.Graph
    extra: dict[str, nn.Module | Tensor]  # that the nodes name and the model has not
    inputs: Inputs | None
    exported: bool


def _captures(
    model: nn.Module, examples: Examples | None, given: Mapping[str, Any], blocks: bool
) -> Iterator[tuple[str, Callable[[Reads], _Captured]]]:
    for kind in (Layers, Blocks) if blocks else (Layers,):
        yield "torch.fx", functools.partial(_symbolic, kind(given, examples is not None), model)
    if examples is not None:
        yield "torch.export", functools.partial(_exported, model, examples)


def _symbolic(tracer: Layers, model: nn.Module, reads: Reads) -> _Captured:
    while True:
        written: list[tuple[str, Any]] = []
        try:
            with no_draws(), reads.recording():
                graph = tracer.trace(model)
        finally:
            written = reads.undo_writes()
        changed = {str(value.target) for node in graph.nodes for value in overwritten(model, node)
                   if value.op == "get_attr"}  # fmt: skip
        owners = {name.rpartition(".")[0] for name in changed}
        owners |= {reads.paths.get(id(owner), "") for _, owner in written}
        if "" in owners or owners <= tracer.whole:
            break
        tracer.whole |= owners
    if changed:
        raise ValueError(f"its forward changes its buffer {min(changed)}")
    if written:
        raise ValueError(f"its forward changes {written[0][0]}")
    return _Captured(graph, {}, tracer.inputs(graph), exported=False)


def _exported(model: nn.Module, examples: Examples, reads: Reads) -> _Captured:
    try:
        with no_draws(), _without_hooks(model), reads.recording():
            found = exported(model, examples)
    finally:
        written = reads.undo_writes()
    if written:
        raise ValueError(f"its forward changes {written[0][0]}")
    called = {str(node.target) for node in found.graph.find_nodes(op="call_module")}
    for path, module in model.named_modules():
        if hooked(module) and not any(path == layer or path.startswith(f"{layer}.") for layer in called):
            raise ValueError(f"{path} has a hook, and torch.export takes it apart")
    return _Captured(*found, exported=True)


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Hooks of layers are called by the stages; in a trace they would become a part of it."""
    before = [(hooks, hooks.copy()) for module in model.modules() for hooks in hooks_in(module.__dict__)]
    for hooks, _ in before:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, content in before:
            hooks.update(content)


def _both_modes(
    model: nn.Module, trained: _Captured, evaluated: _Captured, training: Mapping[nn.Module, bool], fixed: Fixed
) -> Forward:
    """The trained forward, with the constants that evaluation changes.

    Args:
        model: whose forward it is.
        trained: in training.
        evaluated: in evaluation.
        training: in which mode each module was found: the constants begin in it.
        fixed: what the trace relies on; gets the modules whose mode decides on a constant.

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
        name = f"mode_constant_{len(added)}"
        added[name] = constant = ModeConstant(a, b)
        path = innermost(at)
        constant.training = fixed.modes[path] = training[model.get_submodule(path)]
        with trained.graph.inserting_before(at):
            node = trained.graph.create_node("call_module", name)
        node.meta["nn_module_stack"] = at.meta.get("nn_module_stack")
        node.meta["mode_constant"] = True
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
    root._non_persistent_buffers_set, root.training = set(model._non_persistent_buffers_set), training[model]
    for name, value in added.items():
        if isinstance(value, nn.Module):
            root.add_module(name, value)
        else:
            root.register_buffer(name, value, persistent=False)
    nodes = list(trained.graph.nodes)
    fixed.note(nodes)
    inputs = (
        trained.inputs if trained.inputs is None or evaluated.inputs is None else trained.inputs.also(evaluated.inputs)
    )
    return Forward(root, nodes, fixed, inputs, trained.exported)


def _spelled(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.name, str(node.target), sorted(node.kwargs)


def _arguments(node: fx.Node, count: int) -> tuple[Any, ...]:
    """A node's arguments, ``count`` of them where it leaves out some that have defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args
    left_out = node.target._schema.arguments[len(node.args) : count]
    return (*node.args, *(argument.default_value for argument in left_out))
