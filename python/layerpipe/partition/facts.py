"""Assumptions of a trace, checked in every tick, a hundred of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from layerpipe.partition.reads import same

_MOST = 64  # entries of a container whose content is compared in every tick


class Fact(NamedTuple):
    """Something that a stage relies on.

    Attributes:
        test: a Python expression of ``{o}`` and ``{v}``, true while it is so.
        owner: ``{o}``.
        value: ``{v}``, as it was.
        message: says what has changed.
    """

    test: str
    owner: Any
    value: Any
    message: Callable[[], str]

    def holds(self) -> bool:
        try:
            return bool(eval(self.test.format(o="o", v="v"), {"o": self.owner, "v": self.value, "same": same}))
        except (KeyError, AttributeError):
            return False


class Facts:
    """Many facts. ``hold()`` is one compiled expression: about 20 ns for each.

    Args:
        facts: each of them.
        empty: dicts of hooks that must stay without any.
    """

    def __init__(self, facts: Iterable[Fact], empty: Iterable[Any] = ()) -> None:
        self._facts = list(facts)
        names: dict[str, Any] = {"same": same, "empty": tuple(empty)}
        owners: dict[int, str] = {}
        terms = ["not any(empty)"]
        for i, fact in enumerate(self._facts):
            owner = owners.setdefault(id(fact.owner), f"o{len(owners)}")
            names[owner], names[f"v{i}"] = fact.owner, fact.value
            terms.append(fact.test.format(o=owner, v=f"v{i}"))
        self._hold: Callable[[], Any] = eval(f"lambda: {' and '.join(terms)}", names)

    def hold(self) -> bool:
        """Return whether all do, and nothing has come into what must stay empty."""
        try:
            return bool(self._hold())
        except (KeyError, AttributeError):
            return False

    def broken(self) -> str:
        """Return what has changed, in words; empty where nothing has."""
        return next((fact.message() for fact in self._facts if not fact.holds()), "")


def attribute(label: str, fields: dict[str, Any], name: str) -> Iterable[Fact]:
    """That an attribute is what it was: equal where it is a number or a string, else the same object, with the content
    that it had where that is a list, dict or set of at most 64 entries.

    Args:
        label: whose it is, for people.
        fields: the ``__dict__`` that it is in.
        name: the attribute's.
    """
    value = fields[name]
    test, kept = _compared(f"{{o}}[{name!r}]", value)

    def message() -> str:
        now = fields.get(name, "gone")
        if now is value:
            return f"the content of {label}.{name} has changed"
        return f"{label}.{name} was {_shown(value)} and is {_shown(now)}"

    yield Fact(test, fields, kept, message)
    yield from _inside(value, message, 0)


def inherited(label: str, kind: type, name: str) -> Fact:
    """That an attribute of a class is what it was."""
    value = getattr(kind, name)
    test, kept = _compared(f"{{o}}.{name}", value)
    return Fact(
        test, kind, kept, lambda: f"{label}.{name} was {_shown(value)} and is {_shown(getattr(kind, name, 'gone'))}"
    )


def _compared(read: str, value: Any) -> tuple[str, Any]:
    """The test that what is read is still this value, and what to keep for it."""
    if isinstance(value, list | dict | set | tuple) and len(value) <= _MOST:
        return f"same({read}, {{v}})", value if isinstance(value, tuple) else value.copy()
    nan = isinstance(value, float) and math.isnan(value)
    equal = isinstance(value, int | float | str | bytes | complex) and not nan
    return f"{read} {'==' if equal else 'is'} {{v}}", value


def _inside(value: Any, message: Callable[[], str], depth: int) -> Iterable[Fact]:
    """That lists, dicts and sets within a container hold what they did."""
    if isinstance(value, list | dict | tuple) and len(value) <= _MOST and depth < 4:
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, list | dict | set) and len(item) <= _MOST:
                yield Fact("same({o}, {v})", item, item.copy(), message)
            yield from _inside(item, message, depth + 1)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"another {type(value).__name__}"
