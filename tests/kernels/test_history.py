"""The five kinds of past weights, on an optimizer that really steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from layerpipe_kernels.history import KINDS
from tests.conftest import needs_cpp

BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
COUPLED: dict[str, Any] = {"past": "blend", "ema_decay": "coupled"}
ESTIMATES = ["ema", "momentum", "blend"]
AVERAGES: list[dict[str, Any]] = [
    *({"past": "ema", "ema_decay": rule} for rule in ("matched", "white", "window", 0.9, 0.1)),
    *({"past": "blend", "order": k} for k in (1, 2, 3)),
    *({"past": "blend", "order": k, "ema_decay": "coupled"} for k in (2, 3)),
]


class Run:
    """An optimizer on one parameter with AR(1) gradients, and the true versions of its weights."""

    def __init__(self, size: int = 50, dtype: torch.dtype = torch.float64, noise: float = 1.0, **options: Any) -> None:
        self.param = torch.randn(size, dtype=dtype, requires_grad=True)
        self.optimizer = lk.SGD([self.param], **{"lr": 0.1, "momentum": 0.9, **options})
        self.versions = [self.param.detach().clone()]
        self.drift, self.noise = torch.randn(size, dtype=dtype), noise

    def step(self, count: int = 1, grad: bool = True) -> None:
        for _ in range(count):
            self.param.grad = self.drift + self.noise * torch.randn_like(self.param) if grad else None
            self.optimizer.step()
            self.versions.append(self.param.detach().clone())

    def error(self, n: int) -> float:
        """Mean-square error of the past weights, relative to using the latest."""
        true, past = self.versions[-1 - n], self.optimizer.past_weight(self.param)
        return float((past - true).square().sum() / (self.versions[-1] - true).square().sum())


def test_there_are_five_kinds() -> None:
    assert set(KINDS) == {"stash", "latest", "ema", "momentum", "blend"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 6])
def test_stash_is_exact(backend: str, n: int) -> None:
    run = Run(delay=n, past="stash", backend=backend)
    for t in range(1, 3 * n + 2):
        run.step()
        assert torch.equal(run.optimizer.past_weight(run.param), run.versions[t - min(t, n)])


def test_latest_is_the_weight_itself() -> None:
    run = Run(delay=4, past="latest")
    run.step(6)
    assert torch.equal(run.optimizer.past_weight(run.param), run.param)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("past", AVERAGES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 6, 14])
def test_averages_are_exact_while_the_pipe_fills(backend: str, past: dict[str, Any], n: int) -> None:
    run = Run(delay=n, backend=backend, weight_decay=0.01, **past)
    for t in range(1, n + 1):
        run.optimizer.param_groups[0]["lr"] = 0.01 * t  # a warm-up must not matter
        run.step()
        torch.testing.assert_close(run.optimizer.past_weight(run.param), run.versions[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("past", ["ema", "blend"])
def test_averages_are_exact_again_after_a_restart(past: str) -> None:
    run = Run(delay=4, past=past)
    run.step(20)
    run.optimizer.restart_history()
    for _ in range(4):
        run.step()
        torch.testing.assert_close(run.optimizer.past_weight(run.param), run.versions[20], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "past", [{"past": "ema", "ema_decay": "matched"}, {"past": "blend", "order": 2}, COUPLED], ids=str
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_constant_updates_are_reconstructed_exactly_in_the_long_run(past: dict[str, Any], momentum: float) -> None:
    run = Run(delay=6, noise=0.0, momentum=momentum, **past)
    run.step(400)
    assert run.error(6) < 1e-12


def test_matched_is_exact_for_updates_that_drift_linearly() -> None:
    run = Run(delay=6, past="ema", ema_decay="matched", momentum=0.0)
    for t in range(200):
        run.param.grad = run.drift * t
        run.optimizer.step()
        run.versions.append(run.param.detach().clone())
    assert run.error(6) < 1e-12


@pytest.mark.parametrize("n", [2, 6, 14])
def test_kinds_rank_as_the_theory_says(n: int) -> None:
    errors = {}
    for name, options in {
        "coupled": COUPLED,
        "blend": {"past": "blend", "order": 2},
        "matched": {"past": "ema"},
        "window": {"past": "ema", "ema_decay": "window"},
        "latest": {"past": "latest"},
    }.items():
        torch.manual_seed(0)
        run = Run(size=4000, delay=n, noise=10.0, **options)
        run.drift.zero_()
        run.step(30)
        readings = []
        for _ in range(15):
            run.step(10)
            readings.append(run.error(n))
        errors[name] = sum(readings) / len(readings)
    assert errors["coupled"] < errors["blend"] * (1.1 if n == 2 else 0.65)  # at n=2 both have one average
    assert errors["blend"] < errors["matched"] < errors["window"] < errors["latest"] == 1.0
    for name, coupled in (("blend", False), ("coupled", True)):
        predicted = lk.decay.blend(n, min(2, n - 1), 0.9, coupled=coupled).error
        assert errors[name] == pytest.approx(predicted, rel=0.3, abs=3e-4)


def test_momentum_is_the_geometric_extrapolation() -> None:
    run = Run(delay=4, past="momentum", momentum=0.8)
    run.step(10)
    velocity: Tensor = run.optimizer.state[run.param]["momentum_buffer"]
    want = run.param.detach() + 0.1 * velocity * (1 - 0.8**4) / (1 - 0.8)
    torch.testing.assert_close(run.optimizer.past_weight(run.param), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("past", ESTIMATES)
def test_materialized_past_weights_are_those_made_later(backend: str, past: str) -> None:
    torch.manual_seed(1)
    later = Run(delay=4, past=past, backend=backend)
    torch.manual_seed(1)
    by_step = Run(delay=4, past=past, backend=backend, materialize=True)
    for run in (later, by_step):
        torch.manual_seed(2)
        run.step(9)
    a, b = (run.optimizer.past_weight(run.param) for run in (later, by_step))
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert by_step.optimizer.past_view(by_step.param) is by_step.optimizer.state[by_step.param]["past"]


@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("past", [{"past": "stash"}, {"past": "ema"}, {"past": "blend"}, COUPLED], ids=str)
def test_a_parameter_without_gradient_stood_still(past: dict[str, Any], materialize: bool) -> None:
    if past["past"] == "stash" and materialize:
        return
    run = Run(delay=3, materialize=materialize, **past)
    run.step(3)
    run.step(3, grad=False)  # from here on W(t-3) is W(t)
    past_weight = run.optimizer.past_weight(run.param)
    assert torch.equal(run.versions[-1], run.versions[-4])
    far = (run.versions[-1] - run.versions[0]).norm()
    assert (past_weight - run.versions[-4]).norm() < 0.6 * far
    run.step(40, grad=False)
    torch.testing.assert_close(run.optimizer.past_weight(run.param), run.versions[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("past", [{"past": "ema"}, {"past": "blend"}, {"order": 3, **COUPLED}], ids=str)
def test_no_gradient_is_an_update_of_zero(past: dict[str, Any]) -> None:
    first = torch.randn(9, dtype=torch.float64)
    without, zero = (first.clone().requires_grad_() for _ in range(2))
    grads = [torch.randn_like(first) for _ in range(9)]
    for param, still in ((without, None), (zero, torch.zeros_like(first))):
        optimizer = lk.SGD([param], lr=0.1, delay=3, **past)
        for t, grad in enumerate(grads):
            param.grad = still if t in (4, 5, 7) else grad
            optimizer.step()
        past_weight = optimizer.past_weight(param)
        if param is without:
            want = past_weight
    torch.testing.assert_close(past_weight, want, rtol=1e-13, atol=1e-13)


def test_late_gradients_join_in() -> None:
    first, late = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = lk.SGD([first, late], lr=0.1, momentum=0.9, delay=2, past="stash")
    versions = []
    for t in range(8):
        versions.append(late.detach().clone())
        first.grad = torch.randn_like(first)
        late.grad = torch.randn_like(late) if t >= 3 else None
        optimizer.step()
        assert torch.equal(optimizer.past_weight(late), versions[max(0, t - 1)])


@pytest.mark.parametrize("n", [2, 6])
def test_average_of_gradients_and_of_updates_agree_for_plain_sgd_at_constant_lr(n: int) -> None:
    results = []
    for of in ("update", "gradient"):
        torch.manual_seed(3)
        run = Run(delay=n, past="ema", momentum=0.0, weight_decay=0.1, ema_of=of)
        run.step(25)
        results.append(run.optimizer.past_weight(run.param))
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


def test_average_of_gradients_is_wrong_under_a_schedule_where_that_of_updates_is_not() -> None:
    errors = []
    for of in ("update", "gradient"):
        run = Run(delay=6, past="ema", momentum=0.0, noise=0.0, ema_of=of)
        for t in range(1, 60):
            run.optimizer.param_groups[0]["lr"] = 0.002 * t
            run.step()
        errors.append(run.error(6))
    assert errors[0] < 1e-20
    assert errors[1] > 1e-4


def test_no_delay_keeps_nothing() -> None:
    run = Run(delay=0)
    run.step(3)
    assert run.optimizer.history_bytes() == 0
    assert set(run.optimizer.state[run.param]) == {"momentum_buffer"}
    assert torch.equal(run.optimizer.past_weight(run.param), run.param)


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({"past": "stash"}, 6),
        ({"past": "latest"}, 0),
        ({"past": "momentum"}, 0),
        ({"past": "ema"}, 1),
        ({"past": "blend", "order": 3}, 3),
        ({"past": "ema", "materialize": True}, 2),
    ],
    ids=str,
)
def test_history_keeps_as_many_copies_as_it_says(options: dict[str, Any], copies: int) -> None:
    run = Run(delay=6, **options)
    run.step()
    assert run.optimizer.history_bytes() == copies * run.param.nbytes
    assert run.optimizer.optimizer_bytes() == run.param.nbytes


def test_past_weight_is_fresh_or_out() -> None:
    run = Run(delay=2, past="stash")
    run.step(4)
    fresh = run.optimizer.past_weight(run.param)
    out = torch.empty_like(run.param)
    assert run.optimizer.past_weight(run.param, out=out) is out
    run.step(2)
    assert torch.equal(fresh, run.versions[2])
    assert torch.equal(out, run.versions[2])


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
    """Same address and size, other strides or dtype: refused or planned anew, never written as it was."""
    param = torch.randn(4, 4, requires_grad=True)
    optimizer = lk.SGD([param], lr=0.1)
    param.grad = torch.ones(4, 4)
    optimizer.step()
    param.grad = None
    param.data = change(param.data)
    param.grad = torch.ones_like(param)
    before = param.detach().clone()
    if param.is_contiguous():
        optimizer.step()
        torch.testing.assert_close(param.detach(), before - 0.1, equal_nan=True)
    else:
        with pytest.raises(ValueError, match="not contiguous"):
            optimizer.step()


def test_more_averages_than_there_were_begin_anew() -> None:
    run = Run(delay=6, past="blend", order=1)
    run.step(3)
    run.optimizer.param_groups[0]["order"] = 3
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


P = torch.nn.Parameter


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"momentum": float("inf")}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"nesterov": True, "momentum": 0.0}, "Nesterov"),
        ({"nesterov": True, "dampening": 0.1}, "Nesterov"),
        ({"delay": -1}, "delay"),
        ({"delay": 2.5}, "delay"),
        ({"delay": True}, "delay"),
        ({"past": "yesterday"}, "stash, latest, ema, momentum, blend"),
        ({"past": "blend", "order": 4}, "order"),
        ({"past": "blend", "order": 2, "ema_decay": "matched"}, "designs its decays"),
        ({"past": "ema", "ema_decay": "fast"}, "ema_decay"),
        ({"past": "ema", "ema_decay": (0.1, 0.2)}, "one ema_decay"),
        ({"past": "ema", "ema_of": "loss"}, "ema_of"),
        ({"past": "blend", "ema_of": "gradient"}, "ema_of"),
        ({"past": "momentum", "momentum": 0.0}, "momentum in"),
        ({"past": "stash", "materialize": True}, "materialize"),
        ({"differentiable": True}, "differentiable"),
        ({"past": "yesterday", "delay": 0}, "past='yesterday'"),
        ({"backend": "magic"}, "backend='magic'"),
        ({"momentum": 1.0}, "momentum in"),
    ],
    ids=str,
)
def test_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lk.SGD([P(torch.ones(3))], **{"lr": 0.1, "momentum": 0.9, "delay": 4, **options})


def test_a_nan_learning_rate_is_refused_before_any_group_is_written() -> None:
    params = [P(torch.ones(3)), P(torch.ones(3))]
    optimizer = lk.SGD([{"params": [p]} for p in params], lr=0.1)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.param_groups[1]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr is nan"):
        optimizer.step()
    assert all(torch.equal(param, torch.ones(3)) for param in params)


def test_bad_parameters_and_gradients_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\]\[0\].*complex64"):
        lk.SGD([P(torch.ones(3, dtype=torch.complex64))], lr=0.1)
    named = [("head.weight", P(torch.ones(4, 6).t()))]
    optimizer = lk.SGD(named, lr=0.1)
    named[0][1].grad = torch.ones(6, 4)
    with pytest.raises(ValueError, match=r"'head.weight' .*not contiguous"):
        optimizer.step()
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = lk.SGD(table.parameters(), lr=0.1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        optimizer.step()
    memory = torch.randn(10)
    before = memory.clone()
    optimizer = lk.SGD([P(memory[:6]), P(memory[4:])], lr=0.1)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert torch.equal(memory, before)


def test_unknown_parameter_and_wrong_out() -> None:
    run = Run(delay=2, past="ema")
    with pytest.raises(KeyError, match="not in this optimizer"):
        run.optimizer.past_weight(torch.ones(3))
    with pytest.raises(ValueError, match="out must be"):
        run.optimizer.past_weight(run.param, out=torch.empty(3))
