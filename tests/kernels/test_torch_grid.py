"""torch's own optimizer database, option by option: the same trajectories, the same refusals."""

from __future__ import annotations

import copy
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from tests.backends import needs_cpp

pytest.importorskip("expecttest", reason="torch's test helpers need it")
from torch.testing._internal.common_optimizers import optim_db

BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
NAMES = ("SGD", "Adam", "AdamW")
DATABASE = {entry.optim_cls.__name__: entry for entry in optim_db if entry.optim_cls.__name__ in NAMES}

#: Every input of the database, and those it has for CUDA alone: the options themselves work on any device.
INPUTS: list[Any] = []
for _name, _entry in DATABASE.items():
    _seen = set()
    for _device in ("cpu", "cuda"):
        for _input in _entry.optim_inputs_func(device=_device):
            if _input.desc not in _seen:
                _seen.add(_input.desc)
                INPUTS.append(pytest.param((_name, _input.kwargs), id=f"{_name}-{_input.desc}"))
ERRORS = [
    pytest.param(name, error, id=f"{name}-{error.optimizer_error_input.desc}")
    for name, entry in DATABASE.items()
    for error in entry.optim_error_inputs_func(device="cpu", dtype=torch.float32)
]
PASTS: list[dict[str, Any]] = [{}, {"delay": 6, "past": lk.Blend(order=2)}]


def problem(params: list[Tensor], step: int) -> list[Tensor]:
    """Gradients of a badly scaled quadratic plus noise, in the parameters' dtype."""
    noise = torch.Generator().manual_seed(step)
    grads = []
    for i, param in enumerate(params):
        scale = torch.logspace(-2, 1, param.numel(), dtype=torch.float64).view(param.shape)
        random = torch.randn(param.shape, generator=noise, dtype=torch.float64)
        grads.append((scale * (param.detach().double() - i) + random).to(param.dtype))
    return grads


def torch_options(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """For torch's loop on the CPU, where ``capturable`` is refused; it changes no result.

    torch's Adam computes in the dtype of hyperparameters in tensors, which for float64 weights is too coarse to compare
    with: it gets the same numbers as numbers.
    """
    chosen = {k: v for k, v in options.items() if k != "capturable"}
    if dtype == torch.float64 and "lr" in chosen:
        chosen["lr"] = float(chosen["lr"])
    if dtype == torch.float64 and "betas" in chosen:
        chosen["betas"] = tuple(map(float, chosen["betas"]))
    return {**chosen, "foreach": False, "fused": False}


class Run(NamedTuple):
    """A hundred steps of torch's."""

    name: str
    options: dict[str, Any]
    start: list[Tensor]
    grads: list[list[Tensor]]
    end: list[Tensor]
    bounds: list[Tensor]


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=INPUTS)
def theirs(request: pytest.FixtureRequest, dtype: torch.dtype) -> Run:
    """Made once, for all that is compared with it."""
    name, options = request.param
    torch.manual_seed(0)
    params = [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((1,), (4, 5), (101,))]
    start = [p.detach().clone() for p in params]
    optimizer = getattr(torch.optim, name)(params, **torch_options(options, dtype))
    travelled = [torch.zeros_like(p) for p in params]
    size = [p.detach().abs() for p in params]
    every: list[list[Tensor]] = []
    for step in range(100):
        grads = problem(params, step)
        every.append([grad.clone() for grad in grads])
        before = [p.detach().clone() for p in params]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        for i, param in enumerate(params):
            travelled[i] += (param.detach() - before[i]).abs()
            size[i] = torch.maximum(size[i], param.detach().abs())
    # Each of the hundred updates may differ by a few units in its own last place, each sum by half of one.
    eps = torch.finfo(dtype).eps
    bounds = [eps * (8 * path + 12 * largest) for path, largest in zip(travelled, size, strict=True)]
    return Run(name, options, start, every, [p.detach() for p in params], bounds)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("past", PASTS, ids=str)
