"""LayerPipe's schedule (Unnikrishnan and Parhi, arXiv 2108.06629), as we read its abstract.

*Intra-layer*: a weight gradient ``W`` is a task of its own. It does not hold up the activation gradient ``B``, and may
run on another processor than its layer's forward. *Inter-layer*: an activation gradient is divided into two parts that
two neighbouring processors compute, so that every processor has the same to do.

Placement: the tasks ``F``, ``B``, ``W`` of the first layer, in whatever order is best, then those of the second, ...
are laid out on a line and cut into one stretch per processor; a cut may fall between tasks, or anywhere inside a ``B``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from layerpipe.theory.simulate.events import Key, Link, Task, Wait
from layerpipe.theory.simulate.schedules import StageCost, together


class Piece(NamedTuple):
    """A part of a layer's work on one processor: ``share`` of one of its tasks."""

    kind: str
    layer: int
    part: int
    processor: int
    share: float


@dataclasses.dataclass(frozen=True)
class Placement:
    pieces: list[Piece]
    period: float  # the busiest processor's seconds per minibatch


def place(layers: Sequence[StageCost], processors: int) -> Placement:
    """The line and the cut whose busiest processor has the least to do.

    For a given period, filling one processor after the other to the brim is best; the least period for which that
    succeeds is found by bisection.

    Raises:
        ValueError: fewer than one processor.
    """
    if processors < 1:
        raise ValueError(f"a schedule needs at least one processor, got {processors}")
    whole = sum(layer.seconds for layer in layers)
    low, high = whole / processors, whole
    best = _fill(layers, processors, high)
    assert best is not None
    for _ in range(40):
        middle = (low + high) / 2
        found = _fill(layers, processors, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return Placement(best, high)


class _Filled(NamedTuple):
    processor: int
    room: float  # that is left on it
    pieces: list[Piece]


def _fill(layers: Sequence[StageCost], processors: int, period: float) -> list[Piece] | None:
    period *= 1 + 1e-9
    state = _Filled(0, period, [])
    for number, layer in enumerate(layers):
        tasks = {"B": layer.backward, "F": layer.forward, "W": layer.gradient + layer.update}
        found = (_pour(number, tasks, order, state, period) for order in itertools.permutations("BFW"))
        ways = [way for way in found if way is not None and way.processor < processors]
        if not ways:
            return None
        # Fewer processors and more room can only be better for all that follows.
        state = min(ways, key=lambda way: (way.processor, -way.room))
    return state.pieces


def _pour(
    layer: int, tasks: Mapping[str, float], order: Sequence[str], state: _Filled, period: float
) -> _Filled | None:
    """One layer's tasks in this order, or None where one does not fit into a period."""
    processor, room, pieces = state.processor, state.room, list(state.pieces)
    for kind in order:
        left, part = tasks[kind], 0
        if kind == "B" and left > room > 1e-6 * period:  # no crumbs
            pieces.append(Piece(kind, layer, part, processor, room / left))
            left, part = left - room, 1
        if part or left > room:
            processor, room = processor + 1, period
        if left > room:
            return None
        pieces.append(Piece(kind, layer, part, processor, left / tasks[kind] if left else 1.0))
        room -= left
    return _Filled(processor, room, pieces)


def layerpipe(
    layers: Sequence[StageCost],
    processors: int,
    minibatches: int,
    weights: Sequence[int] | None = None,
    link: Link = Link(),  # noqa: B008 (immutable)
) -> list[Task]:
    """The tasks of a placed network; a processor that is free takes the oldest minibatch's.

    As many minibatches are let in as one takes to pass, so that nobody waits and staleness stays bounded.

    Args:
        layers: costs of each layer, not of stages.
        weights: bytes of each layer's; they are sent where a layer's tasks are spread over processors.
        link: how long a minibatch is under way also depends on it.
    """
    placement = place(layers, processors)
    seconds = sum(layer.forward + layer.backward + layer.gradient for layer in layers)
    layers, pieces, weights = _merged(layers, placement.pieces, weights)
    by_layer: dict[tuple[str, int], list[Piece]] = {}
    homes: dict[int, set[int]] = defaultdict(set)
    for piece in pieces:
        by_layer.setdefault((piece.kind, piece.layer), []).append(piece)
        homes[piece.layer].add(piece.processor)
    for piece in pieces:
        if piece.layer and piece.kind != "W" and homes[piece.layer] != homes[piece.layer - 1]:
            seconds += layers[piece.layer].received / link.bandwidth + link.latency
    admitted = max(1, math.ceil(2 * seconds / placement.period)) if placement.period else 1
    return [_task(layers, by_layer, piece, m, admitted, weights) for m in range(minibatches) for piece in pieces]


def _merged(
    layers: Sequence[StageCost], pieces: Sequence[Piece], weights: Sequence[int] | None
) -> tuple[list[StageCost], list[Piece], list[int] | None]:
    """Neighbouring layers that one processor has to itself, made one: the same work in fewer tasks."""
    homes: list[set[int]] = [set() for _ in layers]
    for piece in pieces:
        homes[piece.layer].add(piece.processor)
    groups: list[list[int]] = []
    for number, home in enumerate(homes):
        if groups and len(home) == 1 and homes[groups[-1][-1]] == home:
            groups[-1].append(number)
        else:
            groups.append([number])
    group_of = {number: i for i, group in enumerate(groups) for number in group}
    kept = [piece._replace(layer=group_of[piece.layer]) for piece in pieces]
    sums = None if weights is None else [sum(weights[number] for number in group) for group in groups]
    return [together([layers[n] for n in group]) for group in groups], list(dict.fromkeys(
        piece._replace(share=1.0) if len(groups[piece.layer]) > 1 else piece for piece in kept
    )), sums  # fmt: skip


def _task(
    layers: Sequence[StageCost],
    by_layer: dict[tuple[str, int], list[Piece]],
    piece: Piece,
    minibatch: int,
    admitted: int,
    weights: Sequence[int] | None,
) -> Task:
    kind, number, part, processor, share = piece
    layer = layers[number]
    key = Key(kind, number, minibatch, part)
    last = number == len(layers) - 1
    priority = (minibatch, {"B": 0, "F": 1, "W": 2}[kind])
    if kind == "F":
        after = [Wait(Key("F", number - 1, minibatch), layer.received)] if number else []
        if not number and minibatch >= admitted:  # let in when the oldest one is done
            after.append(Wait(Key("W", 0, minibatch - admitted)))
        return Task(key, processor, layer.forward, tuple(after), priority)
    after = [Wait(Key("F", number, minibatch), 0 if last else layers[number + 1].received)]
    if not last:
        after += [
            Wait(Key("B", number + 1, minibatch, p.part), round(layers[number + 1].received * p.share))
            for p in by_layer["B", number + 1]
        ]
    if kind == "B":
        return Task(key, processor, layer.backward * share, tuple(after), priority)
    if number:
        after.append(Wait(Key("F", number - 1, minibatch), layer.received))  # the saved input
    homes = {p.processor for k in "FB" for p in by_layer[k, number]} - {processor}
    sends = tuple((home, weights[number]) for home in sorted(homes)) if weights else ()
    return Task(key, processor, layer.gradient + layer.update, tuple(after), priority, True, sends)
