"""Bytes that a stage keeps, by kind of past weights; predicted, where ``Pipeline.memory`` measures."""

from __future__ import annotations

import functools
from typing import NamedTuple

from layerpipe_kernels import history
from layerpipe_kernels.past import Past, Stash, parse


class Memory(NamedTuple):
    """Bytes of one stage."""

    weights: int
    gradients: int
    optimizer: int  # momentum
    history: int  # for past weights
    scratch: int  # the largest past weight, made for a backward
    activations: int  # of all minibatches in flight

    @property
    def total(self) -> int:
        return sum(self)


@functools.cache
def history_copies(past: str | Past, delay: int, *, momentum: float = 0.9) -> int:
    """Returns how many copies of a stage's weights its history keeps.

    Raises:
        ValueError: an unknown kind, or options that it cannot work with.
    """
    kind = parse(past)
    if not delay:
        return 0
    if isinstance(kind, Stash):
        return delay
    settings = history.Settings(delay, kind, momentum=momentum, correlation=momentum, newest=momentum > 0)
    return history.make(settings).emas


def stage_memory(
    *,
    weights: int,
    largest: int,
    activations: int,
    delay: int,
    past: str | Past,
    momentum: float = 0.9,
    no_past: int = 0,
) -> Memory:
    """Bytes that a stage keeps.

    Args:
        weights: bytes of its parameters.
        largest: bytes of the largest one.
        activations: bytes kept for the backwards of all minibatches in flight.
        delay: its ``n``.
        past: kind of past weights.
        momentum: of SGD; without there is no buffer.
        no_past: bytes of parameters whose past no backward reads.
    """
    copies = history_copies(past, delay, momentum=momentum)
    # A stashed version is handed out where it lies; everything else is written before the backward reads it.
    scratch = largest if delay and not isinstance(parse(past), Stash) else 0
    return Memory(weights, weights, weights if momentum else 0, copies * (weights - no_past), scratch, activations)
