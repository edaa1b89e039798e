"""Parameter groups that somebody changes between steps, as torch's optimizers allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerpipe_kernels as lk


def nadam(params: Any, lr: float, **past: Any) -> lk.PastWeights:
    return lk.PastWeights(torch.optim.NAdam(params, lr=lr), **past)


KINDS = [
    pytest.param(kind, options, id=f"{kind.__name__}-{options['past']}")
    for kind, options in (
        (lk.SGD, {"momentum": 0.9, "past": "blend"}),
        (lk.SGD, {"momentum": 0.9, "past": "stash"}),
        (lk.SGD, {"momentum": 0.9, "past": lk.Blend(norm="match")}),
        (lk.AdamW, {"past": "blend"}),
        (lk.Lamb, {"past": "ema"}),
        (nadam, {"past": "blend"}),
    )
]


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape) + 0.3)


def step(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.sin(param.detach() * 3)
    optimizer.step()


@pytest.mark.parametrize("shape", [(2, 4), (7,)])
def test_a_new_list_of_parameters_is_stepped(shape: tuple[int, ...]) -> None:
    """A head that is replaced: the first layer goes on, the new one begins."""
    results = []
    for library in (lk, torch.optim):
        first, head, new = parameter(3, 4), parameter(2, 4), parameter(*shape)
        optimizer = library.SGD([first, head], lr=0.1, momentum=0.9)  # type: ignore[attr-defined]
        for _ in range(3):
            step(optimizer)
        optimizer.param_groups[0]["params"] = [first, new]
        for _ in range(3):
            step(optimizer)
        results.append([p.detach() for p in (first, head, new)])
    assert all(map(torch.equal, *results))


def test_options_that_cannot_be_compared_are_options_that_have_changed() -> None:
    param, torchs = parameter(3), parameter(3)
    ours, theirs = lk.SGD([param], lr=0.1, momentum=0.9), torch.optim.SGD([torchs], lr=0.1, momentum=0.9)
    for t in range(4):
        ours.param_groups[0]["of the user"] = torch.ones(2).numpy() * t
        step(ours)
        step(theirs)
    assert torch.equal(param, torchs)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_past_weights_follow_a_group_that_is_replaced(kind: Callable[..., Any], options: dict[str, Any]) -> None:
    def pasts(replaced: bool) -> list[Tensor]:
        param = parameter(5)
        optimizer = kind([param], lr=0.1, delay=3, **options)
        found = []
        for t in range(9):
            if replaced and t in (2, 6):
                optimizer.param_groups[0] = {**optimizer.param_groups[0]}
            step(optimizer)
            found.append(optimizer.past_weight(param))
        return found

    assert all(map(torch.equal, pasts(True), pasts(False)))


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("instead", [False, True])
def test_past_weights_follow_a_list_that_is_changed_in_place(
    kind: Callable[..., Any], options: dict[str, Any], instead: bool
) -> None:
    first, second, new = parameter(5), parameter(2, 3), parameter(4)
    optimizer = kind([first, second], lr=0.1, delay=3, **options)
    for _ in range(5):
        step(optimizer)
        optimizer.past_weight(second)
    params = optimizer.param_groups[0]["params"]
    if instead:
        params[1] = new
    else:
        params.append(new)
    start, history = new.detach().clone(), [first.detach().clone()]
    assert torch.equal(optimizer.past_weight(new), start)
    for _ in range(6):
        step(optimizer)
        history.append(first.detach().clone())
        optimizer.past_weight(new)
    # Near the weights of three updates ago, and nearer than the latest.
    then, now = history[-4], history[-1]
    assert (optimizer.past_weight(first) - then).norm() < 0.5 * (now - then).norm()
    if instead:
        with pytest.raises(KeyError, match=r"shape \(2, 3\) is not in this optimizer"):
            optimizer.past_weight(second)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("begun", [0, 3])
def test_a_group_that_cannot_be_stepped_leaves_the_others_alone(backend: str, begun: int) -> None:
    first, second = parameter(5), parameter(4)
    groups = [{"params": [first]}, {"params": [second]}]
    optimizer = lk.SGD(groups, lr=0.1, momentum=0.9, delay=2, past="stash", backend=backend)
    for _ in range(begun):
        step(optimizer)
    before = first.detach().clone(), optimizer.past_weight(first)
    first.grad, second.grad = torch.ones(5), torch.ones(4).to_sparse()
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['params'\]\[0\].*sparse"):
        optimizer.step()
    assert torch.equal(first, before[0])
    assert torch.equal(optimizer.past_weight(first), before[1])
    assert [group["updates"] for group in optimizer.param_groups] == [begun, begun]


def test_gradients_may_change_their_dtype() -> None:
    param = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    param.grad_dtype = None
    optimizer = lk.SGD([param], lr=0.25)
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        param.grad = torch.ones(4, dtype=dtype)
        optimizer.step()
    assert torch.equal(param, torch.full((4,), 0.25, dtype=torch.bfloat16))
