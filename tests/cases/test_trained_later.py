"""Weights that are frozen first and trained later are trained from then on, or refused by name; never left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
from tests.cases.programs import all_equal, plain_sgd, weights
from tests.engine.delayed_training import DelayedTraining
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import EXECUTORS, sgd

SCHEDULES = ["sequential", "1f1b", "lockstep"]

LATE: dict[str, Callable[[Any], list[nn.Parameter]]] = {
    "a stage": lambda stages: [*stages[1].parameters()],
    "a weight": lambda stages: [stages[1][0].weight],
    "a bias": lambda stages: [stages[2].bias],
}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("schedule", ["sequential", "lockstep"])
@pytest.mark.parametrize("what", LATE)
@pytest.mark.parametrize("drained", [False, True])
def test_weights_frozen_when_the_pipeline_is_made_and_trained_later_are_refused(
    drained: bool, what: str, schedule: str, executor: str
) -> None:
    stages = chain(3)
    for p in LATE[what](stages):
        p.requires_grad_(False)
    with layerpipe.Pipeline(stages, F.cross_entropy, sgd, schedule=schedule, executor=executor) as pipe:
        for x, y in minibatches(4):
            pipe.step(x, y)
        pipe.drain() if drained else pipe.memory()  # which waits until the stages are idle
        for p in LATE[what](stages):
            p.requires_grad_(True)
        said = rf"stage {2 if what == 'a bias' else 1} .*requires a gradient.*requires_grad_\(False\)"
        with pytest.raises(layerpipe.StageError, match=said):
            for x, y in minibatches(3):  # before the eighth forward, when the graph is walked again
                pipe.step(x, y)
            pipe.memory()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("what", LATE)
def test_weights_frozen_afterwards_and_trained_later_are_trained(what: str, schedule: str, executor: str) -> None:
    stages, theirs, data = chain(3), chain(3), minibatches(24)
    with layerpipe.Pipeline(stages, F.cross_entropy, sgd, schedule=schedule, executor=executor, past="stash") as pipe:
        delayed = DelayedTraining(theirs, F.cross_entropy, plain_sgd, schedule=schedule, past="stash")
        for part, grad in ((data[:8], False), (data[8:16], True), (data[16:], False)):
            for p in (*LATE[what](stages), *LATE[what](theirs)):
                p.requires_grad_(grad)
            before = [p.detach().clone() for p in LATE[what](stages)]
            for x, y in part:
                pipe.step(x, y)
            pipe.drain()
            delayed.train(part)
            assert all_equal(before, LATE[what](stages)) == (not grad)
    assert all_equal(weights(nn.Sequential(*stages)), weights(nn.Sequential(*theirs)))


def test_weights_frozen_while_the_pipe_is_full_give_the_same_everywhere() -> None:
    found = []
    for executor in EXECUTORS:
        stages = chain(4)
        with layerpipe.Pipeline(stages, F.cross_entropy, sgd, executor=executor) as pipe:
            for i, (x, y) in enumerate(minibatches(30)):
                if i in (9, 17):
                    pipe.optimizer.state  # noqa: B018  # until the stages are idle
                    for p in stages[1].parameters():
                        p.requires_grad_(i == 17)
                pipe.step(x, y)
            pipe.drain()
        found.append(weights(nn.Sequential(*stages)))
    assert all_equal(*found)


@pytest.mark.parametrize("schedule", ["sequential", "lockstep"])
def test_a_weight_put_in_after_the_pipeline_was_made_is_refused(schedule: str) -> None:
    class Adapter(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.low = inner, nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.low(x)

    def replace(stages: Any) -> None:
        stages[1][0].weight = nn.Parameter(torch.eye(6))

    def adapt(stages: Any) -> None:
        stages[1][0] = Adapter(stages[1][0])

    for change in (replace, adapt):
        stages = chain(3)
        with layerpipe.Pipeline(stages, F.cross_entropy, sgd, schedule=schedule) as pipe:
            pipe.step(*minibatches(1)[0])
            pipe.drain()
            change(stages)
            with pytest.raises(layerpipe.StageError, match=r"stage 1 .*requires a gradient.*not there when"):
                for x, y in minibatches(6):
                    pipe.step(x, y)
