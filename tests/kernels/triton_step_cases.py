"""The Triton step against the reference: on a GPU, or on the CPU under ``TRITON_INTERPRET=1``, which must be set
before the kernels are defined. That is why ``test_triton.py`` runs this file in a process of its own.

Triton's interpreter truncates where a GPU rounds float32 to bfloat16, so results of 16 bits may be one unit apart.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from layerpipe_kernels.options import NO_PAST, STEADY, Options, PastDesign, StepArguments
from layerpipe_kernels.plan import Arrays, ReferenceRunner
from layerpipe_kernels.triton import TritonRunner
from layerpipe_kernels.triton import runner as triton_runner
from tests.kernels.triton_checks import (
    ADAM,
    BF16,
    CHUNK,
    DEVICE,
    DIRECTION,
    DTYPES,
    F32,
    FEW,
    INTERPRETED,
    RUNNABLE,
    SGD,
    SIZES,
    arrays_of_one_element_are_numbers,  # noqa: F401 - a fixture
    check,
    claims_of_alignment_are_checked,  # noqa: F401 - another
    design_of,
    duplicate,
    gradients,
    group,
)

pytestmark = RUNNABLE


@pytest.fixture(autouse=True)
def _smaller_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_runner, "CHUNK", CHUNK)


@pytest.mark.parametrize("unaligned", ["sgd", "adam"])
@pytest.mark.parametrize(("weight", "grad", "master", "ema", "emas"), DTYPES)
def test_step_agrees_at_every_size_dtype_and_alignment(
    unaligned: str,
    weight: torch.dtype,
    grad: torch.dtype,
    master: bool,
    ema: torch.dtype,
    emas: int,
) -> None:
    i = DTYPES.index((weight, grad, master, ema, emas))
    rule, options = (("sgd", SGD), ("adam", ADAM))[(i + (unaligned == "adam")) % 2]
    offset = int(rule == unaligned)
    arrays = group(rule, SIZES, weight=weight, master=master, ema=ema, emas=emas, offset=offset)
    design = design_of(emas)._replace(turn=0.3 if emas > 1 and i % 2 else 0.0)
    check(rule, arrays, options, design, StepArguments(t=9), grad=grad, offset=offset)


@pytest.mark.parametrize(("rule", "options"), [("sgd", SGD), ("adam", ADAM)], ids=["sgd", "adam"])
def test_step_equals_the_reference_in_float64(rule: str, options: Options) -> None:
    arrays = group(rule, FEW, emas=2)
    grads = gradients(arrays)
    want = Arrays(*([[t.double() for t in x] for x in y] if y and isinstance(y[0], list) else
                    [t.double() for t in y] for y in arrays))  # type: ignore[misc, union-attr, attr-defined]  # fmt: skip
    want = want._replace(states=tuple(want.states))
    TritonRunner(rule, arrays, F32).run(grads, [], options, design_of(2), StepArguments(t=9))
    ReferenceRunner(rule, want).run([g.double() for g in grads], [], options, design_of(2), StepArguments(t=9))
    for name in ("weights", "emas", "pasts"):
        for a, b in zip(getattr(arrays, name), getattr(want, name), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("emas", [0, 1, 3])
def test_odd_stride_of_emas_is_not_taken_for_aligned(emas: int) -> None:
    check("sgd", group("sgd", [CHUNK + 1, 1030], emas=emas, ema=BF16), SGD, design_of(emas))


@pytest.mark.parametrize("emas", [1, 2])
@pytest.mark.parametrize("kind", ["weights", "states", "emas", "pasts", "masters", "gradients"])
def test_one_unaligned_array_is_enough(kind: str, emas: int) -> None:
    aligned, offset = (group("sgd", [9, 1030], weight=BF16, master=True, emas=emas, offset=o) for o in (0, 1))
    arrays = aligned if kind == "gradients" else aligned._replace(**{kind: getattr(offset, kind)})
    check("sgd", arrays, SGD, design_of(emas), offset=int(kind == "gradients"))


SGD_OPTIONS: list[dict[str, Any]] = [
    {"momentum": 0.0},
    {"dampening": 0.3},
    {"nesterov": True},
    {"nesterov": True, "weight_decay": 0.0},
    {"maximize": True},
    {"maximize": True, "nesterov": True, "dampening": 1.0},
]


@pytest.mark.parametrize("changes", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize("first", [None, [True, False, True]], ids=["later", "first"])
@pytest.mark.parametrize("counts", [False, True])
def test_sgd_options(changes: dict[str, Any], first: list[bool] | None, counts: bool) -> None:
    options = SGD._replace(**changes)
    arrays = group("sgd", [5, 0, 1030], emas=1, counts=counts, states=int(options.momentum != 0))
    if first:
        for state in arrays.states:
            state[0].fill_(float("nan"))  # holds nothing yet
        if counts:
            arrays.counts[0].zero_()
        elif arrays.states:
            arrays.states[0][2].fill_(float("nan"))
    check("sgd", arrays, options, design_of(1), first=first)


ADAM_OPTIONS: list[dict[str, Any]] = [
    {"decoupled": False},
    {"maximize": True},
    {"beta1": 0.3},
    {"beta1": 0.0, "beta2": 0.0},
    {"beta2": 0.9999, "weight_decay": 0.0},
]


@pytest.mark.parametrize("changes", ADAM_OPTIONS, ids=str)
@pytest.mark.parametrize("states", [2, 3], ids=["adam", "amsgrad"])
def test_adam_options(changes: dict[str, Any], states: int) -> None:
    check("adam", group("adam", FEW, emas=1, states=states), ADAM._replace(**changes), design_of(1), steps=3)


@pytest.mark.parametrize("clocked", [False, True])
@pytest.mark.parametrize(("emas", "of_gradient"), [(0, False), (1, True), (3, False)])
def test_the_design_is_evaluated_at_every_time(emas: int, clocked: bool, of_gradient: bool) -> None:
    design = design_of(emas)._replace(fill_ratio=0.9, ema_of_gradient=of_gradient)
    for t in (0, 1, 4, 5, 11):
        clock = torch.tensor(t, device=DEVICE) if clocked else None
        check("sgd", group("sgd", FEW, emas=emas), SGD, design, StepArguments(t=t, clock=clock))


def test_a_filled_delay_without_update_tap_has_none() -> None:
    check("sgd", group("sgd", FEW), SGD, design_of(0)._replace(update_tap=0.0), StepArguments(t=3))


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_overflow_changes_nothing(rule: str) -> None:
    arrays = group(rule, FEW, emas=2, counts=True, previous=True)
    before = duplicate(arrays)
    clock, horizon_at = torch.tensor(5, device=DEVICE), torch.tensor(5.0, device=DEVICE)
    runner = TritonRunner(rule, arrays, F32)
    found_inf = torch.tensor(1.0, device=DEVICE)
    args = StepArguments(clock=clock, found_inf=found_inf, horizon=3.0, horizon_at=horizon_at)
    grads = [g.fill_(float("inf")) for g in gradients(arrays)]
    runner.run(grads, [], SGD if rule == "sgd" else ADAM, design_of(2), args)
    for a, b in zip(arrays.written(), before.written(), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert (int(clock), float(horizon_at)) == (5, 5.0)
    assert int(runner._done) == 0


@pytest.mark.parametrize(("rule", "options"), [("sgd", SGD), ("adam", ADAM)], ids=["sgd", "adam"])
@pytest.mark.parametrize("maximize", [False, True])
def test_scalars_on_the_device(rule: str, options: Options, maximize: bool) -> None:
    args = StepArguments(
        clock=torch.tensor(2, device=DEVICE),
        grad_scale=torch.tensor(1024.0, device=DEVICE),
        found_inf=torch.zeros((), device=DEVICE),
    )
    options = options._replace(lr=torch.tensor(0.05, device=DEVICE), maximize=maximize)
    check(rule, group(rule, FEW, emas=2), options, design_of(2), args, steps=4)


def test_every_count_is_advanced_once_whatever_the_sizes() -> None:
    for sizes in ([0], [0, 0], [1] * 130 + [0]):
        arrays = check(
            "sgd", group("sgd", sizes, counts=True), SGD, args=StepArguments(clock=torch.tensor(0, device=DEVICE))
        )
        assert [float(c) for c in arrays.counts] == [3 * i % 5 + 1.0 for i in range(len(sizes))]


def test_gradients_are_uploaded_only_when_they_have_moved() -> None:
    arrays = group("sgd", FEW)
    runner = TritonRunner("sgd", arrays, F32)
    one, other = gradients(arrays), gradients(arrays)
    uploads = []
    for grads in (one, one, other):
        before = [w.clone() for w in arrays.weights]
        for velocity in arrays.states[0]:
            velocity.zero_()
        runner.run(grads, [], SGD._replace(weight_decay=0.0), NO_PAST, STEADY)
        uploads.append(runner._uploaded)
        for w, old, g in zip(arrays.weights, before, grads, strict=True):
            torch.testing.assert_close(w, old - 0.1 * g)
    assert uploads[0] is uploads[1]
    assert uploads[1] is not uploads[2]


def test_a_captured_step_keeps_its_own_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told, without a graph, that the stream is being captured."""
    if not INTERPRETED:
        pytest.skip("on a GPU a real capture shows it")
    monkeypatch.setattr(triton_runner, "GRAPHS", 2)
    arrays = group("sgd", FEW)
    runner = TritonRunner("sgd", arrays, F32)
    eager, captured = gradients(arrays), gradients(arrays, offset=1)

    def step(grads: list[Tensor], capturing: bool) -> dict[str, Any]:
        monkeypatch.setattr(triton_runner._device, "capturing", lambda device: capturing)
        return runner.arguments(grads, [], SGD, NO_PAST, STEADY)

    before = step(eager, False)
    graph, other = step(captured, True), step(captured, True)
    with pytest.raises(RuntimeError, match="more than 2 CUDA graphs of one"):
        step(captured, True)
    after = step(eager, False)
    assert before["grads"] is after["grads"]
    assert before["grads"].tolist()[0] == [g.data_ptr() for g in eager]
    assert graph["grads"].tolist()[0] == [g.data_ptr() for g in captured]
    assert (before["ALIGNED"], graph["ALIGNED"], after["ALIGNED"]) == (True, False, True)
    tables = [graph, other, step(captured, True), step(captured, True)]
    assert len({arguments["grads"].data_ptr() for arguments in tables}) == 4


