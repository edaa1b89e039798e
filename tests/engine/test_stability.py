"""The largest stable step, beside closed forms and beside the updates themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from layerpipe.theory.planning.stability import largest_stable_step


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_without_a_delay_it_is_the_textbook_s(momentum: float) -> None:
    assert largest_stable_step(0, momentum) == pytest.approx(2 * (1 + momentum), rel=1e-6)
    nesterov = 2 * (1 + momentum) / (1 + 2 * momentum)
    assert largest_stable_step(0, momentum, nesterov=True) == pytest.approx(nesterov, rel=1e-6)


@pytest.mark.parametrize("delay", [0, 1, 2, 6, 18])
def test_without_momentum_it_is_that_of_delayed_descent(delay: int) -> None:
    assert largest_stable_step(delay) == pytest.approx(2 * math.sin(math.pi / (4 * delay + 2)), rel=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("delay", [1, 2, 6])
def test_torch_s_sgd_with_late_gradients_diverges_beyond_it_and_not_before(delay: int, nesterov: bool) -> None:
    def size_after(step: float) -> float:
        weight = nn.Parameter(torch.ones((), dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=step, momentum=0.9, nesterov=nesterov)
        past = [weight.item()] * (delay + 1)
        for _ in range(8000):
            weight.grad = torch.full((), past[-1 - delay], dtype=torch.float64)  # of a curvature of 1
            optimizer.step()
            past = [*past[1:], weight.item()]
        return max(map(abs, past))

    limit = largest_stable_step(delay, 0.9, nesterov=nesterov)
    assert size_after(0.97 * limit) < 1 < size_after(1.03 * limit)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="delay must not be negative, got -1"):
        largest_stable_step(-1)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        largest_stable_step(2, 1.0)
