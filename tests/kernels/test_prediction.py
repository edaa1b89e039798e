"""Spike compensation and weight prediction in the optimizers, against formulas written down once more in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from tests.backends import BACKENDS
from tests.kernels.quadratics import SHAPES, give_gradients, gradient, parameters

DELAY = 4
LRS = (0.1, 0.1, 0.07, 0.03, 0.03, 0.02, 0.02, 0.01)


class Sgd:
    """``v``, and in its place the mix that is asked for."""

    def __init__(self, momentum: float = 0.9, dampening: float = 0.0, weight_decay: float = 0.01) -> None:
        self.momentum, self.dampening, self.weight_decay, self.v = momentum, dampening, weight_decay, None
        self.beta = momentum

    def update(self, weight: Tensor, g: Tensor, lr: float, share: float) -> Tensor:
        g = g + self.weight_decay * weight
        self.v = g if self.v is None else self.momentum * self.v + (1 - self.dampening) * g
        return lr * ((1 - share) * self.v + share * (1 - self.dampening) / (1 - self.momentum) * g)


class AdamW:
    def __init__(self) -> None:
        self.beta, self.m, self.q, self.t = 0.9, 0.0, 0.0, 0

    def update(self, weight: Tensor, g: Tensor, lr: float, share: float) -> Tensor:
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.q = 0.99 * self.q + 0.01 * g * g
        m = (1 - share) * self.m / (1 - 0.9**self.t) + share * g
        return lr * m / ((self.q / (1 - 0.99**self.t)).sqrt() + 1e-8) + lr * 0.1 * weight


RULES: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "sgd": (Sgd, lambda p, **o: lk.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, **o)),
    "dampened": (lambda: Sgd(0.8, 0.3), lambda p, **o: lk.SGD(p, 0.1, 0.8, 0.3, weight_decay=0.01, **o)),
    "adamw": (AdamW, lambda p, **o: lk.AdamW(p, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1, **o)),
}


def simulated(rule: str, c: float, h: float, staleness: list[float]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """``F`` and ``W`` after every step."""
    rules = [RULES[rule][0]() for _ in SHAPES]
    current = [p.detach().clone() for p in parameters()]
    predicted = [w.clone() for w in current]
    history: tuple[list[list[Tensor]], list[list[Tensor]]] = ([], [])
    for t, (lr, n) in enumerate(zip(LRS, staleness, strict=True)):
        for i, one in enumerate(rules):
            share = 1 - one.beta ** (c * n)
            update = one.update(current[i], gradient(predicted[i], t, 1.0), lr, share)
            current[i] = current[i] - update
            predicted[i] = current[i] - h * n * update
        history[0].append([w.clone() for w in predicted])
        history[1].append([w.clone() for w in current])
    return history


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("c", "h"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("staleness", [[DELAY] * 8, [0, 0, 0, 4, 4, 2.5, 0, 4]], ids=["steady", "changing"])
def test_every_step_is_the_formulas(backend: str, rule: str, c: float, h: float, staleness: list[float]) -> None:
    params = parameters()
    options = {"spike_compensation": c, "weight_prediction": h, "delay": DELAY, "past": "stash", "backend": backend}
    optimizer = RULES[rule][1](params, **options)
    predicted, current = simulated(rule, c, h, staleness)
    for t, (lr, n) in enumerate(zip(LRS, staleness, strict=True)):
        optimizer.set_staleness(None if n == DELAY else n)
        optimizer.param_groups[0]["lr"] = lr
        give_gradients(params, t)
        optimizer.step()
        for param, f, w in zip(params, predicted[t], current[t], strict=True):
            torch.testing.assert_close(param.detach(), f, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(optimizer.current_weight(param), w, rtol=1e-11, atol=1e-12)
    ago = min(len(LRS), DELAY)
    for param, f in zip(params, predicted[len(LRS) - 1 - ago], strict=True):  # what a backward reads, bit for bit
        torch.testing.assert_close(optimizer.past_weight(param), f, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [lk.SGD, lk.AdamW])
def test_without_staleness_the_knobs_change_no_bit(backend: str, make: Any) -> None:
    runs = []
    for knobs in ({}, {"spike_compensation": 1.0, "weight_prediction": 1.0}):
        params = parameters(torch.float32)
        options = {"momentum": 0.9} if make is lk.SGD else {}
        optimizer = make(params, lr=0.1, backend=backend, **options, **knobs)
        for t in range(4):
            give_gradients(params, t)
            optimizer.step()
        assert all("previous_update" not in s for s in optimizer.state.values())
        runs.append(params)
    assert all(map(torch.equal, *runs))


def trained(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[list[Tensor], Any]:
    params = parameters(dtype)
    options = {"delay": 3, "weight_prediction": 1.0, "spike_compensation": 1.0, **options}
    optimizer = lk.AdamW(params, lr=0.05, **options)
    for t in range(5):
        give_gradients(params, t)
        optimizer.step()
    return params, optimizer


KINDS: list[dict[str, Any]] = [{}, {"dtype": torch.bfloat16}, {"dtype": torch.bfloat16, "master_weights": True}]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_evaluation_changes_no_bit_of_the_training_around_it(options: dict[str, Any]) -> None:
    results = []
    for evaluates in (False, True):
        params, optimizer = trained(**options)
        before = [p.detach().clone() for p in params]
        if evaluates:
            current = [optimizer.current_weight(p) for p in params]
            optimizer.eval()
            optimizer.eval()
            assert not optimizer.training
            assert all(map(torch.equal, params, current))
            assert not all(map(torch.equal, params, before))
            assert all(map(torch.equal, map(optimizer.current_weight, params), params))
            optimizer.train()
            optimizer.train()
            assert all(map(torch.equal, params, before))
            assert all("train_weight" not in s for s in optimizer.state.values())
        give_gradients(params, 9)
        optimizer.step()
        results.append([*params, *map(optimizer.past_weight, params)])
    assert all(map(torch.equal, *results))


def test_a_step_or_a_past_in_evaluation_is_refused() -> None:
    params, optimizer = trained()
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"a step while the optimizer evaluates: call its train\(\)"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"past weights were asked for.*train\(\)"):
        optimizer.past_weight(params[0])
    optimizer.train(False)
    with pytest.raises(RuntimeError, match="evaluates"):
        optimizer.step()
    optimizer.train()
    optimizer.step()


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("when", ["train", "eval"])
@pytest.mark.parametrize("says_so", [False, True])
def test_weights_that_somebody_loads_are_the_current_ones(options: dict[str, Any], when: str, says_so: bool) -> None:
    params, optimizer = trained(**options)
    predicted = params[1].detach().clone()
    if when == "eval":
        optimizer.eval()
    with torch.no_grad():
        params[0].fill_(2.0)
    if when == "train":  # nobody can tell them from the predicted ones
        optimizer.weights_loaded()
    else:
        if says_so:
            optimizer.weights_loaded()
        kept = optimizer.state[params[1]]["previous_update"].clone()
        optimizer.train()
        assert torch.equal(optimizer.state[params[1]]["previous_update"], kept)
        assert torch.equal(params[1], predicted)
    assert torch.equal(params[0], torch.full_like(params[0], 2.0))
    assert torch.equal(optimizer.current_weight(params[0]), params[0])


@pytest.mark.parametrize("when", ["train", "eval"])
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_resumes_bit_for_bit(when: str, options: dict[str, Any], wrapped: bool) -> None:
    def make() -> tuple[list[Tensor], Any]:
        if not wrapped:
            return trained(**options)
        params = parameters(options.get("dtype", torch.float32))
        inner = torch.optim.SGD(params, lr=0.05, momentum=0.9)
        optimizer = lk.PastWeights(inner, delay=3, weight_prediction=1.0, spike_compensation=1.0)
        for t in range(5):
            give_gradients(params, t)
            optimizer.step()
        return params, optimizer

    params, optimizer = make()
    if when == "eval":
        optimizer.eval()
    others = [torch.zeros_like(p, requires_grad=True) for p in params]
    with torch.no_grad():
        for other, param in zip(others, params, strict=True):
            other.copy_(param)
    loaded = lk.PastWeights(torch.optim.SGD(others, lr=1.0, momentum=0.9), delay=3) if wrapped else lk.AdamW(others)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert loaded.training == (when == "train")
    for tensors, one in ((params, optimizer), (others, loaded)):
        one.train()
        for t in (7, 8):
            give_gradients(tensors, t)
            one.step()
    assert all(map(torch.equal, params, others))
    assert all(map(torch.equal, map(optimizer.past_weight, params), map(loaded.past_weight, others)))
    assert all(map(torch.equal, map(optimizer.current_weight, params), map(loaded.current_weight, others)))


def test_torchs_checkpoints_begin_a_prediction_and_ours_are_read_by_torch() -> None:
    theirs = parameters(torch.float32)
    plain = torch.optim.AdamW(theirs, lr=0.05)
    give_gradients(theirs, 0)
    plain.step()
    params, optimizer = trained(delay=0)
    optimizer.set_staleness(3)
    give_gradients(params, 5)
    optimizer.step()
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["horizon"] == 0.0
    assert all(torch.equal(optimizer.current_weight(p), p) for p in params)
    plain.load_state_dict(trained()[1].state_dict())
    plain.step()


def test_an_overflow_leaves_the_prediction_as_it_was_while_the_staleness_changes() -> None:
    params, optimizer = trained(delay=2, past="stash")
    twin, other = trained(delay=2, past="stash")
    kept = [p.detach().clone() for p in params]
    current = [optimizer.current_weight(p) for p in params]
    for staleness, overflow in ((5.0, 1.0), (1.0, 1.0), (3.0, 0.0), (3.0, 0.0)):
        optimizer.set_staleness(staleness)
        give_gradients(params, 6, scale=float("inf") if overflow else 4.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(overflow)
        optimizer.step()
        if overflow:
            assert all(map(torch.equal, params, kept))
            assert all(map(torch.equal, map(optimizer.current_weight, params), current))
        else:
            other.set_staleness(staleness)
            give_gradients(twin, 6)
            other.step()
            for a, b in zip(params, twin, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(params, twin, strict=True):
        torch.testing.assert_close(optimizer.past_weight(a), other.past_weight(b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("told", [False, True])
def test_a_parameter_without_a_gradient_is_updated_by_zero(told: bool) -> None:
    params, optimizer = trained(past="stash")
    current = optimizer.current_weight(params[0])
    for t in range(3):
        give_gradients(params, t)
        params[0].grad = None
        if told:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
        optimizer.step()
        torch.testing.assert_close(params[0].detach(), current)
        assert torch.equal(optimizer.current_weight(params[0]), params[0])
    assert not torch.equal(optimizer.current_weight(params[1]), params[1])


def test_every_group_has_its_own_knobs() -> None:
    params = parameters()
    groups = [{"params": params[:1], "weight_prediction": 2.0}, {"params": params[1:]}]
    optimizer = lk.SGD(groups, lr=0.1, momentum=0.9, delay=2)
    for t in range(3):
        give_gradients(params, t)
        optimizer.step()
    assert not torch.equal(optimizer.current_weight(params[0]), params[0])
    assert torch.equal(optimizer.current_weight(params[1]), params[1])


def test_channels_last_parameters_are_predicted_in_their_own_order() -> None:
    plain = torch.randn(4, 3, 2, 5)
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        param = plain.clone(memory_format=memory_format).requires_grad_()
        optimizer = lk.SGD([param], lr=0.1, momentum=0.9, delay=3, weight_prediction=1.0)
        for t in range(5):
            give_gradients([param], t)
            optimizer.step()
        optimizer.eval()
        current = param.detach().clone()
        optimizer.train()
        runs.append([param, current, optimizer.past_weight(param)])
    assert all(map(torch.equal, *runs))


REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (lk.SGD, {"spike_compensation": -1.0}, "spike_compensation must be a number of at least 0, got -1.0"),
    (lk.AdamW, {"weight_prediction": float("nan")}, "weight_prediction must be"),
    (lk.SGD, {"spike_compensation": 1.0, "nesterov": True, "momentum": 0.9}, "nesterov and spike_compensation"),
    (lk.SGD, {"spike_compensation": 1.0, "momentum": 1.0}, "momentum below 1"),
    (lk.SGD, {"weight_prediction": 1.0, "momentum": 0.9, "delay": 3, "past": "momentum"}, "past='momentum'.*blend"),
    (lk.SGD, {"weight_prediction": 1.0, "delay": 3, "past": lk.EMA(of="gradient")}, "EMA of='update'"),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_be_predicted_is_refused_by_name(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(parameters(), lr=0.1, **options)


def test_optimizers_that_have_no_knobs_say_so() -> None:
    with pytest.raises(ValueError, match="Lamb has neither"):
        lk.Lamb([{"params": parameters(), "weight_prediction": 1.0}])
    with pytest.raises(ValueError, match=r"Adagrad's groups have neither; give spike_compensation=0"):
        lk.PastWeights(torch.optim.Adagrad(parameters()), delay=2, spike_compensation=1.0)
    with pytest.raises(ValueError, match="staleness is a number of updates"):
        lk.SGD(parameters()).set_staleness(-1)
