"""Attributes of a model that a trace has fixed, and those of them that one stage relies on."""

from __future__ import annotations

import dis
import inspect
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from layerpipe.partition.facts import Fact, attribute, inherited
from layerpipe.partition.reads import INTERNAL, Reads

_OF_ALL_MODULES = frozenset(dir(nn.Module))
_DATA = (int, float, str, bytes, tuple, list, dict, set, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_in(fields: dict[str, Any]) -> list[Any]:
    """The hooks of the module with this ``__dict__``, in the dicts that torch keeps them in."""
    return [fields[name] for name in _HOOKS]


def hooked(module: nn.Module) -> bool:
    """Return whether a forward or backward hook is registered on this module."""
    return any(hooks_in(module.__dict__))


class Part(NamedTuple):
    """The attributes of one module that a stage relies on.

    Attributes:
        module: the module; ``None`` for what is no module's own.
        path: in the model.
        label: for people.
        facts: what must stay so.
    """

    module: nn.Module | None
    path: str
    label: str
    facts: list[Fact]


class Fixed:
    """The attributes of a model when it was traced.

    Args:
        model: the model.
        reads: what its code has read.

    Attributes:
        reads: see above.
        modes: ``training`` of each module on whose mode a number in the trace depends, by path, as the stages have it;
            one record for all of them.
    """

    def __init__(self, model: nn.Module, reads: Reads) -> None:
        self.model, self.reads = model, reads
        self.modes: dict[str, bool] = {}
        self._paths = dict(model.named_modules(remove_duplicate=False))
        self._shown: set[str] = set()  # modules that some node belongs to, or calls

    def note(self, nodes: Iterable[fx.Node]) -> None:
        """These are all nodes of the trace."""
        for node in nodes:
            self._shown.update(_surrounding(node))
            if node.op == "call_module" and str(node.target) in self._paths:
                layer = str(node.target)
                self._shown.update(path for path in self._paths if path == layer or path.startswith(f"{layer}."))

    def stage(self, nodes: Sequence[fx.Node], *, first: bool) -> list[Part]:
        """Return what these nodes rely on: the modules that they do the work of without calling them.

        Args:
            nodes: of one stage.
            first: whether it is the first one, which also answers for what no node shows.
        """
        layers = [str(node.target) for node in nodes if node.op == "call_module" and str(node.target) in self._paths]
        live = {id(module) for layer in layers for module in self._paths[layer].modules()}
        paths = {"": None}
        for node in nodes:
            named = [str(node.target)] if node.op in ("call_module", "get_attr") else []
            for path in (*_surrounding(node), *named):
                parts = path.split(".")
                paths |= dict.fromkeys(".".join(parts[:i]) for i in range(1, len(parts) + 1))
        if first:
            lists = [path for path, module in self._paths.items() if isinstance(module, nn.ModuleList | nn.ModuleDict)]
            seen = [path for path, module in self._paths.items() if id(module) in self.reads.names]
            paths |= dict.fromkeys(path for path in (*lists, *seen) if path not in self._shown)
        modules = {path: self._paths[path] for path in paths
                   if path in self._paths and id(self._paths[path]) not in live}  # fmt: skip
        return [*(self._part(path, module) for path, module in modules.items()), self._others([*modules.values()])]

    def _part(self, path: str, module: nn.Module) -> Part:
        fields, label = module.__dict__, path or type(self.model).__name__
        facts = list(self._own(module, label))
        facts.append(Fact("{o}['_modules'] == {v}", fields, dict(module._modules), _said(f"a layer of {label}")))
        for kind in ("_parameters", "_buffers"):
            for name, value in fields[kind].items():
                facts.append(Fact(f"{{o}}[{kind!r}].get({name!r}) is {{v}}", fields, value, _said(f"{label}.{name}")))
        if path in self.modes:
            facts.append(_mode(path, label, fields, self.modes))
        return Part(module, path, label, facts)

    def _others(self, modules: Sequence[nn.Module]) -> Part:
        """Attributes that live as long as the code does: numbers of classes and Python modules, and of objects such as
        a config, which others may hold, too."""
        facts: list[Fact] = []
        for label, owner in self.reads.owners.values():
            if not isinstance(owner, nn.Module):
                facts += self._own(owner, label)
            if not isinstance(owner, nn.Module) or any(owner is module for module in modules):
                facts += [inherited(label, type(owner), name) for name in self._inherited(owner)]
        for kind in dict.fromkeys(map(type, modules)):
            facts += _globals(kind)
        return Part(None, "", "", facts)

    def _own(self, owner: Any, label: str) -> Iterator[Fact]:
        """Of the attributes that were read: their values, and that nothing covers those of the class."""
        for name in self.reads.names.get(id(owner), ()):
            if name in owner.__dict__ and (name not in INTERNAL or not isinstance(owner, nn.Module)):
                yield from attribute(label, owner.__dict__, name)
        for name in self._inherited(owner):
            yield Fact(f"{name!r} not in {{o}}", owner.__dict__, None, _said(f"{label}.{name}"))

    def _inherited(self, owner: Any) -> list[str]:
        """Data of the object's class that was read: no method and nothing that is computed."""
        names = [name for name in self.reads.names.get(id(owner), ())
                 if name not in owner.__dict__ and name not in _OF_ALL_MODULES]  # fmt: skip
        return [name for name in names if isinstance(inspect.getattr_static(type(owner), name, self), _DATA)]


def _surrounding(node: fx.Node) -> list[str]:
    """The modules in whose forward a node was traced, by path, from the outside."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def innermost(node: fx.Node) -> str:
    """The module in whose forward a node was traced, by path."""
    return ["", *_surrounding(node)][-1]


def _mode(path: str, label: str, fields: dict[str, Any], modes: dict[str, bool]) -> Fact:
    def message() -> str:
        return (
            f"{label}.training is {fields['training']} and its stage's is {modes[path]}: switch modes with train() and "
            "eval() of the pipeline or of the stage"
        )

    return Fact(f"{{o}}['training'] is {{v}}[{path!r}]", fields, modes, message)


def _said(what: str) -> Callable[[], str]:
    return lambda: f"{what} has been replaced"


def _globals(kind: type) -> Iterator[Fact]:
    """Numbers and strings of their Python module that the functions of a module's class name."""
    for part in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if part.__module__.startswith("torch."):
            continue
        for function in vars(part).values():
            for name in _names(function.__code__) if isinstance(function, types.FunctionType) else ():
                if isinstance(function.__globals__.get(name), int | float | str) and not name.startswith("__"):
                    yield from attribute(part.__module__, function.__globals__, name)


def _names(code: types.CodeType) -> list[str]:
    """The global names that a function and those inside it read."""
    found = [str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return list(dict.fromkeys(itertools.chain(found, *map(_names, inner))))
