"""A minibatch's inputs as the first stage takes them: positional and keyword arguments, as one tuple."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from layerpipe.partition.guard import guard_of
from layerpipe.partition.split_stage import is_split, uncompiled


class Keywords(dict[str, Any]):
    """Keyword arguments, the last of a stage's inputs."""


pytree.register_pytree_node(
    Keywords,
    lambda keywords: (list(keywords.values()), list(keywords)),
    lambda values, names: Keywords(zip(names, values, strict=True)),
    serialized_type_name="layerpipe.inputs.Keywords",
)


def packed(inputs: Any, kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call as one tuple.

    Args:
        inputs: positional arguments as a plain tuple, keyword arguments as a dict with strings as keys, or the one
            argument, which may be a named tuple.
        kwargs: more keyword arguments.
    """
    if isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs):
        return (Keywords({**inputs, **kwargs}),)
    args = inputs if type(inputs) is tuple else (inputs,)
    return (*args, Keywords(kwargs)) if kwargs else args


def call(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """A module's output for arguments that :func:`packed` has made one tuple of."""
    if inputs and type(inputs[-1]) is Keywords:
        return module(*inputs[:-1], **inputs[-1])
    return module(*inputs)


def results(output: Any) -> tuple[Any, ...]:
    """Return what a module returned as a tuple: only a plain tuple is several values."""
    return output if type(output) is tuple else (output,)


def checked(outputs: tuple[Any, ...], *, last: bool) -> tuple[Tensor, ...]:
    """The tensors among a stage's outputs.

    Args:
        outputs: from :func:`results`.
        last: whether the loss follows, and not a stage.

    Raises:
        TypeError: something else than a tensor would cross into the next stage.
    """
    for value in outputs:
        if not isinstance(value, Tensor):
            break
    else:
        return outputs
    if not last:
        raise TypeError(
            f"a stage returns a tensor or a plain tuple of tensors, got {type(value).__name__}: hand its tensors on as "
            "a tuple, and put them together in the next stage"
        )
    return tuple(tensors_of(outputs))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a structure: what torch's trees find, and the fields of dataclasses."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            for field in dataclasses.fields(leaf):
                yield from tensors_of(getattr(leaf, field.name))


class Intake:
    """Checks what a pipeline is fed before any of it is.

    Args:
        first: the first stage.
    """

    def __init__(self, first: nn.Module) -> None:
        self._name = "the model" if is_split(uncompiled(first)) else type(uncompiled(first)).__name__
        self._guard = guard_of(first)
        self._signature = inspect.signature(uncompiled(first).forward)
        self._seen: set[Any] = set()

    def check(self, inputs: tuple[Any, ...]) -> None:
        """Raises:
        TypeError: keyword arguments that the stage does not take, or one that is missing.
        SpecializationError: the stage was traced for others.
        """
        values = inputs
        if inputs and type(inputs[-1]) is Keywords:
            key = len(inputs), *inputs[-1]
            if key in self._seen and self._guard is None:
                return
            try:
                bound = self._signature.bind(*inputs[:-1], **inputs[-1])
            except TypeError as error:
                raise TypeError(self._unfit(str(error))) from None
            self._seen.add(key)
            values = bound.args
        if self._guard is not None and self._guard.inputs is not None:
            self._guard.check_inputs(values)

    def _unfit(self, error: str) -> str:
        names = ", ".join(self._signature.parameters)
        if self._name != "the model":
            return f"{self._name} takes {names}: {error}"
        return f"layerpipe.split was given examples of {names} alone ({error}): give it one of everything that is fed"
