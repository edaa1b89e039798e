"""What is loaded without a past begins one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from tests.kernels.checkpoints import parameters, saved, steps


def assert_warms_up_anew(optimizer: Any, params: list[Tensor]) -> None:
    """For as many steps as the delay, which is 3, the past weights are those of the beginning."""
    start = [p.detach().clone() for p in params]
    for t in range(3):
        steps(optimizer, params, 1, seed=10 + t)
        for param, first in zip(params, start, strict=True):
            torch.testing.assert_close(optimizer.past_weight(param), first, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("past", ["ema", "blend", "stash"])
@pytest.mark.parametrize("begun", [0, 9])
def test_a_checkpoint_without_a_past_warms_up_anew_with_a_warning(past: str, begun: int) -> None:
    alone, params = parameters(), parameters()
    theirs = torch.optim.SGD(alone, lr=0.1, momentum=0.9)
    steps(theirs, alone, 6, seed=1)
    optimizer = lk.SGD(params, lr=0.1, momentum=0.9, delay=3, past=past)
    steps(optimizer, params, begun, seed=2)
    with pytest.warns(UserWarning, match=r"param_groups\[0\] has no past .*delay=3"):
        optimizer.load_state_dict(theirs.state_dict())
    assert_warms_up_anew(optimizer, params)


def test_a_checkpoint_that_lost_its_averages_warms_up_anew() -> None:
    params = parameters()
    optimizer = lk.AdamW(params, lr=0.05, delay=3)
    steps(optimizer, params, 8, seed=1)
    state = saved(optimizer)
    for entry in state["state"].values():
        del entry["ema"]
    with pytest.warns(UserWarning, match="has no past"):
        optimizer.load_state_dict(state)
    assert_warms_up_anew(optimizer, params)


def test_a_checkpoint_before_the_first_step_or_without_a_delay_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.SGD(parameters(), lr=0.1, delay=3).load_state_dict(torch.optim.SGD(parameters(), lr=0.1).state_dict())
        params = parameters()
        theirs = torch.optim.AdamW(params)
        steps(theirs, params, 2, seed=1)
        lk.AdamW(parameters()).load_state_dict(theirs.state_dict())
