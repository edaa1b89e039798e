"""One update in several minibatches: equal to a plain loop, to a simulation of delayed training, and to itself."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from layerpipe import schedule as schedules
from layerpipe.schedule import most_updates_between, updates_between
from layerpipe.stage.probe import ReconstructionProbe
from tests.engine.delayed_training import DelayedTraining
from tests.engine.layouts import data as sequences
from tests.engine.layouts import joining, summing
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import EXECUTORS, assert_equal_state, pipeline, train

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def sgd(params: list[Tensor], **past: Any) -> lk.SGD:
    return lk.SGD(params, **SGD, **past)


def simulated(
    stages: list[nn.Module], data: list[tuple[Tensor, Tensor]], **options: Any
) -> tuple[dict[str, Tensor], list[Tensor]]:
    made = DelayedTraining(
        stages, F.cross_entropy, lambda params: torch.optim.SGD(params, **SGD), **{"past": "stash", **options}
    )
    return nn.Sequential(*stages).state_dict(), made.train(data)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b", "sequential"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_rule_counts_the_updates_of_the_schedule(stages: int, schedule: str, accumulate: int) -> None:
    """Counted one action at a time, for two fills of the pipe; the second begins in the middle of an accumulation."""
    made = schedules.make(schedule, stages)
    waiting = [0] * stages
    for fed in (11, 30):
        begun, updates = list(waiting), [0] * stages
        seen: dict[tuple[int, int], int] = {}
        for tick in range(made.ticks(fed)):
            for stage, kind, minibatch in made.tick(tick, fed):
                if kind == "F":
                    seen[stage, minibatch] = updates[stage]
                    continue
                lag = made.delays()[stage]
                n = updates[stage] - seen[stage, minibatch]
                assert n == updates_between(minibatch, lag, accumulate, begun[stage])
                assert n <= most_updates_between(lag, accumulate)
                waiting[stage] += 1
                if waiting[stage] == accumulate:
                    waiting[stage] = 0
                    updates[stage] += 1


def test_the_delay_is_the_lag_by_the_accumulation_rounded_down_or_up() -> None:
    for lag, accumulate in itertools.product(range(15), range(1, 9)):
        steady = [updates_between(k, lag, accumulate) for k in range(lag, lag + 8 * accumulate)]
        assert set(steady) <= {lag // accumulate, most_updates_between(lag, accumulate)}
        assert sum(steady) * accumulate == len(steady) * lag


@pytest.mark.parametrize("split_backward", [False, True])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("accumulate", [2, 3])
def test_without_a_delay_it_is_a_plain_loop_that_accumulates(
    executor: str, accumulate: int, split_backward: bool
) -> None:
    torch.set_num_threads(1)
    stages, data = chain(), minibatches(12)
    plain = copy.deepcopy(nn.Sequential(*stages))
    optimizer = torch.optim.SGD(plain.parameters(), **SGD)
    losses = []
    for k, (x, y) in enumerate(data, start=1):
        loss = F.cross_entropy(plain(x), y)
        losses.append(loss.detach())
        (loss / accumulate).backward()
        if k % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    options = {"executor": executor, "split_backward": split_backward, "accumulate": accumulate}
    with layerpipe.Pipeline(stages, F.cross_entropy, sgd, schedule="sequential", **options) as pipe:
        assert torch.equal(torch.stack(train(pipe, data)), torch.stack(losses))
        assert_equal_state(pipe.state_dict(), plain.state_dict())


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("schedule", "accumulate", "options"),
    [
        ("lockstep", 2, {}),
        ("lockstep", 3, {"max_norm": 0.5}),
        ("lockstep", 5, {"split_backward": True}),
        ("lockstep", 12, {}),
        ("1f1b", 2, {}),
        ("1f1b", 3, {"split_backward": True}),
        ("sequential", 3, {}),
    ],
)
def test_stash_equals_an_independent_simulation(
    executor: str, schedule: str, accumulate: int, options: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    data = minibatches(42)
    want, losses = simulated(chain(), data, schedule=schedule, accumulate=accumulate, max_norm=options.get("max_norm"))
    given = {"executor": executor, "schedule": schedule, "accumulate": accumulate, "past": "stash"}
    with layerpipe.Pipeline(chain(), F.cross_entropy, sgd, **given, **options) as pipe:
        assert torch.equal(torch.stack(train(pipe, data)), torch.stack(losses))
        assert_equal_state(pipe.state_dict(), want)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("stages", [summing, joining])
def test_gradients_that_share_memory_with_what_goes_upstream_are_added_up_apart(stages: Any, executor: str) -> None:
    data = sequences(14)
    want, _ = simulated(stages(), data, schedule="lockstep", accumulate=3)
    with layerpipe.Pipeline(stages(), F.cross_entropy, sgd, past="stash", executor=executor, accumulate=3) as pipe:
        train(pipe, data)
        assert_equal_state(pipe.state_dict(), want)


@pytest.mark.parametrize("past", ["stash", "latest", "ema", "momentum", "blend"])
def test_executors_give_the_same_weights_and_delays_are_measured(past: str) -> None:
    torch.set_num_threads(1)
    data, states = minibatches(30), []
    for executor in EXECUTORS:
        with pipeline(chain(), past=past, executor=executor, accumulate=4, max_norm=1.0) as pipe:
            scheduler = torch.optim.lr_scheduler.ExponentialLR(pipe.optimizer, 0.97)
            for x, y in data:
                pipe.step(x, y)
                scheduler.step()
            pipe.drain()
            states.append(copy.deepcopy(pipe.state_dict()))
            assert pipe.delays == [2, 1, 1, 0]
            for stage, measured in zip(pipe.stages, pipe.measured_delays(), strict=True):
                found = [updates_between(k, stage.accumulation.lag, 4) for k in range(30)]
                assert measured == {n: found.count(n) for n in set(found)}
                assert stage.version == 7
    assert_equal_state(*states)


@pytest.mark.parametrize("past", ["ema", "blend"])
def test_past_weights_are_exact_while_the_pipe_fills_and_good_after(past: str) -> None:
    data = minibatches(240, size=32)
    with pipeline([stage.double() for stage in chain(5)], past=past, accumulate=3) as pipe:
        probes = [ReconstructionProbe(stage, every=1, samples=1000) for stage in pipe.stages[:-1]]
        train(pipe, [(x.double(), y) for x, y in data])
    assert pipe.delays == [3, 2, 2, 1, 0]
    for stage, probe in zip(pipe.stages, probes, strict=False):
        late = sum(n > 0 for n in stage.measured.elements())
        assert len(probe.readings) == late
        begun = [r for r in probe.readings if r.update < stage.delay]
        assert all(r.relative < 1e-20 for r in begun)
        error = probe.relative_error()
        assert error is not None
        assert error < (0.1 if stage.delay > 1 else 1e-20)


@pytest.mark.parametrize("past", ["stash", "blend"])
def test_gradients_that_wait_survive_a_drain_and_go_into_the_next_update(past: str) -> None:
    data = minibatches(12)
    with pipeline(chain(), schedule="sequential", accumulate=4) as whole:
        train(whole, data)
    with pipeline(chain(), schedule="sequential", accumulate=4) as pipe:
        waiting = []
        for part in (data[:3], data[3:5], data[5:]):
            train(pipe, part)
            waiting.append(pipe.waiting)
        assert waiting == [3, 1, 0]
        assert_equal_state(pipe.state_dict(), whole.state_dict())
    with pipeline(chain(), past=past, accumulate=4) as pipe:
        for part in (data[:3], data[3:5], data[5:]):
            train(pipe, part)
        assert [stage.version for stage in pipe.stages] == [3] * 4


@pytest.mark.parametrize("past", ["stash", "blend"])
@pytest.mark.parametrize("at", [6, 7])
def test_a_checkpoint_amid_an_accumulation_goes_on_bit_for_bit(tmp_path: Path, at: int, past: str) -> None:
    data = minibatches(24)
    with pipeline(chain(), past=past, accumulate=3) as pipe:
        train(pipe, data[:at])
        pipe.checkpoint(tmp_path / "file")
        train(pipe, data[at:])
        want = copy.deepcopy(pipe.state_dict())
    with pipeline(chain(seed=5), past=past, accumulate=3) as pipe:
        train(pipe, data[:4])
        pipe.resume(tmp_path / "file")
        assert pipe.waiting == at % 3
        train(pipe, data[at:])
        assert_equal_state(pipe.state_dict(), want)
    with (
        pipeline(chain(), past=past, accumulate=2) as pipe,
        pytest.raises(layerpipe.CheckpointError, match="of a pipeline with accumulate=3, this one has accumulate=2"),
    ):
        pipe.resume(tmp_path / "file")


def test_what_cannot_accumulate_is_refused() -> None:
    with pytest.raises(ValueError, match="accumulate must be at least 1 minibatch per update, got 0"):
        pipeline(chain(), accumulate=0)
    with pytest.raises(TypeError, match="accumulate is a whole number of minibatches per update"):
        pipeline(chain(), accumulate=2.0)
    with pytest.raises(ValueError, match="executor='graphs' replays the same work for every minibatch"):
        pipeline(chain(), accumulate=2, executor="graphs")


def test_an_optimizer_that_knows_one_past_only_is_refused() -> None:
    class OnePast(lk.SGD):
        def past_view(self, param: Tensor) -> Tensor:  # type: ignore[override]
            return super().past_view(param)

    with (
        pytest.raises(TypeError, match="past_view takes no such number"),
    ):
        layerpipe.Pipeline(chain(), F.cross_entropy, lambda params, **past: OnePast(params, **past), accumulate=2)
