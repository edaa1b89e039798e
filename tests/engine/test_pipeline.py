"""What a user of the pipeline gets: losses, weights, options, state, reports."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import EXECUTORS, pipeline, sgd


@pytest.mark.parametrize("executor", EXECUTORS)
def test_losses_come_out_in_order_and_none_is_lost(executor: str) -> None:
    data = minibatches(12)
    with pipeline(executor=executor) as pipe:
        for _ in range(2):  # a drained pipe fills again
            got = [pipe.step(x, y) for x, y in data]
            assert [loss is None for loss in got] == [i < pipe.latency for i in range(12)]
            assert len(pipe.drain()) == pipe.latency
        assert pipe.in_flight == 0
        assert all(s.version == 24 for s in pipe.stages)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_losses_are_those_of_their_minibatches(executor: str) -> None:
    """With a learning rate of 0 and no running statistics, each loss is the plain one."""
    stages = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    data = minibatches(7)
    pipe = layerpipe.Pipeline(
        stages, F.cross_entropy, lambda params, **past: lk.SGD(params, lr=0.0, **past), executor=executor
    )
    with pipe:
        got = [loss for x, y in data if (loss := pipe.step(x, y)) is not None] + pipe.drain()
    want = [F.cross_entropy(nn.Sequential(*stages)(x), y) for x, y in data]
    torch.testing.assert_close(torch.stack(got), torch.stack(want))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_training_learns(executor: str) -> None:
    x = torch.randn(64, 6)
    y = (x[:, 0] > 0).long()
    with pipeline(executor=executor) as pipe:
        losses = [loss for _ in range(150) if (loss := pipe.step(x, y)) is not None]
        assert losses[-1] < 0.2 < losses[0]


def test_drain_of_an_empty_pipe_and_twice() -> None:
    with pipeline() as pipe:
        assert pipe.drain() == []
        pipe.step(*minibatches(1)[0])
        assert len(pipe.drain()) == 1
        assert pipe.drain() == []


def test_evaluation_uses_current_weights_and_disturbs_nothing() -> None:
    data, x = minibatches(20), torch.randn(5, 6)
    results = []
    for look in (False, True):
        with pipeline(executor="threads") as pipe:
            for step, (inputs, target) in enumerate(data):
                pipe.step(inputs, target)
                if look and step % 3 == 0:
                    pipe.eval()
                    with torch.no_grad():
                        assert torch.equal(pipe(x), nn.Sequential(*pipe.modules)(x))
                    pipe.train()
            pipe.drain()
            results.append(copy.deepcopy(pipe.state_dict()))
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_stages_may_pass_tuples(executor: str) -> None:
    class Fork(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    class Join(nn.Linear):
        def forward(self, y: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(torch.tanh(y) + x)

    stages = [nn.Linear(6, 6), Fork(6, 6), Join(6, 3)]
    assert_sequential_schedule_is_plain_training(stages, executor, lambda x: stages[2](*stages[1](stages[0](x))))
    with pipeline(stages, executor=executor, past="stash") as pipe:
        for x, y in minibatches(10):
            pipe.step(x, y)
        pipe.drain()
        assert pipe(torch.randn(2, 6)).shape == (2, 3)


def assert_sequential_schedule_is_plain_training(stages: list[nn.Module], executor: str, forward: Any) -> None:
    """Trains the stages, and then the same weights in a plain loop over ``forward``, which runs the stages."""
    torch.set_num_threads(1)
    modules = nn.ModuleList(stages)
    start, data = copy.deepcopy(modules.state_dict()), minibatches(6)
    with pipeline(stages, executor=executor, schedule="sequential") as pipe:
        for x, y in data:
            pipe.step(x, y)
        pipe.drain()
    piped = copy.deepcopy(modules.state_dict())
    modules.load_state_dict(start)
    optimizer = sgd([p for p in modules.parameters() if p.requires_grad])
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()
    assert all(torch.equal(value, piped[name]) for name, value in modules.state_dict().items())


def test_schedulers_and_options_reach_the_stages() -> None:
    with pipeline() as pipe:
        scheduler = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 1, gamma=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for x, y in minibatches(8):
                pipe.step(x, y)
                used = [g["lr"] for s in pipe.stages if s.version for g in s.optimizer.param_groups]  # type: ignore[union-attr]
                assert set(used) == ({scheduler.get_last_lr()[0]} if pipe.tick > 3 else set())
                scheduler.step()
        # The first stage's first layer keeps no history and has a group of its own.
        assert [group["delay"] for group in pipe.optimizer.param_groups] == [6, 0, 4, 2, 0]
        assert "momentum_buffer" in next(iter(pipe.optimizer.state.values()))
        with pytest.raises(RuntimeError, match=r"pipe\.step"):
            pipe.optimizer.step()


def test_a_learning_rate_that_is_a_tensor_may_change_in_place() -> None:
    lr = torch.tensor(0.1)
    with layerpipe.Pipeline(
        chain(1), F.cross_entropy, lambda params, **past: lk.SGD(params, lr=lr, **past), schedule="sequential"
    ) as pipe:
        optimizer: Any = pipe.stages[0].optimizer
        for wanted in (0.1, 0.05):
            pipe.optimizer.param_groups[0]["lr"].fill_(wanted)
            pipe.step(*minibatches(1)[0])
            assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(wanted)


def test_gradients_are_clipped_per_stage() -> None:
    with pipeline(max_norm=1e-3) as pipe:
        for x, y in minibatches(10):
            pipe.step(x, y)
        for stage in pipe.stages:
            norm = torch.stack([p.grad.norm() for p in stage.module.parameters()]).norm()  # type: ignore[union-attr]
            assert norm <= 1.001e-3


def test_state_dict_of_stages_by_hand_is_that_of_sequential() -> None:
    stages = chain()
    with pipeline(stages) as pipe:
        assert pipe.state_dict().keys() == nn.Sequential(*stages).state_dict().keys()
        assert dict(pipe.named_parameters()).keys() == dict(nn.Sequential(*stages).named_parameters()).keys()


@pytest.mark.parametrize("past", ["ema", "blend", "stash"])
def test_a_loaded_pipeline_continues_bitwise(past: str) -> None:
    data = minibatches(20)
    with pipeline(past=past) as whole, pipeline(chain(seed=9), past=past) as resumed:
        for x, y in data[:10]:
            whole.step(x, y)
        whole.drain()
        resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
        resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
        for pipe in (whole, resumed):
            for x, y in data[10:]:
                pipe.step(x, y)
            pipe.drain()
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name])


def test_stages_without_parameters_and_frozen_ones() -> None:
    frozen = nn.Linear(6, 6).requires_grad_(False)
    before = copy.deepcopy(frozen.state_dict())
    stages = [nn.Linear(6, 6), nn.Tanh(), frozen, nn.Linear(6, 3)]
    assert_sequential_schedule_is_plain_training(stages, "serial", nn.Sequential(*stages))
    with pipeline(stages, past="stash") as pipe:
        for x, y in minibatches(12):
            pipe.step(x, y)
        pipe.drain()
    assert all(torch.equal(v, before[k]) for k, v in frozen.state_dict().items())


@pytest.mark.parametrize("past", ["stash", "ema", "blend"])
def test_memory_report_adds_up(past: str) -> None:
    with pipeline(past=past) as pipe:
        for x, y in minibatches(20):
            pipe.step(x, y)
        report = pipe.memory()
    for stage, memory in zip(pipe.stages, report, strict=True):
        weights = sum(p.nbytes for p in stage.module.parameters())
        copies = {"stash": stage.delay, "ema": min(stage.delay, 1), "blend": min(2, max(0, stage.delay - 1))}[past]
        assert memory.weights == memory.optimizer == weights
        first = sum(p.nbytes for p in stage.without_past)
        assert (first > 0) == (stage.index == 0)
        assert memory.history == copies * (weights - first)
        assert memory.stash == stage.delay * (weights - first)
        if past == "stash":
            assert memory.stash == memory.history
        assert (memory.scratch > 0) == (stage.delay > 0)
        assert memory.activations > 0
    # More minibatches are in flight the further a stage is from the end.
    assert report[0].activations > report[2].activations


def test_large_half_precision_outputs_are_finite() -> None:
    class Big(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) * 0 + 100).half()

    class Back(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.float())

    with pipeline([Big(6, 600), Back(600, 3)]) as pipe:
        for x, y in minibatches(4, size=16):
            pipe.step(x, y)
