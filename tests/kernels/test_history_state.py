"""What a history keeps, and how it outlives checkpoints and arrays that are replaced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import layerpipe_kernels as lk
from tests.backends import BACKENDS
from tests.kernels.runs import Run

ESTIMATES = ["ema", "momentum", "blend"]


@pytest.mark.parametrize("past", ["stash", *ESTIMATES])
def test_resume_from_state_dict_is_bitwise(past: str) -> None:
    run = Run(delay=4, past=past)
    run.step(7)
    twin = Run(delay=4, past=past)
    with torch.no_grad():
        twin.param.copy_(run.param)
    twin.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    twin.drift = run.drift
    for each in (run, twin):
        torch.manual_seed(5)
        each.step(6)
    assert torch.equal(run.param, twin.param)
    assert torch.equal(run.optimizer.past_weight(run.param), twin.optimizer.past_weight(twin.param))


def test_a_torch_checkpoint_loads() -> None:
    param = torch.randn(5, requires_grad=True)
    theirs = torch.optim.SGD([param], lr=0.3, momentum=0.9)
    param.grad = torch.ones(5)
    theirs.step()
    ours = lk.SGD([param], lr=0.1, momentum=0.9)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.3
    assert torch.equal(ours.state[param]["momentum_buffer"], theirs.state[param]["momentum_buffer"])
    ours.step()


def test_replaced_arrays_are_noticed() -> None:
    """New memory under a parameter or its state is used from the next step on, whatever was planned before."""
    param = torch.randn(20, requires_grad=True)
    optimizer = lk.SGD([param], lr=0.1, momentum=0.9, delay=2, past="ema")
    param.grad = torch.ones(20)
    optimizer.step()
    old = param.data
    param.data = torch.zeros(20)
    optimizer.state[param]["momentum_buffer"] = torch.zeros(20)
    before = old.clone()
    optimizer.step()
    assert torch.equal(old, before)
    torch.testing.assert_close(param.detach(), torch.full((20,), -0.1))


@pytest.mark.parametrize("change", [lambda t: t.t(), lambda t: t.flatten().view(torch.bfloat16)[:16].view(4, 4)])
def test_memory_that_changes_its_meaning_is_noticed(change: Any) -> None:
    """Same address and size, other strides or dtype: planned anew, never written as it was."""
    param = torch.randn(4, 4, requires_grad=True)
    optimizer = lk.SGD([param], lr=0.1)
    param.grad = torch.ones(4, 4)
    optimizer.step()
    param.grad = None
    param.data = change(param.data)
    param.grad = torch.ones_like(param)
    before = param.detach().clone()
    optimizer.step()
    torch.testing.assert_close(param.detach(), before - 0.1, equal_nan=True)


@pytest.mark.parametrize("sizes", [(1000, 5), (5, 1000)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_parameter_of_another_size_at_the_same_place_is_noticed(sizes: tuple[int, int], momentum: float) -> None:
    memory = torch.randn(1000)
    param = torch.nn.Parameter(memory[: sizes[0]])
    optimizer = lk.SGD([param], lr=1.0, momentum=momentum)
    for _ in range(2):
        param.grad = torch.zeros(sizes[0])
        optimizer.step()
    param.grad, param.data = None, memory[: sizes[1]]
    param.grad = torch.ones(sizes[1])
    before = memory.clone()
    if momentum:
        with pytest.raises(ValueError, match="momentum buffer"):
            optimizer.step()
        assert torch.equal(memory, before)
    else:
        optimizer.step()
        before[: sizes[1]] -= 1.0
        assert torch.equal(memory, before)


def test_more_averages_than_there_were_begin_anew() -> None:
    run = Run(delay=6, past=lk.Blend(order=1))
    run.step(3)
    run.optimizer.param_groups[0]["past"] = lk.Blend(order=3)
    run.step(3)
    assert run.optimizer.state[run.param]["ema"].shape == (3, 50)


@pytest.mark.parametrize("past", ["ema", "blend", "stash"])
def test_half_precision_resumes_bitwise(past: str) -> None:
    runs = [Run(delay=3, past=past, dtype=torch.bfloat16) for _ in range(2)]
    runs[0].step(5)
    with torch.no_grad():
        runs[1].param.copy_(runs[0].param)
    runs[1].optimizer.load_state_dict(copy.deepcopy(runs[0].optimizer.state_dict()))
    runs[1].drift = runs[0].drift
    for run in runs:
        torch.manual_seed(5)
        run.step(4)
    assert torch.equal(runs[0].param, runs[1].param)
    assert torch.equal(*(run.optimizer.past_weight(run.param) for run in runs))


def test_a_torch_checkpoint_keeps_our_options() -> None:
    run = Run(delay=6, past="ema")
    theirs = torch.optim.SGD([run.param], lr=0.3, momentum=0.9)
    run.optimizer.load_state_dict(theirs.state_dict())
    group = run.optimizer.param_groups[0]
    assert (group["lr"], group["delay"], group["past"]) == (0.3, 6, "ema")


def test_a_momentum_schedule_does_not_redesign_the_blend() -> None:
    run = Run(delay=6, past="blend", momentum=0.9)
    run.step()
    first = run.optimizer.history(run.optimizer.param_groups[0])
    run.optimizer.param_groups[0]["momentum"] = 0.85
    run.step()
    assert run.optimizer.history(run.optimizer.param_groups[0]) is first


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_that_fills_the_learning_rate_does_not_reach_the_last_update(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor beside the weights is handed to the step as it lies, as on a GPU, and only then changed in place."""
    monkeypatch.setattr("layerpipe_kernels.optim.sgd.learning_rate", lambda group: group["lr"])
    runs = [
        Run(delay=4, past="momentum", dtype=torch.float32, lr=lr, backend=backend) for lr in (0.5, torch.tensor(0.5))
    ]
    with torch.no_grad():
        runs[1].param.copy_(runs[0].param)
    runs[1].drift = runs[0].drift
    for run in runs:
        torch.manual_seed(5)
        run.step(8)
    runs[1].optimizer.param_groups[0]["lr"].fill_(0.1)
    assert torch.equal(*(run.optimizer.past_weight(run.param) for run in runs))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("past", ["ema", "momentum"])
