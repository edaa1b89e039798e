"""What an optimizer refuses in a step, it refuses before it writes anything; and what it cannot keep, it says."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerpipe_kernels as lk

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": lambda groups, **past: lk.SGD(groups, lr=0.1, momentum=0.9, **past),
    "AdamW": lambda groups, **past: lk.AdamW(groups, **past),
    "Lamb": lambda groups, **past: lk.Lamb(groups, **past),
    "SOAP": lambda groups, **past: lk.SOAP(groups, **past),
    "Muon": lambda groups, **past: lk.Muon(groups, **past),
    "PastWeights": lambda groups, **past: lk.PastWeights(torch.optim.SGD(groups, lr=0.1, momentum=0.9), **past),
}
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)


def made(kind: str, **past: Any) -> tuple[list[nn.Parameter], Any]:
    """An optimizer of two groups after two steps, with gradients for a third."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))]
    optimizer = OPTIMIZERS[kind]([{"params": params[:1]}, {"params": params[1:]}], **past)
    for step in range(3):
        for p in params:
            p.grad = torch.randn(p.shape)
        if step < 2:
            optimizer.step()
    return params, optimizer


def contents(optimizer: Any) -> list[Tensor]:
    """Copies of weights and states."""
    both = [optimizer, *([optimizer.optimizer] if hasattr(optimizer, "optimizer") else [])]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = [p.detach().clone() for p in params]
    for each in both:
        for p in params:
            found += [v.clone() for v in each.state.get(p, {}).values() if isinstance(v, Tensor)]
    return found


BAD: dict[str, dict[str, Any]] = {
    "an unknown past": {"past": "nonsense"},
    "a delay that is no number": {"delay": 1.5},
    "an unknown backend": {"backend": "nonsense"},
    "a backend that is not here": {"backend": "cuda"},
    "no seed": {"past": "blend:seed=none"},
    "an order that there is not": {"past": "blend:order=7"},
    "a dtype of averages": {"past": "ema:dtype=float16"},
    "an unknown decay": {"past": "ema:decay=nonsense"},
    "a kind of average": {"past": "ema:of=nonsense"},
    "an unknown norm": {"past": "blend:norm=nonsense"},
}


@every_optimizer
@pytest.mark.parametrize("bad", BAD)
def test_a_group_that_cannot_be_stepped_any_more_leaves_all_groups_as_they_are(kind: str, bad: str) -> None:
    _, optimizer = made(kind, delay=2)
    before = contents(optimizer)
    kept = dict(optimizer.param_groups[1])
    optimizer.param_groups[1].update(BAD[bad])
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, contents(optimizer), strict=True))
    optimizer.param_groups[1].update(kept)
    optimizer.step()  # and goes on
    assert not torch.equal(before[0], contents(optimizer)[0])


@every_optimizer
def test_an_option_that_is_gone_is_named(kind: str) -> None:
    _, optimizer = made(kind, delay=1)
    before = contents(optimizer)
    del optimizer.param_groups[1]["past"]
    with pytest.raises(KeyError, match=r"param_groups\[1\] has no 'past'"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, contents(optimizer), strict=True))


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("value", [None, "x", torch.zeros(5, 7), torch.zeros(4, 3, dtype=torch.float16)])
def test_a_state_that_does_not_fit_lamb_is_named(key: str, value: Any) -> None:
    if key == "step" and isinstance(value, Tensor):
        pytest.skip("any tensor is a count")
    params, optimizer = made("Lamb")
    before = params[0].detach().clone()
    optimizer.state[params[1]][key] = value
    with pytest.raises(ValueError, match=rf"state '{key}' of param_groups\[1\]\['params'\]\[0\] must be"):
        optimizer.step()
    assert torch.equal(params[0], before)


@every_optimizer
def test_weights_of_eight_bits_are_refused(kind: str) -> None:
    weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn))
    for delay in (0, 2):
        with pytest.raises(
            TypeError, match=r"float8_e4m3fn is not supported; only real floating-point .* 16, 32 or 64"
        ):
            OPTIMIZERS[kind]([{"params": [weight]}], delay=delay)


@every_optimizer
def test_an_entry_of_the_state_that_is_no_parameters_is_kept(kind: str) -> None:
    params, optimizer = made(kind, delay=2)
    holder = getattr(optimizer, "optimizer", optimizer)
    holder.state["note"] = {"epoch": 3}
    holder.state["count"] = 4
    assert optimizer.history_bytes() > 0
    assert optimizer.optimizer_bytes() > 0
    optimizer.weights_loaded()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    _, other = made(kind, delay=2)
    other.load_state_dict(saved)
    state = getattr(other, "optimizer", other).state
    assert (state["note"], state["count"]) == ({"epoch": 3}, 4)
    assert other.history_bytes() == optimizer.history_bytes()
    other.weights_loaded()
    other.step()
    assert len(params) == 3


@pytest.mark.parametrize("option", ["backend", "delay", "past"])
def test_an_option_of_the_wrapped_optimizer_that_is_named_like_ours_is_refused(option: str) -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1, option: 5})

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            pass

    inner = Own([nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=f"Own has an option '{option}' of its own"):
        lk.PastWeights(inner, delay=2)
    assert set(inner.param_groups[0]) == {"params", "lr", option}


def test_a_group_of_the_wrapped_optimizer_may_have_its_own_past() -> None:
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))]
    inner = torch.optim.SGD([{"params": params[:1], "delay": 1}, {"params": params[1:]}], lr=0.1)
    assert [group["delay"] for group in lk.PastWeights(inner, delay=2).param_groups] == [1, 2]


def test_a_flattened_state_that_lacks_the_wrapped_optimizers_is_refused() -> None:
    checkpoints = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = checkpoints.StateDictOptions(flatten_optimizer_state_dict=True)
    model = nn.Linear(3, 2)

    def trained() -> Any:
        optimizer = lk.PastWeights(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), delay=1)
        for _ in range(2):
            model(torch.randn(4, 3)).sum().backward()
            optimizer.step()
        return optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = checkpoints.get_optimizer_state_dict(model, trained(), options=options)
        with pytest.raises(ValueError, match="flatten_optimizer_state_dict=False"):
            checkpoints.set_optimizer_state_dict(model, trained(), saved, options=options)
