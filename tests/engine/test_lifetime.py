"""Threads and memory of a pipeline end with it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
from tests.engine.models import minibatches
from tests.engine.pipelines import pipeline, sgd, workers


def test_threads_of_the_caller_are_left_alone() -> None:
    before = torch.get_num_threads()
    with pipeline(executor="threads"):
        assert torch.get_num_threads() == before


def test_a_forgotten_pipeline_ends_its_workers() -> None:
    pipe = pipeline(executor="threads")
    for x, y in minibatches(6):
        pipe.step(x, y)
    assert workers() >= 4
    del pipe  # the fixture sees the threads gone


def test_a_closed_pipeline_can_be_read_but_not_trained() -> None:
    pipe = pipeline(executor="threads")
    pipe.step(*minibatches(1)[0])
    pipe.close()
    pipe.close()
    assert pipe.state_dict()
    with pytest.raises(RuntimeError, match="closed"):
        pipe.step(*minibatches(1)[0])


def test_a_program_may_end_without_closing_its_pipeline() -> None:
    program = """
import torch, layerpipe, layerpipe_kernels as lk
pipe = layerpipe.Pipeline(
    [torch.nn.Linear(500, 500) for _ in range(3)], lambda a, b: (a - b).square().mean(),
    lambda p, **past: lk.SGD(p, lr=0.1, **past), executor="threads")
for _ in range(5):
    pipe.step(torch.randn(2000, 500), torch.randn(2000, 500))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("given", "costs", "wanted"),
    [(1, (1.0, 5.0), (1, 1)), ([1, 2], (), (1, 2)), (None, (), (1, 1)), (None, (1.0, 2.0), (1, 2))],
)
def test_workers_compute_with_the_threads_they_are_given(
    given: Any, costs: tuple[float, ...], wanted: tuple[int, int]
) -> None:
    class Count(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            seen.add((self.out_features, torch.get_num_threads()))
            return y

    seen: set[tuple[int, int]] = set()
    torch.set_num_threads(3 if costs else 2)
    stages = [Count(6, 6), Count(6, 3)]
    for stage, cost in zip(stages, costs, strict=False):
        stage.meta = {"cost": cost}  # type: ignore[assignment]
    with layerpipe.Pipeline(stages, F.cross_entropy, sgd, executor="threads", threads_per_stage=given) as pipe:
        for x, y in minibatches(3):
            pipe.step(x, y)
        pipe.drain()
    assert seen == {(6, wanted[0]), (3, wanted[1])}


def test_minibatches_in_flight_are_freed_with_the_pipeline() -> None:
    """A layer that saves its own output must not keep itself alive through the hooks."""
    pipe = pipeline([nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 3)])
    pipe.step(*minibatches(1)[0])
    output = weakref.ref(pipe.stages[0]._flights[0].outputs[0])
    assert output() is not None
    pipe.close()
    gc.collect()
    assert output() is None


def test_a_forked_process_is_told_that_the_threads_are_not_there() -> None:
    with pipeline(executor="threads") as pipe:
        child = os.fork()
        if not child:
            signal.alarm(20)  # where it would wait for ever
            told = False
            try:
                pipe.state_dict()
            except RuntimeError as error:
                told = "fork" in str(error)
            finally:
                os._exit(not told)
        assert os.waitpid(child, 0)[1] == 0
        pipe.state_dict()
