"""The optimizers on a GPU: nobody waits for it, and a captured step replays like a called one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "past": "blend"}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "past": "ema"}),
    ("SGD", {"momentum": 0.9, "past": "stash"}),
    ("SGD", {"momentum": 0.9, "past": lk.Blend(norm="match")}),
    ("AdamW", {"past": lk.Blend(order=3)}),
    ("AdamW", {"past": lk.Blend(materialize=True)}),
]


def parameters() -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(s, device="cuda", requires_grad=True) for s in ((40, 50), (7,), (3, 3, 3))]


def gradients(params: list[Tensor], step: int) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(step)
    return [torch.randn(p.shape, device="cuda", generator=generator) for p in params]


@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_a_captured_step_replays_with_its_clock_learning_rate_and_past(name: str, options: dict[str, Any]) -> None:
    called, captured = parameters(), parameters()
    lr = torch.tensor(0.05, device="cuda")
    plain = getattr(lk, name)(called, lr=0.05, delay=4, **options)
    optimizer = getattr(lk, name)(captured, lr=lr, delay=4, capturable=True, **options)
    pasts = [torch.empty_like(p) for p in captured]

    def step_captured() -> None:
        optimizer.step()
        for param, past in zip(captured, pasts, strict=True):
            optimizer.past_weight(param, out=past)

    for param in captured:
        param.grad = torch.empty_like(param)  # stays where it is; filled anew for every step
    graph = torch.cuda.CUDAGraph()
    for step in range(14):
        rate = 0.05 / (1 + step)
        lr.fill_(rate)
        plain.param_groups[0]["lr"] = rate
        for a, b, grad in zip(called, captured, gradients(called, step), strict=True):
            a.grad = grad
            assert b.grad is not None
            b.grad.copy_(grad)
        plain.step()
        if step < 2:  # outside of the graph first, which makes state and plan
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step_captured()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if step == 2:
                with torch.cuda.graph(graph):
                    step_captured()
            graph.replay()
        for a, b, past in zip(called, captured, pasts, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
            torch.testing.assert_close(plain.past_weight(a), past, rtol=2e-5, atol=2e-5)
    assert int(optimizer.param_groups[0]["updates"]) == 14


def test_a_capture_without_capturable_is_refused() -> None:
    params = parameters()
    optimizer = lk.AdamW(params, delay=2)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
def test_a_step_under_a_scaler_waits_for_nothing(name: str, options: dict[str, Any]) -> None:
    params = parameters()
    optimizer = getattr(lk, name)(params, lr=0.05, delay=3, **options)
    scaler = torch.amp.GradScaler("cuda")

    def step(value: float) -> None:
        scaler.scale(torch.ones((), device="cuda"))
        for param in params:
            assert param.grad is not None
            param.grad.fill_(value)
        scaler.step(optimizer)
        scaler.update()

    for param in params:
        param.grad = torch.empty_like(param)
    for value in (float("inf"), 1.0):
        step(value)
    before = [p.detach().clone() for p in params]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(float("inf"))
        for param in params:
            optimizer.past_weight(param)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, before, params))
    assert int(optimizer.param_groups[0]["updates"]) == 1


def test_a_checkpoint_goes_to_another_device() -> None:
    ours = parameters()
    optimizer = lk.AdamW(ours, lr=0.05, delay=3, capturable=True)
    for step in range(5):
        for param, grad in zip(ours, gradients(ours, step), strict=True):
            param.grad = grad
        optimizer.step()
    there = [p.detach().cpu().requires_grad_() for p in ours]
    other = lk.AdamW(there, lr=0.05, delay=3, capturable=True)
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(ours, there, strict=True):
        torch.testing.assert_close(optimizer.past_weight(a).cpu(), other.past_weight(b), rtol=1e-6, atol=1e-6)
