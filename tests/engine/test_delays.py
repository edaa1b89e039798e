"""Minibatches one at a time, then following each other: what a policy decides, in a running pipeline."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from layerpipe.delays import AfterSteps, DelayPolicy, Fixed, OnLoss
from tests.engine.delayed_training import SGD, DelayedTraining, delayed_sgd
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import EXECUTORS, assert_equal_state, pipeline, train


class Alternating(DelayPolicy):
    """Synchronous and asynchronous in turn."""

    def __init__(self, every: int) -> None:
        self.every = every

    def asynchronous(self, minibatch: int) -> bool:
        return minibatch // self.every % 2 == 1


class OnThreshold(DelayPolicy):
    """Asynchronous while the last loss it knows is below a threshold; notes what it has seen, and when."""

    needs_losses = True

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.seen: list[float] = []
        self.knew: list[int] = []
        self.said: list[bool] = []

    def asynchronous(self, minibatch: int) -> bool:
        self.knew.append(minibatch - len(self.seen))
        self.said.append(bool(self.seen) and self.seen[-1] < self.threshold)
        return self.said[-1]

    def observe(self, loss: float) -> None:
        self.seen.append(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = list(state["seen"])


def losses_of(pipe: layerpipe.Pipeline, data: list[tuple[Tensor, Tensor]]) -> list[Any]:
    return [None if loss is None else loss.item() for loss in (pipe.step(x, y) for x, y in data)]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
def test_first_steps_are_plain_training_and_the_rest_delayed_training_from_there(executor: str, schedule: str) -> None:
    torch.set_num_threads(1)
    data, stages = minibatches(40), chain()
    plain = nn.Sequential(*copy.deepcopy(stages))
    # Without momentum the optimizer has no state that the simulation would have to take over.
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 1e-3}
    optimizer = torch.optim.SGD(plain.parameters(), **options)
    for x, y in data[:10]:
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    rest = DelayedTraining(
        list(plain), F.cross_entropy, lambda p: torch.optim.SGD(p, **options), schedule=schedule, past="stash"
    )
    rest.train(data[10:])
    with layerpipe.Pipeline(
        stages,
        F.cross_entropy,
        lambda params, **past: lk.SGD(params, **options, **past),
        past="stash",
        schedule=schedule,
        executor=executor,
        sync_steps=10,
    ) as pipe:
        train(pipe, data)
        assert_equal_state(pipe.state_dict(), plain.state_dict())
        for n, measured in zip(pipe.delays, pipe.measured_delays(), strict=True):
            want = {**dict.fromkeys(range(n), 1), n: 30 - n}
            want[0] = want.get(0, 0) + 10
            assert measured == want


def test_no_synchronous_steps_are_the_default() -> None:
    data, states = minibatches(20), []
    for options in ({}, {"sync_steps": 0}, {"delay_policy": Fixed()}):
        with pipeline(chain(), **options) as pipe:
            train(pipe, data)
            states.append(copy.deepcopy(pipe.state_dict()))
    assert_equal_state(states[0], states[1])
    assert_equal_state(states[0], states[2])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("past", ["stash", "blend"])
def test_always_synchronous_is_the_sequential_schedule(past: str, accumulate: int) -> None:
    data = minibatches(20)
    with pipeline(chain(), schedule="sequential", accumulate=accumulate) as want:
        losses = train(want, data)
    with pipeline(chain(), past=past, delay_policy=Fixed(asynchronous=False), accumulate=accumulate) as pipe:
        assert torch.equal(torch.stack(train(pipe, data)), torch.stack(losses))
        assert_equal_state(pipe.state_dict(), want.state_dict())


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("past", ["stash", "blend", "ema"])
def test_a_change_of_pace_is_a_drain(past: str, accumulate: int) -> None:
    """Delays fill up anew, and every loss comes, in order, one by each call."""
    torch.set_num_threads(1)
    data, every = minibatches(45), 7
    drained = pipeline(chain(), past=past, accumulate=accumulate)
    want: list[Tensor] = []
    with drained:
        for begin in range(0, 45, every):
            synchronous = begin // every % 2 == 0
            part = data[begin : begin + every]
            for together in [[minibatch] for minibatch in part] if synchronous else [part]:
                want += train(drained, together)
    for executor in EXECUTORS:
        with pipeline(
            chain(), past=past, accumulate=accumulate, executor=executor, delay_policy=Alternating(every)
        ) as pipe:
            got = train(pipe, data)
            assert torch.equal(torch.stack(got), torch.stack(want))
            assert_equal_state(pipe.state_dict(), drained.state_dict())
            assert pipe.measured_delays() == drained.measured_delays()


@pytest.mark.parametrize(("executor", "latency"), [("serial", 3), ("threads", 4)])
def test_losses_come_one_by_each_call_from_when_the_pipe_has_been_full_once(executor: str, latency: int) -> None:
    data = minibatches(60)
    with pipeline(chain(), executor=executor, delay_policy=Alternating(20)) as pipe:
        got = losses_of(pipe, data)
        late = [k for k, loss in enumerate(got) if loss is None]
        behind = 1 if executor == "threads" else 0
        # One that threads are behind while minibatches go one at a time, and the rest while the pipe fills.
        assert late == [*range(behind), *range(20 + behind, 20 + latency)]
        assert len(pipe.drain()) == latency


def test_executors_agree_on_a_policy_that_looks_at_losses() -> None:
    torch.set_num_threads(1)
    data, runs = minibatches(80), []
    for executor in EXECUTORS:
        policy = OnThreshold(1.05)
        with pipeline(chain(), executor=executor, delay_policy=policy) as pipe:
            losses = train(pipe, data)
            runs.append((policy, losses, copy.deepcopy(pipe.state_dict()), pipe.measured_delays()))
            assert policy.seen == [loss.item() for loss in losses]
            lag = pipe.schedule.ticks(1)
            assert policy.knew == [min(k, lag) for k in range(80)]
    assert len(set(runs[0][0].said)) == 2
    assert runs[0][0].said == runs[1][0].said
    assert torch.equal(torch.stack(runs[0][1]), torch.stack(runs[1][1]))
    assert_equal_state(runs[0][2], runs[1][2])
    assert runs[0][3] == runs[1][3]


@pytest.mark.parametrize("at", [5, 12, 20, 37])
def test_a_policy_goes_on_from_a_checkpoint(tmp_path: Path, at: int) -> None:
    data = minibatches(60)
    for make in (lambda: AfterSteps(20), lambda: OnThreshold(1.05), lambda: OnLoss(window=4, decrease=0.02, rise=0.05)):
        with pipeline(chain(), delay_policy=make()) as pipe:
            train(pipe, data[:at])
            pipe.checkpoint(tmp_path / "file")
            train(pipe, data[at:])
            want, measured = copy.deepcopy(pipe.state_dict()), pipe.measured_delays()
        with pipeline(chain(seed=3), delay_policy=make()) as pipe:
            train(pipe, data[:3])
            pipe.resume(tmp_path / "file")
            train(pipe, data[at:])
            assert_equal_state(pipe.state_dict(), want)
            assert pipe.measured_delays() == measured
    with (
        pipeline(chain(), sync_steps=3) as pipe,
        pytest.raises(layerpipe.CheckpointError, match="whose delays OnLoss decides, here AfterSteps does"),
    ):
        pipe.resume(tmp_path / "file")


def test_the_loss_starts_and_stops_it() -> None:
    policy = OnLoss(window=10, decrease=0.05, rise=0.3)
    said = []

    def show(losses: list[float]) -> None:
        for loss in losses:
            policy.observe(loss)
            said.append(policy.asynchronous(0))

    show([10 * 0.97**k for k in range(40)])
    assert not any(said)
    show([3.0] * 60)
    assert said[-1]
    began = said.index(True)
    assert 45 < began < 90
    show([3.5] * 30)
    assert all(said[began:])
    show([6.0] * 40)
    assert said[-1]
    stopped = said.index(False, began)
    assert 130 < stopped < 140
    assert not any(said[stopped : stopped + 10])


def test_a_loss_that_is_not_a_number_stops_it() -> None:
    policy = OnLoss(window=3, decrease=0.05)
    for loss in (1.0,) * 10:
        policy.observe(loss)
    assert policy.asynchronous(0)
    policy.observe(math.nan)
    assert not policy.asynchronous(0)


def test_without_a_rise_it_never_goes_back() -> None:
    policy = OnLoss(window=3, decrease=0.05, rise=None)
    for loss in (*(1.0,) * 10, *(100.0,) * 10):
        policy.observe(loss)
    assert policy.asynchronous(0)


def test_the_state_of_a_policy_is_all_of_it() -> None:
    whole, first = OnLoss(window=5), OnLoss(window=5)
    values = torch.rand(60, generator=torch.Generator().manual_seed(0)).tolist()
    for loss in values[:17]:
        whole.observe(loss)
        first.observe(loss)
    second = OnLoss(window=5)
    second.load_state_dict(first.state_dict())
    for loss in values[17:]:
        whole.observe(loss)
        second.observe(loss)
        assert whole.asynchronous(0) == second.asynchronous(0)
    assert whole.state_dict() == second.state_dict()


def test_an_optimizer_is_told_how_stale_its_gradients_are() -> None:
    told: dict[int, list[float]] = {}

    class Told(lk.SGD):
        def set_staleness(self, updates: float) -> None:
            told.setdefault(id(self), []).append(updates)

    with layerpipe.Pipeline(
        chain(3),
        F.cross_entropy,
        lambda params, **past: Told(params, lr=0.1, **past),
        accumulate=3,
        delay_policy=Alternating(4),
    ) as pipe:
        train(pipe, minibatches(12))
        by_stage = [told[id(stage.optimizer)] for stage in pipe.stages]
    lags = (4, 2, 0)
    assert [values[0] for values in by_stage] == [lag / 3 for lag in lags]
    for values, lag in zip(by_stage, lags, strict=True):
        assert values == [lag / 3, 0.0, lag / 3, 0.0, 0.0]


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sync_steps=3 is delay_policy=layerpipe.delays.AfterSteps\(3\); give one"):
        pipeline(chain(), sync_steps=3, delay_policy=Fixed())
    with pytest.raises(ValueError, match="synchronous minibatches must not be negative, got -1"):
        pipeline(chain(), sync_steps=-1)
    with pytest.raises(TypeError, match=r"delay_policy is a layerpipe.delays.DelayPolicy, got str"):
        pipeline(chain(), delay_policy="late")
    with pytest.raises(ValueError, match="window must be at least 1 minibatch, got 0"):
        OnLoss(window=0)
    with pytest.raises(ValueError, match="shares of the loss, at least 0, got -1"):
        OnLoss(decrease=-1)


def test_delayed_training_from_the_first_minibatch_is_not_the_same() -> None:
    data = minibatches(20)
    with layerpipe.Pipeline(
        chain(), F.cross_entropy, lambda params, **past: lk.SGD(params, **SGD, **past), past="stash", sync_steps=5
    ) as pipe:
        train(pipe, data)
        late = delayed_sgd(chain(), data).state_dict()
        assert not torch.equal(pipe.state_dict()["0.0.weight"], late["0.0.weight"])
