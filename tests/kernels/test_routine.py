"""Steps that look at nothing twice must be the steps that look at everything."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from layerpipe_kernels.native import all_finite
from layerpipe_kernels.optim.routine import Routine
from tests.conftest import needs_cpp

Optimizer = Callable[..., Any]
KINDS: list[tuple[Optimizer, dict[str, Any]]] = [
    (lk.SGD, {"momentum": 0.9, "past": "blend"}),
    (lk.SGD, {"momentum": 0.9, "past": "momentum"}),
    (lk.SGD, {"past": lk.EMA(of="gradient")}),
    (lk.SGD, {"momentum": 0.9, "nesterov": True, "past": lk.Blend(order=3, dtype=torch.bfloat16)}),
    (lk.SGD, {"momentum": 0.9, "past": lk.Blend(materialize=True)}),
    (lk.SGD, {"momentum": 0.9, "past": "stash"}),
    (lk.SGD, {"momentum": 0.9, "past": lk.Blend(norm="match")}),
    (lk.AdamW, {"past": "blend"}),
    (lk.SGD, {"momentum": 0.9, "past": lk.Blend(decay="coupled")}),
    (lk.Adam, {"past": "latest", "amsgrad": True}),
]


def parameters(device: str = "cpu") -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(device)) for shape in ((3, 5), (7,), (2, 2, 2))]


def fill(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device)


def changes(optimizer: Any, params: list[torch.nn.Parameter], step: int) -> None:
    """What may happen to a group between its steps."""
    first, last = optimizer.param_groups
    first["lr"] = 0.1 / (1 + step)
    match step:
        case 4:
            last["weight_decay"] = 0.05
        case 6:
            params[0].grad = None
        case 9:
            params[0].data = params[0].detach().clone()
        case 11 if "momentum_buffer" in optimizer.state[params[1]]:
            state = optimizer.state[params[1]]
            state["momentum_buffer"] = state["momentum_buffer"].clone()
        case 13:
            last["lr"] = torch.tensor(0.02)
        case 15:
            last["lr"] = 0.03
        case 17:
            optimizer.restart_history()
        case 19:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def changes_before_the_past(optimizer: Any, params: list[torch.nn.Parameter], step: int) -> None:
    """What may happen to a group between a step and a backward."""
    match step:
        case 8:
            params[1].data = params[1].detach() * 2
        case 10 if "ema" in optimizer.state[params[2]]:
            optimizer.state[params[2]]["ema"] = optimizer.state[params[2]]["ema"] * 2
        case 12:
            optimizer.param_groups[1]["delay"] = 2


def trajectory(kind: Optimizer, options: dict[str, Any], device: str = "cpu") -> list[Tensor]:
    params = parameters(device)
    groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.05}]
    optimizer = kind(groups, delay=3, backend="cpp" if device == "cpu" else device, weight_decay=0.01, **options)
    seen = []
    for step in range(24):
        fill(params, step)
        changes(optimizer, params, step)
        optimizer.step()
        changes_before_the_past(optimizer, params, step)
        for param in params:
            seen += [optimizer.past_view(param).clone(), param.detach().clone()]
    return seen


@needs_cpp
@pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=[f"{k.__name__}-{o['past']}-{i}" for i, (k, o) in enumerate(KINDS)]
)
def test_a_routine_changes_nothing(kind: Optimizer, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check(kind, options, monkeypatch)


def check(kind: Optimizer, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> None:
    quick = trajectory(kind, options, device)
    monkeypatch.setattr(Routine, "possible", staticmethod(lambda group, past: False))
    slow = trajectory(kind, options, device)
    assert all(map(torch.equal, quick, slow))


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
