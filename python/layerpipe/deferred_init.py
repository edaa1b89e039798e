"""A model on the meta device, whose initialisation is written down and done later for the parts that a process holds::

    with layerpipe.deferred_init() as init:
        model = Model()                    # takes no memory
    stages = layerpipe.split(model, 16, (x,), balance="params")
    pipe = layerpipe.Pipeline(stages, loss_fn, optimizer, mesh=mesh, materialize=init.materialize)

Every operator on a tensor of the meta device is recorded, in order. To make some tensors, those operators are repeated
that their values depend on, on the CPU. An operator that draws random numbers for another tensor draws them as well,
into memory that is let go of at once: what comes after it finds torch's generator as in a model that is made whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_META = torch.device("meta")
_CPU = torch.device("cpu")
_IS_META = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]


class _Operation(NamedTuple):
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    written: tuple[Tensor, ...]  # on the meta device, whose memory it makes or writes to
    outputs: tuple[Tensor, ...]
    random: bool

    def read(self) -> Iterator[Tensor]:
        yield from _meta((self.args, self.kwargs))


class DeferredInit:
    """Records what was done to tensors of the meta device while they were made; see :func:`deferred_init`."""

    def __init__(self) -> None:
        self._operations: list[_Operation] = []
        self._begin = torch.get_rng_state()

    def materialize(self, modules: Sequence[nn.Module]) -> None:
        """Give the modules' parameters and buffers memory on the CPU, and the values that they would have if the whole
        model had been made there, bit for bit.

        They are new objects, as after ``module.to_empty(device="cpu")``, so it comes before an optimizer. torch's
        generator is left where making the model would have left it, unless somebody has drawn from it since. The most
        memory that it takes is that of the modules, and of one tensor more.

        Raises:
            RuntimeError: a tensor was not made inside :func:`deferred_init`.
        """
        wanted = _meta_tensors(modules)
        needed = {_storage(tensor) for tensor in wanted.values()}
        made: set[int] = set()
        steps: list[tuple[_Operation, bool]] = []
        for operation in reversed(self._operations):
            written = {_storage(tensor) for tensor in operation.written}
            if needs := bool(written & needed):
                needed.update(_storage(tensor) for tensor in operation.read())
                made |= written
            if needs or operation.random:
                steps.append((operation, needs))
        for name, tensor in wanted.items():
            if _storage(tensor) not in made and tensor.numel():
                raise RuntimeError(f"{name} is on the meta device and was not made inside layerpipe.deferred_init()")
        before = torch.get_rng_state()
        memory: dict[int, torch.UntypedStorage] = {}
        torch.set_rng_state(self._begin)
        try:
            with torch.no_grad():
                for operation, needs in reversed(steps):
                    _repeat(operation, memory if needs else None)
        finally:
            if not torch.equal(before, self._begin):
                torch.set_rng_state(before)
        made_of = {tensor: _like(tensor, _real(tensor, memory)) for tensor in wanted.values()}
        for module in dict.fromkeys(m for each in modules for m in each.modules()):
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor in made_of:
                    setattr(module, name, made_of[tensor])


@contextmanager
def deferred_init() -> Iterator[DeferredInit]:
    """Make everything on the meta device, and write down how, for :meth:`DeferredInit.materialize`.

    What a model's constructor asks of its tensors' values, such as ``.item()``, raises torch's error: there are none.
    """
    init = DeferredInit()
    operations = init._operations

    def truncated(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept = tensor.detach()
        operations.append(_Operation(truncated_normal, (kept, *args), kwargs, (kept,), (), True))
        return tensor

    truncated_normal = nn.init._no_grad_trunc_normal_  # draws until it likes all numbers, which these have not
    nn.init._no_grad_trunc_normal_ = truncated
    try:
        with torch.device(_META), _KeepsData(), _Recording(operations):
            yield init
    finally:
        nn.init._no_grad_trunc_normal_ = truncated_normal


class _KeepsData(TorchFunctionMode):
    """Copies what is made of Python's numbers to the meta device, where it would be lost, as an operator of its own.

    Functions of :mod:`torch.nn.init` that leave tensors of the meta device as they are do not know them here.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _IS_META:
            return False
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is None:
            values = func(*args, **{**kwargs, "device": _CPU})
            return torch.empty_like(values, device=_META).copy_(values.detach()).requires_grad_(values.requires_grad)
        return func(*args, **kwargs)


class _Recording(TorchDispatchMode):
    def __init__(self, operations: list[_Operation]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations = operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        outputs = tuple(_meta(output))
        if outputs or any(True for _ in _meta((args, kwargs))):
            # Aliases: what becomes of the model's own tensors does not change what was done to them here.
            args, kwargs, outputs = pytree.tree_map_only(Tensor, _alias, (args, kwargs, outputs))
            written = [*outputs]
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written += _meta(value)
            random = torch.Tag.nondeterministic_seeded in func.tags
            self._operations.append(_Operation(func, args, kwargs, tuple(written), outputs, random))
        return output


def _alias(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.device == _META else tensor


def _repeat(operation: _Operation, memory: dict[int, torch.UntypedStorage] | None) -> None:
    """Do it on the CPU, in the memory of the tensors known there; without any, only draw the random numbers."""

    def there(value: Any) -> Any:
        if isinstance(value, torch.device) and value == _META:
            return _CPU
        if not isinstance(value, Tensor) or value.device != _META:
            return value
        if memory is None:
            return _scratch(value)
        return _real(value, memory)

    args, kwargs = pytree.tree_map(there, (operation.args, operation.kwargs))
    outputs = tuple(x for x in pytree.tree_leaves(operation.function(*args, **kwargs)) if isinstance(x, Tensor))
    if memory is not None and operation.outputs:
        for meta, real in zip(operation.outputs, outputs, strict=True):
            memory.setdefault(_storage(meta), real.untyped_storage())


def _scratch(tensor: Tensor) -> Tensor:
    return torch.zeros(0, dtype=tensor.dtype).set_(
        torch.UntypedStorage(tensor.untyped_storage().nbytes()), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def _real(tensor: Tensor, memory: dict[int, torch.UntypedStorage]) -> Tensor:
    return torch.empty(0, dtype=tensor.dtype).set_(
        memory[_storage(tensor)], tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def _like(tensor: Tensor, real: Tensor) -> Tensor:
    """A parameter where the tensor is one, with its attributes."""
    if isinstance(tensor, nn.Parameter):
        real = nn.Parameter(real, requires_grad=tensor.requires_grad)
    real.__dict__.update(tensor.__dict__)
    return real


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _meta(value: Any) -> Iterator[Tensor]:
    return (x for x in pytree.tree_leaves(value) if isinstance(x, Tensor) and x.device == _META)


def _meta_tensors(modules: Iterable[nn.Module]) -> dict[str, Tensor]:
    return {
        f"stage {i}: {name}" if i else name: tensor
        for i, module in enumerate(modules)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
        if tensor.device == _META
    }
