"""Spike compensation, weight prediction and directions in the fused step: every backend of this machine's CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerpipe_kernels import reference
from layerpipe_kernels.checks import check_options
from layerpipe_kernels.options import NO_PAST, STEADY, AdamOptions, DirectionOptions, SgdOptions, StepArguments
from layerpipe_kernels.plan import Arrays, StepPlan
from tests.backends import BACKENDS
from tests.kernels import steps
from tests.kernels.steps import ADAM, BF16, F16, F32, F64, PREDICTED, SGD, Case

LOCATED = StepArguments(t=9, horizon=3.0, horizon_before=5.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["sgd", "adam", "direction"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_predicted_steps_equal_fp64_at_every_size_and_alignment(
    backend: str, rule: str, offset: int, dtype: torch.dtype
) -> None:
    sizes = (*steps.SIZES, (1 << 15) + 1)
    steps.check(Case(rule, dtype, offset=offset, sizes=sizes, previous=True), backend, args=PREDICTED)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [c for c in steps.STRUCTURES if c.previous], ids=str)
def test_predicted_steps_with_every_combination_of_arrays(backend: str, case: Case) -> None:
    options = case.options()
    if not isinstance(options, DirectionOptions):
        options = options._replace(newest_share=0.4)
    steps.check(case, backend, options=options, args=LOCATED)
    if case.rule == "sgd" and case.states:
        steps.check(case, backend, options=options, args=LOCATED, first=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("rule", ["sgd", "adam", "direction"])
def test_masters_are_predicted_and_weights_are_their_rounded_copies(
    backend: str, rule: str, dtype: torch.dtype
) -> None:
    case = Case(rule, dtype, master=True, previous=True)
    got = steps.check(case, backend, args=PREDICTED)
    for master, weight in zip(got.masters, got.weights, strict=True):
        assert torch.equal(master.to(dtype), weight)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("maximize", [False, True])
def test_adam_direction_equals_fp64(backend: str, dtype: torch.dtype, share: float, maximize: bool) -> None:
    options = AdamOptions(lr=1.0, newest_share=share, maximize=maximize)
    for offset in (0, 1):
        case = Case("adam_direction", dtype, emas=0, past=False, offset=offset)
        steps.check(case, backend, options=options, args=StepArguments(grad_scale=torch.tensor(4.0)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_direction_made_by_adam_moves_a_weight_as_adam_does(backend: str) -> None:
    case = Case("adam", emas=2)
    arrays, grads = case.make()
    want = steps.run("adam", arrays, grads, backend, ADAM, case.design(), STEADY)
    made = Arrays([torch.full_like(g, torch.nan) for g in grads], arrays.states, counts=arrays.counts)
    directions = steps.run("adam_direction", made, grads, backend, ADAM._replace(lr=1.0), NO_PAST)
    moved = arrays._replace(states=(), counts=[])
    options = DirectionOptions(ADAM.lr, ADAM.weight_decay)
    got = steps.run("direction", moved, [*directions.weights], backend, options, case.design())
    for a, b in zip(got.written(), (*want.weights, *want.emas, *want.pasts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(directions.states, want.states, strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["sgd", "adam", "direction"])
@pytest.mark.parametrize("t", [1, 5, 6, 7])
def test_the_newest_update_has_its_own_tap_while_the_delay_fills(backend: str, rule: str, t: int) -> None:
    case = Case(rule, previous=True)
    design = case.design(delay=5, fill_tap=3.0)
    steps.check(case, backend, design=design, args=PREDICTED._replace(t=t))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["sgd", "adam", "direction"])
def test_a_horizon_of_zero_moves_weights_as_no_prediction_does(backend: str, rule: str) -> None:
    case = Case(rule, previous=True)
    arrays, grads = case.make()
    got = steps.run(rule, arrays, grads, backend, case.options(), case.design())
    want = steps.run(rule, arrays._replace(previous=[]), grads, backend, case.options(), case.design())
    for name in ("weights", "emas", "pasts"):
        assert all(map(torch.equal, getattr(got, name), getattr(want, name)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["sgd", "adam", "direction"])
def test_prediction_moves_the_current_weights_as_no_prediction_does(backend: str, rule: str) -> None:
    """The step is that of ``W``, whatever lies in memory: ``W = F + horizon_before u_`` before and after."""
    case = Case(rule, F64, previous=True)
    arrays, grads = case.make()
    current = [w + 5.0 * u for w, u in zip(arrays.weights, arrays.previous, strict=True)]
    want = steps.run(rule, arrays._replace(weights=current, previous=[]), grads, backend, case.options(), case.design())
    got = steps.run(rule, arrays, grads, backend, case.options(), case.design(), PREDICTED)
    for predicted, u, w in zip(got.weights, got.previous, want.weights, strict=True):
        torch.testing.assert_close(predicted + 3.0 * u, w)
    assert all(torch.allclose(a, b) for a, b in zip(got.emas, want.emas, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_horizon_may_lie_beside_the_weights_and_is_kept_there(backend: str) -> None:
    case = Case("adam", previous=True)
    arrays, grads = case.make()
    at = torch.tensor(5.0)
    told = StepArguments(horizon=3.0, horizon_before=77.0, horizon_at=at, found_inf=torch.tensor(0.0))
    got = steps.run("adam", arrays, grads, backend, ADAM, case.design(), told)
    want = steps.run("adam", arrays, grads, backend, ADAM, case.design(), PREDICTED)
    assert all(map(torch.equal, got.written(), want.written()))
    assert float(at) == 3.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [
    Case("sgd", previous=True), Case("adam", BF16, master=True, previous=True), Case("direction", previous=True),
    Case("adam_direction", emas=0, past=False),
], ids=str)  # fmt: skip
def test_an_overflow_changes_no_value(backend: str, case: Case) -> None:
    arrays, grads = case.make()
    grads = [g.fill_(float("inf")) for g in grads]
    at = torch.tensor(5.0)
    args = StepArguments(found_inf=torch.tensor(1.0), horizon=3.0, horizon_at=at)
    got = steps.run(case.rule, arrays, grads, backend, case.options(), case.design(), args)
    for before, after in zip(arrays.written(), got.written(), strict=True):
        assert torch.equal(before.nan_to_num(9.0), after.nan_to_num(9.0))
    assert float(at) == 5.0


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(momentum=st.floats(0.01, 0.99), dampening=st.floats(0, 1), share=st.floats(0, 1), first=st.booleans(),
       maximize=st.booleans(), seed=st.integers(0, 999))  # fmt: skip
def test_sgd_with_any_share_of_the_newest_gradient(
    backend: str, momentum: float, dampening: float, share: float, first: bool, maximize: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    options = SgdOptions(0.1, momentum, dampening, 0.01, False, maximize, share)
    case = Case("sgd", sizes=(5, 40), previous=seed % 2 == 0)
    steps.check(case, backend, ulps=8, options=options, first=first, args=LOCATED if case.previous else STEADY)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(beta1=st.floats(0, 0.99), share=st.floats(0, 1), states=st.integers(2, 3), decoupled=st.booleans(),
       seed=st.integers(0, 999))  # fmt: skip
def test_adam_with_any_share_of_the_newest_gradient(
    backend: str, beta1: float, share: float, states: int, decoupled: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    options = AdamOptions(0.01, beta1, 0.9, 1e-4, 0.01, decoupled, False, share)
    case = Case("adam", sizes=(5, 40), states=states, previous=seed % 2 == 0)
    steps.check(case, backend, ulps=16, options=options, args=LOCATED if case.previous else STEADY)


def test_the_whole_newest_gradient_is_plain_gradient_descent_at_momentums_rate() -> None:
    """``b = 1``: the momentum buffer says nothing, and the step is as long as the buffer's would be in the end."""
    weight, grad, velocity = torch.zeros(3), torch.ones(3), torch.full((3,), 100.0)
    reference.sgd_step_(weight, grad, velocity, None, None, SgdOptions(0.1, momentum=0.9, newest_share=1.0))
    torch.testing.assert_close(weight, torch.full((3,), -1.0))


