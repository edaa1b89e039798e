"""A model cut into stages."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from layerpipe.partition.balance import Cuts, refine
from layerpipe.partition.balance import balance as balanced
from layerpipe.partition.cuts import Piece, find_cuts, pieces, uncuttable, unique_names
from layerpipe.partition.examples import Examples, in_order
from layerpipe.partition.fixed import hooked
from layerpipe.partition.forward import Forward, trace
from layerpipe.partition.layers import FLOPS_PER_ELEMENT, LayerGraph
from layerpipe.partition.profile import TimedCut, intraop_threads, profile_units, seconds
from layerpipe.partition.split_stage import SplitStage, is_split, label, uncompiled, wrapped

BALANCES = ("flops", "time", "params", "bytes")


def split(
    model: nn.Module,
    stages: int,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    balance: str = "flops",
    at: Sequence[str] | None = None,
    wrap: Callable[[nn.Module], Any] | None = None,
) -> list[nn.Module]:
    """Cut a model into a chain of stages of equal cost that share its layers and keep its parameter names.

    The model's ``forward`` is traced (:mod:`torch.fx`) down to torch's own layers, or, where a block's code does not
    allow that, down to the blocks of its ``nn.Sequential`` parts; where that gives nothing, or fewer blocks than
    stages, by :mod:`torch.export` with the example inputs (:func:`layerpipe.partition.forward.trace`). It is cut
    between layers wherever only tensors pass: skip connections and branches are carried along through the stages that
    they cross.

    Args:
        model: shared with the stages, not copied.
        stages: how many.
        example_inputs: arguments of a forward, a tuple, or a dict by name; needed to balance by all but ``params``, and
            by ``torch.export``. The first stage takes these arguments and no others.
        example_kwargs: arguments by name besides a tuple.
        balance: ``"flops"`` (of the forward, activations counted in as memory traffic; the same on every machine),
            ``"time"`` (forward and backward, measured here with the threads that a stage's worker will have: of every
            layer, then of the whole stages of at most :func:`four cuts <layerpipe.partition.balance.refine>`, a second
            or so for each),
            ``"bytes"`` (weights and what the backward needs) or ``"params"``.
        at: instead of balancing, the layers that begin the second stage, the third, ..., by name.
        wrap: what every stage is returned as, such as ``torch.compile``. ``balance="time"`` then measures stages
            wrapped, on copies of each cut: a compiled stage takes less than its layers do one by one.

    Raises:
        ValueError: the model cannot be traced, has fewer places to cut than stages are wanted, or uses tied weights on
            both sides of a cut; the message says what to do. Stages made by hand, a list of modules, need no ``split``.
        TypeError: ``example_inputs`` is a tensor.
    """
    examples = Examples.of(example_inputs, example_kwargs)
    if stages < 1:
        raise ValueError(f"a pipeline has at least one stage, got {stages}")
    if balance not in BALANCES:
        raise ValueError(f"balance={balance!r} is unknown; there are: {', '.join(BALANCES)}")
    if balance != "params" and examples is None and at is None:
        raise ValueError(f"balance={balance!r} runs the model: give example_inputs, or use balance='params'")
    if at is not None and len(at) != stages - 1:
        raise ValueError(f"{stages} stages have {stages - 1} cuts between them, got at={list(at)}")
    forward = trace(model, examples)
    parts = pieces(forward)
    unseen = ""
    if stages > len(parts) and examples is not None:  # whole blocks are too few
        try:
            finer = trace(model, examples, blocks=False)
            forward, parts = finer, pieces(finer)
        except ValueError as error:
            unseen = f"; looking into them: {error}"
    if stages > len(parts):
        raise ValueError(
            f"cannot split {type(model).__name__} into {stages} stages: it has {len(parts)} splittable layers "
            f"({', '.join(label(SplitStage(forward, [p])) for p in parts)})"
            f"{_why_uncuttable(forward)}{_whole(model)}{unseen}"
        )
    inputs = () if examples is None else in_order(forward.nodes, examples.by_name(model))

    def between(cuts: Sequence[int]) -> list[SplitStage]:
        return [SplitStage(forward, parts[a:b]) for a, b in itertools.pairwise(cuts)]

    timed: dict[Cuts, TimedCut] = {}

    def measure(tried: Sequence[Cuts]) -> list[list[float]]:
        for cuts in tried:
            if cuts not in timed:
                timed[cuts] = TimedCut(between(cuts), inputs, wrap)
        times = seconds([timed[cuts] for cuts in tried], at_least=1.0)
        return [[sum(stage) for stage in stages] for stages in times]

    taken: list[float] | None = None  # by each stage
    if at is not None:
        cuts = [0, *find_cuts(forward, parts, at), len(parts)]
    else:
        units = between(range(len(parts) + 1))
        threads = max(1, torch.get_num_threads() // stages)  # as a worker will have
        with intraop_threads(threads), forward.fixed.reads.undone():
            costs = _costs(parts, units, inputs, balance)
            if balance == "time":
                begin = _between_blocks(parts, costs, stages) if wrap is not None else None
                cuts, taken = refine(costs, stages, measure, begin=begin)
            else:
                cuts = balanced(costs, stages)
                taken = [sum(costs[a:b]) for a, b in itertools.pairwise(cuts)]
    made = between(cuts)
    refuse_shared(made)
    _warn_of_unused(model, made)
    names = unique_names(parts)
    for stage, first in zip(made, cuts, strict=False):
        stage.meta["begins"] = names[first]
    for stage, cost in zip(made, taken or (), strict=False):
        stage.meta["cost"] = cost
    return [wrapped(stage, wrap) for stage in made] if wrap is not None else list(made)


def cut_at(stages: Sequence[nn.Module]) -> list[str]:
    """Return where :func:`split` has cut: the layers that begin the second stage, the third, ..., as it takes them in
    ``at=``.

    Raises:
        ValueError: stages that it has not made.
    """
    begins = [stage.meta["begins"] for stage in map(uncompiled, stages) if is_split(stage)]
    if len(begins) != len(stages):
        raise ValueError("only stages that layerpipe.split made know where they were cut")
    return begins[1:]


def _between_blocks(parts: Sequence[Piece], costs: Sequence[float], stages: int) -> list[int] | None:
    """The best cuts where one tensor crosses: within a residual block, a cut is paid for with what it keeps apart."""
    ends = [0, *(i for i, piece in enumerate(parts) if i and len(piece.inputs) == 1), len(parts)]
    if len(ends) <= stages:
        return None
    blocks = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
    return [ends[i] for i in balanced(blocks, stages)]


def _costs(parts: list[Piece], units: Sequence[nn.Module], inputs: Sequence[Any], balance: str) -> list[float]:
    if balance == "params":
        return [float(sum(p.numel() for p in unit.parameters())) for unit in units]
    return costs_by(profile_units(parts, units, inputs, measure=balance == "time"), balance)


def _why_uncuttable(forward: Forward) -> str:
    """The first cut that might have been, and why it cannot be."""
    found = next(iter(uncuttable(forward).items()), None)
    return f"; no cut before {found[0]}, for example: {found[1]}" if found else ""


def _whole(model: nn.Module) -> str:
    """Modules that might be taken apart if nobody looked on."""
    names = [name for name, module in model.named_modules() if hooked(module) and [*module.children()]]
    return f"; {', '.join(names)} is not taken apart for its hooks" if names else ""


def costs_by(layers: LayerGraph, balance: str) -> list[float]:
    """Return each layer's cost when stages are balanced by one of ``BALANCES``.

    Raises:
        ValueError: ``time`` where nothing was measured.
    """
    if balance == "params":
        return [float(layer.parameters) for layer in layers.layers]
    if balance == "bytes":
        return [float(layer.weights + layer.saved) for layer in layers.layers]
    if balance == "flops":
        return [layer.forward_flops + FLOPS_PER_ELEMENT * layer.elements for layer in layers.layers]
    if any(layer.seconds is None for layer in layers.layers):
        raise ValueError("balance='time' needs layers profiled with measure=True")
    return [sum(layer.seconds or ()) for layer in layers.layers]


def share_threads(threads: int, stages: Sequence[nn.Module]) -> list[int]:
    """Return the number of threads of each stage: one at least, the rest by what :func:`split` says they cost.

    Equal shares where stages were made by hand, or balance well. The rest goes, thread by thread, to whichever stage
    would otherwise take longest.
    """
    metas = [getattr(uncompiled(stage), "meta", None) for stage in stages]
    costs = [float(meta.get("cost", 0.0)) if isinstance(meta, dict) else 0.0 for meta in metas]
    if not all(costs):
        return [max(1, threads // len(stages))] * len(stages)
    shares = [1] * len(stages)
    for _ in range(threads - len(stages)):
        slowest = max(range(len(stages)), key=lambda s: costs[s] / shares[s])
        shares[slowest] += 1
    return shares


def refuse_shared(stages: Sequence[nn.Module]) -> None:
    """Tied weights must be in one stage.

    Raises:
        ValueError: a parameter is in two.
    """
    owner: dict[nn.Parameter, int] = {}
    for i, stage in enumerate(stages):
        for name, param in stage.named_parameters():
            if owner.setdefault(param, i) != i:
                raise ValueError(
                    f"{name} of shape {tuple(param.shape)} is in stage {owner[param]} and in stage {i}; tied weights "
                    "cannot be split. Untie them, or give the stages by hand, with all between their uses in one"
                )


def _warn_of_unused(model: nn.Module, stages: Sequence[nn.Module]) -> None:
    used = {name for stage in stages for name, _ in stage.named_parameters()}
    unused = [name for name, _ in model.named_parameters() if name not in used]
    if unused:
        warnings.warn(
            f"{', '.join(unused)}: not used in the forward, so in no stage and not in the pipeline's state_dict",
            stacklevel=3,
        )
