"""SOAP against the published algorithm, computed slowly in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerpipe_kernels as lk
from tests.published_soap import SimulatedMatrix

F64 = torch.float64


def gradients(params: list[Tensor], steps: int, seed: int = 1) -> list[list[Tensor]]:
    """That are correlated from step to step, and along rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=F64)
    made = []
    mixers = [(draw(p.shape[0], p.shape[0]), draw(p[0].numel(), p[0].numel()) if p.ndim > 1 else None) for p in params]
    means = [draw(*p.shape) for p in params]
    for _ in range(steps):
        step = []
        for param, (left, right), mean in zip(params, mixers, means, strict=True):
            noise = draw(param.shape[0], param[0].numel() if param.ndim > 1 else 1)
            noise = left @ noise @ right if right is not None else noise
            step.append((mean + noise.reshape(param.shape)).to(param.dtype))
        made.append(step)
    return made


def follow(optimizer: torch.optim.Optimizer, params: list[Tensor], grads: list[list[Tensor]]) -> None:
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()


def matrices(dtype: torch.dtype = F64) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((6, 9), (5, 4), (6, 9), (4, 3, 2, 2))]


SIDES: list[tuple[dict[str, Any], list[tuple[bool, bool]]]] = [
    ({}, [(True, True)] * 4),
    ({"one_sided": True}, [(True, False), (False, True), (True, False), (True, False)]),
    ({"max_precond_dim": 6}, [(True, False), (True, True), (True, False), (True, False)]),
]
NUMBERS: list[dict[str, Any]] = [
    {},
    {"precondition_frequency": 3, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    {"precondition_frequency": 1, "shampoo_beta": 0.5, "weight_decay": 0.0},
    {"precondition_frequency": 3, "delay": 3, "spike_compensation": 0.5, "weight_prediction": 0.5},
]


@pytest.mark.parametrize("numbers", NUMBERS, ids=str)
@pytest.mark.parametrize(("which", "turned"), SIDES, ids=str)
def test_it_is_the_published_algorithm(
    which: dict[str, Any], turned: list[tuple[bool, bool]], numbers: dict[str, Any]
) -> None:
    params = matrices()
    optimizer = lk.SOAP(params, lr=0.02, **which, **numbers)
    group = optimizer.param_groups[0]
    period, (beta1, beta2) = group["precondition_frequency"], group["betas"]
    b = beta2 if group["shampoo_beta"] < 0 else group["shampoo_beta"]
    share = 1 - beta1 ** (group["spike_compensation"] * group["delay"])
    ahead = group["weight_prediction"] * group["delay"]
    simulated = [SimulatedMatrix(p, *sides) for p, sides in zip(params, turned, strict=True)]
    for t, grads in enumerate(gradients(params, 3 * period + 4)):
        follow(optimizer, params, [grads])
        for i, (matrix, grad) in enumerate(zip(simulated, grads, strict=True)):
            before = matrix.weight
            matrix.step(grad, 0.02, beta1, beta2, b, group["eps"], group["weight_decay"], share)
            predicted = matrix.weight - ahead * (before - matrix.weight)
            torch.testing.assert_close(params[i].detach(), predicted, rtol=1e-5, atol=1e-5)
            since = t - 1 - period * i // len(params)  # the refreshes of four matrices are spread over the period
            if t == 0:
                matrix.begin(optimizer.state[params[i]])
            if since >= 0 and since % period == 0:
                matrix.refresh()
        for param, matrix in zip(params, simulated, strict=True):
            torch.testing.assert_close(optimizer.current_weight(param), matrix.weight, rtol=1e-6, atol=1e-6)


def test_of_long_matrices_only_the_shorter_side_is_turned() -> None:
    params = [torch.randn(shape, requires_grad=True) for shape in ((2, 512), (2, 513), (513, 2))]
    for one_sided, turned in ((None, ["lr", "l", "r"]), (True, ["l", "l", "r"]), (False, ["lr", "lr", "lr"])):
        optimizer = lk.SOAP(params, one_sided=one_sided)
        follow(optimizer, params, gradients(params, 1))
        names = {"l": "basis_left", "r": "basis_right"}
        assert ["".join(s for s in "lr" if names[s] in optimizer.state[p]) for p in params] == turned


def test_float32_stays_near_float64() -> None:
    narrow, wide = matrices(torch.float32), matrices()
    with torch.no_grad():
        for a, b in zip(narrow, wide, strict=True):
            b.copy_(a)
    grads = gradients(narrow, 25)
    follow(lk.SOAP(narrow, one_sided=True), narrow, grads)
    follow(lk.SOAP(wide, one_sided=True), wide, [[g.double() for g in step] for step in grads])
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_a_preconditioner_in_bfloat16_keeps_half_the_bytes_and_nearly_the_updates() -> None:
    pairs = []
    for dtype in (None, torch.bfloat16):
        params = matrices(torch.float32)
        start = [p.detach().clone() for p in params]
        optimizer = lk.SOAP(params, one_sided=True, state_dtype=dtype)
        follow(optimizer, params, gradients(params, 25))
        moved = [p.detach() - s for p, s in zip(params, start, strict=True)]
        names = ("gram_left", "gram_right", "basis_left", "basis_right")
        pairs.append(
            (moved, sum(optimizer.state[p][n].nbytes for p in params for n in names if n in optimizer.state[p]))
        )
    (moved, full), (nearly, half) = pairs
    assert half * 2 == full
    for a, b in zip(moved, nearly, strict=True):
        assert (a - b).norm() < 0.1 * a.norm()


def test_the_refreshes_of_different_matrices_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.randn(4, 4, requires_grad=True) for _ in range(5)]
    optimizer = lk.SOAP(params, precondition_frequency=10, one_sided=True)
    seen: list[int] = []
    qr = torch.linalg.qr

    def counted(matrix: Tensor) -> Any:
        seen[-1] += len(matrix)
        return qr(matrix)

    monkeypatch.setattr(torch.linalg, "qr", counted)
    for step in gradients(params, 31):
        seen.append(0)
        follow(optimizer, params, [step])
    assert seen[11:21] == seen[21:31]
    assert sum(seen[21:31]) == 5
    assert max(seen) == 1


