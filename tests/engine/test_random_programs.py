"""Random networks, schedules and drains beside :class:`DelayedTraining`, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.delayed_training import DelayedTraining
from tests.engine.layer_zoo import WIDTH, ZOO, Layers
from tests.engine.random_programs import Program, difference

pytestmark = pytest.mark.filterwarnings("ignore:.*works on copies of:UserWarning")  # their past is exact all the same

SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def minibatches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(5, WIDTH), torch.randint(3, (5,))) for _ in range(count)]


def network(names: list[str]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [*(ZOO[name]() for name in names), Layers(nn.Linear(WIDTH, 3))]


def assert_trained_alike(names: list[str], runs: list[int], executor: str, split: bool, **options: Any) -> None:
    """``runs`` are the numbers of minibatches between two drains."""
    theirs = network(names)
    ours = copy.deepcopy(theirs)
    data = [minibatches(count) for count in runs]
    simulated = DelayedTraining(
        theirs, loss_fn, lambda params: torch.optim.SGD(params, foreach=False, **SGD), **options
    )
    with layerpipe.Pipeline(
        ours,
        loss_fn,
        lambda params, **past: lk.SGD(params, **SGD, **past),
        executor=executor,
        threads_per_stage=torch.get_num_threads(),
        split_backward=split,
        check_finite=False,
        **options,
    ) as pipe:
        for run in data:
            losses = [loss for x, y in run if (loss := pipe.step(x, y)) is not None] + pipe.drain()
            for loss, expected in zip(losses, simulated.train(run), strict=True):
                assert torch.equal(loss, expected)
    for stage, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for name, value in other.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value), f"{name} of stage {stage}"


@pytest.mark.parametrize("past", ["stash", "latest"])
@pytest.mark.parametrize("name", ZOO)
def test_every_layer_trains_as_in_the_simulation(name: str, past: str) -> None:
    assert_trained_alike(["linear", name], [9, 4], "serial", False, schedule="lockstep", past=past)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    names=st.lists(st.sampled_from(sorted(ZOO)), min_size=1, max_size=4),
    runs=st.lists(st.integers(1, 10), min_size=1, max_size=3),
    executor=st.sampled_from(["serial", "threads"]),
    split=st.booleans(),
    schedule=st.sampled_from(["lockstep", "1f1b", "sequential"]),
    past=st.sampled_from(["stash", "latest"]),
    max_norm=st.sampled_from([None, 1.0]),
)
def test_random_programs_train_as_in_the_simulation(
    names: list[str], runs: list[int], executor: str, split: bool, **options: Any
) -> None:
    assert_trained_alike(names, runs, executor, split, **options)


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_generated_programs_train_as_the_simulation(first: int) -> None:
    for number in range(first, first + 10):
        program = Program(number)
        assert not difference(program), program
