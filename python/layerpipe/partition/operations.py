"""The operations of a forward on its inputs and weights: a trace has to do what its model does.

``torch.fx`` runs a model's Python on stand-ins for tensors. Code that asks what it has been given (``isinstance(x,
Tensor)``), draws random numbers of a fixed shape, or opens a ``torch.no_grad()`` or ``torch.autocast`` leaves no trace,
or a wrong one, and ``torch.fx`` does not say so. On fake tensors both can be run and compared.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def run_without_data(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> list[str] | None:
    """Every operation on what comes from the inputs, the weights or a random generator, with its numbers and shapes;
    ``None`` where the module does not run on fake tensors.

    Args:
        module: run.
        args: of its forward.
        kwargs: of its forward.
        change: what is done before to each tensor of the weights, buffers and inputs.
    """
    caller, operations = _Caller(module), None
    with contextlib.suppress(Exception), FakeTensorMode(allow_non_fake_inputs=True):  # whatever the model's code raises
        made = functools.partial(_fake, change=change)
        state = {name: made(p).requires_grad_(p.requires_grad) for name, p in caller.named_parameters()}
        state |= {name: made(b) for name, b in caller.named_buffers()}
        inputs = pytree.tree_map(made, tuple(args)), pytree.tree_map(made, dict(kwargs or {}))
        with _Log([*state.values(), *inputs]) as log:
            # Not tied: of a layer with two names, functional_call would put back what it put there under the other.
            torch.func.functional_call(caller, state, *inputs, tie_weights=False)
        operations = log.operations
    return operations


def check_same(wanted: list[str] | None, found: list[str] | None) -> None:
    """Refuse a trace whose operations are not its model's, as far as both run on fake tensors.

    Raises:
        ValueError: they are others.
    """
    if wanted is None or found is None:
        return
    for a, b in itertools.zip_longest(wanted, found):
        if a != b:
            what = "nothing" if a is None else a.partition(" ")[0]
            instead = "nothing" if b is None else b.partition(" ")[0]
            how = f"{instead} for {what}" if what != instead else f"another {what}"
            raise ValueError(f"its code does something else while it is traced: {how}")


def alike(a: list[str] | None, b: list[str] | None) -> bool:
    """Return whether operations are the same but for gradients being on: ``torch.export`` detaches what ran without
    them."""
    if a is None or b is None:
        return a is b
    return _without_gradients(a) == _without_gradients(b)


def _without_gradients(operations: list[str]) -> list[tuple[str, ...]]:
    parts = [operation.split(" ", 3) for operation in operations]
    return [(name, overload, seen) for name, overload, _, seen in parts if name != "aten::detach"]


def fake(x: Any) -> Any:
    """Shape, strides and dtype without memory; on a processor, so that attention is the fused kernel it would be."""
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cpu") if isinstance(x, Tensor) else x


def _fake(x: Any, change: Callable[[Tensor], Tensor] | None) -> Any:
    return fake(x) if change is None or not isinstance(x, Tensor) else change(fake(x))


class _Caller(nn.Module):
    """Gives all parameters a name, those of a module that is one itself, too."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.root = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.root(*args, **kwargs)


class _Log(TorchDispatchMode):
    """Lists operations on ``followed`` tensors and on all that is made of them. What is made of constants alone may
    be done once, while the model is traced.

    ``a += b`` is traced as ``a = a + b``, which is the same where nobody sees ``a`` under another name: so both are
    listed alike, and what sees it is marked.
    """

    def __init__(self, followed: Sequence[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []
        self._followed: dict[int, Any] = {}  # storages; held, so that none is taken for another
        self._names: dict[int, list[Tensor]] = {}  # the tensors that were seen of each of them
        self._overwritten: dict[int, list[Tensor]] = {}  # those of them that now hold what another one was given
        self._follow(followed)

    def _follow(self, values: Any) -> None:
        for value in _tensors(values):
            storage = value.untyped_storage()
            self._followed[storage._cdata] = storage
            names = self._names.setdefault(storage._cdata, [])
            if not _among(value, names):
                names.append(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        keys = [x.untyped_storage()._cdata for x in tensors]
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        asked = func.namespace == "prim"  # for a tensor's device or layout: nothing is computed
        if asked or not (drawn or any(key in self._followed for key in keys)):
            return result
        marked = any(_among(x, self._overwritten.get(key, ())) for x, key in zip(tensors, keys, strict=True))
        name = func._schema.name
        if marked and func.is_view:  # by autograd, too, of a view that was written to: what is made of it counts
            self._overwritten[keys[0]] += _tensors(result)
            return result
        if name.endswith("_") and tensors:
            others = [x for x in self._names.get(keys[0], ()) if x is not tensors[0]]
            self._overwritten.setdefault(keys[0], []).extend(others)
        self._follow(result)
        seen = pytree.tree_map(lambda x: (*x.shape, x.dtype) if isinstance(x, Tensor) else x, (args, kwargs))
        self.operations.append(
            f"{name.removesuffix('_')} {func._overloadname} {torch.is_grad_enabled()} {seen}{' overwritten' * marked}"
        )
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]


def _among(value: Tensor, tensors: Sequence[Tensor]) -> bool:
    return any(value is each for each in tensors)