@pytest.mark.parametrize(("weight", "grad", "master", "ema", "emas"), DTYPES)
@pytest.mark.parametrize(("rule", "options"), [
    ("sgd", SGD._replace(newest_share=0.4)), ("adam", ADAM._replace(newest_share=0.4)), ("direction", DIRECTION),
], ids=["sgd", "adam", "direction"])  # fmt: skip
def test_predicted_weights_agree_in_every_dtype(
    rule: str, options: Options, weight: torch.dtype, grad: torch.dtype, master: bool, ema: torch.dtype, emas: int
) -> None:
    arrays = group(rule, FEW, weight=weight, master=master, ema=ema, emas=emas, previous=True, offset=emas % 2)
    args = StepArguments(t=9, horizon=3.0, horizon_before=5.0)
    check(rule, arrays, options, design_of(emas), args, grad=grad, offset=emas % 2)


@pytest.mark.parametrize("rule", ["sgd", "adam", "direction"])
def test_the_horizon_is_kept_on_the_device_and_has_a_tap_while_the_delay_fills(rule: str) -> None:
    options = {"sgd": SGD, "adam": ADAM, "direction": DIRECTION}[rule]
    at = torch.tensor(5.0, device=DEVICE)
    args = StepArguments(clock=torch.tensor(1, device=DEVICE), horizon=3.0, horizon_before=77.0, horizon_at=at)
    arrays = group(rule, FEW, emas=2, previous=True)
    check(rule, arrays, options, design_of(2)._replace(fill_tap=3.0), args, steps=5)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("rule", ["sgd", "adam", "adam_direction"])
