"""PastWeights: any optimizer's steps, and the past they leave behind."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk

Make = Callable[[list[Tensor]], torch.optim.Optimizer]
INNER: dict[str, Make] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "fused": lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "muon": lambda params: torch.optim.Muon([p for p in params if p.ndim == 2], lr=0.01),
}
PASTS: list[dict[str, Any]] = [
    {"past": "stash"},
    {"past": "latest"},
    {"past": "ema"},
    {"past": lk.Blend(order=2)},
    {"past": lk.Blend(order=2, decay="coupled")},
    {"past": lk.Blend(order=2, materialize=True)},
    {"past": lk.Blend(order=1, norm="match")},
]


class Run:
    def __init__(self, make: Make, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(seed)
        self.params = [torch.randn(4, 6, requires_grad=True), torch.randn(5, 5, requires_grad=True)]
        self.optimizer = lk.PastWeights(make(self.params), **options)
        self.versions = [[p.detach().clone() for p in self.params]]

    def step(self, count: int = 1, seed: int = 1) -> None:
        torch.manual_seed(seed)
        for _ in range(count):
            for param in self.params:
                param.grad = torch.randn_like(param)
            self.optimizer.step()
            self.versions.append([p.detach().clone() for p in self.params])


@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
@pytest.mark.parametrize("past", PASTS, ids=str)
def test_the_wrapped_optimizer_steps_as_it_would_alone(make: Make, past: dict[str, Any]) -> None:
    run = Run(make, delay=4, **past)
    run.step(8)
    torch.manual_seed(0)
    alone = [torch.randn(4, 6, requires_grad=True), torch.randn(5, 5, requires_grad=True)]
    optimizer = make(alone)
    torch.manual_seed(1)
    for _ in range(8):
        for param in alone:
            param.grad = torch.randn_like(param)
        optimizer.step()
    assert all(map(torch.equal, run.params, alone))


@pytest.mark.parametrize("make", INNER.values(), ids=INNER)
@pytest.mark.parametrize("past", [p for p in PASTS if p["past"] != "latest"], ids=str)
def test_the_past_is_exact_while_the_pipe_fills_and_near_afterwards(make: Make, past: dict[str, Any]) -> None:
    run = Run(make, delay=4, **past)
    for t in range(1, 12):
        run.step(1, seed=t)
        for i, param in enumerate(run.params):
            true = run.versions[max(0, t - 4)][i]
            estimate = run.optimizer.past_weight(param)
            if t <= 4 or past["past"] == "stash":
                torch.testing.assert_close(estimate, true, rtol=2e-6, atol=2e-6)
            else:
                assert (estimate - true).norm() < 0.9 * (param - true).norm()


@pytest.mark.parametrize("make", [INNER["sgd"], INNER["adamw"]], ids=["sgd", "adamw"])
@pytest.mark.parametrize("past", ["ema", "stash"])
def test_it_agrees_with_the_fused_optimizer(make: Make, past: str) -> None:
    run = Run(make, delay=3, past=past)
    run.step(9)
    twin = Run(make, delay=3, past=past)
    group = twin.optimizer.optimizer.param_groups[0]
    shared = {k: group[k] for k in ("lr", "weight_decay")}
    fused = (
        lk.SGD(twin.params, momentum=0.9, delay=3, past=past, **shared)
        if "momentum" in group
        else lk.AdamW(twin.params, delay=3, past=past, **shared)
    )
    torch.manual_seed(1)
    for _ in range(9):
        for param in twin.params:
            param.grad = torch.randn_like(param)
        fused.step()
    for a, b in zip(run.params, twin.params, strict=True):
        torch.testing.assert_close(run.optimizer.past_weight(a), fused.past_weight(b), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("make", [INNER["sgd"], INNER["adamw"], INNER["muon"]], ids=["sgd", "adamw", "muon"])
@pytest.mark.parametrize("past", PASTS, ids=str)
@pytest.mark.parametrize("how", ["state_dict", "file", "deepcopy"])
def test_resume_is_bitwise(make: Make, past: dict[str, Any], how: str) -> None:
    run = Run(make, delay=3, **past)
    run.step(7)
    if how == "deepcopy":
        params, optimizer = copy.deepcopy((run.params, run.optimizer))
        other = Run(make, delay=3, **past)
        other.params, other.optimizer = params, optimizer
        assert optimizer.param_groups[0]["params"][0] is params[0]
    else:
        other = Run(make, seed=5, delay=3, **past)
        state: Any = copy.deepcopy(run.optimizer.state_dict())
        if how == "file":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        with torch.no_grad():
            for param, source in zip(other.params, run.params, strict=True):
                param.copy_(source)
        other.optimizer.load_state_dict(state)
    known = {p for group in run.optimizer.param_groups for p in group["params"]}
    for a, b in zip(run.params, other.params, strict=True):
        if a in known:
            assert torch.equal(run.optimizer.past_weight(a), other.optimizer.past_weight(b))
    for each in (run, other):
        each.step(2, seed=8)
    for a, b in zip(run.params, other.params, strict=True):
        assert torch.equal(a, b)
        if a in known:
            assert torch.equal(run.optimizer.past_weight(a), other.optimizer.past_weight(b))


def test_a_checkpoint_of_the_wrapped_optimizer_loads_and_warms_up_anew() -> None:
    run = Run(INNER["adamw"], delay=3)
    alone = INNER["adamw"](run.params)
    for param in run.params:
        param.grad = torch.ones_like(param)
    alone.step()
    run.step(6)
    with pytest.warns(UserWarning, match="has no past"):
        run.optimizer.load_state_dict(alone.state_dict())
    start = [p.detach().clone() for p in run.params]
    for t in range(3):
        run.step(1, seed=t)
        for param, begun in zip(run.params, start, strict=True):
            torch.testing.assert_close(run.optimizer.past_weight(param), begun, rtol=2e-6, atol=2e-6)


def test_the_wrapped_optimizer_loads_a_checkpoint_with_a_past() -> None:
    run = Run(INNER["adamw"], delay=3)
    run.step(5)
    alone = INNER["adamw"](run.params)
    alone.load_state_dict(run.optimizer.state_dict())
    for param in run.params:
        assert torch.equal(alone.state[param]["exp_avg"], run.optimizer.optimizer.state[param]["exp_avg"])
    alone.step()


def test_a_scheduler_moves_both() -> None:
    run = Run(INNER["sgd"], delay=2)
    scheduler = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, 0.5)
    run.step()
    scheduler.step()
    assert run.optimizer.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"] == 0.05


def test_groups_are_added_to_both_and_may_have_their_own_past() -> None:
    run = Run(INNER["sgd"], delay=2, past="ema")
    late = torch.randn(3, requires_grad=True)
    run.optimizer.add_param_group({"params": [late], "delay": 4, "past": "stash"})
    assert [g["delay"] for g in run.optimizer.optimizer.param_groups] == [2, 4]
    late.grad = torch.ones(3)
    run.step(2)
    assert run.optimizer.state[late]["stash"].shape == (4, 3)
    with pytest.raises(ValueError, match="yesterday"):
        run.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "past": "yesterday"})
    assert len(run.optimizer.param_groups) == 2


def test_a_grad_scaler_skips_an_overflow() -> None:
    run = Run(INNER["adamw"], delay=3)
    run.step(5)
    before = [run.optimizer.past_weight(p) for p in run.params]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    for param in run.params:
        param.grad = torch.full_like(param, float("inf"))
    scaler.step(run.optimizer)
    scaler.update()
    assert all(map(torch.equal, before, (run.optimizer.past_weight(p) for p in run.params)))
    assert run.optimizer.param_groups[0]["updates"] == 5


def test_hooks_of_both_are_called() -> None:
    run = Run(INNER["sgd"], delay=2)
    called = []
    run.optimizer.register_step_pre_hook(lambda *_: called.append("outer"))
    run.optimizer.optimizer.register_step_post_hook(lambda *_: called.append("inner"))
    run.step()
    assert called == ["outer", "inner"]


def test_what_cannot_be_wrapped_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="knows its past weights itself"):
        lk.PastWeights(lk.SGD([param]), delay=2)
    with pytest.raises(TypeError, match="got list"):
        lk.PastWeights([param], delay=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="past='momentum'"):
        lk.PastWeights(torch.optim.SGD([param], lr=0.1, momentum=0.9), delay=2, past="momentum")


def test_bytes_count_the_history_apart_from_the_optimizers_state() -> None:
    run = Run(INNER["adamw"], delay=6)
    run.step()
    weights = sum(p.nbytes for p in run.params)
    assert run.optimizer.history_bytes() == 2 * weights
    assert run.optimizer.optimizer_bytes() == 2 * weights + 2 * 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"past": "momentum"}, "use past='ema' or past='blend'"), ({"past": "blend:order=7"}, "order must be")],
)
def test_a_wrapping_that_failed_leaves_nothing_behind(wrong: dict[str, Any], message: str) -> None:
    inner = INNER["sgd"]([torch.randn(3, requires_grad=True)])
    group = inner.param_groups[0]
    before = {**group}
    with pytest.raises(ValueError, match=message):
        lk.PastWeights(inner, delay=6, **wrong)
    assert group == before
    lk.PastWeights(inner, delay=4, past="ema")
    assert (group["delay"], group["past"]) == (4, "ema")


def test_an_optimizer_is_wrapped_once() -> None:
    """What it has of a past belongs to its wrapper, or to a checkpoint's: the next one's options would not count."""
    inner = INNER["adamw"]([torch.randn(3, requires_grad=True)])
    wrapped = lk.PastWeights(inner, delay=6)
    with pytest.raises(ValueError, match=r"this AdamW has a past of its own already \(delay=6"):
        lk.PastWeights(inner, delay=4)
    assert wrapped.param_groups[0]["delay"] == 6
    another = INNER["adamw"]([torch.randn(3, requires_grad=True)])
    another.load_state_dict(wrapped.state_dict())
    with pytest.raises(ValueError, match="load a checkpoint into the PastWeights"):
        lk.PastWeights(another, delay=6)


def test_hooks_of_checkpoints_are_called() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = lk.PastWeights(torch.optim.AdamW([param]), delay=2)
    called = list[str]()

    def lower(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        called.append("before loading")
        return {**state, "param_groups": [{**group, "lr": 0.5} for group in state["param_groups"]]}

    def said(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        called.append("after saving")
        return {**state, "said": True}

    optimizer.register_state_dict_pre_hook(lambda _: called.append("before saving"))
    optimizer.register_state_dict_post_hook(said)
    optimizer.register_load_state_dict_pre_hook(lower)
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("after loading"))
    state = optimizer.state_dict()
    assert state["said"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert state["param_groups"][0]["lr"] != 0.5
    assert called == ["before saving", "after saving", "before loading", "after loading"]


@pytest.mark.parametrize("how", ["load", "add"])
def test_groups_that_the_wrapped_optimizer_gets_behind_its_back_have_a_past(how: str) -> None:
    first, second = (torch.nn.Parameter(torch.full((3,), 2.0)) for _ in range(2))
    inner = torch.optim.SGD([first], lr=0.1)
    plain = inner.state_dict()
    optimizer = lk.PastWeights(inner, delay=2, past="stash")
    if how == "load":
        inner.load_state_dict(plain)
    else:
        inner.add_param_group({"params": [second]})
    start = first.detach().clone()
    for _ in range(2):
        first.grad = second.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(optimizer.past_weight(first), start)
    if how == "add":
        assert torch.equal(optimizer.past_weight(second), start)
