"""Mixed precision: an update that overflows never happened, and nobody on the host needs to know."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from tests.backends import needs_cpp

BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "past": "blend"}),
    ("SGD", {"momentum": 0.9, "past": lk.Blend(materialize=True)}),
    ("SGD", {"momentum": 0.9, "past": "momentum"}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "past": "ema"}),
    ("SGD", {"momentum": 0.9, "past": lk.EMA(of="gradient")}),
    ("SGD", {"momentum": 0.9, "past": "stash"}),
    ("SGD", {"past": "latest"}),
    ("SGD", {"momentum": 0.9, "past": lk.Blend(norm="match")}),
    ("Adam", {"past": "ema", "amsgrad": True}),
    ("AdamW", {"past": lk.Blend(order=3)}),
    ("SGD", {"momentum": 0.9, "past": lk.Blend(decay="coupled")}),
    ("AdamW", {"past": lk.Blend(order=3, decay="coupled")}),
    ("AdamW", {"past": lk.Blend(materialize=True, norm="match")}),
    ("AdamW", {"past": lk.Blend(dtype=torch.bfloat16)}),
]


class Pair:
    """An optimizer under a GradScaler, and its twin that steps without one on the gradients that did not overflow."""

    def __init__(self, name: str, options: dict[str, Any], backend: str = "auto", delay: int = 4) -> None:
        options = {"lr": 0.05, "delay": delay, "backend": backend, **options}
        self.params = [torch.randn(6, 5, requires_grad=True), torch.randn(7, requires_grad=True)]
        self.twins = [p.detach().clone().requires_grad_() for p in self.params]
        self.optimizer, self.plain = getattr(lk, name)(self.params, **options), getattr(lk, name)(self.twins, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    def step(self, overflow: bool = False, late: bool = False, unscale: bool = False) -> None:
        """``late``: the second parameter has no gradient yet."""
        for param, twin in zip(self.params, self.twins, strict=True):
            grad = torch.randn_like(param)
            twin.grad = grad
            param.grad = grad * self.scaler.scale(torch.ones(()))
            if overflow:
                param.grad.view(-1)[1] = float("inf")
        if late:
            self.params[1].grad = self.twins[1].grad = None
        if unscale:
            self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not overflow:
            self.plain.step()

    def check(self) -> None:
        for param, twin in zip(self.params, self.twins, strict=True):
            torch.testing.assert_close(param, twin, rtol=2e-6, atol=2e-6)
            close = {"rtol": 2e-6, "atol": 5e-6}
            if lk.past.parse(self.plain.param_groups[0]["past"]).dtype is not None:
                close = {"rtol": 1e-2, "atol": 1e-2}  # what is rounded differs in its last digit, so may its rounding
            torch.testing.assert_close(self.optimizer.past_weight(param), self.plain.past_weight(twin), **close)
        assert int(self.optimizer.param_groups[0]["updates"]) == self.plain.param_groups[0]["updates"]

    def everything(self) -> list[Tensor]:
        """Every value that a step may write."""
        states = [self.optimizer.state[p] for p in self.params]
        group = self.optimizer.param_groups[0]
        clocks = [torch.as_tensor(group[k]) for k in ("updates", "last_lr")]
        arrays = [v for s in states for v in s.values() if isinstance(v, Tensor)]
        pasts = [self.optimizer.past_weight(p) for p in self.params]
        return [t.detach().clone() for t in (*self.params, *arrays, *clocks, *pasts)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_overflows_in_any_step_leave_the_run_as_if_they_had_not_been(
    name: str, options: dict[str, Any], backend: str
) -> None:
    pair = Pair(name, options, backend)
    for step in range(16):
        pair.step(overflow=step in (0, 3, 4, 11), unscale=step % 5 == 2)
        pair.check()


@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_an_overflow_changes_no_value_at_all(name: str, options: dict[str, Any]) -> None:
    pair = Pair(name, options)
    for _ in range(7):
        pair.step()
    pair.step(late=True)
    before = pair.everything()
    for late in (False, True):
        pair.optimizer.param_groups[0]["lr"] = 0.5  # that of an update which did not happen
        pair.step(overflow=True, late=late)
        for a, b in zip(before, pair.everything(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_gradients_may_come_late_and_stay_away_between_overflows(name: str, options: dict[str, Any]) -> None:
    pair = Pair(name, options)
    for step in range(14):
        pair.step(overflow=step in (0, 5, 8), late=step in (0, 1, 2, 7, 8))
        pair.check()
    if name != "SGD":
        counts = [float(pair.optimizer.state[p]["step"]) for p in pair.params]
        assert counts == [11.0, 8.0]


def test_the_first_gradient_after_an_overflow_fills_an_empty_momentum_buffer_whole() -> None:
    pair = Pair("SGD", {"momentum": 0.9, "dampening": 0.9}, delay=0)
    pair.step(overflow=True)
    pair.step()
    torch.testing.assert_close(pair.optimizer.state[pair.params[0]]["momentum_buffer"], pair.twins[0].grad)
    pair.step()
    torch.testing.assert_close(pair.params[0], pair.twins[0])


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_clock_goes_to_the_device_in_the_middle_of_a_run(name: str) -> None:
    pair = Pair(name, {"past": "blend"})
    pair.scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(6):
        pair.step()
    assert isinstance(pair.optimizer.param_groups[0]["updates"], int)
    pair.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(6):
        pair.step(overflow=step == 2)
        pair.check()
    assert isinstance(pair.optimizer.param_groups[0]["updates"], Tensor)


class Forbidden(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises where a tensor's value would come to the host, which on a GPU waits for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "local_scalar_dense" in name or "nonzero" in name or "is_nonzero" in name:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@needs_cpp
@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_a_step_that_may_overflow_never_looks_at_a_tensor(name: str, options: dict[str, Any]) -> None:
    params = [torch.randn(8, requires_grad=True), torch.randn(3, requires_grad=True)]
    optimizer = getattr(lk, name)(params, lr=torch.tensor(0.1), capturable=True, delay=3, **options)
    params[0].grad = torch.randn(8)
    for _ in range(2):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        with Forbidden():
            optimizer.step()
    past = lk.past.parse(options["past"])
    if past.kind in ("stash", "latest") or past.materialize:
        with Forbidden():
            optimizer.past_weight(params[0])


@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_capturable_keeps_the_clock_in_a_tensor_and_changes_no_result(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(4)
    start = torch.randn(40)
    results = []
    for capturable in (False, True):
        param = start.clone().requires_grad_()
        lr = torch.tensor(0.05)
        optimizer = getattr(lk, name)([param], lr=lr, capturable=capturable, delay=5, **options)
        torch.manual_seed(9)
        pasts = []
        for step in range(12):
            lr.fill_(0.05 / (1 + step))
            param.grad = torch.randn(40) if step != 6 else None
            optimizer.step()
            pasts.append(optimizer.past_weight(param))
        results.append(torch.stack([param.detach(), *pasts]))
        assert isinstance(optimizer.param_groups[0]["updates"], Tensor) == capturable
    close = {"rtol": 1e-2, "atol": 1e-2} if lk.past.parse(options["past"]).dtype else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(*results, **close)


@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_a_run_under_a_scaler_resumes_bitwise(name: str, options: dict[str, Any]) -> None:
    pair = Pair(name, options)
    for step in range(7):
        pair.step(overflow=step == 1, late=step == 6)
    other = Pair(name, options)
    with torch.no_grad():
        for param, source in zip(other.params, pair.params, strict=True):
            param.copy_(source)
    other.optimizer.load_state_dict(copy.deepcopy(pair.optimizer.state_dict()))
    other.scaler.load_state_dict(pair.scaler.state_dict())
    for a, b in zip(pair.params, other.params, strict=True):
        assert torch.equal(pair.optimizer.past_weight(a), other.optimizer.past_weight(b))
    for each in (pair, other):
        torch.manual_seed(12)
        for step in range(5):
            each.step(overflow=step == 2, late=step == 2)
    assert all(map(torch.equal, pair.everything(), other.everything()))


@pytest.mark.parametrize("past", ["ema", "blend", "stash"])
def test_a_restart_begins_the_warm_up_anew_on_the_device_too(past: str) -> None:
    pair = Pair("SGD", {"momentum": 0.9, "past": past}, delay=3)
    for _ in range(9):
        pair.step()
    pair.optimizer.restart_history()
    start = [p.detach().clone() for p in pair.params]
    for overflow in (True, False, True, False, False):
        pair.step(overflow=overflow)
        for param, begun in zip(pair.params, start, strict=True):
            torch.testing.assert_close(pair.optimizer.past_weight(param), begun, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [lk.SGD, lk.AdamW])
def test_fused_false_leaves_unscaling_to_the_scaler(kind: Any) -> None:
    """Who clips gradients between the two, as Lightning does, needs that."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([param], lr=0.1, fused=False)
    assert not optimizer._step_supports_amp_scaling
    assert kind([param], lr=0.1)._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(param.grad, torch.ones(3))
    assert not hasattr(optimizer, "found_inf")
    scaler.update()
    param.grad = None
    scaler.scale(param.sum() * float("inf")).backward()
    before = param.detach().clone()
    scaler.step(optimizer)
    assert torch.equal(param, before)