def test_what_is_no_matrix_steps_with_adamw() -> None:
    torch.manual_seed(0)
    shapes = [(7,), (), (5, 1), (1, 6), (3, 4)]
    ours = [torch.randn(s, requires_grad=True) for s in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    named = list(zip(["bias", "scale", "column", "row", "embed.weight"], ours, strict=True))
    optimizer = lk.SOAP(named, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    expected = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        expected.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_a_matrix_may_become_what_steps_with_adam_and_a_matrix_again() -> None:
    params = matrices(torch.float32)
    optimizer = lk.SOAP(params)
    for precondition in (True, False, True):
        optimizer.param_groups[0]["precondition"] = precondition
        follow(optimizer, params, gradients(params, 3))
        for param in params:
            state = optimizer.state[param]
            assert ("basis_left" in state) == precondition
            assert float(state["step"]) == (2.0 if precondition else 3.0)
            assert param.isfinite().all()


def test_another_side_begins_a_new_preconditioner() -> None:
    params = matrices()
    optimizer, twin = lk.SOAP(params), lk.SOAP(matrices(), one_sided=True)
    follow(optimizer, params, gradients(params, 5))
    optimizer.param_groups[0]["one_sided"] = True
    with torch.no_grad():
        for a, b in zip(twin.param_groups[0]["params"], params, strict=True):
            a.copy_(b)
    later = gradients(params, 12, seed=8)
    follow(optimizer, params, later)
    follow(twin, twin.param_groups[0]["params"], later)
    assert all(map(torch.equal, params, twin.param_groups[0]["params"]))
    assert "basis_right" not in optimizer.state[params[0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shampoo_beta": 1.0}, "shampoo_beta"),
        ({"precondition_frequency": 0}, "precondition_frequency"),
        ({"max_precond_dim": 2.5}, "max_precond_dim"),
        ({"state_dtype": torch.float16}, "state_dtype"),
        ({"betas": (0.9, 1.0)}, "index 1"),
        ({"lr": -1.0}, "learning rate"),
        ({"delay": 2, "past": "momentum"}, "momentum buffer"),
    ],
    ids=str,
)
def test_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lk.SOAP([nn.Parameter(torch.ones(3, 2))], **options)


def test_a_first_gradient_that_is_not_finite_is_refused_by_name() -> None:
    layer = nn.Linear(3, 2)
    optimizer = lk.SOAP(layer.named_parameters())
    layer(torch.full((1, 3), float("nan"))).sum().backward()
    with pytest.raises(ValueError, match="first gradient of 'weight'"):
        optimizer.step()


@pytest.mark.parametrize("failure", ["raises", "gives NaN"])
def test_bases_that_float32_cannot_find_are_found_in_float64(failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = torch.linalg.eigh

    def fails(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float64:
            return eigh(matrix)
        if failure == "raises":
            raise RuntimeError("linalg.eigh: the algorithm failed to converge")
        return eigh(matrix)[0], torch.full_like(matrix, torch.nan)

    def stepped() -> Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 4))
        optimizer = lk.SOAP([weight], lr=0.1, precondition=["0"])
        for _ in range(3):
            weight.grad = torch.randn(4, 4)
            optimizer.step()
        return weight.detach()

    expected = stepped()
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    torch.testing.assert_close(stepped(), expected, rtol=1e-3, atol=1e-3)
