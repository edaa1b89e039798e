"""A forward as :mod:`torch.export` sees it, with torch's own layers put back together.

``torch.export`` runs the model's Python on fake tensors and records single operations; a linear layer is
``aten.linear`` on two parameters. The operations of a layer with one input and one output are made a call of that layer
again, so that its hooks, its mode and its name live on.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from layerpipe.partition.examples import Examples
from layerpipe.partition.guard import Inputs, TensorLike
from layerpipe.partition.regions import follow_the_inputs_device, unfold
from layerpipe.partition.values import holds_tensor, written


class Unflatten(nn.Module):
    """Values as the structure that a model returns, such as a dict or a dataclass."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, *values: Any) -> Any:
        return pytree.tree_unflatten(values, self.spec)


class Exported(NamedTuple):
    """A forward in one of the model's modes.

    Attributes:
        graph: with a placeholder for each argument.
        extra: what it names that the model does not have.
        inputs: what it may be given: sizes but that of the minibatch are fixed, and whatever is not a tensor.
    """

    graph: fx.Graph
    extra: dict[str, nn.Module | Tensor]
    inputs: Inputs


def exported(model: nn.Module, examples: Examples) -> Exported:
    """The graph of a forward in the model's present mode.

    The first dimension of the inputs, the minibatch, stays free where the model's code leaves it so; all others are
    the examples'.

    Raises:
        ValueError: the forward changes a buffer of its own, or in place what :func:`unfold` does not allow.
        Exception: whatever ``torch.export`` raises.
    """
    shapes = torch.export.ShapesCollection()
    bound = examples.bound(model)
    for x in pytree.tree_leaves((bound.args, bound.kwargs)):
        if isinstance(x, Tensor) and x.dim():
            shapes[x] = {0: torch.export.Dim.AUTO}
    with quietly():
        program = torch.export.export(model, bound.args, bound.kwargs, dynamic_shapes=shapes, strict=False)
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    structure = graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    graph.set_codegen(fx.graph.CodeGen())
    for node in graph.find_nodes(op="call_module", target="_guards_fn"):
        graph.erase_node(node)
    unfold(graph, module)
    _regroup(graph, model)
    _refuse_changed_buffers(graph)
    follow_the_inputs_device(graph, next(filter(holds_tensor, graph.find_nodes(op="placeholder")), None))
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    extra: dict[str, nn.Module | Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        path = str(node.target)
        if not _has(model, path):  # a constant, or the body of a ``with``
            node.target = path.replace(".", "_")
            while hasattr(model, node.target):
                node.target += "_"
            extra[node.target] = operator.attrgetter(path)(module)
    inputs = _inputs(dict(bound.arguments), program, graph.find_nodes(op="placeholder"))
    _restore_inputs(graph, examples.by_name(model))
    _restore_output(graph, structure, extra)
    return Exported(graph, extra, inputs)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what torch prints of a graph that it gives up on; its exception says it, too."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _regroup(graph: fx.Graph, model: nn.Module) -> None:
    """Each call of one of torch's own layers as one node."""
    calls: dict[str, tuple[str, list[fx.Node]]] = {}
    for node in graph.nodes:
        for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            if node.op == "call_function" and _is_layer(model, path):
                calls.setdefault(key, (path, []))[1].append(node)  # a second call has a key of its own
                break
    for path, nodes in calls.values():
        inside = set(nodes)
        read = [a for a in _unique(a for node in nodes for a in node.all_input_nodes) if a not in inside]
        inputs = [a for a in read if a.op != "get_attr" and holds_tensor(a)]
        outputs = [node for node in nodes if any(user not in inside for user in node.users)]
        if len(inputs) == len(outputs) == 1:
            with graph.inserting_before(nodes[0]):
                call = graph.create_node("call_module", path, (inputs[0],))
            call.meta = dict(outputs[0].meta)
            outputs[0].replace_all_uses_with(call)
            for node in reversed(nodes):
                graph.erase_node(node)


def _is_layer(model: nn.Module, path: str) -> bool:
    """One of torch's own, whose forward takes one value: nothing but that value can have been given to it."""
    try:
        module = model.get_submodule(path)
    except AttributeError:  # what operations belong to that no module makes
        return False
    if not type(module).__module__.startswith("torch.nn") or isinstance(module, nn.Sequential):
        return False
    return len(inspect.signature(module.forward).parameters) == 1


def _refuse_changed_buffers(graph: fx.Graph) -> None:
    for node in graph.nodes:
        changed = written(node)
        if changed is not None and changed.op == "get_attr":
            raise ValueError(f"its forward changes its buffer {changed.target}")


def _inputs(arguments: dict[str, Any], program: Any, placeholders: Sequence[fx.Node]) -> Inputs:
    """Return the graph's guard on its inputs: what it has fixed, and the conditions that the model's code has asked
    for."""
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(arguments)[0]]
    paths, names = [f"L{key}" for key in keys], [key[2:].replace("']", "", 1) for key in keys]
    kinds = [kind_of(node) for node in placeholders]
    symbols: dict[str, str] = {}
    for i, node in enumerate(placeholders):
        for d, size in enumerate(node.meta["val"].shape if holds_tensor(node) else ()):
            symbols.setdefault(str(size), f"args[{i}].size()[{d}]")
    conditions: dict[str, str] = {}
    for code in getattr(program, "_guards_code", None) or ():
        condition, said = code, code
        for i, (path, name) in enumerate(zip(paths, names, strict=True)):
            condition, said = condition.replace(path, f"args[{i}]"), said.replace(path, name)
        conditions[said] = condition
    for symbol, allowed in program.range_constraints.items():
        if str(symbol) in symbols:
            where = symbols[str(symbol)]
            said = names[int(where[5 : where.index("]")])] + where[where.index("]") + 1 :]
            if allowed.lower > 2:  # any size is 2 or more to torch.export
                conditions[f"{said} >= {allowed.lower}"] = f"{where} >= {allowed.lower}"
            if allowed.upper < sys.maxsize - 1:
                conditions[f"{said} <= {allowed.upper}"] = f"{where} <= {allowed.upper}"
    return Inputs(tuple(names), tuple(kinds), conditions, at_least=2)


