"""Simulated past weights, beside the slow simulation and the engine."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerpipe
import layerpipe_kernels as lk
from layerpipe.study import past
from layerpipe.study.settings import Settings
from layerpipe.study.training import DelayedTraining, Horizon, Task
from tests.engine.delayed_training import DelayedTraining as Slow

CONSTANT = Horizon(steps=1000, warmup=0, final=1.0)
#: Momentum as torch scales it: the average of gradients takes steps 1 − β₁ times as long.
SGD = Settings(optimizer="sgd", lr=0.05 / (1 - 0.8), beta1=0.8, max_norm=0.0)


def loss_fn(y: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(y, target)


def task() -> Task:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4)]
    data = [(torch.randn(6, 5), torch.randn(6, 5)) for _ in range(20)]
    loss = lambda model, xy: loss_fn(model(xy[0]), xy[1])
    stage_of = lambda name: int(name[0])
    return Task(nn.Sequential(*layers), stage_of, 4, lambda _: False, itertools.cycle(data), loss, lambda _: 1.0)


class Momentum(torch.optim.SGD):
    """With the bias correction that the simulation's average has."""

    def step(self, closure: Any = None) -> None:
        self.count = getattr(self, "count", 0) + 1
        for group in self.param_groups:
            group["lr"] = 0.05 / (1 - 0.8**self.count)
        super().step(closure)


@pytest.mark.parametrize("schedule", ["1f1b", "lockstep"])
def test_the_latest_weights_are_those_of_the_slow_simulation(schedule: str) -> None:
    mine = task()
    slow_model = copy.deepcopy(mine.model)
    assert isinstance(slow_model, nn.Sequential)
    data = [next(mine.minibatches) for _ in range(20)]
    training = DelayedTraining(task(), 4, schedule, SGD, CONSTANT, past="latest")
    losses = [training.step() for _ in data]
    slow = Slow(list(slow_model), loss_fn, lambda ps: Momentum(ps, 0.05, 0.8), schedule=schedule, past="latest")
    torch.testing.assert_close(losses, [x.item() for x in slow.train(data)], rtol=1e-5, atol=1e-6)
    stash = DelayedTraining(task(), 4, schedule, SGD, CONSTANT)
    assert [stash.step() for _ in data] != losses


@pytest.mark.parametrize("kind", ["ema", "ema:decay=0.5", "blend", "blend:order=3", "blend:decay=coupled"])
@pytest.mark.parametrize("prediction", [0.0, 0.5])
def test_reconstructed_weights_are_the_engines(kind: str, prediction: float) -> None:
    mine = task()
    data = [next(mine.minibatches) for _ in range(20)]
    stages = [copy.deepcopy(stage) for stage in mine.model.children()]
    adam = Settings(optimizer="adam", lr=0.01, beta1=0.8, weight_prediction=prediction, max_norm=0.0)
    training = DelayedTraining(task(), 4, "1f1b", adam, CONSTANT, past=kind)
    losses = [training.step() for _ in data]
    make = lambda ps, **delayed: lk.AdamW(
        ps, lr=0.01, betas=(0.8, 0.95), weight_decay=0.0, weight_prediction=prediction, **delayed
    )
    with layerpipe.Pipeline(stages, loss_fn, make, schedule="1f1b", executor="serial", past=kind) as pipe:
        expected = [loss.item() for x, y in data if (loss := pipe.step(x, y)) is not None]
        expected += [loss.item() for loss in pipe.drain()]
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)


def test_errors_are_measured_beside_the_latest_weights() -> None:
    errors = {}
    for kind in ("latest", "ema", "blend", "stash"):
        training = DelayedTraining(task(), 4, "lockstep", SGD, Horizon(100, 10), past=kind)
        for _ in range(100):
            training.step()
        errors[kind] = [a / b if b else 0.0 for a, b in training.errors]
    assert errors["stash"] == [0.0] * 4
    assert errors["latest"] == [1.0, 1.0, 1.0, 0.0]
    assert max(errors["blend"]) < max(errors["ema"]) < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stored", "unknown"),
        ("blend:order=4", "order must be 1, 2 or 3"),
        ("blend:decay=0.5+0.6", "not simulated"),
        ("blend:norm=match", "not simulated"),
        ("momentum", "not simulated"),
        ("ema:decay=1.5", "decay"),
    ],
)
def test_a_past_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        past.parse(text)
