"""Options, parameters and gradients that are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import layerpipe_kernels as lk
from tests.backends import BACKENDS
from tests.kernels.runs import Run

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
        ({"past": "blend:order=4"}, "order must be 1, 2 or 3"),
        ({"past": "momentum", "momentum": 0.0}, "momentum in"),
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


@pytest.mark.parametrize("ema_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "make", [lk.SGD, lk.Lamb, lambda params, **past: lk.PastWeights(torch.optim.SGD(params), **past)]
)
def test_averages_of_float64_weights_are_refused_any_other_dtype_before_a_step(
    make: Any, ema_dtype: torch.dtype
) -> None:
    params = [P(torch.ones(3)), P(torch.ones(3, dtype=torch.float64))]
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[1\] of dtype torch.float64"):
        make(params, delay=4, past=lk.Blend(dtype=ema_dtype))


def test_a_nan_learning_rate_is_refused_before_any_group_is_written() -> None:
    params = [P(torch.ones(3)), P(torch.ones(3))]
    optimizer = lk.SGD([{"params": [p]} for p in params], lr=0.1)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.param_groups[1]["lr"] = float("nan")
    with pytest.raises(ValueError, match="learning rate: nan"):
        optimizer.step()
    assert all(torch.equal(param, torch.ones(3)) for param in params)


def test_bad_parameters_and_gradients_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\]\[0\].*complex64"):
        lk.SGD([P(torch.ones(3, dtype=torch.complex64))], lr=0.1)
    named = [("head.weight", P(torch.ones(6, 8)[:, ::2]))]
    optimizer = lk.SGD(named, lr=0.1)
    named[0][1].grad = torch.ones(6, 4)
    with pytest.raises(ValueError, match=r"'head.weight' .*gaps"):
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_an_imaginary_part_has_its_sign(backend: str) -> None:
    """torch keeps it as a view whose memory holds the negated number."""
    phase = P(torch.tensor(1.0))
    optimizer = lk.SGD([phase], lr=0.5, backend=backend)
    for _ in range(3):  # the first looks at everything, the others do not
        optimizer.zero_grad()
        (torch.complex(torch.tensor(0.0), phase).conj() * (1 + 2j)).real.backward()
        assert phase.grad is not None
        assert phase.grad.is_neg()
        assert phase.grad.item() == 2.0
        optimizer.step()
    assert phase.item() == -2.0
    turned = P(torch.tensor([1 + 2j]).conj().imag)
    turned.grad = torch.ones(1)
    with pytest.raises(ValueError, match="negated view"):
        lk.SGD([turned], lr=0.1).step()


def test_tensors_without_memory_are_refused_or_made_whole() -> None:
    param = P(torch.ones(3))
    optimizer = lk.SGD([param], lr=0.1)
    for grad in (torch.ones(3), torch._efficientzerotensor(3), torch._efficientzerotensor(3)):
        param.grad = grad
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.9))
    pair = TwoTensor(torch.ones(3), torch.ones(3))
    param.grad = pair
    for _ in range(2):
        with pytest.raises(TypeError, match=r"the gradient of .* has no memory of its own; it is a TwoTensor"):
            optimizer.step()
    wrapped = P(pair)
    wrapped.grad = pair
    with pytest.raises(TypeError, match=r"parameter 'odd' .* has no memory of its own"):
        lk.SGD([("odd", wrapped)], lr=0.1).step()


def test_unknown_parameter_and_wrong_out() -> None:
    run = Run(delay=2, past="ema")
    with pytest.raises(KeyError, match="not in this optimizer"):
        run.optimizer.past_weight(torch.ones(3))
    with pytest.raises(ValueError, match="out must be"):
        run.optimizer.past_weight(run.param, out=torch.empty(3))
