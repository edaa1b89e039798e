"""The five kinds of past weights, on an optimizer that really steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from layerpipe_kernels.past import KINDS
from tests.backends import BACKENDS
from tests.kernels.runs import Run

COUPLED: dict[str, Any] = {"past": "blend:decay=coupled"}
ESTIMATES = ["ema", "momentum", "blend"]
AVERAGES: list[dict[str, Any]] = [
    *({"past": lk.EMA(decay=rule)} for rule in ("matched", "white", "window", 0.9, 0.1)),
    *({"past": lk.Blend(order=k)} for k in (1, 2, 3)),
    *({"past": lk.Blend(order=k, decay="coupled")} for k in (2, 3)),
]


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


@pytest.mark.parametrize("past", [{"past": "ema"}, {"past": "blend"}, COUPLED], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_constant_updates_are_reconstructed_exactly_in_the_long_run(past: dict[str, Any], momentum: float) -> None:
    run = Run(delay=6, noise=0.0, momentum=momentum, **past)
    run.step(400)
    assert run.error(6) < 1e-12


def test_matched_is_exact_for_updates_that_drift_linearly() -> None:
    run = Run(delay=6, past="ema", momentum=0.0)
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
        "blend": {"past": lk.Blend(order=2)},
        "matched": {"past": "ema"},
        "window": {"past": lk.EMA(decay="window")},
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


@pytest.mark.parametrize("materialize", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum_is_extrapolated_with_that_of_the_last_update(backend: str, materialize: bool) -> None:
    run = Run(delay=6, past=lk.Momentum(materialize=materialize), momentum=0.95, backend=backend)
    run.step(10)
    (group,) = run.optimizer.param_groups
    for momentum in (0.85, 0.86):
        group["momentum"] = momentum
        run.step()
        group["momentum"] = 0.5  # a schedule goes on before the past is asked for
        velocity: Tensor = run.optimizer.state[run.param]["momentum_buffer"]
        want = run.param.detach() + 0.1 * velocity * (1 - momentum**6) / (1 - momentum)
        torch.testing.assert_close(run.optimizer.past_weight(run.param), want)
        assert torch.equal(run.optimizer.past_view(run.param), run.optimizer.past_weight(run.param))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("past", ESTIMATES)
def test_materialized_past_weights_are_those_made_later(backend: str, past: str) -> None:
    torch.manual_seed(1)
    later = Run(delay=4, past=past, backend=backend)
    torch.manual_seed(1)
    by_step = Run(delay=4, past=f"{past}:materialize=true", backend=backend)
    for run in (later, by_step):
        torch.manual_seed(2)
        run.step(9)
    a, b = (run.optimizer.past_weight(run.param) for run in (later, by_step))
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    assert by_step.optimizer.past_view(by_step.param) is by_step.optimizer.state[by_step.param]["past"]


@pytest.mark.parametrize("materialize", ["", ":materialize=true"])
@pytest.mark.parametrize("past", ["stash", "ema", "blend", "blend:decay=coupled"])
def test_a_parameter_without_gradient_stood_still(past: str, materialize: str) -> None:
    if past == "stash" and materialize:
        return
    run = Run(delay=3, past=past + materialize)
    run.step(3)
    run.step(3, grad=False)  # from here on W(t-3) is W(t)
    past_weight = run.optimizer.past_weight(run.param)
    assert torch.equal(run.versions[-1], run.versions[-4])
    far = (run.versions[-1] - run.versions[0]).norm()
    assert (past_weight - run.versions[-4]).norm() < 0.6 * far
    run.step(40, grad=False)
    torch.testing.assert_close(run.optimizer.past_weight(run.param), run.versions[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("past", ["ema", "blend", "blend:order=3:decay=coupled"])
def test_no_gradient_is_an_update_of_zero(past: str) -> None:
    first = torch.randn(9, dtype=torch.float64)
    without, zero = (first.clone().requires_grad_() for _ in range(2))
    grads = [torch.randn_like(first) for _ in range(9)]
    for param, still in ((without, None), (zero, torch.zeros_like(first))):
        optimizer = lk.SGD([param], lr=0.1, delay=3, past=past)
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
        run = Run(delay=n, past=lk.EMA(of=of), momentum=0.0, weight_decay=0.1)
        run.step(25)
        results.append(run.optimizer.past_weight(run.param))
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


def test_average_of_gradients_is_wrong_under_a_schedule_where_that_of_updates_is_not() -> None:
    errors = []
    for of in ("update", "gradient"):
        run = Run(delay=6, past=lk.EMA(of=of), momentum=0.0, noise=0.0)
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
        ({"past": lk.Blend(order=3)}, 3),
        ({"past": lk.EMA(materialize=True)}, 2),
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


@pytest.mark.parametrize("past", KINDS)
def test_out_may_have_any_strides(past: str) -> None:
    """Nothing beside it is written."""
    param = torch.nn.Parameter(torch.randn(6, 4))
    optimizer = lk.SGD([param], lr=0.1, momentum=0.9, delay=2, past=past)
    for steps in range(4):
        if steps:
            param.grad = torch.randn(6, 4)
            optimizer.step()
        want = optimizer.past_weight(param)
        memory = torch.full((6, 8), 7.0)
        for out in (torch.empty(4, 6).t(), memory[:, :4], memory[:, 4:]):
            before = memory.clone()
            assert optimizer.past_weight(param, out=out) is out
            assert torch.equal(out, want)
            if out.storage_offset():
                assert torch.equal(memory[:, :4], before[:, :4])
        with pytest.raises(RuntimeError, match="single memory location"):
            optimizer.past_weight(param, out=torch.zeros(1).expand(6, 4))


@pytest.mark.parametrize("past", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_that_has_saved_out_notices_that_it_was_written(past: str, backend: str) -> None:
    run = Run(delay=2, past=past, backend=backend)
    run.step(4)
    out = run.optimizer.past_weight(run.param)
    x = torch.ones_like(out, requires_grad=True)
    loss = (x * out).sum()
    run.optimizer.past_weight(run.param, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_frozen_parameters_are_their_own_past_whatever_their_strides() -> None:
    frozen = [torch.randn(4, 8)[:, :4], torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    moving = torch.nn.Parameter(torch.randn(3))
    params = [torch.nn.Parameter(t, requires_grad=False) for t in frozen]
    optimizer = lk.SGD([*params, moving], lr=0.1, momentum=0.9, delay=2)
    for _ in range(4):
        for param in params:
            assert torch.equal(optimizer.past_weight(param), param)
            assert torch.equal(optimizer.past_view(param), param)
            assert torch.equal(optimizer.past_weight(param, out=torch.empty(param.shape)), param)
        moving.grad = torch.ones(3)
        optimizer.step()
