"""Weights outside a stage's own module: the loss's are trained, other stages' are refused by name in the first
minibatch of every schedule, and a weight is never left out without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.cases import programs
from tests.cases.programs import Weighted, all_equal, plain_sgd, weights
from tests.distributed.processes import Processes
from tests.engine.delayed_training import DelayedTraining
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import EXECUTORS, sgd

SCHEDULES = ["sequential", "1f1b", "lockstep"]
Loss = Callable[..., Tensor]


def plain_loop(network: nn.Module, loss: Loss, data: list[Any], extra: Any = ()) -> list[Tensor]:
    optimizer = plain_sgd([*network.parameters(), *extra])
    for x, y in data:
        optimizer.zero_grad()
        loss(network(x), y).backward()
        optimizer.step()
    return weights(network)


def trained(stages: list[nn.Module], loss: Loss, data: list[Any], **options: Any) -> list[Tensor]:
    with layerpipe.Pipeline(stages, loss, options.pop("optimizer", sgd), **options) as pipe:
        for x, y in data:
            pipe.step(x, y)
        pipe.drain()
    return weights(nn.Sequential(*stages))


def penalty(modules: Any) -> Loss:
    params = [p for module in modules for p in module.parameters()]
    return lambda out, y: F.cross_entropy(out, y) + 0.05 * sum(p.abs().sum() for p in params)


# -- other stages' weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_penalty_on_other_stages_weights_is_refused_at_once(schedule: str, executor: str) -> None:
    stages = chain(3)
    before = weights(nn.Sequential(*stages))
    with pytest.raises(layerpipe.StageError, match=r"stage 2 .*loss_fn uses .* of stage [01] .*as a further output"):
        trained(stages, penalty(stages), minibatches(8), schedule=schedule, executor=executor)
    assert all_equal(weights(nn.Sequential(*stages)), before)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_penalty_on_the_last_stages_own_weights_is_exact(schedule: str) -> None:
    stages, theirs, data = chain(3), chain(3), minibatches(15)
    got = trained(stages, penalty(stages[-1:]), data, schedule=schedule, past="stash")
    DelayedTraining(theirs, penalty(theirs[-1:]), plain_sgd, schedule=schedule, past="stash").train(data)
    assert all_equal(got, weights(nn.Sequential(*theirs)))


@pytest.mark.parametrize("late", [1, 6, 9])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_penalty_that_begins_later_is_refused_when_it_begins(executor: str, late: int) -> None:
    stages = chain(3)
    with_penalty, calls = penalty(stages), []

    def loss(out: Tensor, y: Tensor) -> Tensor:
        calls.append(0)
        return F.cross_entropy(out, y) if len(calls) <= late else with_penalty(out, y)

    with pytest.raises(layerpipe.StageError, match="loss_fn uses"):
        trained(stages, loss, minibatches(20), executor=executor)
    assert len(calls) == late + 1


class WithPenalty(nn.Module):
    """Hands the sum of what came and of its own penalty on beside its output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, so_far: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        return self.inner(x), so_far + 0.05 * sum(p.square().sum() for p in self.inner.parameters())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_penalty_that_is_handed_on_is_exact(schedule: str) -> None:
    def loss(out: Tensor, total: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y) + total

    stages = [WithPenalty(stage) for stage in chain(3)]
    theirs, data = [WithPenalty(stage) for stage in chain(3)], minibatches(12)
    got = trained([*stages], loss, data, schedule=schedule, past="stash")
    DelayedTraining(theirs, loss, plain_sgd, schedule=schedule, past="stash").train(data)
    assert all_equal(got, weights(nn.Sequential(*theirs)))


class Head(nn.Module):
    """Uses another stage's embedding, kept where no module looks."""

    def __init__(self, table: nn.Embedding, detached: bool = False) -> None:
        super().__init__()
        self.table, self.detached, self.linear = [table], detached, nn.Linear(6, 6)

    def forward(self, h: Tensor) -> Tensor:
        weight = self.table[0].weight.detach() if self.detached else self.table[0].weight
        return self.linear(h) @ weight.t()


