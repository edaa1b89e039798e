from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from layerpipe_kernels import backend as backends
from layerpipe_kernels import ops
from layerpipe_kernels.reference import SgdOptions
from tests.conftest import needs_cpp

PLAIN = SgdOptions(lr=0.1)
step = functools.partial(ops.sgd_step_, options=PLAIN)
BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [0, 1, 17, 40_000, 300_001])
@pytest.mark.parametrize("terms", [0, 1, 2, 3, 4])
def test_reconstruct_adds_its_terms(backend: str, size: int, terms: int) -> None:
    weight = torch.randn(size)
    states, taps = [torch.randn(size) for _ in range(terms)], [1.5, -2.0, 0.25, 3.0][:terms]
    out = torch.full_like(weight, float("nan"))
    result = ops.reconstruct(weight, states, taps, out=out, backend=backend)
    want = weight.double() + sum((t * s.double() for t, s in zip(taps, states, strict=True)), torch.zeros(()))
    assert result is out
    torch.testing.assert_close(out.double(), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reconstruct_makes_its_output(backend: str) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    out = ops.reconstruct(weight, [torch.ones(3, 4)], [2.0], backend=backend)
    assert not out.requires_grad
    assert torch.equal(out, weight.detach() + 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ema_update(backend: str) -> None:
    emas, update = [torch.ones(5), torch.zeros(5)], torch.full((5,), 4.0)
    version = emas[0]._version
    ops.ema_update_(emas, update, [0.5, 0.75], backend=backend)
    assert torch.equal(emas[0], torch.full((5,), 2.5))
    assert torch.equal(emas[1], torch.full((5,), 1.0))
    assert emas[0]._version > version


def strided() -> Tensor:
    return torch.randn(4, 6).t()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.reconstruct(strided(), [], []), ValueError, "weight .*not contiguous"),
        (lambda: ops.reconstruct(torch.ones(6, 4), [strided()], [1.0]), ValueError, r"terms\[0\].*not contiguous"),
        (lambda: ops.reconstruct(torch.ones(4), [torch.ones(5)], [1.0]), ValueError, "term of"),
        (lambda: ops.reconstruct(torch.ones(4), [], [1.0]), ValueError, "one tap each"),
        (lambda: ops.reconstruct(torch.ones(4), [torch.ones(4)] * 5, [1.0] * 5), ValueError, "0 to 4 terms"),
        (lambda: ops.reconstruct(torch.ones(4, dtype=torch.int32), [], []), TypeError, "floating point"),
        (lambda: ops.reconstruct(torch.eye(3).to_sparse(), [], []), TypeError, "sparse"),
        (lambda: ops.ema_update_([strided()], torch.ones(6, 4), [0.5]), ValueError, r"emas\[0\].*not contiguous"),
        (lambda: ops.ema_update_([torch.ones(4)], torch.ones(4), [1.5]), ValueError, r"decays\[0\]"),
        (lambda: ops.ema_update_([torch.ones(4)], torch.ones(4), [float("nan")]), ValueError, r"decays\[0\]"),
        (lambda: ops.ema_update_([], torch.ones(4), []), ValueError, "1 to 3 EMAs"),
        (lambda: step([strided()], [torch.ones(6, 4)]), ValueError, r"weights\[0\].*not contiguous"),
        (lambda: step([torch.ones(4)], []), ValueError, "1 weights but 0"),
        (lambda: step([torch.ones(4)], [torch.ones(4)], [torch.ones(5)]), ValueError, "momentum"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]


def test_overlapping_output_is_refused() -> None:
    memory = torch.randn(10)
    with pytest.raises(ValueError, match="share memory"):
        ops.reconstruct(memory[:8], [], [], out=memory[2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused_input_leaves_everything_untouched(backend: str) -> None:
    good, bad = torch.ones(4), torch.ones(6)
    with pytest.raises(ValueError, match="gradient"):
        ops.sgd_step_([good, bad], [torch.ones(4), torch.ones(5)], options=PLAIN, backend=backend)
    assert torch.equal(good, torch.ones(4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_require_gradients_are_stepped(backend: str) -> None:
    weight, velocity = torch.nn.Parameter(torch.ones(4)), torch.zeros(4)
    ops.sgd_step_(
        [weight], [torch.ones(4)], [velocity], options=SgdOptions(0.5, 0.9, weight_decay=1.0), backend=backend
    )
    assert weight.tolist() == [0.0] * 4
    assert velocity.grad_fn is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_averages_of_another_number_are_refused(backend: str) -> None:
    weights = [torch.ones(4), torch.ones(4)]
    three = SgdOptions(lr=1.0, decays=[0.5] * 3, taps=[0.0] * 3)
    with pytest.raises(ValueError, match=r"ema of weights\[1\]"):
        emas = [torch.zeros(3, 4), torch.zeros(1, 4)]
        ops.sgd_step_(weights, weights, None, emas, options=three, backend=backend)
    with pytest.raises(ValueError, match="as many decays and taps"):
        ops.sgd_step_(weights, weights, None, None, options=three, backend=backend)
    assert torch.equal(weights[0], torch.ones(4))


def test_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERPIPE_BACKEND", "reference")
    assert backends.choose(torch.ones(1)) == "reference"
    monkeypatch.setenv("LAYERPIPE_BACKEND", "magic")
    with pytest.raises(ValueError, match="LAYERPIPE_BACKEND='magic'"):
        backends.choose(torch.ones(1))


def test_missing_forced_backend_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_C", None)
    assert backends.choose(torch.ones(1)) == "reference"
    assert lk.available_backends() == ("reference",)
    with pytest.raises(RuntimeError, match="compiler"):
        backends.choose(torch.ones(1), "cpp")


@needs_cpp
def test_cpp_refuses_dtypes_it_has_no_loop_for() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        backends.choose(torch.ones(1, dtype=torch.bfloat16), "cpp")


def test_build_info_says_what_is_there() -> None:
    info = lk.build_info()
    assert info["backends"] == list(lk.available_backends())
    assert info["extension"] == ("cpp" in info["backends"])
