"""The fused step: C++ and reference against fp64, and against torch.optim.SGD."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import layerpipe_kernels as lk
from layerpipe_kernels import ops, reference
from layerpipe_kernels.reference import SgdOptions
from tests.conftest import needs_cpp

CHUNK = 1 << 15
SIZES = [0, 1, 3, 4, 5, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 1_000_000]
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
HYPER: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}


def case(size: int, emas: int, *, offset: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    """Random arrays; ``offset`` elements into their storage, so that they are not aligned to vectors. The past weights
    are poisoned: whatever is not written stays NaN."""

    def array(*shape: int) -> Tensor:
        return torch.randn(*shape[:-1], shape[-1], dtype=dtype) if not offset else torch.randn(
            torch.Size(shape).numel() + offset, dtype=dtype)[offset:].view(shape)  # fmt: skip

    return {
        "weight": array(size),
        "grad": array(size),
        "velocity": array(size),
        "ema": array(emas, size) if emas else None,
        "past": array(size).fill_(float("nan")),
    }


def run(arrays: dict[str, Tensor | None], backend: str, **hyper: Any) -> dict[str, Tensor]:
    """One step on copies (which keep the alignment), by a backend or, as ``fp64``, by the reference in float64."""
    first, options = hyper.pop("first", False), SgdOptions(**hyper)
    if backend == "fp64":
        copies = {k: None if v is None else v.double() for k, v in arrays.items()}
        reference.sgd_step_(*copies.values(), options, first=first)  # type: ignore[arg-type]
    else:
        copies = {k: None if v is None else realigned(v) for k, v in arrays.items()}
        ops.sgd_step_(
            *([v] if v is not None else None for v in copies.values()), options=options, first=first, backend=backend
        )  # type: ignore[arg-type]
    return {k: v for k, v in copies.items() if v is not None and k != "grad"}


def realigned(tensor: Tensor) -> Tensor:
    offset = tensor.storage_offset()
    copy = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:].view(tensor.shape)
    return copy.copy_(tensor)


def magnitude(arrays: dict[str, Tensor | None], hyper: dict[str, Any]) -> Tensor:
    """The sum of the absolute values that go into a result: what rounding errors are relative to."""
    a = {k: None if v is None else v.double().abs().nan_to_num() for k, v in arrays.items()}
    w, g, v = a["weight"], a["grad"], a["velocity"]
    assert w is not None
    assert g is not None
    total = w + (1 + hyper["lr"]) * (g + hyper.get("weight_decay", 0) * w + (0 if v is None else v)) * 2
    if a["ema"] is not None:
        total = total + (a["ema"] * (1 + torch.tensor(hyper["taps"]).abs()[:, None])).sum(0)
    return total * (1 + sum(map(abs, hyper.get("taps", ()))) + abs(hyper.get("update_tap", 0)))


def assert_close_to_fp64(arrays: dict[str, Tensor | None], backend: str, **hyper: Any) -> None:
    """Within four units in the last place of the magnitudes involved."""
    got, want = run(arrays, backend, **hyper), run(arrays, "fp64", **hyper)
    weight = arrays["weight"]
    assert weight is not None
    bound = 4 * torch.finfo(weight.dtype).eps * magnitude(arrays, hyper)
    for name, value in got.items():
        assert not value.isnan().any(), f"{name} has elements that were never written"
        error = (value.double() - want[name]).abs()
        assert (error <= bound).all(), f"{name}: {(error / bound).max()} of the bound"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [0, 1])
def test_step_equals_fp64_at_every_size_and_alignment(backend: str, size: int, offset: int) -> None:
    assert_close_to_fp64(
        case(size, 2, offset=offset), backend, **HYPER, decays=[0.5, 0.8], taps=[-3.0, 5.0], update_tap=2.0
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("emas", [0, 1, 2, 3])
@pytest.mark.parametrize(("momentum", "first"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("of_gradient", [False, True])
def test_every_combination_of_arrays(
    backend: str, emas: int, momentum: bool, first: bool, past: bool, of_gradient: bool
) -> None:
    arrays = case(1000, emas)
    if not momentum:
        arrays["velocity"] = None
    if not past:
        arrays["past"] = None
    hyper = {**HYPER, "momentum": 0.9 if momentum else 0.0}
    assert_close_to_fp64(
        arrays, backend, **hyper, first=first, ema_of_gradient=of_gradient,
        decays=[0.3, 0.6, 0.9][:emas], taps=[1.0, -2.0, 3.0][:emas], update_tap=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 200),
    lr=st.floats(0, 2),
    momentum=st.floats(0.01, 0.999),
    dampening=st.floats(0, 1),
    weight_decay=st.floats(0, 1),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    decays=st.lists(st.floats(0, 0.999), max_size=3),
    tap=st.floats(-20, 20),
    seed=st.integers(0, 2**31),
    double=st.booleans(),
)
def test_any_hyperparameters(
    backend: str, size: int, decays: list[float], tap: float, seed: int, double: bool, **hyper: Any
) -> None:
    torch.manual_seed(seed)
    arrays = case(size, len(decays), dtype=torch.float64 if double else torch.float32)
    assert_close_to_fp64(arrays, backend, **hyper, decays=decays, taps=[tap] * len(decays), update_tap=tap)


@needs_cpp
def test_threads_change_no_bit() -> None:
    arrays = case(1_000_000, 2)
    hyper = {**HYPER, "decays": [0.5, 0.8], "taps": [1.0, 2.0]}
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(run(arrays, "cpp", **hyper))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_their_state_in_float32(dtype: torch.dtype) -> None:
    param = torch.randn(100, dtype=dtype, requires_grad=True)
    optimizer = lk.SGD([param], lr=0.1, momentum=0.9, delay=2, past="ema")
    param.grad = torch.randn_like(param)
    optimizer.step()
    assert optimizer.state[param]["momentum_buffer"].dtype == torch.float32
    assert optimizer.state[param]["ema"].dtype == torch.float32
    assert optimizer.past_weight(param).dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_delayed_backward_without_hooks_fails_instead_of_being_wrong(backend: str) -> None:
    param = torch.randn(4, 4, requires_grad=True)
    loss = (torch.randn(2, 4, requires_grad=True) @ param).sum()
    param.grad = torch.ones_like(param)
    lk.SGD([param], lr=0.1, backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