def test_a_hundred_steps_agree_with_torch(theirs: Run, past: dict[str, Any], backend: str) -> None:
    ours = [p.clone().requires_grad_() for p in theirs.start]
    optimizer = getattr(lk, theirs.name)(ours, **theirs.options, **past, backend=backend)
    for grads in theirs.grads:
        for param, grad in zip(ours, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    for a, b, bound, begin in zip(ours, theirs.end, theirs.bounds, theirs.start, strict=True):
        assert ((a - b).detach().abs() <= bound).all(), (
            f"{float(((a - b).detach().abs() / bound).max()):.3g} of the bound"
        )
        assert not torch.equal(b, begin)
    if theirs.name == "SGD" and a.dtype == torch.float32:
        assert all(map(torch.equal, ours, theirs.end))


@pytest.mark.parametrize(("name", "error"), ERRORS)
def test_what_torch_refuses_is_refused(name: str, error: Any) -> None:
    bad = error.optimizer_error_input
    params = bad.params if bad.params is not None else [torch.nn.Parameter(torch.randn(2, 3))]
    make = getattr(lk, name)
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            make(params, **bad.kwargs)
    else:
        with pytest.raises(error.error_type, match=error.error_regex), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(params, **bad.kwargs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"foreach": True, "fused": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together"),
        ({"differentiable": True, "fused": True}, RuntimeError, "`fused` does not support `differentiable`"),
        ({"differentiable": True}, ValueError, "differentiable=True is not supported; use torch.optim"),
        ({"past": "blend:norm=same"}, ValueError, "norm of past='blend' must be None or 'match'"),
    ],
    ids=str,
)
def test_flags_that_contradict_each_other_are_refused(
    name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(lk, name)([torch.nn.Parameter(torch.randn(3))], **options)


@pytest.mark.parametrize("name", NAMES)
def test_complex_parameters_are_refused_by_name(name: str) -> None:
    params = [("spectrum", torch.nn.Parameter(torch.randn(3, dtype=torch.complex64)))]
    with pytest.raises(TypeError, match=r"'spectrum' of dtype torch.complex64 is not supported"):
        getattr(lk, name)(params)


@pytest.mark.parametrize("name", NAMES)
def test_options_differ_from_group_to_group(name: str) -> None:
    theirs = [torch.randn(30, requires_grad=True) for _ in range(3)]
    ours = [p.detach().clone().requires_grad_() for p in theirs]
    options: list[dict[str, Any]] = [{}, {"lr": 0.5, "weight_decay": 0.3}, {"maximize": True, "lr": torch.tensor(0.1)}]
    optimizers = [
        make([{"params": [p], **copy.copy(o)} for p, o in zip(params, options, strict=True)], lr=0.01, **extra)
        for make, params, extra in (
            (getattr(torch.optim, name), theirs, {"foreach": False}),
            (getattr(lk, name), ours, {"delay": 3}),
        )
    ]
    for step in range(20):
        for param, twin, grad in zip(theirs, ours, problem(theirs, step), strict=True):
            param.grad, twin.grad = grad, grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_and_groups_have_torchs_names_and_values(name: str) -> None:
    param = torch.nn.Parameter(torch.randn(3))
    theirs = getattr(torch.optim, name)([param])
    ours = getattr(lk, name)([param])
    for key, value in theirs.defaults.items():
        assert ours.defaults[key] == value
        assert ours.param_groups[0][key] == value


def test_a_learning_rate_in_a_tensor_is_read_in_every_step() -> None:
    for capturable in (False, True):
        param = torch.ones(3, requires_grad=True)
        lr = torch.tensor(0.5)
        optimizer = lk.SGD([param], lr=lr, capturable=capturable)
        for rate in (0.5, 0.25):
            lr.fill_(rate)
            param.grad = torch.ones(3)
            optimizer.step()
        assert param.tolist() == [0.25] * 3
