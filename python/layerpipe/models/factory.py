"""Functions of the user's, by name: ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def is_name(text: str) -> bool:
    """Return whether this has the form of a function's name."""
    return text.find(":") > 0


def find(name: str) -> Callable[..., Any]:
    """The function or class of this name.

    Raises:
        ImportError: there is no such module, or it cannot be imported.
        ValueError: it has no such function.
    """
    path, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise ImportError(f"{name}: {error}") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(f"{name}: {path} has no function or class {attribute!r}")
    return factory  # type: ignore[no-any-return]


def call(name: str, known: Mapping[str, Any]) -> Any:
    """Call it with those of the known values that it has parameters for.

    Raises:
        ImportError, ValueError: there is none, or it asks for something else.
    """
    factory = find(name)
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # built in
        parameters = ()  # type: ignore[assignment]
    given = {p.name: known[p.name] for p in parameters if p.name in known and p.kind is not p.POSITIONAL_ONLY}
    needs = [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in given
    ]
    if needs:
        raise ValueError(f"{name} asks for {', '.join(needs)}; it can be given {', '.join(known)}")
    return factory(**given)
