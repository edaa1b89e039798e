"""Optimizers and programs of the cases that several processes run, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import sgd


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def plain_sgd(params: Any) -> lk.SGD:
    return lk.SGD(params, lr=0.05, momentum=0.9)


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


class Counting(torch.optim.Optimizer):
    """Adam with its step count in the group, made with it, as several published optimizers have it."""

    OWN = ("k",)

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s["m"], s["v"] = torch.zeros_like(p), torch.zeros_like(p)
                s["m"].lerp_(p.grad, 0.1)
                s["v"].lerp_(p.grad**2, 0.001)
                step = (s["m"] / (1 - 0.9 ** group["k"])) / ((s["v"] / (1 - 0.999 ** group["k"])).sqrt() + 1e-8)
                p.sub_(step, alpha=group["lr"])


class Estimating(torch.optim.Optimizer):
    """Estimates its step size in its groups as it goes, and averages weights by a sum of rates kept there: the two
    kinds of numbers that learning-rate-free and schedule-free optimizers have."""

    OWN = ("d", "k", "weight_sum")

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "d": 1e-3, "k": 0, "weight_sum": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            norm = sum(float(p.grad.norm()) for p in group["params"])
            group["d"] = max(group["d"], min(group["d"] * 1.2, 0.05 / (norm + 1e-6)))
            group["k"] += 1
            rate = group["lr"] * group["d"]
            group["weight_sum"] += rate**2
            share = rate**2 / group["weight_sum"] if group["weight_sum"] else 0.0
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["z"] = p.clone()
                state["z"].sub_(p.grad, alpha=rate)
                p.lerp_(state["z"], max(share, 0.5))


def counting(params: Any, **past: Any) -> lk.PastWeights:
    return lk.PastWeights(Counting(params), **past)


def estimating(params: Any, **past: Any) -> lk.PastWeights:
    return lk.PastWeights(Estimating(params), **past)


def counted(rank: int, executor: str, schedule: str, optimizer: str, checkpoint: str | None) -> dict[str, Any]:
    """Train 24 minibatches with a schedule and two drains; counts and weights as numbers.

    Args:
        checkpoint: where to write after half of the minibatches, and go on from in a pipeline of its own.
    """
    make = {"counting": counting, "estimating": estimating}[optimizer]
    pipe = layerpipe.Pipeline(chain(4), F.cross_entropy, make, schedule=schedule, executor=executor)
    rate = torch.optim.lr_scheduler.ExponentialLR(pipe.optimizer, 0.97)
    for i, (x, y) in enumerate(minibatches(24)):
        pipe.step(x, y)
        rate.step()
        if i in (5, 11):
            pipe.drain()
        if i == 11 and checkpoint is not None:
            pipe.checkpoint(checkpoint, rate=rate.state_dict())
            pipe.close()
            pipe = layerpipe.Pipeline(chain(4, seed=1), F.cross_entropy, make, schedule=schedule, executor=executor)
            rate = torch.optim.lr_scheduler.ExponentialLR(pipe.optimizer, 0.97)
            rate.load_state_dict(pipe.resume(checkpoint)["rate"])
    pipe.drain()
    counts = [
        g["k"] for stage in pipe.ranks.by_stage([stage.optimizer.param_groups for stage in pipe.stages]) for g in stage
    ]  # type: ignore[union-attr]
    state = {name: value.tolist() for name, value in pipe.state_dict().items()}
    pipe.close()
    return {"counts": counts, "state": state}


class Weighted(nn.Module):
    """A loss with learned weights of the classes, and a count in a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(out * self.scale, y)


def weighted(rank: int, executor: str, schedule: str, checkpoint: str | None) -> dict[str, Any]:
    """Train with a loss that has weights, as :func:`counted` does; its weights and the network's."""

    def make() -> layerpipe.Pipeline:
        return layerpipe.Pipeline(chain(4), Weighted(), sgd, schedule=schedule, executor=executor)

    pipe = make()
    for i, (x, y) in enumerate(minibatches(20)):
        pipe.step(x, y)
        if i == 10:
            pipe.drain()
            if checkpoint is not None:
                pipe.checkpoint(checkpoint)
                pipe.close()
                pipe = make()
                pipe.resume(checkpoint)
    pipe.drain()
    loss: Any = pipe.loss_fn
    state = {name: value.tolist() for name, value in pipe.state_dict().items()}
    pipe.close()
    return {"scale": loss.scale.tolist(), "calls": loss.calls.item(), "state": state}


def asks(rank: int, where: str, what: str) -> None:
    """Ask for something that waits for all stages from inside the last process's stage or loss."""
    box: list[layerpipe.Pipeline] = []

    def ask(value: Tensor) -> Tensor:
        if box:
            {"pipe(x)": lambda: box[0](torch.randn(2, 6)), "drain": box[0].drain}[what]()
        return value

    stages = chain(4)
    if where == "forward":
        stages[3].register_forward_pre_hook(lambda module, inputs: (ask(inputs[0]),))
    loss = F.cross_entropy if where == "forward" else lambda out, y: ask(F.cross_entropy(out, y))
    with layerpipe.Pipeline(stages, loss, sgd, executor="distributed") as pipe:
        box.append(pipe)
        for x, y in minibatches(12):
            pipe.step(x, y)
        pipe.drain()
