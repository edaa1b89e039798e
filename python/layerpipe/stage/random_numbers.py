"""Random numbers of a stage's layers: numbers of its own, whoever runs the stages and in whatever order.

torch has one generator for all threads of a process. Workers that drew from it would take numbers in the order they
come, and :mod:`torch.utils.checkpoint`, which sets it back for a recomputation, would set it back for all of them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layerpipe.stage.other_generators import OtherGenerators

_NOTHING = nullcontext()


_ALONE = threading.RLock()
os.register_at_fork(before=_ALONE.acquire, after_in_parent=_ALONE.release, after_in_child=_ALONE.release)


@functools.cache
def share_torchs_generator() -> None:
    """Several threads may call ``torch.get_rng_state`` and its like from now on.

    Without this, all threads of a process can stop for good. torch takes the generator's C++ lock while it holds the
    GIL, and then makes a tensor. Before Python 3.12 the garbage collector may run at that moment, a finalizer or a
    callback of it hand the GIL to another thread, and that one, if it wants the generator's state, waits for the C++
    lock without giving the GIL back. ``torch.utils.checkpoint`` asks for the state in every forward and backward,
    ``torch.compile`` whenever it compiles. So torch's functions wait for a lock of Python's first, which gives the GIL
    back. From 3.12 on the collector runs between bytecodes only.
    """
    if sys.version_info >= (3, 12):
        return
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "seed", "initial_seed"):
        alone = _one_at_a_time(getattr(torch.random, name))
        setattr(torch.random, name, alone)
        setattr(torch, name, alone)


def _one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _ALONE:
            return function(*args, **kwargs)

    return alone


def seed() -> int:
    """Follows from where torch's generator is, and leaves it there."""
    state = torch.get_rng_state().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(state, digest_size=7).digest(), "little")


class RandomNumbers(ABC):
    """One stage's, on the CPU. A device's own generator is drawn from in the order in which work is issued, one host
    thread's, and needs nothing.

    The first minibatch shows which calls draw at all; those that do not cost nothing until :meth:`look_again`.

    Args:
        seed: of all stages, each of which has its own numbers.
        stage: its index.
    """

    def __init__(self, seed: int, stage: int) -> None:
        self.generator = torch.Generator().manual_seed(seed + stage)
        self._draws: dict[str, bool] = {}

    @property
    def draws(self) -> bool:
        """Return whether anything has drawn so far."""
        return any(self._draws.values())

    def look_again(self) -> None:
        """Expect draws from now on: the mode of the layers, or they themselves, may have changed."""
        self._draws = {what: True for what, draws in self._draws.items() if draws}

    def during(self, what: str) -> AbstractContextManager[object]:
        """Random numbers are this stage's in here; ``what`` names the call."""
        draws = self._draws.get(what)
        if draws is None:
            return self._first(what)
        return self.lend() if draws else _NOTHING

    @contextmanager
    def _first(self, what: str) -> Iterator[None]:
        before = self.generator.get_state().numpy()
        with self.lend():
            yield
        self._draws[what] = bool((self.generator.get_state().numpy() != before).any())

    @abstractmethod
    def lend(self) -> AbstractContextManager[object]:
        """Let torch draw from :attr:`generator` in this thread."""

    @property
    def refuses_recomputation(self) -> bool:
        """Return whether the layers draw and must not be called again in a backward."""
        return False

    def recomputing(self, known: bool) -> AbstractContextManager[object]:
        """Around a backward, which may call layers again and then needs the numbers of their forward; ``known``
        whether its forward has shown that it will."""
        return _NOTHING


class Swapped(RandomNumbers):
    """For stages that one thread runs in turn: torch's generator has the stage's state for as long as that takes.

    All that draws is served, compiled or not, and so is a recomputation: what it sets the generator back to is what the
    stage's forward left there, and it puts back what it found.
    """

    @contextmanager
    def lend(self) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(outside)


class HandedIn(RandomNumbers):
    """For stages in threads of their own: every random operator is handed the stage's generator.

    Draws from Python's and NumPy's generators are refused.

    What torch compiles makes its own random operators, which cannot be reached: a compiled stage draws from torch's.
    """

    def __init__(self, seed: int, stage: int, others: OtherGenerators) -> None:
        super().__init__(seed, stage)
        self.others, self._stage = others, stage
        self._looked = False  # whether a backward has come since

    @property
    def refuses_recomputation(self) -> bool:
        return self.draws

    def look_again(self) -> None:
        super().look_again()
        self.others.look_again(self._stage)
        self._looked = False

    @contextmanager
    def _first(self, what: str) -> Iterator[None]:
        with self.others.forward(self._stage, torchs=False), super()._first(what):
            yield

    def during(self, what: str) -> AbstractContextManager[object]:
        draws = self._draws.get(what)
        if draws is None:
            return self._first(what)
        return self._watched() if draws else self.others.forward(self._stage, torchs=True)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        with self.others.forward(self._stage, torchs=False), self.lend():
            yield

    def lend(self) -> AbstractContextManager[object]:
        return _Handing(self.generator)

    def recomputing(self, known: bool) -> AbstractContextManager[object]:
        first, self._looked = not self._looked, True
        return _Refusing() if (first or known) and self.draws else _NOTHING  # type: ignore[no-untyped-call]


class _Handing(TorchDispatchMode):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seeded = _seeded(func)
        if seeded is None or not _on_cpu(args, kwargs):
            return func(*args, **kwargs)
        overload, position = seeded
        if position is not None and len(args) > position:
            args = (*args[:position], args[position] or self._generator, *args[position + 1 :])
        elif kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": self._generator}
        return overload(*args, **kwargs)


class _Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _seeded(func) is not None and _on_cpu(args, kwargs or {}):
            raise RuntimeError(
                "a backward recomputes layers that draw random numbers (dropout inside torch.utils.checkpoint?), and "
                "threads share the generator that it would set back for that; use executor='serial' or 'distributed', "
                "or keep the random layers out of the checkpointed part"
            )
        return func(*args, **(kwargs or {}))


@functools.cache
def _seeded(operator: Any) -> tuple[Any, int | None] | None:
    """The overload of a random operator that takes a generator, and where if not by name; ``None`` for all others."""
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return None
    name = operator._overloadname
    for overload in (name, "generator" if name == "default" else f"{name}_generator", f"{name[:-6]}_generator_dtype"):
        found = getattr(operator.overloadpacket, overload, None)
        for position, argument in enumerate(found._schema.arguments if found is not None else ()):
            if argument.name == "generator":
                return found, None if argument.kwarg_only else position
    return None


def _on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    tensor = next((value for value in args if isinstance(value, Tensor)), None)
    device = kwargs.get("device") or (tensor.device if tensor is not None else torch.get_default_device())
    return torch.device(device).type == "cpu"
