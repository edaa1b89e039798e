"""A step among what else a program does to a device: sleeping streams, freed memory, failed captures, overflows."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from layerpipe_kernels.options import StepArguments
from layerpipe_kernels.plan import Arrays
from tests.gpu.plans import eager_and_replayed, on_gpu
from tests.kernels import steps
from tests.kernels.steps import BF16, F16, F32, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LONG = 30_000_000  # cycles, about 20 ms


def parameters(count: int = 3) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(1000 + i, device="cuda", requires_grad=True) for i in range(count)]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("ema", [F32, BF16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_sgd_has_the_cpus_bits_in_every_dtype(
    backend: str, dtype: torch.dtype, ema: torch.dtype, wide: bool, offset: int
) -> None:
    """With masters, float32 gradients, averages that are rounded at random, and unaligned arrays."""
    if "cpp" not in lk.available_backends():
        pytest.skip("needs the compiled CPU backend")
    grad, master = (F32, dtype != F32) if wide else (dtype, False)
    case = Case("sgd", dtype, grad, ema, 2, True, master, counts=True, offset=offset, sizes=(0, 1, 7, 8193, 40_001))
    arrays, grads = case.make()
    args = StepArguments(t=9)
    want = steps.run("sgd", arrays, grads, "cpp", case.options(), case.design(), args)
    there, grads_there = Arrays(*(on_gpu(x) for x in arrays)), [g.cuda() for g in grads]  # type: ignore[arg-type]
    got = steps.run("sgd", there, grads_there, backend, case.options(), case.design(), args)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(want.written(), got.written(), strict=True))


def test_a_thousand_tensors_over_steps_and_replays(backend: str) -> None:
    case = Case("adam", sizes=tuple(1 + i % 90 for i in range(1000)), counts=True, device="cuda")
    arrays, plain, captured, _ = eager_and_replayed(case, backend, 6)
    assert all(map(torch.equal, plain.written(), captured.written()))
    assert [int(count) for count in captured.counts] == [6 + int(count) for count in arrays.counts]


def test_gradients_may_move_while_the_stream_sleeps(backend: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = lk.SGD(ours, lr=0.1, momentum=0.9, delay=2, backend=backend)
    expected = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    for step in range(6):
        torch.cuda._sleep(LONG)  # the host is steps ahead
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.full_like(a, 0.1 * (step + 1))  # the last one's memory is free to be given out again
            b.grad = torch.full_like(b, 0.1 * (step + 1))
        optimizer.step()
        expected.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_an_optimizer_may_go_while_its_kernel_waits(backend: str) -> None:
    ours, theirs = parameters(), parameters()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer = lk.SGD(ours, lr=0.1, momentum=0.9, backend=backend)
        for param in ours:
            param.grad = torch.ones_like(param)
        torch.cuda._sleep(LONG)
        optimizer.step()
        del optimizer
        gc.collect()
        trash = [torch.full((1 << 16,), -1, dtype=torch.int64, device="cuda") for _ in range(20)]  # where its table was
    torch.cuda.current_stream().wait_stream(side)
    for param in theirs:
        param.grad = torch.ones_like(param)
    torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False).step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert trash


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_the_step_behind_an_overflow_is_as_if_there_had_been_none(backend: str, name: str) -> None:
    ours, theirs = parameters(), parameters()
    options = {"momentum": 0.9} if name == "SGD" else {}
    a = getattr(lk, name)(ours, lr=0.01, delay=3, backend=backend, **options)
    b = getattr(lk, name)(theirs, lr=0.01, delay=3, backend=backend, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=10**9, backoff_factor=0.999999)
    for value in (1.0, float("inf"), 2.0, float("nan"), 3.0):
        scaler.scale(torch.ones((), device="cuda"))
        scale = scaler.get_scale()
        for param in ours:
            param.grad = torch.full_like(param, value * scale)
        scaler.step(a)
        scaler.update(1024.0)
        if value == value and value != float("inf"):
            for param in theirs:
                param.grad = torch.full_like(param, value)
            b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a.past_weight(x), b.past_weight(y), rtol=1e-5, atol=1e-5)


def test_a_failed_capture_leaves_a_step_possible() -> None:
    """In a process of its own, which may be left with a broken state of captures."""
    program = """
        import torch, layerpipe_kernels as lk
        param = torch.ones(1000, device="cuda", requires_grad=True)
        optimizer = lk.SGD([param], lr=torch.tensor(0.5, device="cuda"), capturable=True)
        param.grad = torch.ones_like(param)
        optimizer.step()
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                optimizer.step()
                param.sum().item()  # what no capture allows
        except RuntimeError:
            pass
        else:
            raise SystemExit("the capture did not fail")
        torch.cuda.synchronize()
        assert float(param[0]) == 0.5, param[0]
        optimizer.step()
        assert float(param[0]) == 0.0, param[0]
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
