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
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from layerpipe.partition.aliasing import written
from layerpipe.partition.regions import follow_the_inputs_device, is_tensor, unfold


class Unflatten(nn.Module):
    """Values as the structure that a model returns, such as a dict or a dataclass."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, *values: Any) -> Any:
        return pytree.tree_unflatten(values, self.spec)


def exported(model: nn.Module, example_inputs: Sequence[Any]) -> tuple[fx.Graph, dict[str, nn.Module | Tensor]]:
    """The graph of a forward in the model's present mode, and what it names that the model does not have.

    The first dimension of the inputs, the minibatch, stays free where the model's code leaves it so; all others are
    the examples'.

    Raises:
        ValueError: the forward changes a buffer of its own, or in place what :func:`unfold` does not allow, or takes
            something else than a flat list of inputs.
        Exception: whatever ``torch.export`` raises.
    """
    shapes = torch.export.ShapesCollection()
    for x in example_inputs:
        if isinstance(x, Tensor) and x.dim():
            shapes[x] = {0: torch.export.Dim.AUTO}
    with quietly():
        program = torch.export.export(model, tuple(example_inputs), dynamic_shapes=shapes, strict=False)
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
    follow_the_inputs_device(graph, next(filter(is_tensor, graph.find_nodes(op="placeholder")), None))
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    extra: dict[str, nn.Module | Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        if not _has(model, str(node.target)):
            extra[str(node.target)] = getattr(module, str(node.target))  # a constant, or the body of a ``with``
    if len(graph.find_nodes(op="placeholder")) != len(example_inputs):
        raise ValueError("its inputs are nested; they must be tensors")
    _restore_output(graph, structure, extra)
    return graph, extra


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
        inputs = [a for a in read if a.op != "get_attr" and is_tensor(a)]
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
