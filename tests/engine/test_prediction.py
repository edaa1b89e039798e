"""Spike compensation and weight prediction in a pipeline: against plain formulas, and who sees which weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.delayed_training import DelayedTraining
from tests.engine.models import chain, minibatches
from tests.engine.pipelines import EXECUTORS, assert_equal_state, train
from tests.published_soap import SimulatedMatrix

WD = 1e-2


class Formula:
    """An optimizer as docs/optimizers.md writes it: ``d = P(a m + b g)``, ``W -= u``, and ``F = W - h n u`` is what the
    parameters hold. Slow, and nothing of ours.

    Args:
        adam: Adam's preconditioner and decoupled decay, or SGD's momentum in torch's scaling.
        c, h, n: spike compensation, weight prediction, staleness.
        k: β₁ is at least ``1 - 1 / (k n)``.
    """

    def __init__(
        self, params: list[nn.Parameter], *, adam: bool, lr: float, c: float, h: float, n: float, k: float = 0
    ) -> None:
        self.params, self.adam, self.lr, self.h, self.n = params, adam, lr, h, n
        self.beta = max(0.9, 1 - 1 / (k * n)) if k * n else 0.9
        self.share = self.beta ** (c * n)
        self.weights = [p.detach().clone() for p in params]
        self.m = [torch.zeros_like(p) for p in params]
        self.q = [torch.zeros_like(p) for p in params]
        self.t = 0

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        a, b = self.share, 1 - self.share
        for i, param in enumerate(self.params):
            grad, weight = param.grad, self.weights[i]
            assert grad is not None
            if self.adam:
                self.m[i] = self.beta * self.m[i] + (1 - self.beta) * grad
                self.q[i] = 0.99 * self.q[i] + 0.01 * grad * grad
                root = (self.q[i] / (1 - 0.99**self.t)).sqrt() + 1e-8
                update = self.lr * (a * self.m[i] / (1 - self.beta**self.t) + b * grad) / root + self.lr * WD * weight
            else:
                grad = grad + WD * weight
                self.m[i] = 0.9 * self.m[i] + grad
                update = self.lr * (a * self.m[i] + b * grad / (1 - 0.9))
            self.weights[i] = weight - update
            param.copy_(self.weights[i] - self.h * self.n * update)

    def zero_grad(self) -> None:
        for param in self.params:
            param.grad = None


class Preconditioned(Formula):
    """As ``Formula`` with Adam, but matrices step with SOAP or Muon. The network's output layer does not."""

    def __init__(self, params: list[nn.Parameter], *, muon: bool, last: bool, **numbers: Any) -> None:
        super().__init__(params, adam=True, **numbers)
        matrices = [] if last else [i for i, p in enumerate(params) if p.ndim == 2]
        self.muon, self.exponent = muon, numbers["c"] * self.n
        self.soap = {i: SimulatedMatrix(params[i], True, True) for i in matrices}
        self.average = {i: torch.zeros_like(params[i]) for i in matrices}

    @torch.no_grad()
    def step(self) -> None:
        before = {i: self.weights[i] for i in self.soap}
        super().step()
        for i, matrix in self.soap.items():
            param = self.params[i]
            assert param.grad is not None
            if self.muon:
                self.average[i] = 0.95 * self.average[i] + 0.05 * param.grad
                a = 0.95**self.exponent
                update = self.lr * orthogonal(a * self.average[i] + (1 - a) * param.grad) + self.lr * WD * before[i]
                self.weights[i] = before[i] - update
            else:
                matrix.step(param.grad, self.lr, 0.9, 0.99, 0.99, 1e-8, WD, 1 - self.share)
                self.weights[i] = matrix.weight
                matrix.begin_alone() if self.t == 1 else matrix.refresh()
            param.copy_(self.weights[i] - self.h * self.n * (before[i] - self.weights[i]))


def orthogonal(matrix: Tensor) -> Tensor:
    x = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


def preconditioned(muon: bool, c: float, h: float) -> Callable[..., torch.optim.Optimizer]:
    def make(params: list[Tensor], **past: Any) -> torch.optim.Optimizer:
        options = {"lr": 0.01, "weight_decay": WD, "spike_compensation": c, "weight_prediction": h, **past}
        if muon:
            return lk.Muon(params, adamw_betas=(0.9, 0.99), nesterov=False, ns_dtype=torch.float64, **options)
        return lk.SOAP(params, betas=(0.9, 0.99), precondition_frequency=1, **options)

    return make


