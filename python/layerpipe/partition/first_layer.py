"""Weights whose past no backward reads: those of the network's first layer.

A linear layer's weight enters the backward only through the gradient of the layer's input, and nobody wants the
gradient of the data. So the layer with the largest delay keeps no history at all (docs/maths.md); where it is an
embedding, that is often the largest weight of the network.
"""

from __future__ import annotations

import collections

from torch import fx, nn

from layerpipe.partition.split_stage import is_split, uncompiled

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
