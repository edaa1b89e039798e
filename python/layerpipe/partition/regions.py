"""Regions of an exported forward that run under a ``with``: ``torch.export`` makes each a graph of its own, called by a
node.

Without gradients (``torch.no_grad()``), it is put back where it is called, and its layers are layers like all others.
In another precision (``torch.autocast``), it stays a graph, which can still run under the autocast of somebody else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from layerpipe.partition.values import holds_tensor, overwritten, written


def unfold(graph: fx.Graph, module: fx.GraphModule) -> None:
    """Puts back what runs without gradients, its results detached, and rids the graph of what only the example had.

    Args:
        graph: changed.
        module: whose it is; gets the bodies that stay, when what held them is gone.

    Raises:
        ValueError: a body changes in place what it is given, or without gradients anything at all: autograd would
            refuse it, or hear of it.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)  # of a dtype and a device: a stage may be moved to others
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_autocast):
        body, given = _body(node, module, 4)
        unfold(body.graph, body)
        for changed in body.graph.nodes:
            for value in overwritten(body, changed):
                if value.op == "placeholder":
                    raise ValueError(f"its forward changes {given[value]} in place under torch.autocast")
        follow_the_inputs_device(body.graph, next((n for n in given if holds_tensor(n)), None))
        body.recompile()
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.wrap_with_set_grad_enabled):
        _put_back(node, graph, module)


def _put_back(node: fx.Node, graph: fx.Graph, module: fx.GraphModule) -> None:
    enabled: Any = node.args[0]
    body, given = _body(node, module, 1)
    unfold(body.graph, body)
    for inner in body.graph.nodes:
        if (changed := written(inner)) is not None and not enabled:
            raise ValueError(f"its forward changes {changed} in place where gradients are switched off")
        if inner.op == "get_attr":  # a body that stays
            name = f"{node.name}_{inner.target}"
            module.add_module(name, getattr(body, inner.target))
            inner.target = name
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(body.graph, dict(given))
        if not enabled:
            results = [_detached(graph, result) for result in results]
    for part in list(node.users):  # getitem(node, i)
        place: Any = part.args[1]
        part.replace_all_uses_with(results[place])
        graph.erase_node(part)
    graph.erase_node(node)


def _body(node: fx.Node, module: fx.GraphModule, place: int) -> tuple[fx.GraphModule, dict[fx.Node, Any]]:
    """The graph that a node calls, and what each of its placeholders is given."""
    name: Any = node.args[place]
    body: fx.GraphModule = getattr(module, name.target)
    return body, dict(zip(body.graph.find_nodes(op="placeholder"), node.args[place + 1 :], strict=True))


def _detached(graph: fx.Graph, value: Any) -> Any:
    if not (isinstance(value, fx.Node) and holds_tensor(value)):
        return value
    detached = graph.call_function(torch.ops.aten.detach.default, (value,))
    detached.meta = {"val": value.meta["val"]}
    return detached


def follow_the_inputs_device(graph: fx.Graph, tensor: fx.Node | None) -> None:
    """Create tensors on this tensor's device, in a stage that has been moved, too."""
    made = [n for n in graph.nodes if any(isinstance(a, torch.device) for a in (*n.args, *n.kwargs.values()))]
    if tensor is None or not made:
        return
    there = tensor.meta["val"].device
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        device = graph.call_function(getattr, (tensor, "device"))
    for node in made:
        node.args = tuple(device if a == there else a for a in node.args)
        node.kwargs = {key: device if a == there else a for key, a in node.kwargs.items()}
