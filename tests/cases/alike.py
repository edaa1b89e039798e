"""A pipeline beside the simulation: the same losses and the same weights, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.delayed_training import DelayedTraining

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}


def trained_alike(
    stages: Callable[[], list[nn.Module]], data: list[tuple[Tensor, Tensor]], executor: str = "serial", **options: Any
) -> None:
    theirs, ours = stages(), stages()
    options = {"schedule": "lockstep", "past": "stash", **options}
    simulated = DelayedTraining(
        theirs, F.cross_entropy, lambda params: torch.optim.SGD(params, foreach=False, **SGD), **options
    )
    want = simulated.train(data)
    with layerpipe.Pipeline(
        ours,
        F.cross_entropy,
        lambda params, **past: lk.SGD(params, **SGD, **past),
        executor=executor,
        threads_per_stage=torch.get_num_threads(),
        **options,
    ) as pipe:
        got = [loss for x, y in data if (loss := pipe.step(x, y)) is not None] + pipe.drain()
    assert all(map(torch.equal, got, want))
    for mine, other in zip(ours, theirs, strict=True):
        for name, value in other.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value), name