def test_past_weights_that_are_no_longer_materialized_are_made_again(past: str, capturable: bool) -> None:
    """What the last step wrote before the change must not be taken for the past for ever."""
    by_step = f"{past}:materialize=true"
    runs = [Run(delay=4, past=kind, capturable=capturable) for kind in (by_step, past)]
    with torch.no_grad():
        runs[1].param.copy_(runs[0].param)
    runs[1].drift = runs[0].drift
    for kind in (by_step, past):
        runs[0].optimizer.param_groups[0]["past"] = kind
        for run in runs:
            torch.manual_seed(5)
            run.step(6)
    torch.testing.assert_close(*(run.optimizer.past_weight(run.param) for run in runs))


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("option", "values"),
    [("momentum", (0.9, 0.0)), ("momentum", (0.0, 0.9)), ("past", (lk.Blend(order=1), lk.Blend(order=3)))],
)
def test_averages_of_another_number_are_no_past(
    option: str, values: tuple[Any, Any], backend: str, capturable: bool
) -> None:
    """Between the change of an option and the next gradient, no memory behind the old averages is read."""
    params = [torch.nn.Parameter(torch.randn(20)) for _ in range(2)]
    options = {"momentum": 0.9, "delay": 2 if option == "momentum" else 6, option: values[0]}
    optimizer = lk.SGD(params, lr=0.1, backend=backend, capturable=capturable, **options)
    for _ in range(10):
        for param in params:
            param.grad = torch.ones(20)
        optimizer.step()
    optimizer.param_groups[0][option] = values[1]
    made = []
    for _ in range(3):
        made.append(optimizer.past_weight(params[1]) - params[1])
        params[0].grad, params[1].grad = torch.ones(20), None
        optimizer.step()
    buffer = optimizer.state[params[1]].get("momentum_buffer")
    moved = 0.0 if buffer is None else 10 * buffer.abs().max()  # at most the newest update, never what lay behind
    assert made[0].abs().max() <= moved
    assert not any(difference.any() for difference in made[1:])
    for _ in range(8):
        for param in params:
            param.grad = torch.ones(20)
        optimizer.step()
    assert (optimizer.past_weight(params[1]) > params[1]).all()
