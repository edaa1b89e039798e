"""Checks that all processes of a pipeline have been given the same, before the first minibatch."""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from layerpipe.executors.ranks import Ranks
from layerpipe.optimizer import options_of

#: What says of a parameter group which stage it is of.
_OF_A_STAGE = ("delay", "past")


def check_same(ranks: Ranks, stages: Sequence[nn.Module], options: Mapping[str, Any]) -> None:
    """Refuse processes that make different pipelines, in all processes alike.

    Args:
        stages: all of them.
        options: of the pipeline.

    Raises:
        ValueError: names the first thing that differs, and the process.
    """
    if ranks.processes == 1:
        return
    from layerpipe import __version__

    values = {
        "layerpipe's version": __version__,
        "torch's version": torch.__version__,
        "the number of processes": ranks.processes,
        "the number of stages": len(stages),
        "torch's seed": torch.initial_seed(),
        **{name: getattr(value, "__qualname__", value) for name, value in options.items()},
    }
    parameters = [[(name, tuple(p.shape), p.dtype) for name, p in stage.named_parameters()] for stage in stages]
    first, *others = ranks.gather_all((values, parameters, [_checksum(stage) for stage in stages]))
    for rank, other in enumerate(others, start=1):
        for name, value in first[0].items():
            if other[0].get(name) != value:
                seed = ": call torch.manual_seed alike in all before the model is made" if "seed" in name else ""
                raise ValueError(f"{name} is {other[0].get(name)!r} in process {rank} and {value!r} in process 0{seed}")
        for stage, (mine, theirs) in enumerate(zip(first[1], other[1], strict=True)):
            if mine != theirs:
                raise ValueError(
                    f"stage {stage} has other parameters in process {rank} than in process 0: cut the model at "
                    "the same layers in all, and where that is measured (balance='time'), in one: "
                    "layerpipe.partition.cut_at(stages) is what the others' layerpipe.split takes as at="
                )
        for stage, pair in enumerate(zip(first[2], other[2], strict=True)):
            if None not in pair and pair[0] != pair[1]:
                raise ValueError(
                    f"the weights of stage {stage} in process {rank} are not those in process 0: seed all processes "
                    "alike before the model is made, or load the same weights in all"
                )


def check_same_optimizers(
    ranks: Ranks,
    own: Sequence[torch.optim.Optimizer],
    stages: Sequence[nn.Module],
    make: Callable[[int], torch.optim.Optimizer | None],
) -> None:
    """Refuse processes whose optimizers were given other options, in all processes alike.

    Stages may have options of their own. So where those of two stages differ, each process makes the optimizer of the
    same stage once more, to compare.

    Args:
        own: the optimizers of this process's stages.
        make: makes that of a stage, if it has parameters to train.

    Raises:
        ValueError: names the first option that differs, and the process.
    """
    if ranks.processes == 1:
        return
    found = [one for each in ranks.gather_all([_options(optimizer) for optimizer in own]) for one in each]
    if all(one == found[0] for one in found):
        return
    stage = next(i for i, module in enumerate(stages) if any(p.requires_grad for p in module.parameters()))
    again: list[dict[str, Any]] | None = None
    with contextlib.suppress(Exception):  # a function that knows the stages of its own process only
        made = make(stage)
        again = None if made is None else _options(made)
    first, *others = ranks.gather_all(again)
    for rank, other in enumerate(others, start=1):
        if first is None or other is None or first == other:
            continue
        said = _difference(first, other)
        raise ValueError(f"the optimizer of stage {stage} has {said[1]} in process {rank} and {said[0]} in process 0")


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    groups = [{k: v for k, v in group.items() if k not in _OF_A_STAGE} for group in options_of([optimizer])]
    return [{"class": type(optimizer).__name__, **group} for group in groups]


def _difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[str, str]:
    for mine, theirs in zip(one, other, strict=False):
        for name in (*mine, *theirs):
            if mine.get(name) != theirs.get(name):
                return f"{name}={mine.get(name)!r}", f"{name}={theirs.get(name)!r}"
    return f"{len(one)} groups", f"{len(other)} groups"


def _checksum(stage: nn.Module) -> int | None:
    """Of weights and buffers; ``None`` where some are not there, or are no plain tensors."""
    total = 0
    try:
        for tensor in itertools.chain(stage.parameters(), stage.buffers()):
            data = tensor.detach().cpu().contiguous().reshape(-1)
            total = zlib.crc32(data.view(torch.uint8).numpy().data, total)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    return total
