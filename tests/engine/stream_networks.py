"""Networks and programs for the executors that run on streams."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import layerpipe
import layerpipe_kernels as lk
from tests.engine.fake_device import FakeDevice, Site, fake_device
from tests.engine.models import chain, minibatches


def sgd(params: list[Tensor], **options: Any) -> lk.SGD:
    # The compiled step takes addresses, which the fake device does not see.
    return lk.SGD(params, lr=0.05, momentum=0.9, backend="reference", **options)


class Skip(nn.Module):
    """Hands on what the next stage but one will add, and what needs no gradient."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor, skipped: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        mask = x > 0 if mask is None else mask
        return torch.tanh(self.layer(x)) * mask, x if skipped is None else skipped, mask


class Join(nn.Linear):
    def forward(self, x: Tensor, skipped: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + skipped * mask)


class Recomputed(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=False)  # type: ignore[no-any-return]


class Shifted(nn.Module):
    """Its weights' gradient is an expanded one, which autograd copies when it puts it down."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by.sum().exp()


def network(kind: str, count: int) -> list[nn.Module]:
    stages = chain(count)
    if kind == "skip":
        stages = [*(Skip() for _ in range(count - 1)), Join(6, 3)]
    if kind == "dropout":
        stages = [nn.Sequential(nn.Dropout(0.3), stage) for stage in stages]
    if kind == "shifted":
        stages = [nn.Sequential(stage, Shifted()) for stage in stages]
    if kind == "recomputed":
        stages = [Recomputed(stage) for stage in stages]
    return stages


def train(pipe: layerpipe.Pipeline, ticks: int) -> list[Tensor]:
    """As a program does: data made for each step and forgotten, losses used, weights looked at and changed between."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(pipe.optimizer, lambda step: 1 / (1 + step))
    losses, total = [], torch.zeros(())
    for i, (x, y) in enumerate(minibatches(ticks)):
        loss = pipe.step(x * 1, y * 1)
        if loss is not None:
            total += loss
            losses.append(loss * 1)
        del loss
        scheduler.step()
        if i == ticks // 2:
            state = copy.deepcopy(pipe.state_dict())
            for name, value in pipe.state_dict().items():
                value.data.copy_(state[name])
            for loss in pipe.drain():
                losses.append(loss * 1)
        if i == ticks - 3:
            pipe(x)
            [p.data.mul_(1) for p in pipe.parameters()]
    return losses + [loss * 1 for loss in pipe.drain()]


def pipeline(stages: list[nn.Module], executor: str, **options: Any) -> layerpipe.Pipeline:
    return layerpipe.Pipeline(stages, F.cross_entropy, sgd, executor=executor, check_finite=False, **options)


def run(
    case: tuple[str, int, dict[str, Any]],
    without: Site | None = None,
    ticks: int = 24,
    *,
    make: Callable[..., layerpipe.Pipeline] = pipeline,
    executor: str = "streams",
) -> FakeDevice:
    kind, count, options = case
    with fake_device(without) as device:
        pipe = make(network(kind, count), executor, **options)
        train(pipe, ticks)
        del pipe
    return device
