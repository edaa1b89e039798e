"""The rule by which an optimizer for matrices preconditions a parameter or steps it with Adam."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from layerpipe_kernels.optim.options import Group

#: A parameter's attribute, by Megatron-Core's name for it: an embedding or the output layer.
MARK = "is_embedding_or_output_parameter"

#: Names of embeddings, positions and output layers: a part of the dotted name that contains one of the first or is one
#: of the second.
_NAMED = re.compile(r"(^|\.)([^.]*(embed|position)[^.]*|wte|wpe|lm_head|head|fc)(\.|$)", re.IGNORECASE)


def sides(param: Tensor) -> tuple[int, int]:
    """Returns rows and columns of a parameter ``(out, *)`` as a matrix ``(out, in * k * k)``, as of a convolution."""
    rows = param.shape[0] if param.ndim else 1
    return rows, param.numel() // max(rows, 1)


def is_preconditioned(group: Group, i: int) -> bool:
    """Returns whether a group's ``i``-th parameter is stepped as a matrix.

    It has two sides of more than one element; and where the group's ``precondition`` is ``None``, neither a mark
    (:func:`mark_embeddings_and_output`) nor a name says that it is an embedding or the output layer.
    """
    param, wanted = group["params"][i], group["precondition"]
    if wanted is False or param.ndim < 2 or min(sides(param)) < 2:
        return False
    if wanted is None:
        names = group.get("param_names")
        return not getattr(param, MARK, False) and (names is None or _NAMED.search(names[i]) is None)
    return True


def mark_embeddings_and_output(module: nn.Module, *, output: bool = True) -> None:
    """Mark a network's embeddings and its output layer, which optimizers for matrices then step with Adam.

    Marked are the weights of :class:`torch.nn.Embedding` and :class:`torch.nn.EmbeddingBag`, parameters whose names
    say that they are embeddings, positions or heads, and the weight of the last linear layer or convolution. The mark
    is an attribute of the parameter, ``is_embedding_or_output_parameter = True``, as Megatron-Core sets it;
    ``copy.deepcopy`` loses it. A :class:`layerpipe.Pipeline` marks its stages itself.

    Args:
        module: the network, its layers registered in the order in which they run.
        output: whether its last layer is the network's output.
    """
    last: list[nn.Parameter] = []
    for layer in module.modules():
        weights = [p for p in _weight(layer) if p.ndim > 1]
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            for param in weights:
                setattr(param, MARK, True)
        elif weights:
            last = weights
    for param in last if output else ():
        setattr(param, MARK, True)
    for name, param in module.named_parameters():
        if param.ndim > 1 and _NAMED.search(name):
            setattr(param, MARK, True)


def _weight(layer: nn.Module) -> list[nn.Parameter]:
    """Returns a layer's weight, or the parameters of its parametrization, which is not run: it may change buffers."""
    parametrized: Any = layer._modules.get("parametrizations")
    if parametrized is not None and "weight" in parametrized:
        return list(parametrized["weight"].parameters(recurse=False))
    weight = layer._parameters.get("weight")
    return [] if weight is None else [weight]
