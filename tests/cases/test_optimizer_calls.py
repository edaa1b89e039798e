"""What a stage calls of its optimizer is what a plain loop calls: ``zero_grad()``, ``step()`` and their hooks, once per
update. What steps otherwise is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.cases.programs import weights
from tests.engine.fake_device import fake_device
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import EXECUTORS, pipeline


@pytest.mark.parametrize("executor", [*EXECUTORS, "streams"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_step_hooks_are_called_once_per_update_of_each_stage(executor: str, wrapped: bool) -> None:
    calls: list[tuple[str, Any, int]] = []

    def make(params: Any, **past: Any) -> torch.optim.Optimizer:
        return lk.PastWeights(torch.optim.Adam(params), **past) if wrapped else lk.SGD(params, lr=0.1, **past)

    with fake_device(), layerpipe.Pipeline(chain(3), F.cross_entropy, make, executor=executor) as pipe:
        post = pipe.optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o, 0)))
        for i, (x, y) in enumerate(minibatches(10)):
            if i == 4:  # in a pipe that is full
                pre = pipe.optimizer.register_step_pre_hook(
                    lambda o, args, kwargs: calls.append(("pre", o, threading.get_ident()))
                )
            pipe.step(x, y)
        pipe.drain()
        optimizers = [stage.optimizer for stage in pipe.stages]
        for optimizer in optimizers:
            assert sum(o is optimizer and when == "post" for when, o, _ in calls) == 10
            assert 6 <= sum(o is optimizer and when == "pre" for when, o, _ in calls) <= 10
        assert len({thread for _, _, thread in calls if thread}) == (3 if executor == "threads" else 1)
        post.remove()
        pre.remove()
        count = len(calls)
        pipe.step(*minibatches(1)[0])
        pipe.drain()
        assert len(calls) == count


def beside(
    pipe: layerpipe.Pipeline,
    plain: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    data: list[tuple[Tensor, Tensor]],
) -> None:
    """Trains a pipeline and, in a plain loop, a network on the same minibatches."""
    for x, y in data:
        plain.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
        pipe.step(x, y)
    pipe.drain()


def test_a_hook_may_change_the_gradients_as_in_a_plain_loop() -> None:
    def halve(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = p.grad / 2

    plain, stages = nn.Sequential(*chain(2)), chain(2)
    theirs: list[torch.optim.Optimizer] = [lk.SGD(stage.parameters(), lr=0.1, momentum=0.9) for stage in plain]
    for optimizer in theirs:
        optimizer.register_step_pre_hook(halve)
    with layerpipe.Pipeline(
        stages, F.cross_entropy, lambda p, **past: lk.SGD(p, lr=0.1, momentum=0.9, **past), schedule="sequential"
    ) as pipe:
        pipe.optimizer.register_step_pre_hook(halve)
        beside(pipe, plain, theirs, minibatches(8))
    assert all(map(torch.equal, weights(plain), weights(nn.Sequential(*stages))))


def test_hooks_are_refused_where_steps_are_replayed() -> None:
    def make(params: Any, **past: Any) -> lk.SGD:
        return lk.SGD(params, lr=0.1, capturable=True, backend="reference", **past)

    def make_hooked(params: Any, **past: Any) -> lk.SGD:
        optimizer = make(params, **past)
        optimizer.register_step_post_hook(lambda *_: None)
        return optimizer

    options: dict[str, Any] = {"executor": "graphs", "check_finite": False}
    with fake_device():
        pipe = layerpipe.Pipeline(chain(2), F.cross_entropy, make, **options)
        for register in (pipe.optimizer.register_step_pre_hook, pipe.optimizer.register_step_post_hook):
            with pytest.raises(RuntimeError, match="no replay calls a hook; use executor='streams'"):
                register(lambda *_: None)
        with pytest.raises(ValueError, match=r"stage 0 .*no replay calls a hook"):
            layerpipe.Pipeline(chain(2), F.cross_entropy, make_hooked, **options)


def test_hooks_of_states_are_called() -> None:
    calls: list[str] = []
    with pipeline(chain(2)) as pipe:
        optimizer = pipe.optimizer
        optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
        optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 7})
        optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append(f"load {state.pop('note')}"))
        optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        assert state["note"] == 7
    assert calls == ["save", "load 7", "loaded"]


class EveryFourth(torch.optim.SGD):
    """Steps every fourth time; what becomes of the gradients meanwhile, it does not say."""

    calls = 0
    first = 4

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure) if self.calls % 4 == self.first % 4 else None


class Accumulating(EveryFourth):
    """Keeps the gradients until it steps, as wrappers for gradient accumulation do."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.calls % 4 == 0:
            super().zero_grad(set_to_none)