def kind_of(node: fx.Node, *, any_dtype: bool = False) -> Any:
    """Return what ``torch.export`` knows of a value that a stage is given."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return TensorLike(
            None if any_dtype else value.dtype, tuple(s if isinstance(s, int) else str(s) for s in value.shape)
        )
    return Any if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool) else value


def _restore_inputs(graph: fx.Graph, given: dict[str, Any]) -> None:
    """A placeholder for each argument, taken apart where it is a structure."""
    leaves = graph.find_nodes(op="placeholder")
    after = leaves[-1].next
    rest = iter(leaves)
    for name, value in given.items():
        structure = pytree.tree_structure(value)
        parts = [next(rest) for _ in range(structure.num_leaves)]
        if structure.is_leaf():
            parts[0].target = name
            continue
        with graph.inserting_before(parts[0] if parts else after):
            whole = graph.placeholder(name)
        whole.meta["val"] = value
        with graph.inserting_before(after):
            flat = graph.call_function(pytree.tree_leaves, (whole,))
            flat.meta["val"] = None
            for i, part in enumerate(parts):
                item = graph.call_function(operator.getitem, (flat, i))
                item.meta = dict(part.meta)
                part.replace_all_uses_with(item)
                graph.erase_node(part)


def _restore_output(graph: fx.Graph, spec: pytree.TreeSpec, extra: dict[str, nn.Module | Tensor]) -> None:
    output = graph.output_node()
    values: Any = tuple(pytree.tree_leaves(output.args))
    if spec.is_leaf():
        output.args = (values[0],)
    elif spec.type in (tuple, list) and all(child.is_leaf() for child in spec.children()):
        output.args = (spec.type(values),)
    else:
        extra["output_structure"] = Unflatten(spec)
        with graph.inserting_before(output):
            output.args = (graph.create_node("call_module", "output_structure", values),)


def _has(model: nn.Module, path: str) -> bool:
    prefix, _, name = path.rpartition(".")
    try:
        return hasattr(model.get_submodule(prefix), name)
    except AttributeError:
        return False


def _unique(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(nodes))