def test_what_cannot_be_stepped_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"nesterov and newest_share.*one of them"):
        check_options(SGD._replace(nesterov=True, newest_share=0.1), NO_PAST, STEADY, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"newest_share must be in \[0, 1\], got 1.5"):
        check_options(ADAM._replace(newest_share=1.5), NO_PAST, STEADY, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="momentum in"):
        check_options(SGD._replace(momentum=1.0, newest_share=0.1), NO_PAST, STEADY, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match="horizon is nan"):
        check_options(SGD, NO_PAST, StepArguments(horizon=float("nan")), 0, torch.device("cpu"))
    weight = torch.zeros(4)
    with pytest.raises(ValueError, match=r"previous update of weights\[0\].*torch.float32"):
        StepPlan("sgd", Arrays([weight], previous=[torch.zeros(4, dtype=F64)]), names=["weights[0]"], backend="cpp")
    states = ([torch.zeros(4)], [torch.zeros(4)])
    with pytest.raises(ValueError, match="moves no weights that have a past"):
        arrays = Arrays([weight], states, counts=[torch.tensor(0.0)], previous=[torch.zeros(4)])
        StepPlan("adam_direction", arrays, names=["weights[0]"], backend="cpp")
    with pytest.raises(ValueError, match="share memory"):
        StepPlan("direction", Arrays([weight], previous=[weight]), names=["weights[0]"], backend="cpp")