def plain_accumulation(data: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    plain = nn.Sequential(*chain(2))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for i, (x, y) in enumerate(data):
        F.cross_entropy(plain(x), y).backward()
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    return weights(plain)


def wrapped(kind: Any) -> Callable[..., lk.PastWeights]:
    return lambda params, **past: lk.PastWeights(kind(params, lr=0.1), **past)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("split", [False, True])
def test_an_optimizer_that_keeps_its_gradients_accumulates(executor: str, split: bool) -> None:
    stages = chain(2)
    with layerpipe.Pipeline(
        stages, F.cross_entropy, wrapped(Accumulating), schedule="sequential", executor=executor, split_backward=split
    ) as pipe:
        for x, y in minibatches(40):
            pipe.step(x, y)
        pipe.drain()
    assert all(map(torch.equal, plain_accumulation(minibatches(40)), weights(nn.Sequential(*stages))))


def test_with_delays_an_accumulating_optimizer_gives_the_same_in_threads() -> None:
    found = []
    for executor in EXECUTORS:
        stages = chain(4)
        with layerpipe.Pipeline(
            stages, F.cross_entropy, wrapped(Accumulating), past="stash", executor=executor
        ) as pipe:
            for x, y in minibatches(20):
                pipe.step(x, y)
            pipe.drain()
        found.append(weights(nn.Sequential(*stages)))
    assert all(map(torch.equal, *found))


class ByData(EveryFourth):
    """Writes to ``param.data``, which no version counter sees."""

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        if self.calls % 4 == self.first % 4:
            for p in self.param_groups[0]["params"]:
                p.data.sub_(0.1 * p.grad)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("first", [1, 3, 4])
@pytest.mark.parametrize("kind", [EveryFourth, ByData])
def test_a_step_that_does_nothing_with_its_gradients_is_refused(
    kind: Any, first: int, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EveryFourth, "first", first)
    with (
        layerpipe.Pipeline(chain(2), F.cross_entropy, wrapped(kind), schedule="sequential", executor=executor) as pipe,
        pytest.raises(layerpipe.StageError, match=rf"stage \d .*{kind.__name__}\.step\(\) left .*zero_grad"),
    ):
        for x, y in minibatches(3):
            pipe.step(x, y)
        pipe.drain()


def test_a_step_of_0_is_a_step() -> None:
    """A warm-up begins with a learning rate of 0, and a gradient may be 0."""

    class Own(ByData):
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.data.sub_(self.param_groups[0]["lr"] * p.grad)

    stages, plain = chain(2), nn.Sequential(*chain(2))
    theirs = Own(plain.parameters(), lr=0.1)
    with layerpipe.Pipeline(stages, F.cross_entropy, wrapped(Own), schedule="sequential") as pipe:
        warm = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: max(0, i - 2) / 10) for o in (theirs, pipe.optimizer)]
        for x, y in minibatches(10):
            plain.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            theirs.step()
            pipe.step(x, y)
            for schedule in warm:
                schedule.step()
        pipe.drain()
    assert all(map(torch.equal, weights(plain), weights(nn.Sequential(*stages))))


class Skipping(torch.optim.SGD):
    """Leaves out updates with large gradients, and says that these gradients are dropped."""

    def step(self, closure: Any = None) -> Any:
        grads = [p.grad for p in self.param_groups[0]["params"]]
        return super().step(closure) if torch.stack([g.norm() for g in grads]).norm() < 0.4 else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)


def test_an_optimizer_may_leave_updates_out() -> None:
    stages, plain = chain(2), nn.Sequential(*chain(2))
    theirs: list[torch.optim.Optimizer] = [Skipping(stage.parameters(), lr=0.1) for stage in plain]
    with layerpipe.Pipeline(stages, F.cross_entropy, wrapped(Skipping), schedule="sequential") as pipe:
        beside(pipe, plain, theirs, minibatches(20))
    assert all(map(torch.equal, weights(plain), weights(nn.Sequential(*stages))))


def test_a_past_that_does_not_count_a_step_is_refused() -> None:
    class Sometimes(lk.SGD):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            return super().step(closure) if self.calls % 2 == 0 else None

        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none)

    with (
        layerpipe.Pipeline(chain(3), F.cross_entropy, lambda p, **past: Sometimes(p, lr=0.1, **past)) as pipe,
        pytest.raises(layerpipe.StageError, match=r"stage \d .*Sometimes left out an update"),
    ):
        for x, y in minibatches(10):
            pipe.step(x, y)


class NeedsLoss(torch.optim.SGD):
    def step(self, loss: Tensor) -> Any:  # type: ignore[override]
        return super().step()


class Around(torch.optim.SGD):
    """Wraps another optimizer, as look-ahead does."""

    def __init__(self, params: Any) -> None:
        params = list(params)
        super().__init__(params, lr=0.1)
        self.base = torch.optim.LBFGS(params)


@pytest.mark.parametrize("schedule", ["sequential", "1f1b"])
@pytest.mark.parametrize("kind", [torch.optim.LBFGS, NeedsLoss, Around], ids=lambda kind: kind.__name__)
def test_optimizers_that_need_a_closure_are_refused_when_the_pipeline_is_made(kind: Any, schedule: str) -> None:
    name = "LBFGS" if kind is Around else kind.__name__
    for make in (lambda params, **past: lk.PastWeights(kind(params), **past), lambda params, **past: kind(params)):
        with pytest.raises(TypeError, match=rf"stage \d .*{name}\.step needs its .*closure"):
            layerpipe.Pipeline([nn.Linear(6, 6), nn.Linear(6, 3)], F.cross_entropy, make, schedule=schedule)
