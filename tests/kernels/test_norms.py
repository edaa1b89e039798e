"""``norm="match"``: past weights have the norm of the version that they estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk

Make = Callable[..., Any]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda params, **past: lk.SGD(params, lr=0.1, momentum=0.9, **past),
    "AdamW": lambda params, **past: lk.AdamW(params, lr=0.05, **past),
    "captured AdamW": lambda params, **past: lk.AdamW(params, lr=0.05, capturable=True, **past),
    "Lamb": lambda params, **past: lk.Lamb(params, lr=0.05, **past),
    "wrapped": lambda params, **past: lk.PastWeights(torch.optim.RMSprop(params, lr=0.05), **past),
}
PASTS = [
    lk.EMA(norm="match"),
    lk.Blend(order=1, norm="match"),
    lk.Blend(order=2, materialize=True, norm="match"),
    lk.Latest(norm="match"),
]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("past", PASTS, ids=str)
@pytest.mark.parametrize("n", [1, 5])
def test_the_norm_is_that_of_the_true_past_weights(make: Make, past: lk.Past, n: int) -> None:
    params: list[Tensor] = [torch.randn(6, 4, requires_grad=True), torch.randn(9, requires_grad=True)]
    optimizer = make(params, delay=n, past=past)
    norms = [[float(p.detach().norm()) for p in params]]
    for t in range(1, 4 * n + 3):
        for param in params:
            param.grad = torch.randn_like(param) if param is params[0] or t % 3 else None
        optimizer.step()
        norms.append([float(p.detach().norm()) for p in params])
        for i, param in enumerate(params):
            for estimate in (optimizer.past_weight(param), optimizer.past_view(param)):
                assert float(estimate.norm()) == pytest.approx(norms[max(0, t - n)][i], rel=2e-6)
        assert float(params[0].detach().norm()) == norms[-1][0]  # the weights themselves are not scaled


def test_only_the_length_changes() -> None:
    results = []
    for norm in (None, "match"):
        torch.manual_seed(1)
        param = torch.randn(50, requires_grad=True)
        optimizer = lk.SGD([param], lr=0.1, momentum=0.9, delay=4, past=lk.EMA(norm=norm))
        for _ in range(11):
            param.grad = torch.randn(50)
            optimizer.step()
        results.append(optimizer.past_weight(param))
    plain, matched = results
    assert float(plain.norm()) != float(matched.norm())
    torch.testing.assert_close(plain / plain.norm(), matched / matched.norm())


def test_weights_of_norm_zero_stay_finite() -> None:
    param = torch.zeros(5, requires_grad=True)
    optimizer = lk.SGD([param], lr=0.1, delay=2, past=lk.EMA(norm="match"))
    for _ in range(4):
        param.grad = torch.zeros(5)
        optimizer.step()
        assert torch.equal(optimizer.past_weight(param), torch.zeros(5))


def test_it_keeps_n_numbers_per_tensor() -> None:
    param = torch.randn(50, requires_grad=True)
    optimizer = lk.SGD([param], lr=0.1, delay=6, past=lk.Latest(norm="match"))
    param.grad = torch.ones(50)
    optimizer.step()
    assert optimizer.history_bytes() == 6 * 4


def test_bfloat16_weights_keep_their_norms_in_float32() -> None:
    param = torch.randn(500, dtype=torch.bfloat16, requires_grad=True)
    optimizer = lk.SGD([param], lr=0.1, delay=3, past=lk.EMA(norm="match"), master_weights=True)
    norms = [param.detach().float().norm()]
    for _ in range(8):
        param.grad = torch.randn_like(param)
        optimizer.step()
        norms.append(param.detach().float().norm())
    assert optimizer.state[param]["norms"].dtype == torch.float32
    torch.testing.assert_close(optimizer.past_weight(param).float().norm(), norms[-4], rtol=2e-3, atol=0)
