"""The step on a GPU: the CPU tests' cases, and what only a device can show."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import layerpipe_kernels as lk
from layerpipe_kernels import ops
from layerpipe_kernels.checks import check_options
from layerpipe_kernels.options import STEADY, SgdOptions, StepArguments
from layerpipe_kernels.plan import Arrays
from tests.gpu.plans import eager_and_replayed, on_gpu, plan_of
from tests.kernels import steps
from tests.kernels.steps import BF16, F16, F32, Case

CHUNK = 1 << 13
SIZES = (*steps.SIZES, CHUNK - 1, CHUNK, CHUNK + 1, 300_000)
BOTH = pytest.mark.parametrize("rule", ["sgd", "adam"])


@contextmanager
def no_host_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gpu(case: Case) -> Case:
    return dataclasses.replace(case, device="cuda")


@BOTH
@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_step_equals_fp64_at_every_size_and_alignment(backend: str, rule: str, offset: int, dtype: torch.dtype) -> None:
    steps.check(Case(rule, dtype, offset=offset, sizes=SIZES, device="cuda"), backend, ulps=16)


@pytest.mark.parametrize("case", steps.STRUCTURES, ids=str)
def test_every_combination_of_arrays(backend: str, case: Case) -> None:
    steps.check(gpu(case), backend, ulps=16)
    if case.rule == "sgd" and case.states:
        steps.check(gpu(case), backend, ulps=16, first=True)


@pytest.mark.parametrize("case", steps.COVERING, ids=str)
def test_every_combination_of_dtypes(backend: str, case: Case) -> None:
    steps.check(gpu(case), backend, ulps=16)


@BOTH
@pytest.mark.parametrize("t", [1, 6, 7, 40])
@pytest.mark.parametrize("emas", [0, 1, 3])
def test_averages_warm_up_as_designed(backend: str, rule: str, t: int, emas: int) -> None:
    case = Case(rule, emas=emas, device="cuda")
    steps.check(case, backend, ulps=16, design=case.design(delay=6, fill_ratio=0.9), args=StepArguments(t=t))


@pytest.mark.parametrize("ema", [None, BF16])
def test_sgd_equals_the_cpus_bit_for_bit(ema: torch.dtype | None) -> None:
    """The same source, with its fused multiply-adds written out, and the same random bits."""
    if not {"cuda", "cpp"} <= set(lk.available_backends()):
        pytest.skip("needs both compiled backends")
    case = Case(ema=ema, sizes=SIZES)
    arrays, grads = case.make()
    args = StepArguments(t=9)
    want = steps.run("sgd", arrays, grads, "cpp", case.options(), case.design(), args)
    moved = Arrays(*(on_gpu(x) for x in arrays))
    got = steps.run("sgd", moved, [g.cuda() for g in grads], "cuda", case.options(), case.design(), args)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(want.written(), got.written(), strict=True))


@BOTH
def test_device_tensors_are_read_without_host_synchronisation(backend: str, rule: str) -> None:
    case = Case(rule, emas=1, counts=True, device="cuda")
    arrays, grads = case.make()
    options = case.options()._replace(lr=torch.tensor(0.25, device="cuda"))
    design = case.design(delay=9)
    clock, scale = torch.tensor(4, device="cuda"), torch.tensor(1024.0, device="cuda")
    args = StepArguments(clock=clock, grad_scale=scale, found_inf=torch.zeros((), device="cuda"))
    copies = steps.cloned(arrays)
    scaled = [g * 1024 for g in grads]
    plan = plan_of(case, copies, scaled, backend)
    check_options(options, design, args, plan.ema_count, plan.device)
    with no_host_synchronisation():
        plan.step(scaled, options, design, args)
    want = steps.run(rule, arrays, grads, backend, options._replace(lr=0.25), design, StepArguments(t=5))
    for a, b in zip(copies.written(), want.written(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert int(clock) == 5


@BOTH
def test_an_overflow_changes_no_value(backend: str, rule: str) -> None:
    case = Case(rule, counts=True, device="cuda")
    arrays, grads = case.make()
    grads = [g.fill_(float("inf")) for g in grads]
    clock, one = torch.tensor(4, device="cuda"), torch.ones((), device="cuda")
    args = StepArguments(clock=clock, grad_scale=one * 2, found_inf=one)
    got = steps.run(rule, arrays, grads, backend, case.options(), case.design(), args)
    for before, after in zip(arrays.written(), got.written(), strict=True):
        assert torch.equal(before.nan_to_num(9.0), after.nan_to_num(9.0))
    assert int(clock) == 4


@BOTH
def test_one_launch_per_step(backend: str, rule: str) -> None:
    case = Case(rule, sizes=tuple([1000] * 300), counts=True, device="cuda")
    arrays, grads = case.make()
    plan = plan_of(case, arrays, grads, backend)
    args = StepArguments(clock=torch.tensor(0, device="cuda"))
    plan.step(grads, case.options(), case.design(), args)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        plan.step(grads, case.options(), case.design(), args)
        torch.cuda.synchronize()
    # Beside kernels the profiler lists copies, synchronisations and its own buffers; a kernel says that it is one.
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and "kernel" in e.name]
    assert len(kernels) == 1, [e.name for e in kernels]


@BOTH
@pytest.mark.parametrize("tensors", [399, 400, 401, 1000])
def test_a_group_of_any_number_of_tensors(backend: str, rule: str, tensors: int) -> None:
    case = Case(rule, sizes=tuple(i % 50 for i in range(tensors)), counts=True, device="cuda")
    arrays, grads = case.make()
    clock = torch.tensor(0, device="cuda")
    copies = steps.cloned(arrays)
    plan_of(case, copies, grads, backend).step(grads, case.options(), case.design(), StepArguments(clock=clock))
    want = steps.oracle(rule, arrays, grads, case.options(), case.design(), StepArguments(t=1))
    for a, b in zip(copies.weights, want.weights, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert [float(c) for c in copies.counts] == [float(c) for c in want.counts]
    assert int(clock) == 1


@BOTH
def test_a_captured_graph_replays_the_steps(backend: str, rule: str) -> None:
    _, eager, captured, clocks = eager_and_replayed(Case(rule, emas=2, counts=True, device="cuda"), backend, 5)
    assert all(map(torch.equal, eager.written(), captured.written()))
    assert int(clocks[0]) == int(clocks[1]) == 5


def test_launches_follow_the_current_stream(backend: str) -> None:
    case = Case(sizes=(5_000_000,), device="cuda")
    arrays, grads = case.make()
    plan = plan_of(case, arrays, grads, backend)
    want = steps.oracle("sgd", arrays, [grads[0].double() * 0 + 1], case.options(), case.design())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        grads[0].fill_(1.0)  # a step on another stream would come before this
        plan.step(grads, case.options(), case.design(), STEADY)
    side.synchronize()
    torch.testing.assert_close(arrays.weights[0].double(), want.weights[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("size", [0, 1, 8, 17, 100_003])
def test_reconstruct_and_averages(backend: str, dtype: torch.dtype, size: int) -> None:
    master, velocity = torch.randn(size, device="cuda"), torch.randn(size, device="cuda")
    ema = torch.randn(size, device="cuda").bfloat16()
    out = torch.full((size,), float("nan"), dtype=dtype, device="cuda")
    want = master + 0.5 * velocity - 2.0 * ema.float()
    for taps in ([0.5, -2.0], torch.tensor([0.5, -2.0], device="cuda")):
        ops.reconstruct(master, [velocity, ema], taps, out=out, backend=backend)
        torch.testing.assert_close(out, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    average, update = torch.randn(size, device="cuda"), torch.randn(size, device="cuda").to(dtype)
    expected = 0.75 * average.double() + 0.25 * update.double()
    ops.ema_update_([average], update, [0.75], backend=backend)
    torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_optimizers_must_agree_with_torch(backend: str, name: str) -> None:
    options = {"momentum": 0.9} if name == "SGD" else {}
    ours = [torch.randn(s, device="cuda", requires_grad=True) for s in ((1,), (3, 5), (100, 101))]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizer = getattr(lk, name)(ours, lr=0.01, delay=4, **options, backend=backend)
    expected = getattr(torch.optim, name)(theirs, lr=0.01, foreach=False, **options)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        expected.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    assert torch.isfinite(optimizer.past_weight(ours[-1])).all()


def test_steps_are_proper_operators(backend: str) -> None:
    case = Case(sizes=(4, 9), device="cuda")
    arrays, grads = case.make()
    design = case.design()
    middle = (0.1, None, *SgdOptions(0.1)[1:], *design, *STEADY, backend, False)
    lists = (arrays.weights, grads, *arrays.states, arrays.emas, arrays.pasts, arrays.masters, arrays.counts)
    torch.library.opcheck(torch.ops.layerpipe.sgd_step_.default, (*lists, *middle))
