"""Programs of several processes that fail, stop or die."""

from __future__ import annotations

import datetime
import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
from tests.distributed.hosts import cable
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import pipeline, sgd


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Tensor:
        raise ArithmeticError("on purpose")


class _Fails(nn.Module):
    def __init__(self, where: str, calls: int) -> None:
        super().__init__()
        self.linear, self.where, self.calls = nn.Linear(6, 6), where, calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0 and self.where == "forward":
            raise ArithmeticError("on purpose")
        y = self.linear(x)
        return _Raises.apply(y) if self.calls < 0 and self.where == "backward" else y  # type: ignore[no-any-return,no-untyped-call]


def fails(rank: int, where: str, calls: int) -> None:
    """Stage 1 or the loss raises at some time; the others would train on for long."""
    count = iter(range(calls))

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if where == "loss" and next(count, None) is None:
            raise ArithmeticError("on purpose")
        return F.cross_entropy(output, target)

    stages = [chain(2)[0], _Fails(where, calls), nn.Linear(6, 3)]
    with layerpipe.Pipeline(stages, loss_fn, sgd, executor="distributed") as pipe:
        for x, y in minibatches(200):
            pipe.step(x, y)


def diverges(rank: int) -> None:
    with pipeline(chain(3), executor="distributed") as pipe:
        for i, (x, y) in enumerate(minibatches(200)):
            if i == 9 and rank == 2:
                with torch.no_grad():
                    next(pipe.parameters()).fill_(float("nan"))
            pipe.step(x, y)


def interrupted(rank: int, victim: int) -> None:
    with pipeline(chain(3), executor="distributed") as pipe:
        for i, (x, y) in enumerate(minibatches(200)):
            if i == 9 and rank == victim:
                os.kill(os.getpid(), signal.SIGINT)
            pipe.step(x, y)


def dies(rank: int, victim: int, after: int) -> None:
    with pipeline(chain(3), executor="distributed") as pipe:
        for i, (x, y) in enumerate(minibatches(200)):
            if i == after and rank == victim:
                os._exit(1)
            pipe.step(x, y)


def unplugged(rank: int, host: int, seconds: float) -> None:
    """The process of this rank takes its host off the network; the group waits so long for a tensor."""
    store, size = dist.distributed_c10d._get_default_store(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore("impatient", store),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=seconds),
    )
    try:
        with pipeline(chain(3), executor="distributed") as pipe:
            for i, (x, y) in enumerate(minibatches(200)):
                if i == 9 and rank == host:
                    cable("down")
                pipe.step(x, y)
    finally:
        if rank == host:
            cable("up")


def uneven(rank: int, counts: list[int]) -> None:
    with pipeline(chain(2), executor="distributed") as pipe:
        for x, y in minibatches(counts[rank]):
            pipe.step(x, y)
        pipe.drain()


def closes(rank: int, who: int) -> str:
    pipe = pipeline(chain(2), executor="distributed")
    for i, (x, y) in enumerate(minibatches(200)):
        if rank == who and i == 5:
            pipe.close()
            return "closed"
        pipe.step(x, y)
    return "trained"


def cut_differently(rank: int) -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    pipeline(layerpipe.split(model, 2, at=["1" if rank else "2"]), executor="distributed")


def refuses(rank: int, stage: int) -> None:
    """Stages have delays of 6, 4, 2 and 0; the factory fails for one of them."""

    def optimizer(params: list[Tensor], **past: Any) -> Any:
        if past["delay"] == 6 - 2 * stage:
            raise ArithmeticError("on purpose")
        return sgd(params, **past)

    layerpipe.Pipeline(chain(4), F.cross_entropy, optimizer, executor="distributed")


def untrained(rank: int) -> None:
    pipeline([*chain(2), nn.Tanh(), nn.Tanh()], executor="distributed")


def closes_inside(rank: int, stage: int, where: str, at: int, size: int) -> str:
    """Close the pipeline inside the ``at``-th forward, backward or loss of a stage; what each process is told.

    Whoever has been told waits for the others: the end of a process says more than a message.
    """
    stages = chain(6)
    calls: list[layerpipe.Pipeline] = []

    def call(value: Tensor) -> Tensor:
        calls.append(pipe)
        if len(calls) == at:
            pipe.close()
        return value

    if where == "forward":
        stages[stage].register_forward_pre_hook(lambda module, inputs: (call(inputs[0]),))
    elif where == "backward":
        first: Any = next(stages[stage].parameters())
        first.register_hook(call)
    loss_fn = F.cross_entropy if where != "loss" else lambda output, target: call(F.cross_entropy(output, target))
    pipe = layerpipe.Pipeline(stages, loss_fn, sgd, executor="distributed")
    said = "trained"
    try:
        for x, y in minibatches(30, size=size):
            pipe.step(x, y)
        pipe.drain()
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
    dist.barrier()
    return said
