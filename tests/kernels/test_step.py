"""The fused step: every backend of this machine's CPU against fp64, and the optimizers against torch's."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import layerpipe_kernels as lk
from layerpipe_kernels.options import AdamOptions, PastDesign, SgdOptions, StepArguments
from tests.backends import BACKENDS, needs_cpp
from tests.kernels import steps
from tests.kernels.steps import BF16, F16, F32, F64, Case

CHUNK = 1 << 15


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
def test_step_equals_fp64_at_every_size_and_alignment(backend: str, rule: str, offset: int, dtype: torch.dtype) -> None:
    sizes = (*steps.SIZES, CHUNK - 1, CHUNK, CHUNK + 1, 300_000)
    steps.check(Case(rule, dtype, offset=offset, sizes=sizes), backend)


@pytest.mark.invariant(4)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", steps.STRUCTURES, ids=str)
def test_every_combination_of_arrays(backend: str, case: Case) -> None:
    steps.check(case, backend)
    if case.rule == "sgd" and case.states:
        steps.check(case, backend, first=True)


@pytest.mark.invariant(4)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", steps.COVERING, ids=str)
def test_every_combination_of_dtypes(backend: str, case: Case) -> None:
    steps.check(case, backend)


@needs_cpp
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_chunks_and_threads_change_no_bit(rule: str) -> None:
    case = Case(rule, ema=BF16, sizes=(200_000, 3, 0, 70_000))
    arrays, grads = case.make()
    results = []
    for threads, chunk in ((1, 0), (3, 0), (1, 64), (2, 1 << 20)):
        torch.set_num_threads(threads)
        results.append(steps.run(rule, arrays, grads, "cpp", case.options(), case.design(), chunk=chunk))
    for other in results[1:]:
        assert all(map(torch.equal, results[0].written(), other.written()))


@needs_cpp
def test_bfloat16_averages_are_rounded_alike_by_cpp_and_reference() -> None:
    """The same random bits: results differ only where float32 arithmetic does, before it is rounded."""
    case = Case(ema=BF16, emas=3, sizes=(0, 5, 40_000))
    arrays, grads = case.make()
    ours, theirs = (
        steps.run("sgd", arrays, grads, b, case.options(), case.design(seed=3), StepArguments(t=9))
        for b in ("cpp", "reference")
    )
    different = sum((a != b).sum() for a, b in zip(ours.emas, theirs.emas, strict=True))
    assert different < 0.001 * 3 * 40_005


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_is_unbiased_reproducible_and_new_in_every_update(backend: str) -> None:
    ema = torch.zeros(1, 100_000, dtype=BF16)
    update = 1.0 + 2.0**-10  # an eighth of the way to the next bfloat16

    def averages(t: int, seed: int) -> torch.Tensor:
        arrays = steps.Arrays([torch.zeros(100_000)], (), [ema])
        grads = [torch.full((100_000,), update)]
        design = PastDesign(0, (0.0,), (0.0,), seed=seed)
        return steps.run("sgd", arrays, grads, backend, SgdOptions(lr=1.0), design, StepArguments(t)).emas[0].float()

    first = averages(1, 0)
    assert set(first.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    assert abs(float(first.mean()) - update) < 5 * 2.0**-7 * (0.125 * 0.875 / 100_000) ** 0.5
    assert torch.equal(first, averages(1, 0))
    for other in (averages(2, 0), averages(1, 1)):
        assert 0.15 < float((first != other).float().mean()) < 0.29  # independent: 2 * 1/8 * 7/8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-40])
def test_stochastic_rounding_keeps_what_is_special(backend: str, special: float) -> None:
    ema, update = torch.zeros(64, dtype=BF16), torch.full((64,), special)
    lk.ops.ema_update_([ema], update, [0.0], seed=1, backend=backend)
    nearest = update.to(BF16)
    if special != special:
        assert ema.isnan().all()
    else:
        assert ((ema.float() - nearest.float()).nan_to_num(0).abs() <= nearest.float().abs() * 2**-7 + 1e-40).all()
        assert torch.equal(ema.signbit(), update.signbit())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("t", [1, 2, 5, 6, 7, 40])
@pytest.mark.parametrize("emas", [0, 1, 3])
def test_averages_warm_up_as_designed(backend: str, rule: str, t: int, emas: int) -> None:
    case = Case(rule, emas=emas)
    steps.check(case, backend, design=case.design(delay=6, fill_ratio=0.9), args=StepArguments(t=t))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("t", [0, 1, 5, 6, 7])
@pytest.mark.parametrize(("emas", "dtype", "ema"), [(2, F32, None), (3, F64, None), (3, BF16, BF16)])
def test_averages_turn_when_the_delay_has_filled(
    backend: str, rule: str, t: int, emas: int, dtype: torch.dtype, ema: torch.dtype | None
) -> None:
    case = Case(rule, dtype, emas=emas, ema=ema)
    steps.check(case, backend, design=case.design(delay=5, turn=0.4), args=StepArguments(t=t))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_average_that_does_not_turn_does_not_see_the_other(backend: str) -> None:
    arrays = steps.Arrays([torch.zeros(9)], (), [torch.stack([torch.ones(9), torch.full((9,), torch.inf)])])
    design = PastDesign(0, (0.5, 0.5), (0.0, 0.0))
    got = steps.run("sgd", arrays, [torch.zeros(9)], backend, SgdOptions(lr=1.0), design)
    assert torch.equal(got.emas[0][0], torch.full((9,), 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_tensors_may_hold_the_learning_rate_the_clock_and_the_scale(backend: str, rule: str) -> None:
    case = Case(rule, emas=1)
    arrays, grads = case.make()
    clock, scale = torch.tensor(4), torch.tensor(1024.0)
    told = StepArguments(clock=clock, grad_scale=scale, found_inf=torch.tensor(0.0))
    options = case.options()._replace(lr=torch.tensor(0.25))
    scaled = [g * 1024 for g in grads]
    got = steps.run(rule, arrays, scaled, backend, options, case.design(delay=9), told)
    plain = case.options()._replace(lr=0.25)
    want = steps.run(rule, arrays, grads, backend, plain, case.design(delay=9), StepArguments(t=5))
    for a, b in zip(got.written(), want.written(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert int(clock) == 5


@pytest.mark.invariant(6)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [Case(counts=True), Case("adam", states=3), Case("adam", BF16, master=True)], ids=str)
def test_an_overflow_changes_no_value(backend: str, case: Case) -> None:
    arrays, grads = case.make()
    grads = [g.fill_(float("inf")) for g in grads]
    clock = torch.tensor(4)
    args = StepArguments(clock=clock, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(1.0))
    got = steps.run(case.rule, arrays, grads, backend, case.options(), case.design(), args)
    for before, after in zip(arrays.written(), got.written(), strict=True):
        assert torch.equal(before.nan_to_num(9.0), after.nan_to_num(9.0))
    assert int(clock) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_count_of_zero_says_that_the_momentum_buffer_is_empty(backend: str) -> None:
    case = Case(counts=True, emas=0, past=False, sizes=(5, 10))  # counts 0 and 0
    arrays, grads = case.make()
    options = SgdOptions(lr=0.0, momentum=0.5, dampening=0.9)
    got = steps.run("sgd", arrays, grads, backend, options, case.design())
    assert torch.equal(got.states[0][0], grads[0])
    again = steps.run("sgd", got, grads, backend, options, case.design())
    torch.testing.assert_close(again.states[0][0], grads[0] * (0.5 + (1 - 0.9)))


HYPER = {
    "sizes": st.lists(st.integers(0, 200), min_size=1, max_size=4).map(tuple),
    "emas": st.integers(0, 3),
    "offset": st.integers(0, 3),
    "past": st.booleans(),
    "dtypes": st.sampled_from([*steps.DTYPES, (F64, None, False)]),
    "half_ema": st.booleans(),
    "decays": st.tuples(*[st.floats(0, 0.999)] * 3),
    "tap": st.floats(-20, 20, width=32),  # what float32 takes for 0 is none
    "delay": st.integers(0, 20),
    "t": st.integers(0, 40),
    "seed": st.integers(0, 2**31),
    "turn": st.floats(-0.9, 0.9),
    "lr": st.floats(0, 2),
    "weight_decay": st.floats(0, 1),
    "maximize": st.booleans(),
}


def drawn(rule: str, states: int, draw: dict[str, Any]) -> tuple[Case, PastDesign, StepArguments]:
    torch.manual_seed(draw["seed"])
    dtype, grad, master = draw["dtypes"]
    ema = BF16 if draw["half_ema"] and dtype != F64 else None
    case = Case(
        rule, dtype, grad, ema, draw["emas"], draw["past"], master, states, False, draw["offset"], draw["sizes"]
    )
    taps = (draw["tap"],) * case.emas
    decays = draw["decays"][: case.emas]
    turn = draw["turn"] if case.emas > 1 and decays[0] * decays[1] + draw["turn"] ** 2 <= 1 else 0.0
    design = PastDesign(draw["delay"], decays, taps, draw["tap"], 0.9, seed=draw["seed"], turn=turn)
    return case, design, StepArguments(t=draw["t"])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(draw=st.fixed_dictionaries(HYPER), momentum=st.floats(0.01, 0.999), dampening=st.floats(0, 1),
       nesterov=st.booleans(), first=st.booleans(), states=st.integers(0, 1))  # fmt: skip
def test_sgd_with_any_hyperparameters(
    backend: str, draw: dict[str, Any], momentum: float, dampening: float, nesterov: bool, first: bool, states: int
) -> None:
    case, design, args = drawn("sgd", states, draw)
    options = SgdOptions(draw["lr"], momentum, dampening, draw["weight_decay"], nesterov, draw["maximize"])
    steps.check(case, backend, ulps=8, options=options, design=design, args=args, first=first)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(draw=st.fixed_dictionaries(HYPER), beta1=st.floats(0, 0.99), beta2=st.floats(0.5, 0.9999),
       eps=st.floats(1e-8, 1e-2), decoupled=st.booleans(), states=st.integers(2, 3))  # fmt: skip
def test_adam_with_any_hyperparameters(
    backend: str, draw: dict[str, Any], beta1: float, beta2: float, eps: float, decoupled: bool, states: int
) -> None:
    case, design, args = drawn("adam", states, draw)
    options = AdamOptions(draw["lr"], beta1, beta2, eps, draw["weight_decay"], decoupled, draw["maximize"])
    steps.check(case, backend, ulps=16, options=options, design=design, args=args)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 5e-4},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    {"momentum": 0.8, "dampening": 0.3},
    {"momentum": 0.9, "maximize": True, "weight_decay": 0.1},
    {"weight_decay": 0.1, "maximize": True},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("past", [{"delay": 0}, {"delay": 4, "past": "ema"}, {"delay": 4, "past": "stash"}], ids=str)
def test_sgd_must_agree_with_torch_bit_for_bit(backend: str, options: dict[str, Any], past: dict[str, Any]) -> None:
    ours = [torch.randn(s, requires_grad=True) for s in ((1,), (3, 5), (17,), (100, 101))]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizer = lk.SGD(ours, lr=0.1, **options, **past, backend=backend)
    expected = torch.optim.SGD(theirs, lr=0.1, foreach=False, **options)
    for _, (a, b) in itertools.product(range(5), zip(ours, theirs, strict=True)):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
        if a is ours[-1]:
            optimizer.step()
            expected.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


ADAM_OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1},
    {"amsgrad": True, "weight_decay": 0.01},
    {"maximize": True, "betas": (0.3, 0.5), "eps": 1e-3},
    {"betas": (0.0, 0.99)},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("options", ADAM_OPTIONS, ids=str)
@pytest.mark.parametrize("past", [{"delay": 0}, {"delay": 4, "past": lk.Blend(materialize=True)}], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_adam_must_agree_with_torch(
    backend: str, name: str, options: dict[str, Any], past: dict[str, Any], dtype: torch.dtype
) -> None:
    ours = [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((1,), (3, 5), (100, 101))]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizer = getattr(lk, name)(ours, lr=0.01, **options, **past, backend=backend)
    expected = getattr(torch.optim, name)(theirs, lr=0.01, foreach=False, **options)
    for step in range(20):
        for a, b in zip(ours, theirs, strict=True):
            late = a is ours[0] and step < 5  # a parameter whose gradient comes late counts its own steps
            a.grad = None if late else torch.randn_like(a)
            b.grad = None if late else a.grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        expected.step()
    eps = torch.finfo(dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=20 * 0.01 * 8 * eps)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_weights_keep_their_state_in_float32(dtype: torch.dtype, name: str, backend: str) -> None:
    param = torch.randn(100, dtype=dtype, requires_grad=True)
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(lk, name)([param], lr=0.1, delay=3, past="ema", master_weights=True, **options, backend=backend)
    for _ in range(2):
        param.grad = torch.randn_like(param)
        optimizer.step()
    state = optimizer.state[param]
    for key in ("momentum_buffer", "ema", "master") if name == "SGD" else ("exp_avg", "exp_avg_sq", "ema", "master"):
        assert state[key].dtype == torch.float32
    assert torch.equal(state["master"].to(dtype), param)
    assert optimizer.past_weight(param).dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_delayed_backward_without_hooks_fails_instead_of_being_wrong(backend: str) -> None:
    param = torch.randn(4, 4, requires_grad=True)
    loss = (torch.randn(2, 4, requires_grad=True) @ param).sum()
    param.grad = torch.ones_like(param)
    lk.SGD([param], lr=0.1, backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_cases_are_described_by_what_they_change() -> None:
    assert "emas=3" in str(dataclasses.replace(Case(), emas=3))
    assert str(Case(grad=F32)) == "grad=torch.float32"


def test_a_single_number_is_averaged_in_bfloat16_by_the_reference() -> None:
    """Beside Adam's step count, a tensor without dimensions too, it must not become float64."""
    param = torch.nn.Parameter(torch.tensor(1.0))
    optimizer = lk.AdamW([param], lr=0.1, delay=2, past=lk.Blend(dtype=torch.bfloat16), backend="reference")
    for _ in range(4):
        param.grad = torch.tensor(1.0)
        optimizer.step()
    assert param < 1.0
    assert optimizer.past_weight(param) > param
