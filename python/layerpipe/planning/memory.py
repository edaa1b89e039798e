"""Bytes that a stage keeps, by kind of past weights; predicted, where ``Pipeline.memory`` measures."""

from __future__ import annotations

import functools
from typing import NamedTuple

from layerpipe_kernels import history


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
def history_copies(past: str, delay: int, *, order: int = 2, momentum: float = 0.9) -> int:
    """Copies of a stage's weights that its history keeps.

    Raises:
        ValueError: an unknown kind, or options that it cannot work with.
    """
    if past not in history.KINDS:
        raise ValueError(f"past={past!r} is unknown; there are: {', '.join(history.KINDS)}")
    if not delay:
        return 0
    if past == "stash":
        return delay
    settings = history.Settings(delay=delay, order=order, momentum=momentum, correlation=momentum, newest=momentum > 0)
    return history.make(past, settings).emas


def stage_memory(
    *,
    weights: int,
    largest: int,
    activations: int,
    delay: int,
    past: str,
    order: int = 2,
    momentum: float = 0.9,
    no_past: int = 0,
) -> Memory:
    """What a stage keeps.

    Args:
        weights: bytes of its parameters.
        largest: bytes of the largest one.
        activations: bytes kept for the backwards of all minibatches in flight.
        delay: its ``n``.
        past: kind of past weights, with the ``order`` of a blend.
        momentum: of SGD; without there is no buffer.
        no_past: bytes of parameters whose past no backward reads.
    """
    copies = history_copies(past, delay, order=order, momentum=momentum)
    # A stashed version is handed out where it lies; everything else is written before the backward reads it.
    scratch = largest if delay and past != "stash" else 0
    return Memory(weights, weights, weights if momentum else 0, copies * (weights - no_past), scratch, activations)