def factory(adam: bool, c: float, h: float, **more: Any) -> Callable[..., torch.optim.Optimizer]:
    def make(params: list[Tensor], **past: Any) -> torch.optim.Optimizer:
        options = {"spike_compensation": c, "weight_prediction": h, "weight_decay": WD, **more, **past}
        if adam:
            return lk.AdamW(params, lr=0.01, betas=(0.9, 0.99), **options)
        return lk.SGD(params, lr=0.05, momentum=0.9, **options)

    return make


def double(stages: list[nn.Module]) -> list[nn.Module]:
    return [stage.double() for stage in stages]


def data64(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y) for x, y in minibatches(count)]


@pytest.mark.parametrize(
    ("adam", "c", "h", "k"),
    [
        *((adam, c, h, 0.0) for adam in (False, True) for c, h in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5))),
        (True, 0.5, 0.5, 14.0),
    ],
)
@pytest.mark.parametrize(("schedule", "accumulate"), [("lockstep", 1), ("1f1b", 1), ("lockstep", 4)])
def test_stash_equals_a_simulation_with_the_plain_formula(
    adam: bool, c: float, h: float, k: float, schedule: str, accumulate: int
) -> None:
    data, simulated = data64(36), double(chain())
    factor = 2 if schedule == "lockstep" else 1
    staleness = iter([factor * s / accumulate for s in (3, 2, 1, 0)])
    lr = 0.01 if adam else 0.05
    made = DelayedTraining(
        simulated,
        F.cross_entropy,
        lambda params: Formula(params, adam=adam, lr=lr, c=c, h=h, n=next(staleness), k=k),  # type: ignore[arg-type,return-value]
        schedule=schedule,
        past="stash",
        accumulate=accumulate,
    )
    losses = made.train(data)
    options = {"past": "stash", "schedule": schedule, "accumulate": accumulate}
    make = factory(adam, c, h, **({"beta1_delay": k} if adam else {}))
    with layerpipe.Pipeline(double(chain()), F.cross_entropy, make, **options) as pipe:
        torch.testing.assert_close(torch.stack(train(pipe, data)), torch.stack(losses), rtol=1e-6, atol=1e-8)
        weights = {
            name: made.optimizers[s].weights[i]  # type: ignore[union-attr]
            for s, stage in enumerate(simulated)
            for i, (name, _) in enumerate(nn.Sequential(*[nn.Identity()] * s, stage).named_parameters())
        }
        state = pipe.state_dict()
        for name, weight in weights.items():
            torch.testing.assert_close(state[name], weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("muon", [False, True], ids=["SOAP", "Muon"])
@pytest.mark.parametrize(("c", "h"), [(0.0, 0.0), (1.0, 0.5)])
@pytest.mark.parametrize(("schedule", "accumulate"), [("lockstep", 1), ("1f1b", 2)])
def test_stash_equals_a_simulation_of_preconditioned_optimizers(
    muon: bool, c: float, h: float, schedule: str, accumulate: int
) -> None:
    data, simulated = data64(36), double(chain())
    factor = 2 if schedule == "lockstep" else 1
    stages = iter([3, 2, 1, 0])

    def make(params: list[nn.Parameter]) -> Preconditioned:
        after = next(stages)
        numbers = {"lr": 0.01, "c": c, "h": h, "n": factor * after / accumulate}
        return Preconditioned(params, muon=muon, last=after == 0, **numbers)

    options: dict[str, Any] = {"schedule": schedule, "past": "stash", "accumulate": accumulate}
    made = DelayedTraining(simulated, F.cross_entropy, make, **options)  # type: ignore[arg-type]
    losses = made.train(data)
    with layerpipe.Pipeline(double(chain()), F.cross_entropy, preconditioned(muon, c, h), **options) as pipe:
        torch.testing.assert_close(torch.stack(train(pipe, data)), torch.stack(losses), rtol=1e-5, atol=1e-7)


def running(executor: str, **options: Any) -> tuple[layerpipe.Pipeline, list[nn.Module]]:
    stages = chain()
    pipe = layerpipe.Pipeline(stages, F.cross_entropy, factory(True, 0.5, 1.0), executor=executor, **options)
    for x, y in minibatches(15):
        pipe.step(x, y)
    return pipe, stages


def current(pipe: layerpipe.Pipeline) -> list[Tensor]:
    pipe.measured_delays()  # waits for the stages
    return [s.optimizer.current_weight(p).clone() for s in pipe.stages for p in s.params]  # type: ignore[union-attr]


def values(modules: list[nn.Module]) -> list[Tensor]:
    return [p.detach().clone() for module in modules for p in module.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_evaluation_and_state_see_the_weights_and_training_the_predicted_ones(executor: str) -> None:
    pipe, stages = running(executor)
    with pipe:
        weights, predicted = current(pipe), values(stages)
        assert not equal(weights, predicted)
        x = minibatches(1)[0][0]
        saved = pipe.state_dict()
        assert equal([saved[name] for name, _ in pipe.named_parameters()], weights)
        assert equal(values(stages), predicted)
        pipe.eval()
        assert equal(values(stages), weights)
        inside = pipe(x)
        pipe.train()
        assert equal(values(stages), predicted)
        with torch.no_grad():
            for stage in stages:
                stage.eval()
            outside = pipe(x)
            for stage in stages:
                stage.train()
        assert torch.equal(inside, outside)
        assert equal(values(stages), predicted)
        pipe.eval()
        pipe.step(*minibatches(1)[0])  # trains, whoever forgot train()
        assert not pipe.weights.shown
        pipe.drain()
        assert equal(values(stages), current(pipe))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("past", ["stash", "blend"])
def test_looking_at_the_weights_changes_no_training(executor: str, past: str) -> None:
    torch.set_num_threads(1)
    states = []
    for looks in (False, True):
        pipe, _ = running(executor, past=past, accumulate=3, sync_steps=4)
        with pipe:
            for x, y in minibatches(12):
                if looks:
                    pipe.state_dict()
                    pipe.eval()
                    pipe(x)
                    pipe.train()
                pipe.step(x, y)
            if looks:
                pipe.weights.show()
            pipe.drain()
            states.append(copy.deepcopy(pipe.state_dict()))
    for name in states[0]:
        assert torch.equal(*(state[name] for state in states)), name


@pytest.mark.parametrize("evaluating", [False, True])
def test_a_checkpoint_holds_the_weights_and_goes_on_bit_for_bit(tmp_path: Path, evaluating: bool) -> None:
    pipe, _ = running("serial")
    with pipe:
        if evaluating:
            pipe.eval()
        pipe.checkpoint(tmp_path / "file")
        pipe.train()
        saved = copy.deepcopy(pipe.state_dict())
        train(pipe, minibatches(10))
        want = copy.deepcopy(pipe.state_dict())
    again, stages = running("serial")
    with again:
        again.drain()
        again.resume(tmp_path / "file")
        assert_equal_state(again.state_dict(), saved)
        assert equal(values(stages), current(again))
        train(again, minibatches(10))
        assert_equal_state(again.state_dict(), want)


def test_an_optimizer_that_averages_its_weights_is_switched_too() -> None:
    """As schedule-free ones are: train() and eval() are all that is asked for."""

    class Averaging(torch.optim.SGD):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr=lr)
            self.mode: list[str] = []

        def train(self) -> None:
            self.mode.append("train")

        def eval(self) -> None:
            self.mode.append("eval")

    made: list[Averaging] = []

    def make(params: list[Tensor], **past: Any) -> Averaging:
        made.append(Averaging(params, lr=0.1))
        return made[-1]

    with layerpipe.Pipeline(chain(2), F.cross_entropy, make, schedule="sequential") as pipe:
        data = minibatches(3)
        pipe.step(*data[0])
        assert made[0].mode == []
        pipe(data[0][0])
        assert made[0].mode == ["eval", "train"]
        pipe.eval()
        pipe(data[0][0])
        pipe.step(*data[1])
        assert made[0].mode == ["eval", "train", "eval", "eval", "train"]
