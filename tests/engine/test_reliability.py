"""Whatever happens: the threads end, every stage has made whole updates, nothing hangs."""

from __future__ import annotations

import copy
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.models import CallsAt, chain, minibatches
from tests.engine.pipelines import EXECUTORS, pipeline, sgd, workers


def weights(pipe: layerpipe.Pipeline) -> list[list[Tensor]]:
    return [[p.detach().clone() for p in stage.module.parameters()] for stage in pipe.stages]


def versions(count: int) -> list[list[list[Tensor]]]:
    """Of an undisturbed run: every stage's weights after each of its updates."""
    found: list[list[list[Tensor]]] = []
    with pipeline() as pipe:
        for stage in pipe.stages:
            found.append([[p.detach().clone() for p in stage.module.parameters()]])
            update = stage.update

            def recorded(options: Any, stage: Any = stage, update: Any = update, own: Any = found[-1]) -> None:
                update(options)
                own.append([p.detach().clone() for p in stage.module.parameters()])

            stage.update = recorded  # type: ignore[method-assign]
        for x, y in minibatches(count):
            pipe.step(x, y)
        pipe.drain()
    return found


def assert_whole_updates(pipe: layerpipe.Pipeline, known: list[list[list[Tensor]]]) -> None:
    """Every stage has just the weights that its number of updates gives."""
    for stage, now, versions in zip(pipe.stages, weights(pipe), known, strict=True):
        assert all(map(torch.equal, now, versions[stage.version])), stage.name


def raises(x: Tensor) -> Tensor:
    raise KeyError("the matter")


def out_of_memory(x: Tensor) -> Tensor:
    return x + torch.empty(1 << 50)


def memory_error(x: Tensor) -> Tensor:
    raise MemoryError


