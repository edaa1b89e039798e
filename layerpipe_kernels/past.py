"""Kinds of past weights and their options, one value each, as optimizers and pipelines take them in ``past=``.

A kind is also spelled in a string: its name, then its options between colons, as in ``"blend:order=3:decay=coupled"``.
Several decays are joined by plus signs, ``"blend:decay=0.5+0.8"``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from layerpipe_kernels.decay import COUPLED, RULES, DecayRule, resolve

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NORMS = (None, "match")


class Past:
    """A way to estimate the weights of ``delay`` updates ago; the base of the kinds below.

    A kind has some of these options; of the others it has the defaults.

    Attributes:
        dtype: of the averages, ``torch.float32`` or ``torch.bfloat16``, which is rounded stochastically; ``None`` is
            that of the optimizer's state.
        norm: ``"match"`` scales past weights to the norm that the true ones had, kept as ``delay`` numbers per tensor.
        materialize: the optimizer's step writes the past weights itself, at the price of one more copy of the weights.
        seed: of the stochastic rounding; the same seed gives the same bits on every backend.
    """

    kind: ClassVar[str]
    dtype: torch.dtype | None = None
    norm: str | None = None
    materialize: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in (None, *_DTYPES.values()):
            raise ValueError(f"{self._of('dtype')} must be torch.float32 or torch.bfloat16, got {self.dtype}")
        if self.norm not in _NORMS:
            raise ValueError(f"{self._of('norm')} must be None or 'match', got {self.norm!r}")
        if not isinstance(self.materialize, bool):
            raise ValueError(f"{self._of('materialize')} must be True or False, got {self.materialize!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"{self._of('seed')} must be a whole number, got {self.seed!r}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._given())})"

    def __str__(self) -> str:
        """Returns the spelling that :func:`parse` takes, without the options that have their default. A decay that is a
        function is spelled by its name, which cannot be parsed."""
        return ":".join((self.kind, *(f"{name}={_spelled(value)}" for name, value in self._given())))

    def _given(self) -> list[tuple[str, Any]]:
        """Returns the options that do not have their default."""
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]  # of every subclass
        return [(f.name, getattr(self, f.name)) for f in fields if getattr(self, f.name) != f.default]

    def _of(self, option: str) -> str:
        return f"the {option} of past={self.kind!r}"


@dataclass(frozen=True, repr=False)
class Blend(Past):
    """Estimates the sum of the last ``delay`` updates by a few EMAs and the newest update, at the least mean error.

    Args:
        order: number of EMAs, 1 to 3; short delays keep fewer.
        decay: of the EMAs. ``None``: designed for the delay. ``"coupled"``: designed, too, the first two turning about
            each other, at half the error or less. A tuple: one number in ``[0, 1)`` per EMA. A rule as :class:`EMA` has
            it: of the one EMA of ``order=1``.
        dtype, norm, materialize, seed: as in :class:`Past`.

    Raises:
        ValueError: an option out of its range, or a decay that does not go with the order.
    """

    kind: ClassVar[str] = "blend"
    order: int = 2
    decay: DecayRule | tuple[float, ...] | None = None
    dtype: torch.dtype | None = None
    norm: str | None = None
    materialize: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.order, bool) or self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3 EMAs, got {self.order!r}")
        if self.decay is None:
            return
        if self.decay == COUPLED:
            if self.order == 1:
                raise ValueError("decay='coupled' couples two EMAs; give order=2 or 3")
        elif isinstance(self.decay, tuple):
            if len(self.decay) != self.order:
                raise ValueError(f"order={self.order} takes {self.order} decays, got decay={self.decay}")
            for decay in self.decay:
                _check_rule(decay)
            if self.order == 1:
                object.__setattr__(self, "decay", self.decay[0])
        elif self.order > 1:
            raise ValueError(
                f"past='blend' of order {self.order} designs its decays; give 'coupled', or a tuple of {self.order} to "
                f"fix them, got decay={self.decay!r}"
            )
        else:
            _check_rule(self.decay)


@dataclass(frozen=True, repr=False)
class EMA(Past):
    """Estimates the sum of the last ``delay`` updates as ``delay`` times one EMA of updates (arXiv 2512.08160).

    Args:
        decay: ``"matched"``, ``"white"`` or ``"window"`` (:mod:`layerpipe_kernels.decay`), a number in ``[0, 1)``, or a
            function of the delay, which checkpoints leave out.
        of: ``"update"``, or ``"gradient"`` for the paper's literal form, which is scaled by the last learning rate.
        dtype, norm, materialize, seed: as in :class:`Past`.

    Raises:
        ValueError: an option out of its range, or ``materialize`` with an EMA of gradients.
    """

    kind: ClassVar[str] = "ema"
    decay: DecayRule = "matched"
    of: str = "update"
    dtype: torch.dtype | None = None
    norm: str | None = None
    materialize: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.decay, tuple):
            raise ValueError(f"past='ema' has one EMA and one decay, got decay={self.decay}")
        _check_rule(self.decay)
        if self.of not in ("update", "gradient"):
            raise ValueError(f"an EMA is of='update' or of='gradient', got of={self.of!r}")
        if self.of == "gradient" and self.materialize:
            raise ValueError("materialize=True needs an EMA of='update'")


@dataclass(frozen=True, repr=False)
class Momentum(Past):
    """Extrapolates SGD's momentum buffer geometrically; keeps nothing of its own.

    Args:
        norm, materialize: as in :class:`Past`.
    """

    kind: ClassVar[str] = "momentum"
    norm: str | None = None
    materialize: bool = False


@dataclass(frozen=True, repr=False)
class Latest(Past):
    """Takes the present weights for the past ones; keeps nothing.

    Args:
        norm: as in :class:`Past`.
    """

    kind: ClassVar[str] = "latest"
    norm: str | None = None


@dataclass(frozen=True, repr=False)
class Stash(Past):
    """Keeps a copy of each of the last ``delay`` versions of the weights: exact."""

    kind: ClassVar[str] = "stash"


KINDS: dict[str, type[Past]] = {kind.kind: kind for kind in (Stash, Latest, EMA, Momentum, Blend)}


def parse(past: str | Past) -> Past:
    """Returns the value that a string spells; a value is returned as it is.

    Raises:
        ValueError: an unknown kind, an option that the kind does not have, or one out of its range.
    """
    if isinstance(past, Past):
        return past
    if not isinstance(past, str):
        raise ValueError(f"past must be a name or a value such as Blend(order=2), got {past!r}")
    return _parse(past)


def option(past: str | Past) -> str | Past:
    """Returns the spelling, by which parameter groups and checkpoints have it; a value that cannot be spelled, as one
    of its options is a function, is returned as it is.

    Raises:
        ValueError: as :func:`parse` does.
    """
    past = parse(past)
    return past if callable(getattr(past, "decay", None)) else str(past)


@functools.cache
def _parse(past: str) -> Past:
    name, *options = past.split(":")
    if name not in KINDS:
        raise ValueError(f"past={past!r} is unknown; there are: {', '.join(KINDS)}")
    kind: Any = KINDS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    values = {}
    for option in options:
        key, _, text = option.partition("=")
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"past={past!r}: {name} has no option {key!r}; {has}")
        if key in values:
            raise ValueError(f"past={past!r} has {key} twice")
        try:
            values[key] = _READERS[key](text)
        except (KeyError, ValueError):
            raise ValueError(f"past={past!r}: {key} cannot be {text!r}") from None
    try:
        made: Past = kind(**values)
    except ValueError as error:
        raise ValueError(f"past={past!r}: {error}") from None
    return made


def _check_rule(rule: DecayRule) -> None:
    """Refuse what is neither a rule's name, a number in [0, 1) nor a function."""
    if not callable(rule):
        try:
            resolve(rule, 1)
        except TypeError:
            raise ValueError(f"decay must be a rule's name, a number or a function, got {rule!r}") from None


def _spelled(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_spelled, value))
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, bool):
        return str(value).lower()
    return getattr(value, "__qualname__", None) or str(value)


def _decay(text: str) -> DecayRule | tuple[float, ...]:
    if text in RULES or text == COUPLED:
        return text
    numbers = tuple(map(float, text.split("+")))
    return numbers[0] if len(numbers) == 1 else numbers


_READERS: dict[str, Callable[[str], Any]] = {
    "order": int,
    "decay": _decay,
    "of": str,
    "dtype": _DTYPES.__getitem__,
    "norm": str,
    "materialize": {"true": True, "false": False}.__getitem__,
    "seed": int,
}
