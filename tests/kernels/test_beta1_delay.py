"""``beta1_delay``: Adam's and SOAP's average of gradients by how late they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from layerpipe_kernels.decay import of_gradients
from tests.kernels.quadratics import give_gradients, gradient, parameters

MAKE = {"Adam": lk.Adam, "AdamW": lk.AdamW, "SOAP": lk.SOAP}


def run(make: Any, steps: int, staleness: float | None = None, **options: Any) -> list[Tensor]:
    """The weights after each step, and their past."""
    params = parameters(torch.float32)
    optimizer = make(params, lr=0.05, delay=3, spike_compensation=1.0, weight_prediction=0.5, **options)
    if staleness is not None:
        optimizer.set_staleness(staleness)
    found = []
    for t in range(steps):
        give_gradients(params, t)
        optimizer.step()
        found += [*(p.detach().clone() for p in params), *map(optimizer.past_weight, params)]
    return found


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("staleness", [None, 1.75, 0.0])
def test_it_is_the_decay_of_the_staleness(make: Any, staleness: float | None) -> None:
    ruled = run(make, 8, staleness, betas=(0.9, 0.95), beta1_delay=14.0)
    decay = of_gradients(3 if staleness is None else staleness)
    fixed = run(make, 8, staleness, betas=(decay, 0.95))
    for i, (a, b) in enumerate(zip(ruled, fixed, strict=True)):
        if staleness is None or i % 4 < 2:  # the averages of updates are designed for the delay
            assert torch.equal(a, b)
    assert not torch.equal(ruled[-3], run(make, 8, staleness, betas=(0.5, 0.95))[-3])


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(("first", "then"), [(0.0, 3.0), (3.0, 0.0)])
def test_a_change_of_staleness_keeps_the_average_without_bias(first: float, then: float, capturable: bool) -> None:
    param = torch.randn(7, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"betas": (0.9, 0.99), "beta1_delay": 14, "spike_compensation": 0.5}
    optimizer = lk.Adam([param], lr=0.05, delay=3, capturable=capturable, **options)
    weight, mean, square = param.detach().clone(), torch.zeros(7).double(), torch.zeros(7).double()
    for t in range(1, 9):
        n = first if t <= 4 else then
        optimizer.set_staleness(n)
        beta = of_gradients(n)
        grad = gradient(weight, t, 1.0)
        param.grad = grad.clone()
        optimizer.step()
        unbiased = mean / (1 - of_gradients(first) ** 4) if t == 5 else mean / (1 - beta ** (t - 1)) if t > 1 else mean
        mean = beta * (1 - beta ** (t - 1)) * unbiased + (1 - beta) * grad
        square = 0.99 * square + 0.01 * grad * grad
        share = 1 - beta ** (0.5 * n)
        direction = (1 - share) * mean / (1 - beta**t) + share * grad
        weight -= 0.05 * direction / ((square / (1 - 0.99**t)).sqrt() + 1e-8)
        torch.testing.assert_close(param.detach(), weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_change_of_staleness_before_a_step_or_after_a_checkpoint_is_the_same(make: Any) -> None:
    params, others = parameters(torch.float32), parameters(torch.float32, seed=1)
    options: dict[str, Any] = {"lr": 0.05, "delay": 2, "beta1_delay": 14, "spike_compensation": 1.0}
    one, two = make(params, **options), make(others, **options)
    one.set_staleness(0)
    for t in range(5):
        give_gradients(params, t)
        one.step()
    with torch.no_grad():
        for param, other in zip(params, others, strict=True):
            other.copy_(param)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for optimizer, weights in ((one, params), (two, others)):
        optimizer.set_staleness(1.5)
        for t in range(5, 9):
            give_gradients(weights, t)
            optimizer.step()
    assert all(map(torch.equal, params, others))


def test_an_undone_update_is_that_of_the_decay_it_was_made_with() -> None:
    params = parameters()
    optimizer = lk.AdamW(params, lr=0.05, delay=1, beta1_delay=30)
    optimizer.set_staleness(0.0)
    for t in range(6):
        before = [p.detach().clone() for p in params]
        give_gradients(params, t)
        optimizer.step()
    optimizer.set_staleness(1.0)
    for param, want in zip(params, before, strict=True):
        torch.testing.assert_close(optimizer.past_weight(param), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [-1.0, float("nan"), True, "14"])
def test_a_factor_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="beta1_delay must be a number of at least 0"):
        lk.AdamW(parameters(), delay=2, beta1_delay=value)
