"""The past of predicted weights, and predictions around other optimizers and beside the kernels' fast ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from tests.backends import needs_cpp
from tests.kernels.quadratics import give_gradients, gradient, parameters


@pytest.mark.parametrize("past", ["blend", "blend:materialize=true", "ema", "ema:materialize=true", "stash"])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("make", [lk.SGD, lk.AdamW])
def test_past_weights_of_a_filling_delay_are_the_predicted_ones(past: str, told: bool, make: Any) -> None:
    params = parameters()
    options = {"momentum": 0.9} if make is lk.SGD else {}
    optimizer = make(params, lr=0.05, delay=6, past=past, weight_prediction=1.0, **options)
    first = [p.detach().clone() for p in params]
    for t in range(6):
        give_gradients(params, t)
        if told:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
        optimizer.step()
        for param, want in zip(params, first, strict=True):
            torch.testing.assert_close(optimizer.past_weight(param), want, rtol=1e-6, atol=1e-6)
    optimizer.restart_history()
    again = [p.detach().clone() for p in params]
    assert all(torch.equal(optimizer.current_weight(p), p) for p in params)
    give_gradients(params, 7)
    optimizer.step()
    for param, want in zip(params, again, strict=True):
        torch.testing.assert_close(optimizer.past_weight(param), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("past", ["blend", "ema"])
def test_while_the_delay_fills_steady_updates_are_exact_at_every_age(past: str) -> None:
    param = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer, versions = lk.SGD([param], lr=0.1, delay=5, past=past, weight_prediction=1.0), [torch.zeros(3).double()]
    for t in range(1, 6):
        param.grad = torch.ones_like(param)
        optimizer.step()
        versions.append(param.detach().clone())
        for n in range(t + 1):
            torch.testing.assert_close(optimizer.past_weight(param, n), versions[t - n])


@pytest.mark.parametrize("make", [lk.SGD, lk.AdamW])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("told", [False, True])
def test_past_weights_of_steady_updates_are_exact(make: Any, order: int, told: bool) -> None:
    """A constant gradient: all updates are alike, up to Adam's eps, and so is what is ahead of them."""
    param = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    options = {"momentum": 0.5} if make is lk.SGD else {"weight_decay": 0.0}
    optimizer = make(
        [param], lr=0.1, delay=5, past=lk.Blend(order=order), weight_prediction=1.0, spike_compensation=1.0, **options
    )
    versions = []
    for _ in range(200):
        param.grad = torch.ones_like(param)
        if told:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)
        optimizer.step()
        versions.append(param.detach().clone())
    for n in (1, 3, 5):
        torch.testing.assert_close(optimizer.past_weight(param, n), versions[-1 - n], rtol=1e-5, atol=1e-5)


def test_around_torchs_sgd_the_knobs_are_those_of_our_own() -> None:
    pair = [parameters(), parameters()]
    options = {"delay": 3, "past": "stash", "spike_compensation": 1.0, "weight_prediction": 1.0}
    ours = lk.SGD(pair[0], 0.05, 0.9, **options)
    wrapped = lk.PastWeights(torch.optim.SGD(pair[1], 0.05, 0.9), **options)
    for t in range(8):
        for params, optimizer in zip(pair, (ours, wrapped), strict=True):
            optimizer.set_staleness(2 if t in (3, 4) else None)
            give_gradients(params, t)
            optimizer.step()
        for a, b in zip(*pair, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(ours.current_weight(a), wrapped.current_weight(b), rtol=1e-9, atol=1e-9)


def test_a_wrapped_optimizer_steps_on_the_current_weights_and_its_closure_sees_the_predicted() -> None:
    params = parameters()
    inner, seen = torch.optim.SGD(params, lr=0.1, momentum=0.9), []
    inner.register_step_pre_hook(lambda *_: seen.append(params[0].detach().clone()))
    optimizer = lk.PastWeights(inner, delay=3, weight_prediction=1.0)
    for t in range(3):
        predicted = params[0].detach().clone()
        current = optimizer.current_weight(params[0])

        def closure(t: int = t, predicted: Tensor = predicted) -> float:
            assert torch.equal(params[0], predicted)
            give_gradients(params, t)
            return 3.5

        assert optimizer.step(closure) == 3.5
        torch.testing.assert_close(seen[-1], current)
    assert not torch.equal(seen[-1], predicted)


@needs_cpp
@pytest.mark.parametrize("make", [lk.SGD, lk.AdamW])
def test_steps_by_routine_predict_as_the_reference_does(make: Any) -> None:
    options = {"momentum": 0.9} if make is lk.SGD else {}
    pairs = []
    for backend in ("cpp", "reference"):
        params = parameters()
        knobs = {"spike_compensation": 0.5, "weight_prediction": 1.0}
        pairs.append((params, make(params, lr=0.05, delay=3, backend=backend, **knobs, **options)))
    (ours, optimizer), (theirs, reference) = pairs
    for t in range(12):
        for params, one in pairs:
            one.set_staleness(1.5 if t in (6, 7, 8) else None)
            give_gradients(params, t)
            one.step()
        # The step after a change of the horizon begins with the one before.
        assert (0 in optimizer._routines) == (t not in (0, 6, 9))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
            torch.testing.assert_close(optimizer.past_view(a), reference.past_view(b), rtol=1e-9, atol=1e-10)


def test_matrices_that_are_preconditioned_are_predicted_too() -> None:
    """Theirs is the kernels' rule for given directions."""
    for make in (lk.SOAP, lk.Muon):
        params = parameters(torch.float32)
        groups = [{"params": params, "weight_prediction": 1.0}]
        optimizer = make(groups, lr=0.02, delay=3)
        plain = make(twins := parameters(torch.float32), lr=0.02, delay=3)
        for t in range(5):
            for tensors, one in ((params, optimizer), (twins, plain)):
                for tensor in tensors:
                    tensor.grad = gradient(torch.ones_like(tensor), t, 1.0)  # the same for both
                one.step()
            for a, b in zip(params, twins, strict=True):
                torch.testing.assert_close(optimizer.current_weight(a), b.detach(), rtol=1e-5, atol=1e-5)
                assert not torch.equal(a, b)
        before = [p.detach().clone() for p in params]
        optimizer.eval()
        optimizer.train()
        assert all(map(torch.equal, params, before))
