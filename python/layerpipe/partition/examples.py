"""The arguments of a forward that a model is traced with, by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn


class Examples(NamedTuple):
    """A call of a model: ``model(*args, **kwargs)``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(
        cls, inputs: Sequence[Any] | Mapping[str, Any] | None, kwargs: Mapping[str, Any] | None = None
    ) -> Examples | None:
        """From what a user gives: positional arguments, or a dict of keyword arguments, or both.

        Returns:
            The call; ``None`` where nothing is given.

        Raises:
            TypeError: the inputs are one tensor, or a named tuple, which may be one argument or several.
        """
        if inputs is None and kwargs is None:
            return None
        if isinstance(inputs, Mapping):
            return cls((), {**inputs, **(kwargs or {})})
        if isinstance(inputs, Tensor) or (isinstance(inputs, tuple) and type(inputs) is not tuple):
            kind = "tensor" if isinstance(inputs, Tensor) else type(inputs).__name__
            raise TypeError(f"example_inputs is a {kind}; give a tuple of the forward's arguments: (x,)")
        return cls(tuple(inputs or ()), dict(kwargs or {}))

    def bound(self, model: nn.Module) -> inspect.BoundArguments:
        """The arguments by the parameters of the model's forward.

        Raises:
            ValueError: it takes others.
        """
        try:
            return inspect.signature(model.forward).bind(*self.args, **self.kwargs)
        except TypeError as error:
            raise ValueError(f"the example inputs do not fit {type(model).__name__}.forward: {error}") from error

    def by_name(self, model: nn.Module) -> dict[str, Any]:
        """Each argument under its parameter's name; the ``i``-th of ``*args`` as ``args_i``, those of ``**kwargs``
        under their own.

        Raises:
            ValueError: the model's forward takes other arguments.
        """
        bound = self.bound(model)
        found: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                found |= {f"{name}_{i}": x for i, x in enumerate(value)}
            elif kind is inspect.Parameter.VAR_KEYWORD:
                found |= value
            else:
                found[name] = value
        return found


def in_order(nodes: Iterable[fx.Node], given: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments as a traced forward takes them: one for each of its placeholders, all of those of a ``*args``."""
    values: list[Any] = []
    for node in nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name in given:
            values.append(given[name])
        elif name.startswith("*") and not name.startswith("**"):
            values += [value for key, value in given.items() if key.rpartition("_")[0] == name[1:]]
    return tuple(values)
