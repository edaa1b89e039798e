"""Averages, past weights and numbers of one tensor by Triton against the reference; run as ``triton_step_cases.py``."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from layerpipe_kernels import reference
from layerpipe_kernels.triton import ema_update_, reconstruct
from layerpipe_kernels.triton.number import one_minus_exp
from tests.kernels.triton_checks import (
    BF16,
    DEVICE,
    F16,
    F32,
    PRECISION,
    RUNNABLE,
    array,
    arrays_of_one_element_are_numbers,  # noqa: F401 - a fixture
    claims_of_alignment_are_checked,  # noqa: F401 - another
)

pytestmark = RUNNABLE


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("seed", [0, 1, 16, 2**31, 2**32 - 1])
def test_random_bits_are_those_of_the_reference(seed: int, offset: int) -> None:
    special = [0.0, 1e-45, -1e-40, 3.3895e38, 3.4028e38, float("inf"), -float("inf"), float("nan"), 1.0, -1.0]
    update = array(4000, offset=offset)
    update[: len(special)] = torch.tensor(special)
    emas = [torch.zeros(4000 + offset, dtype=BF16, device=DEVICE)[offset:] for _ in range(3)]
    ema_update_(emas, update, [0.0] * 3, seed)  # the average is then the update itself, exactly
    for k, ema in enumerate(emas):
        want = reference.round_stochastic(update, reference.hash32(reference.hash32(seed) + k))
        same = ema.view(torch.int16) == want.view(torch.int16)
        assert (same | (ema.isnan() & want.isnan())).all()  # what a GPU computes from a NaN is its own NaN


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1023, 2048, 2049, 5000])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("turn", [0.0, 0.6])
def test_ema_update(size: int, offset: int, dtype: torch.dtype, turn: float) -> None:
    emas = [array(size, offset=offset), array(size, dtype=BF16)]
    want = [e.clone() for e in emas]
    update = array(size, dtype=dtype)
    ema_update_(emas, update, [0.9, 0.5], 7, turn)
    reference.ema_update_(want, update, [0.9, 0.5], 7, turn)
    for a, b in zip(emas, want, strict=True):
        torch.testing.assert_close(a, b, rtol=PRECISION[a.dtype], atol=1e-6)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1023, 2048, 2049, 5000])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("weight", "out"), [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16)])
@pytest.mark.parametrize("terms", [(F32,), (F32, BF16, BF16, F32)])
def test_reconstruct(
    size: int, offset: int, weight: torch.dtype, out: torch.dtype, terms: tuple[torch.dtype, ...]
) -> None:
    w, arrays = array(size, dtype=weight, offset=offset), [array(size, dtype=dtype) for dtype in terms]
    taps = torch.randn(len(terms))
    want = torch.empty(size, dtype=out, device=DEVICE)
    reference.reconstruct(w, arrays, taps.tolist(), want)
    for given_taps in (taps.tolist(), taps.to(DEVICE)):
        got = array(size, dtype=out, offset=offset).fill_(float("nan"))
        reconstruct(w, arrays, given_taps, got, size)
        torch.testing.assert_close(got, want, rtol=PRECISION[out], atol=1e-5)


@triton.jit
def _one_minus_exp(x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(y + at, one_minus_exp(tl.load(x + at)))


def test_one_minus_exp_keeps_its_digits() -> None:
    x = -torch.logspace(-8, 2, 1024, dtype=torch.float32, device=DEVICE)
    x[0] = -float("inf")
    y = torch.empty_like(x)
    _one_minus_exp[(1,)](x, y, 1024)
    torch.testing.assert_close(y.double(), -torch.expm1(x.double()), rtol=4e-7, atol=0)
