"""A part of a traced forward as a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

from torch import Tensor, fx, nn

from layerpipe.partition.cuts import Piece
from layerpipe.partition.exported import Unflatten
from layerpipe.partition.forward import Forward, ModeConstant
from layerpipe.partition.guard import Guard, guard_of
from layerpipe.partition.values import made_again


class SplitStage(fx.GraphModule):
    """Consecutive pieces of a traced model as a module of its own, with the model's own parameter names.

    Args:
        forward: of the whole model.
        pieces: of it.
    """

    def __init__(self, forward: Forward, pieces: list[Piece]) -> None:
        root, graph = forward.root, fx.Graph()
        values = {node: graph.placeholder(node.name) for node in pieces[0].inputs}
        nodes = [node for piece in pieces for node in piece.nodes]
        received = [*pieces[0].inputs, *(node for node in nodes if node.op == "placeholder")]

        def value(node: fx.Node) -> fx.Node:
            if node not in values:
                values[node] = made_again(graph, node, received, values) or graph.node_copy(node, value)
            return values[node]

        for node in nodes:
            for source in node.all_input_nodes:
                value(source)
            values[node] = graph.node_copy(node, value)
        if nodes[-1].op != "output":
            passed = [values[node] for node in pieces[-1].outputs]
            graph.output(passed[0] if len(passed) == 1 else tuple(passed))
        for node in graph.nodes:
            if isinstance(node.type, str):  # annotations that are not evaluated; torch 2.11 cannot pickle them
                node.type = None
        super().__init__(root, graph, class_name="Stage")
        self._add_guard(forward.guard(nodes, pieces[0].inputs))
        _leave_out_of_the_state(self, root)
        # Copies and pickling make it a plain GraphModule; these keep what is in meta, those attributes.
        self.is_split = self.meta["is_split"] = True
        self.meta["aliases"] = _aliases(self, root)
        _give_all_names(self)

    def _add_guard(self, guard: Guard) -> None:
        name = "guard"
        while hasattr(self, name):
            name += "_"
        self.add_module(name, guard)
        given = self.graph.find_nodes(op="placeholder")
        with self.graph.inserting_after(given[-1]):
            self.graph.call_module(name, tuple(given))
        self.recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        copied = super().__deepcopy__(memo)
        _leave_out_of_the_state(copied, self)
        _give_all_names(copied)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        kept = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
        return *super().__reduce__(), {name: getattr(self, name) for name in kept}


def _leave_out_of_the_state(stage: fx.GraphModule, root: nn.Module) -> None:
    """Of a stage whose tensors come from ``root``, those that ``root.state_dict()`` has not.

    fx makes a persistent buffer of a tensor that is none, and in torch 2.13 of every buffer.
    """
    for node in stage.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        owner, origin = stage.get_submodule(path), root.get_submodule(path)
        kept = name in origin._buffers and name not in origin._non_persistent_buffers_set
        if name in owner._buffers and not kept:
            owner.register_buffer(name, owner._buffers[name], persistent=False)


def _tensors(module: nn.Module, *, every_name: bool) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=not every_name)
    yield from module.named_buffers(remove_duplicate=not every_name)


def _aliases(stage: nn.Module, root: nn.Module) -> dict[str, str]:
    """The names in ``root`` that tensors of the stage have besides those that its graph uses."""
    there = dict(_tensors(stage, every_name=True))
    first = {id(tensor): name for name, tensor in there.items()}
    return {name: first[id(tensor)] for name, tensor in _tensors(root, every_name=True)
            if id(tensor) in first and name not in there}  # fmt: skip


def _give_all_names(stage: fx.GraphModule) -> None:
    """A model whose layers have several names keeps them all in its state."""
    tensors = dict(_tensors(stage, every_name=True))
    for alias, name in stage.meta["aliases"].items():
        *path, last = alias.split(".")
        owner: nn.Module = stage
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if isinstance(tensor := tensors[name], nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            source, _, buffer = name.rpartition(".")
            kept = buffer not in stage.get_submodule(source)._non_persistent_buffers_set
            owner.register_buffer(last, tensor, persistent=kept)


def is_split(stage: nn.Module) -> TypeGuard[fx.GraphModule]:
    """Return whether :func:`split` made this stage, so that its parameters have the model's names."""
    return isinstance(stage, fx.GraphModule) and (hasattr(stage, "is_split") or "is_split" in stage.meta)


def uncompiled(stage: nn.Module) -> nn.Module:
    """Return the module that :func:`torch.compile` was given, whose parameters have their own names; any other module
    as it is."""
    original = getattr(stage, "_orig_mod", stage)
    return original if isinstance(original, nn.Module) else stage


def wrapped(stage: SplitStage, wrap: Callable[[nn.Module], Any]) -> Any:
    """``wrap(stage)``; what is compiled is guarded before compiled code runs, which does not check."""
    made = wrap(stage)
    guard = guard_of(stage)
    if made is not stage and isinstance(made, nn.Module) and uncompiled(made) is stage and guard is not None:
        made.register_forward_pre_hook(guard.before)
    return made


def label(stage: nn.Module) -> str:
    """Return a stage's name for people: its first and last layer."""
    stage = uncompiled(stage)
    if not is_split(stage):
        return type(stage).__name__
    calls = [str(node.target) for node in stage.graph.nodes if node.op == "call_module"]
    names = [name for name in calls if not isinstance(stage.get_submodule(name), ModeConstant | Guard | Unflatten)]
    if not names:
        return type(stage).__name__
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
