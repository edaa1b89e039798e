"""LAMB against the published algorithm, one number after the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk


def algorithm_2(
    weights: list[Tensor],
    grads: list[list[Tensor | None]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    wd: float,
) -> list[list[Tensor]]:
    """arXiv 1904.00962, algorithm 2, line by line, in float64: the weights after every step."""
    x = [w.detach().double().clone() for w in weights]
    m, v, t = [torch.zeros_like(w) for w in x], [torch.zeros_like(w) for w in x], [0] * len(x)
    history = []
    for step in grads:
        for i, grad in enumerate(step):
            if grad is None:
                continue
            g = grad.double()
            t[i] += 1
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            m_hat, v_hat = m[i] / (1 - beta1 ** t[i]), v[i] / (1 - beta2 ** t[i])
            r = m_hat / (v_hat.sqrt() + eps)
            total = r + wd * x[i]
            top, bottom = float(x[i].square().sum()) ** 0.5, float(total.square().sum()) ** 0.5
            ratio = top / bottom if top > 0 and bottom > 0 else 1.0
            x[i] = x[i] - lr * ratio * total
        history.append([w.clone() for w in x])
    return history


def gradients(params: list[Tensor], steps: int) -> list[list[Tensor | None]]:
    """Of which the last parameter's come late, and the first one's are 0 once."""
    made: list[list[Tensor | None]] = [[torch.randn_like(p) for p in params] for _ in range(steps)]
    made[0][-1] = made[1][-1] = None
    made[0][0] = torch.zeros_like(params[0])
    return made


def follow(optimizer: torch.optim.Optimizer, params: list[Tensor], grads: list[list[Tensor | None]]) -> None:
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.0}, {"betas": (0.5, 0.9), "eps": 1e-3, "lr": 0.05}], ids=str
)
def test_it_is_the_published_algorithm(options: dict[str, Any], dtype: torch.dtype) -> None:
    params = [torch.randn(s, dtype=dtype) for s in ((4, 5), (1,), (3,), (60,))]
    params[2].zero_()  # a weight of norm 0 is updated with the ratio 1
    params = [p.requires_grad_() for p in params]
    grads = gradients(params, 40)
    told = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, **options}
    want = algorithm_2(params, grads, told["lr"], *told["betas"], told["eps"], told["weight_decay"])[-1]
    follow(lk.Lamb(params, **told), params, grads)
    close = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    for got, expected in zip(params, want, strict=True):
        torch.testing.assert_close(got.detach().double(), expected, **close)


def test_maximize_climbs() -> None:
    a, b = (torch.ones(5, requires_grad=True) for _ in range(2))
    for param, sign, maximize in ((a, 1.0, False), (b, -1.0, True)):
        optimizer = lk.Lamb([param], lr=0.1, maximize=maximize)
        param.grad = sign * torch.arange(1.0, 6.0)
        optimizer.step()
    assert torch.equal(a, b)


@pytest.mark.parametrize("past", ["stash", "ema", "ema:materialize=true", "blend", "blend:materialize=true",
                                  "blend:decay=coupled", "blend:decay=coupled:materialize=true"])  # fmt: skip
def test_past_weights_are_exact_while_the_pipe_fills(past: str) -> None:
    param = torch.randn(30, dtype=torch.float64, requires_grad=True)
    start = param.detach().clone()
    optimizer = lk.Lamb([param], lr=0.05, delay=5, past=past)
    for _ in range(5):
        param.grad = torch.randn_like(param)
        optimizer.step()
        torch.testing.assert_close(optimizer.past_weight(param), start, rtol=0, atol=1e-12)


def test_half_precision_weights_keep_their_state_in_float32() -> None:
    param = torch.randn(64, dtype=torch.bfloat16, requires_grad=True)
    optimizer = lk.Lamb([param], lr=0.05, delay=3, past=lk.Blend(dtype=torch.bfloat16))
    for _ in range(3):
        param.grad = torch.randn_like(param)
        optimizer.step()
    twin = lk.Lamb([param], lr=0.05, delay=3, past=lk.Blend(dtype=torch.bfloat16))
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, dtype in (("exp_avg", torch.float32), ("exp_avg_sq", torch.float32), ("ema", torch.bfloat16)):
        assert optimizer.state[param][key].dtype == twin.state[param][key].dtype == dtype
        assert torch.equal(optimizer.state[param][key], twin.state[param][key])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "learning rate"),
        ({"eps": -1.0}, "eps"),
        ({"betas": (0.9, 1.0)}, "index 1"),
        ({"delay": 2, "past": "momentum"}, "momentum buffer"),
        ({"weight_decay": float("nan")}, "weight_decay"),
    ],
    ids=str,
)
def test_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lk.Lamb([torch.nn.Parameter(torch.ones(3))], **options)


def test_a_sparse_gradient_is_refused_before_anything_is_written() -> None:
    table = torch.nn.Embedding(5, 3, sparse=True)
    other = torch.nn.Parameter(torch.ones(3))
    optimizer = lk.Lamb([{"params": [other]}, {"params": table.parameters()}])
    other.grad = torch.ones(3)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"param_groups\[1\]\['params'\]\[0\]"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3))


@pytest.mark.parametrize("kind", ["Lamb", "PastWeights"])
def test_a_grad_scaler_skips_an_overflow_and_the_clock_stays(kind: str) -> None:
    """On the host: neither has a step that the device could skip."""
    params = [torch.randn(5, requires_grad=True) for _ in range(2)]
    optimizer: Any = lk.Lamb(params, lr=0.1, delay=3)
    if kind == "PastWeights":
        optimizer = lk.PastWeights(torch.optim.AdamW(params, lr=0.1), delay=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for overflow in (False, True, False):
        before = [p.detach().clone() for p in params]
        past = [optimizer.past_weight(p) for p in params]
        for param in params:
            param.grad = torch.ones(5) * scaler.scale(torch.ones(()))
        if overflow:
            params[0].grad[1] = float("inf")  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        assert overflow == all(map(torch.equal, params, before))
        assert not overflow or all(map(torch.equal, past, map(optimizer.past_weight, params)))
    assert optimizer.param_groups[0]["updates"] == 2


@pytest.mark.parametrize("kind", ["Lamb", "PastWeights"])
def test_a_step_with_a_past_cannot_be_captured(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    param = torch.ones(3, requires_grad=True)
    optimizer: Any = lk.Lamb([param], delay=2)
    if kind == "PastWeights":
        optimizer = lk.PastWeights(torch.optim.SGD([param], lr=0.1), delay=2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=f"a {kind} with a delay cannot be captured in a CUDA graph"):
        optimizer._refuse_capture(torch.device("cuda"), optimizer.param_groups[0])
    optimizer._refuse_capture(torch.device("cpu"), optimizer.param_groups[0])
