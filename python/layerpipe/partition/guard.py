"""Refuses to run a stage of :func:`layerpipe.split` on what it was not traced for."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils import _pytree as pytree

from layerpipe.errors import SpecializationError
from layerpipe.partition.facts import Facts
from layerpipe.partition.fixed import Part, hooks_in


class TensorLike(NamedTuple):
    """A tensor as a trace has it: sizes that are fixed as numbers, others by name; ``None`` for any dtype."""

    dtype: torch.dtype | None
    sizes: tuple[int | str, ...]


class Inputs(NamedTuple):
    """The inputs that a stage takes.

    Attributes:
        names: of the values, flattened.
        kinds: of each: a :class:`TensorLike`, ``Any`` for anything, or the very value.
        conditions: Python expressions of ``args``, by what they say to people.
        at_least: what a size that is not fixed may be.
        flat: whether the values are those that are given flattened.
    """

    names: tuple[str, ...]
    kinds: tuple[Any, ...]
    conditions: Mapping[str, str] = {}
    at_least: int = 0
    flat: bool = True

    @property
    def any_dtype(self) -> bool:
        return all(kind.dtype is None for kind in self.kinds if isinstance(kind, TensorLike))

    def of_any_dtype(self) -> Inputs:
        """With tensors of any dtype."""
        return self._replace(
            kinds=tuple(kind._replace(dtype=None) if isinstance(kind, TensorLike) else kind for kind in self.kinds)
        )

    def also(self, other: Inputs) -> Inputs:
        """Return what both allow, of the same forward in two modes."""
        return self._replace(
            kinds=tuple(_narrower(a, b) for a, b in zip(self.kinds, other.kinds, strict=True)),
            conditions={**self.conditions, **other.conditions},
        )

    def refused(self, values: Sequence[Any]) -> str:
        """Return what is wrong with these values; empty where nothing is."""
        if len(values) != len(self.names):
            return f"it takes {', '.join(self.names)}, got {len(values)} values"
        sizes: dict[str, tuple[str, int]] = {}
        for name, kind, value in zip(self.names, self.kinds, values, strict=True):
            if isinstance(kind, TensorLike):
                if wrong := self._tensor(name, kind, value, sizes):
                    return wrong
            elif kind is not Any and not (type(value) is type(kind) and value == kind):
                return f"{name} was {kind!r} and is {_shown(value)}"
        for said, condition in self.conditions.items():
            if not eval(condition, {**SYMPY_INTERP, "args": values}):
                return f"{said} was so and is not"
        return ""

    def _tensor(self, name: str, kind: TensorLike, value: Any, sizes: dict[str, tuple[str, int]]) -> str:
        if not isinstance(value, Tensor):
            return f"{name} was a tensor and is {_shown(value)}"
        if kind.dtype is not None and value.dtype != kind.dtype:
            return f"{name} was of {kind.dtype} and is of {value.dtype}"
        if value.dim() != len(kind.sizes):
            return f"{name} was of shape ({', '.join(map(str, kind.sizes))}) and is of {tuple(value.shape)}"
        for i, (wanted, size) in enumerate(zip(kind.sizes, value.shape, strict=True)):
            if isinstance(wanted, int):
                if size != wanted:
                    return f"{name}.shape[{i}] was {wanted} and is {size}"
            elif wanted.isidentifier():
                where, first = sizes.setdefault(wanted, (f"{name}.shape[{i}]", size))
                if size != first:
                    return f"{name}.shape[{i}] was the same as {where} and is {size}, not {first}"
                if size < self.at_least:
                    return f"{name}.shape[{i}] is {size}, for which the model's code may do something else"
        return ""


def _narrower(a: Any, b: Any) -> Any:
    if not isinstance(a, TensorLike) or not isinstance(b, TensorLike):
        return b if a is Any else a
    return a._replace(sizes=tuple(y if isinstance(y, int) else x for x, y in zip(a.sizes, b.sizes, strict=True)))


class Guard(nn.Module):
    """Called by a stage with what it is given, before it does anything.

    Copies, which are no part of the model any more, guard their inputs alone. Compiled code does not check; a hook of
    the compiled stage does, :meth:`before`.

    Args:
        inputs: what the stage may be given; ``None`` for anything.
        parts: what it relies on in the model.
        modes: of the model's modules, :attr:`layerpipe.partition.fixed.Fixed.modes`.
    """

    def __init__(self, inputs: Inputs | None, parts: Sequence[Part] = (), modes: dict[str, bool] | None = None) -> None:
        super().__init__()
        self.inputs = inputs
        self._seen: set[Any] = set()
        modules = {part.path: part.module for part in parts if part.module is not None}
        self._parts = {part.path if part.module is not None else None: part._replace(module=None) for part in parts}
        self._fields = {path: module.__dict__ for path, module in modules.items()}
        self._modes = {} if modes is None else modes
        self._facts: Facts | None = None  # of all parts; made when it is needed
        # Not the modules are held, only their __dict__, until they go, so that parts of other stages can go with them.
        itself = weakref.ref(self)
        self._gone = [weakref.ref(module, functools.partial(_forget, itself, path)) for path, module in modules.items()]

    def forward(self, *values: Any) -> None:
        if not torch.compiler.is_compiling():
            self.check(values)

    def before(self, module: nn.Module, values: Sequence[Any]) -> None:
        """:meth:`check` as a forward pre-hook."""
        self.check(values)

    def check(self, values: Sequence[Any]) -> None:
        """Raises:
        SpecializationError: the values, or the model, are not what the stage was traced for.
        """
        if self._facts is None or not self._facts.hold():
            self.check_model()
        if self.inputs is not None:
            self.check_inputs(values)

    def check_inputs(self, values: Sequence[Any]) -> None:
        """:meth:`check` of the values alone; of each kind of them once."""
        assert self.inputs is not None
        key = tuple([(x.shape, x.dtype) if isinstance(x, Tensor) else None for x in values])
        if key in self._seen:
            return
        flat = pytree.tree_leaves(tuple(values)) if self.inputs.flat else values
        if wrong := self.inputs.refused(flat):
            raise SpecializationError(
                f"{wrong}; layerpipe.split has fixed that, for torch.export saw the example inputs only. Give it "
                "examples of this kind, bring all minibatches to one size, or give the stages by hand"
            )
        if None not in key:
            self._seen.add(key)

    def check_model(self) -> None:
        """:meth:`check` of the model alone."""
        if self._facts is None:
            facts = (fact for part in self._parts.values() for fact in part.facts)
            self._facts = Facts(facts, (hooks for fields in self._fields.values() for hooks in hooks_in(fields)))
        if self._facts.hold():
            return
        for path, fields in self._fields.items():
            if any(hooks_in(fields)):
                raise SpecializationError(
                    f"a hook was registered on {self._parts[path].label} after layerpipe.split had taken it apart, so "
                    "nothing would call it: register it before the split, which then keeps that module whole, or on a "
                    "layer inside"
                )
        raise SpecializationError(
            f"{self._facts.broken()}; layerpipe.split has fixed that in the stages. Split the model anew; or keep a "
            "number that changes in a buffer, or in a layer of torch's own such as nn.Dropout, which the stages share "
            "with the model"
        )

    def train(self, mode: bool = True) -> Guard:
        super().train(mode)
        for path, fields in self._fields.items():
            fields["training"] = mode
            if path in self._modes:
                self._modes[path] = mode
        return self

    def forget(self, path: str) -> None:
        """A module of the model is gone: nobody can change it any more."""
        self._facts = None
        del self._parts[path], self._fields[path]

    def __deepcopy__(self, memo: dict[int, Any]) -> Guard:
        return _copy(self.inputs, self.training)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copy, (self.inputs, self.training)


def _copy(inputs: Inputs | None, training: bool) -> Guard:
    guard = Guard(inputs)
    guard.training = training
    return guard


def _forget(guard: weakref.ref[Guard], path: str, _: object) -> None:
    if (alive := guard()) is not None:
        alive.forget(path)


def guard_of(stage: nn.Module) -> Guard | None:
    """The guard of a stage that :func:`layerpipe.split` made, compiled or not."""
    stage = getattr(stage, "_orig_mod", stage)
    return next((child for child in stage.children() if isinstance(child, Guard)), None)


def _shown(value: Any) -> str:
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
