"""Adam's and AdamW's last update undone: the past of a delay of 1, without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import layerpipe_kernels as lk
from tests.backends import BACKENDS

CASES: list[dict[str, Any]] = [
    {"cls": lk.AdamW, "weight_decay": 0.1},
    {"cls": lk.AdamW, "weight_decay": 0.0},
    {"cls": lk.AdamW, "amsgrad": True},
    {"cls": lk.Adam, "weight_decay": 0.1},
    {"cls": lk.AdamW, "maximize": True, "betas": (0.0, 0.9)},
]


def steps(optimizer: Any, param: torch.Tensor, count: int, still: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """The versions of the weights."""
    versions = [param.detach().clone()]
    for t in range(count):
        optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
        param.grad = None if t in still else torch.randn_like(param)
        optimizer.step()
        versions.append(param.detach().clone())
        optimizer.param_groups[0]["lr"] = 5.0  # a schedule goes on before the past is asked for
        optimizer.param_groups[0]["betas"] = (0.5, 0.5)
        past = optimizer.past_weight(param)
        assert torch.equal(optimizer.past_view(param), past)
        torch.testing.assert_close(past, versions[-2], rtol=2e-6, atol=2e-6)
        assert torch.equal(optimizer.past_weight(param, 0), param)
        optimizer.param_groups[0]["betas"] = optimizer.defaults["betas"]
    return versions


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_exact_to_rounding_and_keeps_nothing(case: dict[str, Any], backend: str, capturable: bool) -> None:
    options = {key: value for key, value in case.items() if key != "cls"}
    param = torch.randn(50, requires_grad=True)
    optimizer = case["cls"]([param], delay=1, backend=backend, capturable=capturable, **options)
    steps(optimizer, param, 8)
    assert optimizer.history_bytes() == 0


def test_a_parameter_without_a_gradient_stood_still() -> None:
    param, other = (torch.randn(20, requires_grad=True) for _ in range(2))
    optimizer = lk.AdamW([param, other], delay=1)
    other.grad = torch.randn(20)
    steps(optimizer, param, 8, still=(0, 3, 4))


def test_after_a_restart_the_weights_are_their_own_past() -> None:
    param = torch.randn(20, requires_grad=True)
    for capturable in (False, True):
        optimizer = lk.AdamW([param], delay=1, capturable=capturable)
        steps(optimizer, param, 3)
        optimizer.restart_history()
        assert torch.equal(optimizer.past_weight(param), param)


def test_masters_are_undone_for_narrow_weights() -> None:
    param = torch.randn(200, dtype=torch.bfloat16, requires_grad=True)
    optimizer = lk.AdamW([param], lr=0.01, delay=1, master_weights=True)
    for _ in range(5):
        before = param.detach().clone()
        param.grad = torch.randn_like(param)
        optimizer.step()
        assert (optimizer.past_weight(param) != before).sum() <= 1  # a master in the middle of two


def test_what_cannot_be_undone_keeps_an_average() -> None:
    for options in ({"spike_compensation": 1.0}, {"weight_prediction": 1.0}, {"past": "ema"}, {"delay": 2}):
        param = torch.randn(20, requires_grad=True)
        optimizer = lk.AdamW([param], **{"delay": 1, **options})
        param.grad = torch.randn(20)
        optimizer.step()
        assert optimizer.history_bytes() > 0
