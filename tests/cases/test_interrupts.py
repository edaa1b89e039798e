"""Whatever ends a pipeline or a run, from inside or outside, ends all of it: nobody waits on, and what was measured is
there."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
from tests.distributed import programs
from tests.distributed.processes import Processes
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import EXECUTORS, sgd, workers


class Calls(nn.Module):
    """Calls something in the ``at``-th forward or backward."""

    def __init__(self, what: Callable[[], None], where: str, at: int) -> None:
        super().__init__()
        self.what, self.where, self.at, self.calls = what, where, at, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward":
            return self.count(x)
        y = x * 1.0
        y.register_hook(self.count)
        return y

    def count(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.what()
        return x


def closed_short_run(number: int, executor: str) -> None:
    """One of many: sizes, schedule, and who closes when, by its number; some are closed in several places at once."""
    chance = random.Random(number)
    stages, fed = chance.randint(1, 4), chance.randint(1, 8)
    made: list[layerpipe.Pipeline] = []

    def close() -> None:
        for pipe in made:
            pipe.close()

    parts = chain(stages)
    several = chance.random() < 0.3
    for victim in range(stages) if several else [chance.randrange(stages)]:
        where = chance.choice(["forward", "backward"])
        parts[victim] = nn.Sequential(parts[victim], Calls(close, where, chance.randint(1, fed)))
    in_loss = Calls(close, "forward", chance.randint(1, fed)) if chance.random() < 0.3 else nn.Identity()
    options: dict[str, Any] = {"threads_per_stage": 1} if executor == "threads" else {}
    pipe = layerpipe.Pipeline(
        parts, lambda output, target: in_loss(F.cross_entropy(output, target)), sgd, executor=executor,
        schedule=chance.choice(["lockstep", "1f1b", "sequential"]), split_backward=chance.random() < 0.5, **options,
    )  # fmt: skip
    made.append(pipe)
    watchdog = threading.Timer(0.02 * chance.random(), close)
    if chance.random() < 0.2:
        watchdog.start()
    with pytest.raises(RuntimeError, match="the pipeline is closed"):
        for x, y in minibatches(fed):
            pipe.step(x, y)
        pipe.drain()
    watchdog.cancel()
    assert all(torch.isfinite(value).all() for value in pipe.state_dict().values())
    pipe.close()


@pytest.mark.parametrize("runs", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_pipeline_closed_from_inside_says_so_and_never_hangs(executor: str, runs: int) -> None:
    torch.set_num_threads(1)
    before = workers()
    for number in range(runs):
        closed_short_run(number, executor)
    assert workers() == before


@pytest.mark.parametrize("size", [8, 20_000], ids=["small", "large"])
@pytest.mark.parametrize(("stage", "where"), [(0, "forward"), (3, "backward"), (5, "forward"), (5, "loss")])
def test_a_pipeline_closed_inside_one_process_ends_in_all(three: Processes, stage: int, where: str, size: int) -> None:
    for at in (1, 4, 30):
        said = three.all(programs.closes_inside, stage, where, at, size)
        assert said[stage // 2] == "RuntimeError: the pipeline is closed"
        for rank in {0, 1, 2} - {stage // 2}:
            assert "closed its pipeline" in said[rank] or "the pipeline is closed" in said[rank], said
