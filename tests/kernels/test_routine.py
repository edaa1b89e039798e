"""Steps that look at nothing twice must be the steps that look at everything."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch

import layerpipe_kernels as lk
from layerpipe_kernels.native import all_finite
from tests.backends import needs_cpp
from tests.kernels.routines import KINDS, Optimizer, check, fill, parameters


@needs_cpp
@pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=[f"{k.__name__}-{o['past']}-{i}" for i, (k, o) in enumerate(KINDS)]
)
def test_a_routine_changes_nothing(kind: Optimizer, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check(kind, options, monkeypatch)


@needs_cpp
def test_most_steps_are_routine(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    step_group = lk.SGD._step_group
    monkeypatch.setattr(lk.SGD, "_step_group", lambda self, i, *rest: (looked.append(i), step_group(self, i, *rest))[1])
    params = parameters()
    optimizer = lk.SGD(params, lr=0.1, momentum=0.9, delay=3, backend="cpp")
    for step in range(10):
        fill(params, step)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.step()
    assert looked == [0]


@needs_cpp
def test_a_learning_rate_that_is_no_number_changes_no_group() -> None:
    params = parameters()
    optimizer = lk.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, momentum=0.9, delay=3, backend="cpp")
    for step in range(3):
        fill(params, step)
        optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[1]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr is nan"):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    assert [group["updates"] for group in optimizer.param_groups] == [3, 3]


@needs_cpp
def test_a_routine_step_counts_versions() -> None:
    params = parameters()
    optimizer = lk.SGD(params, lr=0.1, delay=3, past="ema", backend="cpp")
    for step in range(3):
        fill(params, step)
        versions = [p._version for p in params]
        optimizer.step()
        assert all(p._version > v for p, v in zip(params, versions, strict=True))


def replace_state(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = collections.defaultdict(dict)


def replace_group(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.5}


def change_betas_in_place(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["betas"][0] = 0.1


def drop_a_group(optimizer: torch.optim.Optimizer) -> None:
    del optimizer.param_groups[0]


@pytest.mark.parametrize("change", [replace_state, replace_group, change_betas_in_place, drop_a_group])
def test_what_is_exchanged_as_a_whole_is_noticed(change: Callable[[torch.optim.Optimizer], None]) -> None:
    results = []
    for kind in (torch.optim.Adam, lk.Adam):
        params = parameters()
        optimizer = kind([{"params": params[:2], "betas": [0.9, 0.99]}, {"params": params[2:]}], lr=0.1)
        for step in range(8):
            fill(params, step)
            if change is drop_a_group and step < 4:
                params[0].grad = None
            if step == 4:
                change(optimizer)
            optimizer.step()
        results.append(params)
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_past_is_not_made_of_a_state_that_was_exchanged() -> None:
    params = parameters()
    optimizer = lk.SGD(params, lr=0.1, momentum=0.9, delay=3)
    for step in range(5):
        fill(params, step)
        optimizer.step()
    assert not torch.equal(optimizer.past_view(params[0]), params[0])
    replace_state(optimizer)
    assert torch.equal(optimizer.past_view(params[0]), params[0])


def test_a_step_works_while_another_thread_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = lk.SGD(params, lr=0.1)
    fill(params, 0)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    before = params[0].detach().clone()
    optimizer.step()
    assert not torch.equal(before, params[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [0, 1, 7, 64, 1000])
def test_all_finite_finds_what_is_not(dtype: torch.dtype, numel: int) -> None:
    largest = torch.full((numel,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(largest)  # though their sum is not
    assert all_finite(-largest)
    for place in {0, numel // 2, numel - 1} if numel else ():
        for value in (float("nan"), float("inf"), float("-inf")):
            spoilt = torch.zeros(numel, dtype=dtype)
            spoilt[place] = value
            assert not all_finite(spoilt)
    assert all_finite(torch.zeros(4, 6, dtype=dtype).t()[1:3])
    assert not all_finite(torch.full((4, 6), float("nan"), dtype=dtype).t()[1:3])