def with_head(detached: bool = False) -> list[nn.Module]:
    torch.manual_seed(0)
    table = nn.Embedding(11, 6)
    return [table, nn.Linear(6, 6), Head(table, detached)]


def words(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(11, (8,), generator=generator), torch.randint(11, (8,), generator=generator))
            for _ in range(count)]  # fmt: skip


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_head_that_uses_another_stages_embedding_is_refused(schedule: str, executor: str, detached: bool) -> None:
    with pytest.raises(layerpipe.StageError, match=r"stage 2 \(Head\).* weight of stage 0 \(Embedding\).*one stage"):
        trained(with_head(detached), F.cross_entropy, words(8), schedule=schedule, executor=executor)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_another_stage_does_not_train_may_be_used(schedule: str) -> None:
    stages, theirs = with_head(), with_head()
    for parts in (stages, theirs):
        parts[0].requires_grad_(False)
    got = trained(stages, F.cross_entropy, words(12), schedule=schedule, past="stash")
    DelayedTraining(theirs, F.cross_entropy, plain_sgd, schedule=schedule, past="stash").train(words(12))
    assert all_equal(got, weights(nn.Sequential(*theirs)))


def test_both_uses_in_one_stage_are_served() -> None:
    table, middle, head = with_head()
    theirs = nn.Sequential(*with_head())
    got = trained([nn.Sequential(table, middle, head)], F.cross_entropy, words(12))
    assert all_equal(got, plain_loop(theirs, F.cross_entropy, words(12)))


class Remembers(nn.Linear):
    auxiliary: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.auxiliary = y.square().mean()
        return y


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_auxiliary_loss_left_on_another_stages_module_is_refused(schedule: str, executor: str) -> None:
    first = Remembers(6, 6)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y) + first.auxiliary

    with pytest.raises(layerpipe.StageError, match=r"stage 1 .*loss_fn uses .* of stage 0 .*auxiliary loss"):
        trained([first, nn.Linear(6, 3)], loss, minibatches(8), schedule=schedule, executor=executor)


def test_an_auxiliary_loss_left_on_the_last_stage_is_served() -> None:
    found = []
    for pipelined in (False, True):
        torch.manual_seed(0)
        last = Remembers(6, 3)
        stages = [nn.Linear(6, 6), last]
        loss = lambda out, y, last=last: F.cross_entropy(out, y) + last.auxiliary
        if pipelined:
            found.append(trained(stages, loss, minibatches(10), schedule="sequential"))
        else:
            found.append(plain_loop(nn.Sequential(*stages), loss, minibatches(10)))
    assert all_equal(*found)


# -- the loss's own --------------------------------------------------------------------------------------------------


def added_by_hand(loss: nn.Module, stages: list[nn.Module]) -> Callable[..., lk.SGD]:
    last = next(stages[-1].parameters())
    return lambda params, **past: sgd([*params, *(loss.parameters() if any(p is last for p in params) else ())], **past)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("how", ["module", "loss_params", "optimizer"])
def test_a_loss_with_weights_is_trained(how: str, executor: str) -> None:
    stages, loss, theirs = chain(2), Weighted(), Weighted()
    options: dict[str, Any] = {}
    if how == "loss_params":
        options["loss_params"] = loss.parameters()
    if how == "optimizer":
        options["optimizer"] = added_by_hand(loss, stages)
    given: Loss = loss if how == "module" else lambda out, y: loss(out, y)
    got = trained(stages, given, minibatches(15), schedule="sequential", executor=executor, **options)
    assert all_equal(got, plain_loop(nn.Sequential(*chain(2)), theirs, minibatches(15), theirs.parameters()))
    assert all_equal(weights(loss), weights(theirs))
    assert not torch.equal(loss.scale, torch.ones(3))


