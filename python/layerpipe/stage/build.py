"""The stages of a pipeline, each with the optimizer that its factory makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from layerpipe.errors import divergence_advice
from layerpipe.executors.agreement import check_same_optimizers
from layerpipe.executors.ranks import Ranks
from layerpipe.executors.replicas import Replicas
from layerpipe.loss import LossWeights
from layerpipe.stage.accumulation import Accumulation
from layerpipe.stage.foreign import Owners, check_held
from layerpipe.stage.network_norm import NetworkNorm
from layerpipe.stage.random_numbers import RandomNumbers
from layerpipe.stage.stage import Stage
from layerpipe_kernels import Past, mark_embeddings_and_output

OptimizerFactory = Callable[..., torch.optim.Optimizer]


def build(
    modules: Sequence[nn.Module],
    optimizer: OptimizerFactory,
    *,
    past: str | Past,
    accumulations: Sequence[Accumulation],
    names: Sequence[str],
    random: Sequence[RandomNumbers | None],
    loss: LossWeights,
    ranks: Ranks,
    network_norm: bool,
    **options: Any,
) -> list[Stage]:
    """The stages of this process.

    Args:
        modules, accumulations, names, random: one for each of all stages.
        optimizer: called for every stage with parameters.
        loss: whose weights the last stage trains.
        network_norm: whether ``max_norm`` is of all stages' gradients together.
        past: what it is given besides the delay.
        options: of :class:`Stage`, the same for all.

    Raises:
        ValueError: an optimizer holds other parameters than its stage's.
        Exception: what a factory raised in this process; a RuntimeError where it was another one.
        ValueError: the factory gives one stage's optimizer other options in another process.
    """
    advice = divergence_advice(past, max(a.delay for a in accumulations))

    owners = Owners(modules, names)

    def make_optimizer(i: int) -> torch.optim.Optimizer | None:
        params = [p for p in modules[i].parameters() if p.requires_grad]
        if i == len(modules) - 1 and not params:
            params = [*loss.trained.values()]
        return optimizer(params, delay=accumulations[i].delay, past=past) if params else None

    def make(i: int) -> Stage:
        last = i == len(modules) - 1
        mark_embeddings_and_output(modules[i], output=last)
        stepping = make_optimizer(i)
        if stepping is not None:
            if last:
                loss.train_with(stepping)
            check_held(names[i], modules[i], stepping, owners, last=last)
        return Stage(
            modules[i],
            stepping,
            index=i,
            accumulation=accumulations[i],
            name=names[i],
            advice=advice,
            random=random[i],
            owners=owners,
            last=i == len(modules) - 1,
            **options,
        )

    made: list[Stage] = []
    error: Exception | None = None
    try:
        made += [make(i) for i in ranks.own]
    except Exception as caught:
        error = caught
    ranks.agree(error, RuntimeError)
    for stage in made:
        if ranks.notices is not None:
            group = ranks.averaging[stage.index]
            buffers = [*stage.module.buffers(), *(loss.buffers.values() if stage.last else ())]
            stage.replicas = Replicas(group, ranks.notices, stage.params, buffers, names[stage.index])
        if network_norm:
            stage.network_norm = NetworkNorm(stage.index, len(modules))
    check_same_optimizers(ranks, [s.optimizer for s in made if s.optimizer is not None], modules, make_optimizer)
    return made
