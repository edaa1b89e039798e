"""Muon: torch's for matrices, and AdamW for everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerpipe_kernels as lk

OPTIONS: list[dict[str, Any]] = [
    {},
    {"nesterov": False, "momentum": 0.8, "weight_decay": 0.0},
    {"adjust_lr_fn": "original", "ns_steps": 3},
    {"adjust_lr_fn": "match_rms_adamw"},
    {"adjust_lr_fn": "spectral_unclamped", "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
]


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((32, 16), (16, 48), (40, 40), (32, 16), (64, 8))]


def steps(optimizer: torch.optim.Optimizer, params: list[Tensor], count: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_matrices_are_stepped_as_torch_does(options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    steps(lk.Muon(ours, lr=0.02, **options), ours, 20)
    steps(torch.optim.Muon(theirs, lr=0.02, **options), theirs, 20)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_spike_compensation_gives_the_newest_gradient_more_weight(nesterov: bool) -> None:
    param, options = torch.randn(4, 6, requires_grad=True), {"lr": 1.0, "weight_decay": 0.0, "nesterov": nesterov}
    optimizer = lk.Muon([param], delay=4, spike_compensation=0.5, ns_dtype=torch.float32, **options)
    average = torch.zeros(4, 6)
    for _ in range(5):
        before, param.grad = param.detach().clone(), torch.randn(4, 6)
        average = 0.95 * average + 0.05 * param.grad
        optimizer.step()
        a = 0.95 ** (2 + nesterov)
        once = lk.Muon([torch.zeros(4, 6, requires_grad=True)], ns_dtype=torch.float32, momentum=0.0, **options)
        once.param_groups[0]["params"][0].grad = a * average + (1 - a) * param.grad
        once.step()
        expected = once.param_groups[0]["params"][0].detach()
        torch.testing.assert_close(param.detach() - before, expected, rtol=1e-4, atol=1e-5)


def test_the_defaults_are_torchs() -> None:
    ours, theirs = lk.Muon(parameters()).defaults, torch.optim.Muon(parameters()).defaults
    assert {name: ours[name] for name in theirs} == theirs


def test_float32_steps_come_nearer_to_orthogonal() -> None:
    """With coefficients that converge, the direction is ``U V^T``."""
    param = torch.randn(6, 10, requires_grad=True)
    before = param.detach().clone()
    options: Any = {"ns_coefficients": (1.875, -1.25, 0.375), "ns_steps": 30, "weight_decay": 0.0, "momentum": 0.0}
    optimizer = lk.Muon([param], lr=1.0, ns_dtype=torch.float32, nesterov=False, **options)
    param.grad = torch.randn(6, 10)
    optimizer.step()
    u, _, v = torch.linalg.svd(param.grad, full_matrices=False)
    torch.testing.assert_close(before - param.detach(), u @ v, rtol=0, atol=1e-5)


def test_a_convolution_is_a_matrix_of_its_outputs() -> None:
    kernel = torch.randn(8, 3, 3, 3, requires_grad=True)
    matrix = kernel.detach().view(8, 27).clone().requires_grad_()
    optimizer, flat = lk.Muon([kernel], lr=0.02), lk.Muon([matrix], lr=0.02)
    for _ in range(5):
        kernel.grad = torch.randn_like(kernel)
        matrix.grad = kernel.grad.view(8, 27).clone()
        optimizer.step()
        flat.step()
    assert torch.equal(kernel.view(8, 27), matrix)


def test_what_is_no_matrix_steps_with_adamw_at_its_own_rate() -> None:
    ours = [torch.randn(5, requires_grad=True), torch.randn(9, 4, requires_grad=True)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    named = zip(["bias", "wte.weight"], ours, strict=True)
    optimizer = lk.Muon(named, lr=0.02, adamw_betas=(0.8, 0.9), adamw_eps=1e-6, adamw_lr_ratio=0.1, weight_decay=0.0)
    expected = torch.optim.AdamW(theirs, lr=0.002, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
    steps(optimizer, ours, 20)
    steps(expected, theirs, 20)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_checkpoints_go_to_torch_and_back() -> None:
    alone, params = parameters(), parameters()
    steps(torch.optim.Muon(alone, lr=0.02), alone, 9)
    optimizer: Any = torch.optim.Muon(params, lr=0.02)
    generator = torch.Generator().manual_seed(1)
    for library in (torch.optim, lk, torch.optim):
        state, optimizer = optimizer.state_dict(), library.Muon(params, lr=0.5)
        optimizer.load_state_dict(state)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()
    for a, b in zip(params, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "learning rate"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"adjust_lr_fn": "mine"}, "adjust_lr_fn"),
        ({"ns_coefficients": (1.0, 2.0)}, "three numbers"),
        ({"ns_steps": 100}, "ns_steps"),
        ({"ns_dtype": torch.int8}, "ns_dtype"),
        ({"adamw_betas": (0.9, 1.0)}, "adamw_betas"),
        ({"adamw_lr_ratio": -0.1}, "adamw_lr_ratio"),
        ({"delay": 2, "past": "momentum"}, "momentum buffer"),
    ],
    ids=str,
)
def test_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lk.Muon([nn.Parameter(torch.ones(3, 2))], **options)