@pytest.mark.parametrize("schedule", ["1f1b", "lockstep"])
def test_with_delays_all_executors_train_the_loss_alike_and_go_on(
    schedule: str, two: Processes, tmp_path: Path
) -> None:
    expected = programs.weighted(0, "serial", schedule, None)
    assert expected["scale"] != [1.0, 1.0, 1.0]
    assert programs.weighted(0, "threads", schedule, None) == expected
    assert programs.weighted(0, "serial", schedule, str(tmp_path / "run.pt")) == expected
    results = two.all(programs.weighted, "distributed", schedule, None)
    assert results[1] == expected
    assert [result["state"] for result in results] == [expected["state"]] * 2


def test_a_checkpoint_of_another_loss_is_refused(tmp_path: Path) -> None:
    with layerpipe.Pipeline(chain(2), Weighted(), sgd) as pipe:
        pipe.checkpoint(tmp_path / "run.pt")
    with (
        layerpipe.Pipeline(chain(2), F.cross_entropy, sgd) as other,
        pytest.raises(layerpipe.CheckpointError, match=r"another loss.*loss\.scale"),
    ):
        other.resume(tmp_path / "run.pt")


def test_a_last_stage_without_weights_trains_the_losss() -> None:
    loss, theirs = Weighted(), Weighted()
    got = trained([*chain(2), nn.Identity()], loss, minibatches(10), schedule="sequential")
    assert all_equal(got, plain_loop(nn.Sequential(*chain(2)), theirs, minibatches(10), theirs.parameters()))
    assert all_equal(weights(loss), weights(theirs))


def test_frozen_weights_of_a_loss_and_a_model_that_it_refers_to_are_left_alone() -> None:
    class Perceptual(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.net = model, nn.Linear(3, 4).requires_grad_(False)

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(out, y) + (self.net(out) - self.net(F.one_hot(y, 3).float())).square().mean()

    stages, theirs = chain(2), nn.Sequential(*chain(2))
    torch.manual_seed(5)
    loss = Perceptual(nn.Sequential(*stages))
    before = weights(loss.net)
    got = trained(stages, loss, minibatches(10), schedule="sequential")
    assert all_equal(weights(loss.net), before)
    assert all_equal(got, plain_loop(theirs, loss, minibatches(10)))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_loss_with_weights_that_nobody_was_told_of_is_refused(executor: str) -> None:
    loss, plain = Weighted(), torch.ones(3, requires_grad=True)
    for given, said in (
        (lambda out, y: loss(out, y), "loss_params="),
        (lambda out, y: F.cross_entropy(out * plain, y), "loss_params="),  # no parameter, but there again and again
    ):
        with pytest.raises(layerpipe.StageError, match=rf"stage 1 .*loss_fn uses a weight of shape \(3,\).*{said}"):
            trained(chain(2), given, minibatches(6), executor=executor)


def test_an_optimizer_with_parameters_that_are_not_its_stages_is_refused() -> None:
    stages, loss = chain(3), Weighted()
    for extra, said in (
        (loss, r"stage 0 .*holds a parameter of shape \(3,\) of no stage.*loss_params="),
        (stages[2], r"stage 0 .*holds weight of stage 2"),
    ):
        with pytest.raises(ValueError, match=said):
            layerpipe.Pipeline(
                stages, loss, lambda params, extra=extra, **past: sgd([*params, *extra.parameters()], **past)
            )
    with pytest.raises(TypeError, match=r"loss_params are nn\.Parameters"):
        layerpipe.Pipeline(stages, loss, sgd, loss_params=[torch.ones(1)])  # type: ignore[list-item]


def test_leaves_that_a_forward_makes_itself_are_served() -> None:
    class Slope(nn.Linear):
        """Has the gradient of its own output with respect to its input as a feature."""

        def forward(self, x: Tensor) -> Tensor:
            point = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(super().forward(point).tanh().sum(), point, create_graph=True)
            return super().forward(x) + slope + point

    found = []
    for pipelined in (False, True):
        torch.manual_seed(0)
        stages: list[nn.Module] = [Slope(6, 6), nn.Linear(6, 3)]
        if pipelined:
            found.append(trained(stages, F.cross_entropy, minibatches(9), schedule="sequential"))
        else:
            found.append(plain_loop(nn.Sequential(*stages), F.cross_entropy, minibatches(9)))
    assert all_equal(*found)
