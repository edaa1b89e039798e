"""Weights whose past no backward reads: those of the network's first layer.

A linear layer's weight enters the backward only through the gradient of the layer's input, and nobody wants the
gradient of the data. So the layer with the largest delay keeps no history at all (docs/maths.md); where it is an
embedding, that is often the largest weight of the network.
"""

from __future__ import annotations

import collections
from typing import Any

from torch import fx, nn

from layerpipe.partition.split_stage import is_split, uncompiled
from layerpipe_kernels.optim.checkpoint import CLOCK

#: Layers that are linear in their weights, or look them up.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.EmbeddingBag)


def without_past(stage: nn.Module) -> set[nn.Parameter]:
    """The weights of the first stage that only ever meet the data, as far as its structure shows: nothing is run.

    Looks into the stages of :func:`layerpipe.split` and into ``nn.Sequential``; of other modules it knows nothing.
    """
    stage = uncompiled(stage)
    found = set(_of_graph(stage) if is_split(stage) else _of_module(stage))
    # Of a parameter or layer that is there twice, the second use may need the past.
    layers = [module for _, module in stage.named_modules(remove_duplicate=False)]
    owners = collections.Counter(p for layer in layers for p in layer._parameters.values() if p is not None)
    return {p for p in found if owners[p] == 1}


def _of_module(module: nn.Module) -> list[nn.Parameter]:
    if type(module) in _LAYERS and not module._forward_hooks and not module._forward_pre_hooks:
        return [p for p in module._parameters.values() if p is not None]
    if type(module) is nn.Sequential:
        for child in module:
            if any(p.requires_grad for p in child.parameters()):
                return _of_module(child)
    return []


def _of_graph(stage: fx.GraphModule) -> list[nn.Parameter]:
    data: set[fx.Node] = set()  # values that no trained weight has touched
    found: list[nn.Parameter] = []
    calls = collections.Counter(node.target for node in stage.graph.nodes if node.op == "call_module")
    for node in stage.graph.nodes:
        untouched = node.op != "get_attr" and all(source in data for source in node.all_input_nodes)
        if untouched and node.op == "call_module":
            layer = stage.get_submodule(str(node.target))
            if any(p.requires_grad for p in layer.parameters()):
                if calls[node.target] == 1:
                    found += _of_module(layer)
                continue
        if untouched:
            data.add(node)
    attributes = {node.target for node in stage.graph.nodes if node.op == "get_attr"}
    used_directly = {p for name, p in stage.named_parameters() if name in attributes}
    return [p for p in found if p not in used_directly]


def drop_history(optimizer: Any, params: set[nn.Parameter]) -> None:
    """Give these parameters of an optimizer a delay of 0, in a group of their own where others share theirs."""
    for group in list(optimizer.param_groups):
        ours = [p for p in group["params"] if p in params]
        if not ours:
            continue
        if len(ours) == len(group["params"]):
            group["delay"] = 0
            continue
        names = group.pop("param_names", None)
        kept = [i for i, p in enumerate(group["params"]) if p not in params]
        moved = [i for i, p in enumerate(group["params"]) if p in params]
        options = {k: v for k, v in group.items() if k not in ("params", *CLOCK)}
        members: list[Any] = group["params"]
        group["params"] = [members[i] for i in kept]
        added = [members[i] for i in moved]
        if names is not None:
            group["param_names"] = [names[i] for i in kept]
            added = [(names[i], members[i]) for i in moved]
        optimizer.add_param_group({**options, "params": added, "delay": 0})
