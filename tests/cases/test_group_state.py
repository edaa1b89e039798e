"""What an optimizer keeps in its parameter groups is its own: only what the caller changes on the pipeline's common
view goes to a stage, what the optimizer changed is shown there once the pipe is drained, and a checkpoint has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.cases import programs
from tests.cases.programs import Counting, Estimating, counting, estimating, weights
from tests.distributed.processes import Processes
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import EXECUTORS, pipeline


def schedules(optimizer: torch.optim.Optimizer, scheduled: bool) -> list[Any]:
    return [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)] if scheduled else []


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("scheduled", "drained"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", [Counting, Estimating])
def test_without_delays_it_is_a_plain_loop(kind: Any, scheduled: bool, drained: bool, executor: str) -> None:
    plain, stages = nn.Sequential(*chain(2)), chain(2)
    theirs = [kind(stage.parameters()) for stage in plain]
    rates = [s for optimizer in theirs for s in schedules(optimizer, scheduled)]
    with layerpipe.Pipeline(
        stages,
        F.cross_entropy,
        lambda params, **past: lk.PastWeights(kind(params), **past),
        schedule="sequential",
        executor=executor,
    ) as pipe:
        rates += schedules(pipe.optimizer, scheduled)
        for i, (x, y) in enumerate(minibatches(25)):
            plain.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            for optimizer in theirs:
                optimizer.step()
            pipe.step(x, y)
            if drained and i % 10 == 9:
                pipe.drain()
            for rate in rates:
                rate.step()
        pipe.drain()
        for stage, optimizer in zip(pipe.stages, theirs, strict=True):
            own = stage.optimizer.param_groups[0]  # type: ignore[union-attr]
            for key in kind.OWN:
                assert own[key] == optimizer.param_groups[0][key]
                assert pipe.optimizer.param_groups[stage.index][key] == own[key]
    assert all(map(torch.equal, weights(plain), weights(nn.Sequential(*stages))))


@pytest.mark.parametrize("make", [counting, estimating])
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
def test_executors_and_drains_agree_with_a_count_in_the_state(
    two: Processes, schedule: str, make: Any, tmp_path: Path
) -> None:
    expected = programs.counted(0, "serial", schedule, make.__name__, None)
    assert all(count == 24 for count in expected["counts"])
    assert programs.counted(0, "threads", schedule, make.__name__, None) == expected
    for result in two.all(programs.counted, "distributed", schedule, make.__name__, None):
        assert result == expected
    path = str(tmp_path / "run.pt")  # written after half of it, and read again by a new pipeline
    assert programs.counted(0, "serial", schedule, make.__name__, path) == expected
    assert programs.counted(0, "threads", schedule, make.__name__, path) == expected


def test_a_count_that_the_caller_sets_is_set_once() -> None:
    """Not again with every later change of the learning rate."""
    with (
        pipeline(chain(2), schedule="sequential") as _,
        layerpipe.Pipeline(chain(2), F.cross_entropy, counting) as pipe,
    ):
        rate = torch.optim.lr_scheduler.ExponentialLR(pipe.optimizer, 0.9)

        def train() -> list[int]:
            for x, y in minibatches(5):
                pipe.step(x, y)
                rate.step()
            pipe.drain()
            return [group["k"] for group in pipe.optimizer.param_groups]

        assert train() == [5] * 2
        for group in pipe.optimizer.param_groups:
            assert group["k"] == 5
            group["k"] = 1
        assert train() == [6] * 2
        assert train() == [11] * 2


def test_what_the_caller_set_last_before_a_drain_reaches_the_next_update() -> None:
    with pipeline(chain(3), executor="threads") as pipe:
        for rate in (0.3, 0.2, 0.3):  # back to a value that a stage has had before
            for x, y in minibatches(4):
                pipe.step(x, y)
            for group in pipe.optimizer.param_groups:
                group["lr"] = rate
            pipe.drain()
            assert [group["lr"] for group in pipe.optimizer.param_groups] == [rate] * 4
        pipe.step(*minibatches(1)[0])
        pipe.drain()
        assert [g["lr"] for stage in pipe.stages for g in stage.optimizer.param_groups] == [0.3] * 4  # type: ignore[union-attr]


class Tensors(torch.optim.Optimizer):
    """Keeps a count and a norm per step as tensors, and a list that grows."""

    def __init__(self, params: Any, lr: float | Tensor) -> None:
        defaults = {"lr": lr, "k": torch.zeros((), dtype=torch.long), "last": torch.zeros(2), "seen": []}
        super().__init__(params, defaults)
        for group in self.param_groups:
            group["k"], group["last"], group["seen"] = torch.zeros((), dtype=torch.long), torch.zeros(2), []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            group["last"][:] = torch.stack([group["k"] * 1.0, group["k"] * 2.0])
            group["seen"].append(int(group["k"]))
            for p in group["params"]:
                p.sub_(p.grad, alpha=float(group["lr"]) / float(group["k"]))


def test_tensors_and_lists_in_groups_stay_and_are_shown() -> None:
    found, rate = [], torch.tensor(0.1)

    def make(params: Any, **past: Any) -> lk.PastWeights:
        return lk.PastWeights(Tensors(params, rate), **past)

    for steady in (True, False):  # a learning rate that a schedule fills in place changes nothing of the others
        stages = chain(2)
        with layerpipe.Pipeline(stages, F.cross_entropy, make) as pipe:
            for i, (x, y) in enumerate(minibatches(9)):
                pipe.step(x, y)
                if not steady:
                    rate.fill_(0.1)
                    pipe.optimizer.param_groups[0]["note"] = [i]
                if i == 4:
                    pipe.drain()
            pipe.drain()
            for group in pipe.optimizer.param_groups:
                assert (int(group["k"]), group["last"].tolist(), group["seen"]) == (9, [9.0, 18.0], [*range(1, 10)])
        found.append(weights(nn.Sequential(*stages)))
    assert all(map(torch.equal, *found))


def test_momentum_that_a_schedule_moves_and_a_count_go_together() -> None:
    class Both(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
                group["lr"] *= 0.999  # of its own, until the caller sets another
            return super().step(closure)

    stages, plain = chain(2), nn.Sequential(*chain(2))
    theirs = Both(plain.parameters(), lr=0.1, momentum=0.9)
    with layerpipe.Pipeline(
        stages,
        F.cross_entropy,
        lambda params, **past: lk.PastWeights(Both(params, lr=0.1, momentum=0.9), **past),
        schedule="sequential",
    ) as pipe:
        for i, (x, y) in enumerate(minibatches(20)):
            theirs.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            theirs.step()
            pipe.step(x, y)
            for optimizer in (theirs, pipe.optimizer):
                for group in optimizer.param_groups:
                    group["momentum"] = 0.9 - i / 100
                    if i == 10:
                        group["lr"] = 0.05
        pipe.drain()
        assert [group["count"] for group in pipe.optimizer.param_groups] == [20, 20]
        assert [group["lr"] for group in pipe.optimizer.param_groups] == [theirs.param_groups[0]["lr"]] * 2
    assert all(map(torch.equal, weights(plain), weights(nn.Sequential(*stages))))


@pytest.mark.parametrize(("key", "value"), [("delay", 3), ("past", "stash"), ("past", lk.Blend(order=3))])
def test_what_past_weights_were_made_for_cannot_be_changed(key: str, value: Any) -> None:
    with pipeline(chain(3)) as pipe:
        pipe.step(*minibatches(1)[0])
        before = pipe.optimizer.param_groups[0][key]
        pipe.optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError, match=f"parameter group 0 was made with {key}="):
            pipe.step(*minibatches(1)[0])
        pipe.optimizer.param_groups[0][key] = before  # nothing has been lost
        pipe.step(*minibatches(1)[0])
        assert len(pipe.drain()) == 2


def test_an_optimizers_state_dict_carries_the_counts() -> None:
    with layerpipe.Pipeline(chain(2), F.cross_entropy, counting) as pipe:
        for x, y in minibatches(6):
            pipe.step(x, y)
        pipe.drain()
        state = pipe.optimizer.state_dict()
    with layerpipe.Pipeline(chain(2), F.cross_entropy, counting) as other:
        other.optimizer.load_state_dict(state)
        assert [group["k"] for group in other.optimizer.param_groups] == [6, 6]
        for x, y in minibatches(2):
            other.step(x, y)
        other.drain()
        assert [group["k"] for group in other.optimizer.param_groups] == [8, 8]
