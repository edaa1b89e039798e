"""Decays of averages of updates: rules for one EMA, and the design of a blend of several.

The past weights are ``W(t-n) = W(t) + u(t) + u(t-1) + ... + u(t-n+1)``: a rectangular window over the last ``n``
updates. An EMA is an exponential window; the rules here choose its decay, and :func:`blend` chooses a few of them and
their weights, so that the estimate comes closest to the rectangle.

``n`` is a delay in updates, a decay is a pure number in ``[0, 1)``.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DecayRule = str | float | Callable[[int], float]
Array = NDArray[np.float64]
Decays = NDArray[Any]  # real or complex


def matched(n: int) -> float:
    """Returns ``(n-1)/(n+1)``: the EMA's mean age equals the window's; exact for updates that drift linearly."""
    return (n - 1) / (n + 1) if n > 0 else 0.0


def window(n: int) -> float:
    """Returns ``n/(n+1)``: the EMA's mean age is ``n``. Kept for comparison; it looks too far back."""
    return n / (n + 1)


@functools.cache
def white(n: int) -> float:
    """Returns the decay of least mean-square error for uncorrelated updates, about ``4**(-1/n)`` for large ``n``.

    Minimises ``n (2 b**n - 1) + n**2 (1-b)/(1+b)``.
    """
    if n <= 1:
        return 0.0
    low, high = 0.0, 1.0
    while high - low > 1e-13:  # bisect the derivative, which changes sign once
        b = (low + high) / 2
        slope = 2 * n * n * b ** (n - 1) - 2 * n * n / (1 + b) ** 2
        low, high = (b, high) if slope < 0 else (low, b)
    return (low + high) / 2


#: In place of a rule, for a blend: its averages are designed to turn about each other.
COUPLED = "coupled"

RULES: dict[str, Callable[[int], float]] = {"matched": matched, "white": white, "window": window}


