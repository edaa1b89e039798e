"""Random numbers that are not torch's, in stages that run in threads of their own.

Python's and NumPy's global generators are one for all threads of a process: workers that drew from them would take
numbers in the order they come, another one in every run. Nobody can hand such a layer a generator of its stage's own,
so the first draw is refused. Where it was seen while nobody else could draw, it is known whose it was: the first
forward of every stage is looked at like that, and one after a generator has moved during a stage's forward.
"""

from __future__ import annotations

import ctypes
import functools
import random
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

_ADVICE = (
    "draw with torch (torch.rand(()).item()), whose numbers are the stage's own here; or from a generator that this "
    "stage alone has (random.Random(seed), numpy.random.default_rng(seed)); or use executor='serial'"
)


class OtherGenerators:
    """Watches a pipeline's stages for draws from the generators of Python and NumPy, and when it looks closely from
    torch's, where a stage is not known to draw.

    The executor asks :attr:`wanted` before a tick; if so, it lets nothing else run beside the tick and says so by
    :attr:`looking`.
    """

    def __init__(self, stages: Iterable[int]) -> None:
        self.looking = False
        self._alone = threading.Lock()
        self._new = set(stages)  # whose forward has not been looked at
        self._suspected = 0
        self._next = 1  # the suspicion that is looked into

    @property
    def wanted(self) -> bool:
        return bool(self._new) or self._suspected >= self._next

    def look_again(self, stage: int) -> None:
        """A stage's layers may have changed."""
        self._new.add(stage)

    def done(self) -> None:
        """A tick has been looked at."""
        self.looking = False
        if self._suspected >= self._next:  # by another's draws: look less often
            self._next = 2 * self._suspected

    def forward(self, stage: int, *, torchs: bool) -> Watch:
        """Around a stage's forward; ``torchs`` to watch torch's generator, too.

        Raises:
            RuntimeError: it draws.
        """
        return Watch(self, stage, torchs)


class Watch:
    """One forward's."""

    __slots__ = ("_before", "_look", "_others", "_stage", "_torchs")

    def __init__(self, others: OtherGenerators, stage: int, torchs: bool) -> None:
        self._others, self._stage, self._torchs = others, stage, torchs

    def __enter__(self) -> None:
        self._look = self._others.looking
        if self._look:
            self._others._alone.acquire()
        self._before = _states(self._torchs) if self._look else _positions()

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        others = self._others
        if not self._look:
            if error is None and _positions() != self._before:
                others._suspected += 1
            return
        try:
            now = _states(self._torchs)
        finally:
            others._alone.release()
        others._new.discard(self._stage)
        if error is None:
            for (name, state), (_, before) in zip(now, self._before, strict=True):
                if state != before:
                    raise RuntimeError(_refusal(name))


def _refusal(name: str) -> str:
    if name == "torch":
        return (
            "its layers have begun to draw random numbers after forwards in which they drew none, and threads share "
            "the generator that these came from; call pipe.train() or pipe.drain() when that begins, or use "
            "executor='serial'"
        )
    return (
        f"its layers draw from {name}'s global random numbers, which all threads share: no two runs would be equal; "
        + _ADVICE
    )


def _states(torchs: bool) -> list[tuple[str, Any]]:
    states: list[tuple[str, Any]] = [("Python", random.getstate())]
    numbers = _numpys()
    if numbers is not None:
        states.append(("NumPy", str(numbers._bit_generator.state)))
    if torchs:
        states.append(("torch", torch.get_rng_state().numpy().tobytes()))
    return states


def _positions() -> tuple[Any, ...]:
    """Return what any draw changes, read in a microsecond."""
    numbers = _numpys()
    return (
        _python_position().value,
        None if numbers is None else _numpy_position(numbers._bit_generator).value,
    )


class _Unknown:
    value = None


@functools.cache
def _python_position() -> Any:
    """The count of numbers taken from the state and the state's first word, which follow an object's header."""
    for generator in (random.Random(1), random._inst):
        found = ctypes.c_uint64.from_address(id(generator) + object.__basicsize__)
        state = generator.getstate()[1]
        if (found.value & 0xFFFFFFFF, found.value >> 32) != (state[-1], state[0]):
            return _Unknown()  # another Python than CPython
    return found


@functools.lru_cache(maxsize=4)
def _numpy_position(generator: Any) -> Any:
    """The state's last word and the count behind it, of the Mersenne Twister that NumPy's global functions have."""
    if type(generator).__name__ != "MT19937":
        return _Unknown()
    return ctypes.c_uint64.from_address(generator.ctypes.state_address + 4 * 623)


def _numpys() -> Any:
    mtrand = sys.modules.get("numpy.random.mtrand")
    return None if mtrand is None else mtrand._rand


# -- generators that several stages have -----------------------------------------------------------------------------


def check_not_shared(stages: Sequence[nn.Module], names: Sequence[str]) -> None:
    """Refuse a generator object that layers of two stages have, as far as attributes and functions show it.

    Raises:
        ValueError: there is one.
    """
    owners: dict[int, int] = {}
    for i, stage in enumerate(stages):
        for generator in {id(g): g for g in _generators(stage)}.values():
            other = owners.setdefault(id(generator), i)
            if other != i:
                kind = f"{type(generator).__module__.partition('.')[0]}'s {type(generator).__name__}"
                raise ValueError(
                    f"{names[other]} and {names[i]} draw from the same generator, {kind}: stages that run at the same "
                    "time, or in processes, would not draw from it in one order; give each stage a generator of its "
                    "own, draw with torch's functions without a generator, or use executor='serial'"
                )


def _generators(stage: nn.Module) -> Iterator[Any]:
    for module in stage.modules():
        for value in [*vars(module).values(), type(module).forward]:
            yield from _within(value, 3)


def _within(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, _kinds()):
        yield value
    elif depth and not isinstance(value, nn.Module | torch.Tensor):
        for inner in _parts(value):
            yield from _within(inner, depth - 1)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if _filled(cell))
        yield from value.__defaults__ or ()
        yield from (value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__)
    elif isinstance(value, types.MethodType | types.BuiltinMethodType):
        yield value.__self__


def _filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _kinds() -> tuple[type, ...]:
    numpy: Any = sys.modules.get("numpy.random")
    of_numpy = (numpy.Generator, numpy.RandomState, numpy.BitGenerator) if numpy is not None else ()
    return (random.Random, torch.Generator, *of_numpy)