def test_the_newest_gradient_has_its_share(rule: str, share: float) -> None:
    options = (SGD if rule == "sgd" else ADAM)._replace(newest_share=share, maximize=share == 1.0)
    past = rule != "adam_direction"
    check(rule, group(rule, [*FEW, CHUNK + 1], past=past), options, steps=3)


@pytest.mark.parametrize("offset", [0, 1])
def test_directions_agree_at_every_size(offset: int) -> None:
    check("adam_direction", group("adam_direction", SIZES, past=False, offset=offset), ADAM, offset=offset)
    check("direction", group("direction", SIZES, emas=1, offset=offset), DIRECTION, design_of(1), offset=offset)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    decays=st.lists(st.floats(0, 0.999), max_size=3),
    tap=st.floats(-5, 5),
    t=st.integers(0, 6),
    seed=st.integers(0, 2**32 - 1),
    offset=st.integers(0, 1),
    lr=st.floats(0, 1),
    weight_decay=st.floats(0, 1),
    maximize=st.booleans(),
    rule=st.sampled_from(["sgd", "adam"]),
)
def test_any_hyperparameters(
    sizes: list[int], decays: list[float], tap: float, t: int, seed: int, offset: int, rule: str, **hyper: Any
) -> None:
    torch.manual_seed(seed)
    design = PastDesign(3, tuple(decays), (tap,) * len(decays), tap, seed=seed)
    arrays = group(rule, sizes, emas=len(decays), offset=offset)
    options = (SGD if rule == "sgd" else ADAM)._replace(**hyper)
    check(rule, arrays, options, design, StepArguments(t=t), offset=offset)


def test_float64_is_refused_by_name() -> None:
    weights = [torch.zeros(3, dtype=torch.float64, device=DEVICE)]
    with pytest.raises(TypeError, match=r"weights .* not torch\.float64"):
        TritonRunner("sgd", Arrays(weights), torch.float64)