def not_a_number(x: Tensor) -> Tensor:
    return x * float("nan")


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (raises, "KeyError: 'the matter'"),
        (out_of_memory, "out of memory: try smaller minibatches"),
        (memory_error, "out of memory: try smaller minibatches"),
        (not_a_number, "not finite after"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_trouble_in_a_stage_ends_with_its_name_and_whole_updates(
    executor: str, where: str, stage: int, what: Any, message: str
) -> None:
    torch.set_num_threads(1)
    before, known = workers(), versions(30)
    stages = chain()
    inside = stages[stage]
    assert isinstance(inside, nn.Sequential)
    inside.append(CallsAt(what, where, at=9))
    pipe = pipeline(stages, executor=executor)
    expected = layerpipe.DivergenceError if what is not_a_number else layerpipe.StageError
    with pytest.raises(expected, match=message) as caught:
        for x, y in minibatches(30):
            pipe.step(x, y)
        pipe.drain()
    if what is not not_a_number or where == "forward":
        assert caught.value.stage.startswith(f"stage {stage} ")
    pipe.close()
    assert workers() == before
    finite = all(torch.isfinite(p).all() for p in pipe.parameters())
    if finite:  # a NaN gradient of the first stage is seen by nobody before its update
        assert_whole_updates(pipe, known)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_nan_loss_names_the_last_stage_and_the_minibatch(executor: str) -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * (float("nan") if target is bad else 1.0)

    data = minibatches(12)
    bad = data[5][1]
    with (
        layerpipe.Pipeline(chain(), loss_fn, sgd, executor=executor) as pipe,
        pytest.raises(layerpipe.DivergenceError, match=r"stage 3 \(Linear\): the loss of minibatch 5 is not finite"),
    ):
        for x, y in data:
            pipe.step(x, y)
        pipe.drain()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_data_loader_that_throws_leaves_whole_updates_and_no_thread(executor: str) -> None:
    torch.set_num_threads(1)
    known, before = versions(9), workers()

    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        yield from minibatches(9)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"), pipeline(executor=executor) as pipe:
        for x, y in loader():
            pipe.step(x, y)
    assert workers() == before
    assert_whole_updates(pipe, known)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
@pytest.mark.parametrize("fed", [0, 1, 2, 5])
def test_data_that_ends_early_is_trained_on_all_the_same(executor: str, schedule: str, fed: int) -> None:
    with pipeline(executor=executor, schedule=schedule) as pipe:
        losses = [pipe.step(x, y) for x, y in minibatches(fed)] + pipe.drain()
        assert sum(loss is not None for loss in losses) == fed
        assert [stage.version for stage in pipe.stages] == [fed] * 4


@pytest.mark.parametrize("moment", ["forward", "update"])
def test_ctrl_c_in_the_serial_executor_waits_for_the_end_of_an_update(moment: str) -> None:
    known = versions(12)
    pipe = pipeline()
    stage = pipe.stages[1]
    plan_step = stage.optimizer.step  # type: ignore[union-attr]
    calls = 0

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the handler runs between two lines of Python

    def step() -> None:
        plan_step()
        interrupt()  # the weights are new, and the stage has not counted them yet

    if moment == "update":
        stage.optimizer.step = step  # type: ignore[union-attr,method-assign]
    else:
        stage.module.register_forward_pre_hook(lambda *_: interrupt())
    handler = signal.getsignal(signal.SIGINT)
    with pipe, pytest.raises(KeyboardInterrupt):
        for x, y in minibatches(12):
            pipe.step(x, y)
    assert signal.getsignal(signal.SIGINT) is handler
    assert calls == 4
    assert_whole_updates(pipe, known)
    with pytest.raises(RuntimeError, match="stopped after an error"):
        pipe.step(*minibatches(1)[0])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_ctrl_c_at_any_moment_leaves_whole_updates(executor: str) -> None:
    torch.set_num_threads(1)
    data, chance, before = minibatches(4000), random.Random(1), workers()
    for _ in range(3):
        pipe = pipeline(executor=executor)
        timer = threading.Timer(chance.uniform(0.01, 0.1), os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            while True:
                for x, y in data:
                    pipe.step(x, y)
        timer.join()
        pipe.close()
        assert workers() == before
        # An update is whole if the stage's clock and its optimizer's say the same.
        for stage in pipe.stages:
            assert {g["updates"] for g in stage.optimizer.param_groups} == {stage.version}  # type: ignore[union-attr]


def test_ctrl_c_twice_does_not_wait() -> None:
    class Stuck(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
            return super().forward(x)

    start = time.monotonic()
    with pipeline([Stuck(6, 3)]) as pipe, pytest.raises(KeyboardInterrupt):
        pipe.step(*minibatches(1)[0])
    assert time.monotonic() - start < 30  # not a speed: the sleep was cut short


def test_a_signal_between_ticks_goes_to_whoever_handles_it_then() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[int] = []
    data = minibatches(4)

    def chained(number: int, frame: Any) -> None:
        seen.append(number)
        if callable(inner):
            inner(number, frame)

    pipe = pipeline(executor="serial")
    try:
        signal.signal(signal.SIGTERM, lambda *_: seen.append(-1))
        pipe.step(*data[0])
        inner = signal.signal(signal.SIGTERM, chained)  # what a logger installs in the middle of training
        pipe.step(*data[1])
        os.kill(os.getpid(), signal.SIGTERM)
        pipe.step(*data[2])
        assert seen == [signal.SIGTERM, -1]
        pipe.drain()
        assert signal.getsignal(signal.SIGTERM) is chained
        pipe.step(*data[3])
        pipe.close()
        assert signal.getsignal(signal.SIGTERM) is chained
    finally:
        signal.signal(signal.SIGTERM, before)


def short_run(number: int) -> None:
    """One of many: sizes, schedule and end by its number."""
    chance = random.Random(number)
    stages, fed = chance.randint(1, 4), chance.randint(0, 6)
    schedule = chance.choice(["lockstep", "1f1b", "sequential"])
    parts = chain(stages)
    fails = chance.random() < 0.3 and fed > 0
    if fails:
        where = chance.choice(["forward", "backward"])
        at = chance.randint(1, fed)
        victim = chance.randrange(stages)
        parts[victim] = nn.Sequential(parts[victim], CallsAt(raises, where, at))
    pipe = layerpipe.Pipeline(
        parts, F.cross_entropy, lambda p, **past: lk.SGD(p, lr=0.01, **past), schedule=schedule, executor="threads",
        threads_per_stage=1, split_backward=chance.random() < 0.5,
    )  # fmt: skip
    try:
        losses = [pipe.step(x, y) for x, y in minibatches(fed)]
        if chance.random() < 0.7:
            losses += pipe.drain()
            assert not fails
            assert sum(loss is not None for loss in losses) == fed
    except layerpipe.StageError as error:
        if not fails or "the matter" not in str(error):
            raise
    pipe.close()
    for stage in pipe.stages:
        assert {g["updates"] for g in stage.optimizer.param_groups} <= {stage.version, 0}  # type: ignore[union-attr]


@pytest.mark.parametrize("runs", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_short_runs_end_as_they_should(runs: int) -> None:
    torch.set_num_threads(1)
    before = workers()
    for number in range(runs):
        short_run(number)
    assert workers() == before


def test_pipelines_side_by_side_do_not_disturb_each_other() -> None:
    torch.set_num_threads(1)
    data = minibatches(12)
    with pipeline() as pipe:
        for x, y in data:
            pipe.step(x, y)
        pipe.drain()
        alone = copy.deepcopy(pipe.state_dict())
    pipes = [pipeline(executor="threads", threads_per_stage=1) for _ in range(3)]
    for x, y in data:
        for pipe in pipes:
            pipe.step(x, y)
    for pipe in pipes:
        pipe.drain()
        assert all(torch.equal(value, alone[name]) for name, value in pipe.state_dict().items())
        pipe.close()
