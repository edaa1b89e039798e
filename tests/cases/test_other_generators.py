"""Layers that draw from other generators than torch's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.models import minibatches


class MayBeSkipped(nn.Module):
    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.layer, self.draw = nn.Linear(6, 6), draw

    def forward(self, x: Tensor) -> Tensor:
        return x if self.draw() < 0.3 else torch.tanh(self.layer(x))


def trained(draws: list[Callable[[], Any]], executor: str, ticks: int = 20, caller: Any = None) -> list[Tensor]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    stages = [nn.Linear(6, 6), *(MayBeSkipped(draw) for draw in draws), nn.Linear(6, 3)]
    with layerpipe.Pipeline(
        stages,
        F.cross_entropy,
        lambda params, **past: lk.SGD(params, lr=0.1, momentum=0.9, **past),
        executor=executor,
        threads_per_stage=1,
    ) as pipe:
        for x, y in minibatches(ticks):
            if caller is not None:
                caller()
            pipe.step(x, y)
        pipe.drain()
    return [p.detach() for stage in stages for p in stage.parameters()]


#: Functions that draw from the one generator of the process.
GLOBAL = {
    "Python": lambda: random.random(),
    "Python's gauss": lambda: random.gauss(0, 1),
    "Python's choice": lambda: random.choice([0.1, 0.9]),
    "NumPy": lambda: np.random.rand(),
    "NumPy's shuffle": lambda: np.random.permutation(3)[0],
}


@pytest.mark.parametrize("name", GLOBAL)
def test_threads_refuse_the_first_draw_from_a_generator_of_the_process(name: str) -> None:
    said = rf"stage 1 \(MayBeSkipped\).*{name[:5]}.*torch\.rand.*executor='serial'"
    with pytest.raises(layerpipe.StageError, match=said):
        trained([GLOBAL[name], lambda: 1.0], "threads")


@pytest.mark.parametrize("name", GLOBAL)
def test_one_thread_draws_the_same_in_every_run(name: str) -> None:
    first, second = (trained([GLOBAL[name]] * 2, "serial") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_callers_draws_are_its_own() -> None:
    """Data may be shuffled and augmented while stages work."""

    def caller() -> None:
        random.random()
        np.random.rand()

    want = trained([lambda: 1.0], "serial", caller=caller)
    assert all(map(torch.equal, trained([lambda: 1.0], "threads", caller=caller), want))


def test_a_draw_that_comes_late_is_refused_too() -> None:
    calls = [0]

    def draw() -> float:
        calls[0] += 1
        return random.random() if calls[0] > 8 else 1.0

    with pytest.raises(layerpipe.StageError, match=r"stage 1 \(MayBeSkipped\).*Python"):
        trained([draw], "threads", ticks=40)


def test_generators_of_a_stages_own_are_served() -> None:
    def draws() -> list[Callable[[], Any]]:
        mine = torch.Generator().manual_seed(3)
        return [
            random.Random(1).random,
            np.random.default_rng(2).random,
            lambda: torch.rand((), generator=mine),
        ]

    want = trained(draws(), "serial")
    for _ in range(2):
        assert all(map(torch.equal, trained(draws(), "threads"), want))


def _python() -> list[Callable[[], Any]]:
    shared = random.Random(1)
    return [shared.random, lambda: shared.gauss(0, 1)]


def _numpy() -> list[Callable[[], Any]]:
    shared = np.random.default_rng(1)
    return [shared.random, lambda: shared.random()]


def _torch() -> list[Callable[[], Any]]:
    shared = torch.Generator().manual_seed(1)
    return [lambda: torch.rand((), generator=shared), lambda: torch.rand((), generator=shared)]


@pytest.mark.parametrize("draws", [_python, _numpy, _torch, lambda: [random.random] * 2])
def test_threads_refuse_a_generator_that_two_stages_share(draws: Any) -> None:
    trained(draws(), "serial")
    said = r"stage 1 \(MayBeSkipped\) and stage 2 \(MayBeSkipped\) draw from the same generator.*of its own"
    with pytest.raises(ValueError, match=said):
        trained(draws(), "threads")
