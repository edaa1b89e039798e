"""A pipeline before it is trained: the cut, the delays, the memory, and what each schedule would give."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from layerpipe.partition import costs_by
from layerpipe.partition.balance import CapError
from layerpipe.partition.balance import balance as balanced
from layerpipe.partition.layers import Layer, LayerGraph
from layerpipe.theory import retiming
from layerpipe.theory.planning.machine import A100, Machine
from layerpipe.theory.planning.memory import Memory, history_copies, stage_memory
from layerpipe.theory.planning.parts import Parts
from layerpipe.theory.retiming import Derivation
from layerpipe.theory.simulate import BUILDERS, Report, StageCost, Timeline, layerpipe, report, run, together
from layerpipe_kernels.past import Past

#: Schedules that a plan compares.
SCHEDULES = (*BUILDERS, "layerpipe")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Consecutive layers. ``delay`` is in updates, at most; ``memory`` per kind of past weights."""

    layers: list[Layer]
    cost: StageCost
    delay: int
    in_flight: int
    memory: dict[str, Memory]

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def flops(self) -> float:
        return sum(layer.flops for layer in self.layers)

    @property
    def label(self) -> str:
        names = [layer.name for layer in self.layers]
        return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A cut network; ``stages`` and ``derivation`` are under ``schedule``, ``reports`` under each one."""

    layers: LayerGraph
    schedule: str
    stages: list[Stage]
    derivation: Derivation
    timelines: dict[str, Timeline]
    reports: dict[str, Report]

    @property
    def at(self) -> list[str]:
        """For ``layerpipe.split(model, stages, at=...)``."""
        return [stage.layers[0].name for stage in self.stages[1:]]

    @property
    def skips(self) -> list[tuple[str, str, int]]:
        """Connections that cross more than one boundary, and the activations of how many minibatches they hold."""
        found = []
        for a, b, data in self.derivation.graph.edges(data=True):
            if a.kind == b.kind == "F" and data["registers"] > self.derivation.clocking.boundary:
                found.append((str(a.layer), str(b.layer), int(data["registers"])))
        return found

    def speedup(self, schedule: str) -> float:
        """Over one processor that does it all."""
        saved = 1 - 1 / self.derivation.accumulate  # updates that are not made
        alone = sum(stage.cost.seconds - saved * stage.cost.update for stage in self.stages)
        return alone / self.reports[schedule].period

    def to_json(self) -> dict[str, Any]:
        """Everything that the tables show, in seconds, bytes and FLOPs."""
        return {
            "schedule": self.schedule,
            "accumulate": self.derivation.accumulate,
            "at": self.at,
            "skips": self.skips,
            "stages": [
                {
                    "layers": [layer.name for layer in stage.layers],
                    "parameters": stage.parameters,
                    "flops": stage.flops,
                    "delay": stage.delay,
                    "in_flight": stage.in_flight,
                    "seconds": stage.cost.seconds,
                    "received": stage.cost.received,
                    "memory": {past: {**m._asdict(), "total": m.total} for past, m in stage.memory.items()},
                }
                for stage in self.stages
            ],
            "schedules": {
                name: {**dataclasses.asdict(found), "speedup": self.speedup(name)}
                for name, found in self.reports.items()
            },
        }


def plan(
    layers: LayerGraph,
    *,
    stages: int | None = None,
    memory_per_stage: float | None = None,
    schedule: str = "lockstep",
    past: str | Past = "blend",
    momentum: float = 0.9,
    balance: str = "roofline",
    machine: Machine = A100,
    microbatches: int = 8,
    accumulate: int = 1,
    simulate: Sequence[str] = SCHEDULES,
) -> Plan:
    """Cut a network into stages and predict what comes of it.

    Args:
        layers: from :func:`layerpipe.partition.profile.profile`.
        stages: how many; without it, the fewest that keep to ``memory_per_stage``, or 4.
        memory_per_stage: bytes that no stage may need, under ``schedule`` and ``past``.
        schedule: ``"lockstep"``, ``"1f1b"`` or ``"sequential"``.
        balance: ``"roofline"`` (this machine's seconds), or one of :data:`layerpipe.partition.BALANCES`.
        microbatches: parts of a minibatch under ``gpipe``.
        accumulate: minibatches per update, under every schedule but ``layerpipe``.
        simulate: schedules to compare.

    Raises:
        ValueError: an unknown name, more stages than layers, tied weights on both sides of a cut, or memory that no
            cut keeps to.
    """
    _check(simulate, SCHEDULES, "simulate")
    retiming.clocking(schedule)
    history_copies(past, 1, momentum=momentum)
    costs = [machine.cost(layer, layers.crossing[i]) for i, layer in enumerate(layers.layers)]
    weights = [cost.seconds for cost in costs] if balance == "roofline" else costs_by(layers, balance)

    parts = Parts(layers)

    def memory_of(stage: int, at: Any, delay: int, in_flight: int, kind: str | Past) -> Memory:
        return stage_memory(
            weights=parts.weights[at],
            no_past=0 if stage else parts.no_past[at],
            largest=(parts.largest if stage else parts.largest_past)[at],
            activations=in_flight * parts.activations[at],
            delay=delay, past=kind, momentum=momentum,
        )  # fmt: skip

    def cut(count: int) -> list[int]:
        if memory_per_stage is None:
            return balanced(weights, count)
        # Delays depend on how many stages there are, not on what is in them.
        found = retiming.derive(count, [[s] for s in range(count)], schedule, accumulate)
        memory = [
            np.where(parts.empty, np.inf, memory_of(s, ..., delay, in_flight, past).total)
            for s, (delay, in_flight) in enumerate(zip(found.delays, found.in_flight, strict=True))
        ]
        try:
            return balanced(weights, count, memory=memory, cap=memory_per_stage)
        except CapError as error:
            raise ValueError(
                f"no cut into {count} stages keeps every stage to {readable(memory_per_stage)} under {schedule} and "
                f"past={past!r}; {readable(error.least)} would do"
            ) from error

    if stages is not None or memory_per_stage is None:
        cuts = cut(min(4, len(layers)) if stages is None else _stages(stages, layers))
    else:
        cuts = _fewest(cut, len(layers))
    _refuse_tied(layers, cuts)
    names = [layer.name for layer in layers.layers]
    grouping = [names[a:b] for a, b in itertools.pairwise(cuts)]
    derivation = retiming.derive(layers.graph(), grouping, schedule, accumulate)

    made = []
    for s, (a, b) in enumerate(itertools.pairwise(cuts)):
        n, flying = derivation.delays[s], derivation.in_flight[s]
        cost = together(costs[a:b])
        memory = {
            kind: Memory(*map(int, memory_of(s, (a, b), n, flying, kind)))
            for kind in ("stash", "latest", "ema", "momentum", "blend")
            if momentum or kind != "momentum"
        }
        made.append(Stage(layers.layers[a:b], cost, n, flying, memory))
    minibatches = 16 + 3 * len(made)  # what is ever in flight, and some more
    timelines = {}
    for name in simulate:
        if name == "layerpipe":
            # Its tasks come in no fixed order: more of them, so that their jitter averages out.
            tasks = layerpipe(
                costs, len(made), 64 + minibatches, [layer.weights for layer in layers.layers], machine.link
            )
        else:
            count = minibatches + 4 * (accumulate - 1) if name in ("1f1b", "lockstep") else 6 * accumulate
            tasks = BUILDERS[name]([stage.cost for stage in made], count, microbatches, accumulate)
        timelines[name] = run(tasks, machine.link, len(made))
    reports = {name: report(timeline) for name, timeline in timelines.items()}
    return Plan(layers, schedule, made, derivation, timelines, reports)


def readable(size: float) -> str:
    """Bytes in three digits, rounded up, as ``--memory-per-stage`` reads them but for the B."""
    unit, factor = next(((u, f) for u, f in (("G", 1e9), ("M", 1e6), ("k", 1e3)) if size >= f), ("", 1.0))
    digits = max(0, 3 - len(str(int(size / factor))))
    return f"{math.ceil(size / factor * 10**digits - 1e-9) / 10**digits:.{digits}f} {unit}B"


def _check(names: Sequence[str], known: Any, what: str) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{what}={unknown[0]!r} is unknown; there are: {', '.join(known)}")


def _stages(stages: int, layers: LayerGraph) -> int:
    if not 1 <= stages <= len(layers):
        raise ValueError(f"cannot cut into {stages} stages: the network has {len(layers)} places to begin one")
    return stages


def _fewest(cut: Callable[[int], list[int]], most: int) -> list[int]:
    """The fewest stages for which there is a cut."""
    for count in range(1, most + 1):
        try:
            return cut(count)
        except ValueError as error:
            reason = error
    raise ValueError(f"no number of stages helps: {reason}")


def _refuse_tied(layers: LayerGraph, cuts: Sequence[int]) -> None:
    stage_of = [s for s, (a, b) in enumerate(itertools.pairwise(cuts)) for _ in range(a, b)]
    for name, a, b in layers.tied:
        if stage_of[a] != stage_of[b]:
            raise ValueError(
                f"{name} is used by {layers.layers[a].name} in stage {stage_of[a]} and by {layers.layers[b].name} in "
                f"stage {stage_of[b]}; tied weights cannot be split. Untie them, or give the stages by hand, with both "
                "uses in one of them"
            )