def resolve(rule: DecayRule, n: int) -> float:
    """Returns the decay for delay ``n`` from a rule's name, a number or a function of ``n``.

    Raises:
        ValueError: an unknown name, or a decay outside ``[0, 1)``.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"decay={rule!r} is unknown; there are: {', '.join(RULES)}, or a number")
        decay = RULES[rule](n)
    else:
        decay = float(rule(n)) if callable(rule) else float(rule)
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must be in [0, 1), got {decay} for a delay of {n}")
    return decay


class Blend(NamedTuple):
    """A filter ``sum of the last n updates ~ n * (update_tap * u(t) + sum_k taps[k] * E_k(t))``; the taps sum to 1."""

    decays: tuple[float, ...]
    taps: tuple[float, ...]
    update_tap: float
    error: float  # predicted mean-square error relative to using the latest weights
    turn: float = 0.0  # couples the first two, see :class:`layerpipe_kernels.options.PastDesign`


@functools.cache
def blend(
    n: int,
    order: int = 2,
    correlation: float = 0.9,
    newest: bool = True,
    decays: tuple[float, ...] | None = None,
    coupled: bool = False,
    horizon: float = 0.0,
) -> Blend:
    """Returns the best filter of ``order`` EMAs, and the newest update if there is one, for a delay of ``n``.

    Models the updates as AR(1) with autocorrelation ``correlation**|j-k|``, demands that constant updates come out
    exact, and minimises the mean-square error: the taps by a linear system, the decays by a grid and a polish. Each
    average is taken to carry a rounding noise of one part in a thousand (bf16's), which keeps the taps moderate.
    Computed in fp64 and cached.

    No more than ``n`` numbers can be needed to know a sum of ``n`` updates: the newest update alone is exact for
    ``n = 1``, and with it ``n - 1`` EMAs are as good as any number. :func:`useful_order` says how many those are.

    Args:
        n: delay in updates, at least 1.
        order: number of EMAs, 0 to 3; 0 is the newest update alone.
        correlation: of successive updates; the momentum for SGD, ``beta1`` for Adam, 0 without.
        newest: whether the newest update ``u(t)`` is available as one more term.
        decays: fix the decays and design the taps only.
        coupled: let the first two EMAs turn about each other, as the real and imaginary part of one complex average.
            What two remember can then end more abruptly, as the window does: half the error of two that do not, and
            taps near 1, so that rounding hardly matters. A single EMA has nothing to turn about.
        horizon: ``p`` of weight prediction: wanted is the sum of the last ``n`` updates plus ``p (u(t) - u(t-n))``.

    Raises:
        ValueError: an argument out of its range.
    """
    if n < 1:
        raise ValueError(f"a blend is designed for a delay of at least 1, got {n}")
    if order not in (0, 1, 2, 3) or order + newest == 0:
        raise ValueError(f"order must be 1, 2 or 3 EMAs, or 0 with the newest update, got {order}")
    if order == 0:
        error = _best(n, np.zeros((1, 1)), correlation, False, horizon).error
        return Blend((), (), 1.0, error)
    if not 0.0 <= correlation < 1.0:
        raise ValueError(f"correlation must be in [0, 1), got {correlation}")
    if coupled and decays is not None:
        raise ValueError(f"coupled EMAs are designed together, decays={decays} cannot be fixed")
    if coupled and order > 1:
        return _coupled(n, order, correlation, newest, horizon)
    if decays is not None:
        if len(decays) != order:
            raise ValueError(f"order={order} takes {order} decays, got {len(decays)}")
        lowest = 0.0 if newest else -1.0  # an average with decay 0 is the newest update
        if len(set(decays)) < order or not all(lowest < b < 1.0 and b >= 0.0 for b in decays):
            raise ValueError(f"decays must be distinct and in {'(' if newest else '['}0, 1), got {decays}")
        return _best(n, np.array([decays]), correlation, newest, horizon)

    # An EMA's mean age b/(1-b) is the natural, roughly logarithmic, scale of decays.
    ages = np.geomspace(0.02, 6.0 * n + 2.0, 44 if order < 3 else 26)
    candidates = np.array(list(itertools.combinations(ages, order)))
    best = _best(n, candidates / (1 + candidates), correlation, newest, horizon)
    step = ages[1] / ages[0]
    while step > 1.0005:
        centre = np.array([b / (1 - b) for b in best.decays])
        shifts = np.array(list(itertools.product((1 / step, step**-0.5, 1.0, step**0.5, step), repeat=order)))
        near = np.sort(centre * shifts, axis=1)
        near = near[(near[:, 1:] > 1.1 * near[:, :-1]).all(axis=1) & (near[:, 0] > 0.01)]
        better = _best(n, near / (1 + near), correlation, newest, horizon) if len(near) else best
        if better.error < best.error * (1 - 1e-9):
            best = better
        else:
            step **= 0.5
    return best


@functools.cache
def retapped(
    n: int, decays: tuple[float, ...], correlation: float, newest: bool, turn: float = 0.0, *, horizon: float = 0.0
) -> Blend:
    """Returns the best taps for a delay of ``n`` where the averages are those of a design for another one.

    Args:
        n: delay in updates, at least 1.
        decays: of the averages there are; distinct.
        correlation, newest, horizon: as for :func:`blend`.
        turn: of the first two, where a design has coupled them.
    """
    if n == 1 and newest and not horizon:
        return Blend(decays, (0.0,) * len(decays), 1.0, 0.0, turn)
    row: Decays = np.array([decays])
    if turn:
        row = row.astype(complex)
        row[0, :2] = complex(decays[0], turn), complex(decays[0], -turn)
    return _best(n, row, correlation, newest, horizon)


def _coupled(n: int, order: int, correlation: float, newest: bool, horizon: float) -> Blend:
    """As the search in :func:`blend`, over a complex decay's age and angle (below a right angle, so that its real part
    is a decay too), and the age of a third EMA."""
    ages, angles = np.geomspace(0.05, 2.0 * n, 24), np.geomspace(0.3, 8.0, 24) / n
    grids = [ages, angles[angles < np.pi / 2], ages][:order]

    def best_of(rows: Array) -> Blend:
        pair = rows[:, 0] / (1 + rows[:, 0]) * np.exp(1j * rows[:, 1])
        third = rows[:, 2:] / (1 + rows[:, 2:])
        rows = np.concatenate([pair[:, None], pair.conj()[:, None], third], axis=1)
        return _best(n, rows, correlation, newest, horizon)

    best = best_of(np.array(list(itertools.product(*grids))))
    step = ages[1] / ages[0]
    while step > 1.0005:
        pole, third = complex(best.decays[0], best.turn), [b / (1 - b) for b in best.decays[2:]]
        centre = [abs(pole) / (1 - abs(pole)), float(np.angle(pole)), *third]
        shifts = np.array(list(itertools.product((1 / step, step**-0.5, 1.0, step**0.5, step), repeat=order)))
        near = np.array(centre) * shifts
        better = best_of(near[near[:, 1] < np.pi / 2])
        if better.error < best.error * (1 - 1e-9):
            best = better
        else:
            step **= 0.5
    return best


def useful_order(n: int, order: int, newest: bool, predicted: bool = False) -> int:
    """Returns ``order``, or as many EMAs as improve a delay of ``n``; with predicted weights one update more counts."""
    return min(order, n + predicted - newest)


#: The two averages that a complex one and its conjugate stand for: its real and imaginary part, each with mean 1.
_PAIR = np.array([[1 + 1j, 1 - 1j], [1 - 1j, 1 + 1j]]) / 2


def _best(n: int, decays: Decays, correlation: float, newest: bool, horizon: float) -> Blend:
    """Returns the best of many rows of decays, each with its best taps; the first two may be complex and conjugate."""
    order, coupled = decays.shape[1], np.iscomplexobj(decays)
    # Columns: the exponential windows n(1-b)b^i, then the newest update n[i=0], which is the window of decay 0.
    bases = np.concatenate([decays, np.zeros((len(decays), 1))], axis=1) if newest else decays
    scale = n * (1 - bases)
    gram = _inner(bases[:, :, None], bases[:, None, :], correlation) * scale[:, :, None] * scale[:, None, :]
    cross = _inner_window(n, bases, correlation, horizon) * scale
    power = _window_power(n, correlation, horizon)
    if coupled:
        mix = np.eye(gram.shape[-1], dtype=complex)
        mix[:2, :2] = _PAIR
        gram, cross = (mix @ gram @ mix.T).real, (cross @ mix.T).real
    gram[:, range(order), range(order)] += 1e-6 * n * n
    # Eliminate the last column by sum of taps = 1: minimise |w - last - D c|^2 in the norm of the correlations.
    system = gram[:, :-1, :-1] - gram[:, :-1, -1:] - gram[:, -1:, :-1] + gram[:, -1:, -1:]
    right = cross[:, :-1] - cross[:, -1:] - gram[:, :-1, -1] + gram[:, -1:, -1]
    head = np.linalg.solve(system, right[:, :, None])[:, :, 0]
    taps = np.concatenate([head, 1 - head.sum(axis=1, keepdims=True)], axis=1)
    errors = power - 2 * (taps * cross).sum(1) + np.einsum("bi,bij,bj->b", taps, gram, taps)
    pick = int(np.argmin(errors))
    return Blend(
        decays=tuple(float(b.real) for b in decays[pick]),
        taps=tuple(float(c) for c in taps[pick, :order]),
        update_tap=float(taps[pick, order]) if newest else 0.0,
        error=float(max(errors[pick], 0.0) / power),
        turn=float(decays[pick, 0].imag) if coupled else 0.0,
    )


def _inner(a: Decays, b: Decays, rho: float) -> Decays:
    """Returns ``sum_ij a^i b^j rho^|i-j|`` over ``i, j >= 0``."""
    result: Array = (1 / (1 - a * rho) + b * rho / (1 - b * rho)) / (1 - a * b)
    return result


def _wanted(n: int, horizon: float) -> Array:
    """Returns, by the age of an update, how often it is in the wanted sum."""
    wanted: Array = np.ones(n + 1)
    wanted[0], wanted[n] = 1 + horizon, -horizon
    return wanted


def _inner_window(n: int, b: Decays, rho: float, horizon: float) -> Decays:
    """Returns ``sum_ij wanted[i] b^j rho^|i-j|`` over ``i, j >= 0``."""
    total = np.zeros_like(b)
    power, before = np.ones_like(b), np.zeros_like(b)
    for weight in _wanted(n, horizon):
        before = power + rho * before  # sum over j <= i of b^j rho^(i-j)
        total += weight * (before + power * (b * rho / (1 - b * rho)))
        power = power * b
    return total


def _window_power(n: int, rho: float, horizon: float) -> float:
    wanted = _wanted(n, horizon)
    ages = np.arange(n + 1)
    return float(wanted @ (np.float64(rho) ** abs(ages[:, None] - ages)) @ wanted)


def of_gradients(delay: float, least: float = 0.9, factor: float = 14.0) -> float:
    """Returns ``max(least, 1 - 1 / (factor n))``: a decay for the average of gradients that are ``n`` updates late.

    For optimizers with spike compensation: the later the gradients, the longer the average that the newest one is
    weighed against may be. The 14 was found in simulations of SOAP on a GPT of eight stages (docs/delay.md).

    Args:
        delay: ``n`` in updates, which may be a mean.
        least: the decay of gradients that are not late.
        factor: updates that are averaged, per update of delay.

    Raises:
        ValueError: a negative delay or factor, or a ``least`` outside [0, 1).
    """
    if not delay >= 0 or not factor >= 0 or not 0.0 <= least < 1.0:
        raise ValueError(f"a delay and its factor are at least 0 and a decay in [0, 1), got {delay}, {factor}, {least}")
    return max(least, 1 - 1 / (factor * delay)) if factor * delay else least
