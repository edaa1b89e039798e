"""Records what a model's Python reads while it is traced: attributes of its modules, and of the plain objects that they
hold.

A trace has the numbers that it has met (a temperature, a flag, a field of a ``config``) as constants. These are the
attributes whose later change would go unnoticed.
"""

from __future__ import annotations

import contextlib
import enum
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

#: What every module has: no attribute of a user's.
INTERNAL = frozenset(vars(nn.Module()))
_HEAP_TYPE, _IMMUTABLE_TYPE = 1 << 9, 1 << 8  # of a type's flags: made by a class statement; attributes cannot be set
_DEPTH = 4  # of containers and objects within each other
_MOST = 20_000  # objects that are looked at


class Owner(NamedTuple):
    """A module, or a plain object that one holds, and what people call it."""

    label: str
    value: Any


class Reads:
    """Records which attributes are read, and undoes and tells which were written.

    Args:
        model: looked through for modules and for what they hold.
    """

    def __init__(self, model: nn.Module) -> None:
        self.owners: dict[int, Owner] = {}
        self.paths = {id(module): name for name, module in model.named_modules()}
        self.names: dict[int, dict[str, None]] = {}  # of each owner: read so far, in order
        self._containers: list[tuple[Owner, Any]] = []  # each with a copy of its content
        for path, module in model.named_modules():
            self._look(path or type(model).__name__, module, 0)
        self._before = {key: _fields(owner.value) for key, owner in self.owners.items()}

    def _look(self, label: str, value: Any, depth: int) -> None:
        if id(value) in self.owners or depth > _DEPTH or len(self.owners) + len(self._containers) > _MOST:
            return
        if isinstance(value, nn.Module) or has_fields(value):
            if isinstance(value, nn.Module) and depth:
                return  # under its own name, or none of the model's
            self.owners[id(value)] = Owner(label, value)
            if not _can_record(type(value)):  # as of a types.SimpleNamespace: any may have been read
                self.names[id(value)] = dict.fromkeys(_fields(value))
            for name, field in _fields(value).items():
                self._look(f"{label}.{name}", field, depth + 1)
        elif isinstance(value, list | dict | set):
            if all(value is not owner.value for owner, _ in self._containers):
                self._containers.append((Owner(label, value), value.copy()))
                for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                    self._look(f"{label}[{key!r}]", item, depth + 1)
        elif isinstance(value, tuple):
            for key, item in enumerate(value):
                self._look(f"{label}[{key!r}]", item, depth + 1)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Undo what is written to attributes in here."""
        try:
            yield
        finally:
            self.undo_writes()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is read in here."""
        replaced: list[tuple[Any, Any]] = []
        objects = (owner.value for owner in self.owners.values() if not isinstance(owner.value, nn.Module))
        kinds: set[Any] = {nn.Module, *(type(value) for value in objects if _can_record(type(value)))}
        for kind in kinds:
            replaced.append((kind, kind.__dict__.get("__getattribute__")))
            kind.__getattribute__ = _recorder(kind.__getattribute__, self.owners, self.names)
        try:
            yield
        finally:
            for kind, before in replaced:
                if before is None:
                    del kind.__getattribute__
                else:
                    kind.__getattribute__ = before

    def undo_writes(self) -> list[tuple[str, Any]]:
        """Put attributes and containers back as they were; returns what had been written and whose it is."""
        written: list[tuple[str, Any]] = []
        for key, before in self._before.items():
            label, owner = self.owners[key]
            now = _fields(owner)
            for name in {**before, **now}:
                if name not in before or name not in now or not _equal(now[name], before[name]):
                    written.append((f"{label}.{name}", owner))
                    vars(owner).pop(name, None)
            vars(owner).update({name: value for name, value in before.items() if name not in vars(owner)})
        for (label, container), content in self._containers:
            if not same(container, content):
                written.append((label, container))
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        return written


def _recorder(read: Any, owners: dict[int, Owner], names: dict[int, dict[str, None]]) -> Any:
    def __getattribute__(self: Any, name: str) -> Any:
        value = read(self, name)
        if id(self) in owners:
            names.setdefault(id(self), {})[name] = None
        return value

    return __getattribute__


def has_fields(value: Any) -> bool:
    """Return whether this is an object, such as a ``config``, whose attributes are data."""
    data = (list, dict, set, tuple, enum.Enum, Tensor)
    code = (type, types.ModuleType, types.FunctionType, nn.Module)
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, data + code)
        and type(value).__module__.partition(".")[0] not in ("torch", "numpy", "functools")
    )


def _can_record(kind: type) -> bool:
    """Return whether a class can be made to record."""
    return bool(kind.__flags__ & _HEAP_TYPE) and not kind.__flags__ & _IMMUTABLE_TYPE


def _fields(value: Any) -> dict[str, Any]:
    return {
        name: field for name, field in vars(value).items() if name not in INTERNAL or not isinstance(value, nn.Module)
    }


def _equal(now: Any, before: Any) -> bool:
    """Return whether an attribute is what it was; ``torch.export`` makes tuples anew."""
    data = isinstance(before, tuple | list | dict | set | int | float | str)
    return now is before or (data and type(now) is type(before) and same(now, before))


def same(container: Any, content: Any) -> bool:
    """Return whether a list, dict or set holds what it held: the same objects, or equal ones."""
    try:
        return bool(container == content)
    except (RuntimeError, ValueError, TypeError, AssertionError):  # tensors or arrays that are not the same object
        return False
