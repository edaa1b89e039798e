"""Checkpoints: torch's into ours, ours into torch's, and nothing lost on the way."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from tests.kernels.checkpoints import BF16, F32, F64, parameters, saved, steps, take

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 0.05, "amsgrad": True}),
    ("AdamW", {"lr": 0.05, "weight_decay": 0.1}),
]
PASTS: list[dict[str, Any]] = [
    {"past": "stash"},
    {"past": "ema"},
    {"past": lk.Blend(order=3)},
    {"past": lk.Blend(materialize=True)},
    {"past": lk.Blend(norm="match")},
    {"past": lk.EMA(dtype=BF16)},
]


@pytest.mark.parametrize("delay", [0, 4])
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=str)
def test_a_run_goes_from_torch_to_ours_and_back(name: str, options: dict[str, Any], delay: int) -> None:
    alone, params = parameters(), parameters()
    expected = getattr(torch.optim, name)(alone, foreach=False, **options)
    steps(expected, alone, 15, seed=1)
    optimizer: Any = getattr(torch.optim, name)(params, foreach=False, **options)
    steps(optimizer, params, 5, seed=1)
    generator_steps = [(lk, {"delay": delay}), (torch.optim, {"foreach": False})]
    for i, (library, extra) in enumerate(generator_steps):
        state = saved(optimizer)
        optimizer = getattr(library, name)(params, **options, **extra)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch's checkpoint has no past
            optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == options["lr"]
        generator = torch.Generator().manual_seed(1)
        for step in range(15):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            if 5 * (i + 1) <= step < 5 * (i + 2):
                optimizer.step()
    for a, b in zip(params, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("past", PASTS, ids=str)
@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=str)
@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_resume_is_bitwise(
    name: str, options: dict[str, Any], past: dict[str, Any], dtype: torch.dtype, how: str
) -> None:
    params = parameters(dtype)
    make = lambda of: getattr(lk, name)(of, delay=4, master_weights=dtype == BF16, **options, **past)
    optimizer = make(params)
    steps(optimizer, params, 7, seed=1)
    steps(optimizer, params, 1, seed=2, late=True)
    if how == "file":
        others = parameters(dtype)
        other = make(others)
        take(others, params)
        other.load_state_dict(saved(optimizer))
    else:
        pair = (params, optimizer)
        others, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
        assert other.param_groups[0]["params"][0] is others[0]
    for a, b in zip(params, others, strict=True):
        assert torch.equal(optimizer.past_weight(a), other.past_weight(b))
    for each, of in ((optimizer, params), (other, others)):
        steps(each, of, 6, seed=4)
    for a, b in zip(params, others, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.past_weight(a), other.past_weight(b))


@pytest.mark.parametrize("how", ["file", "deepcopy", "another group"])
@pytest.mark.parametrize("past", ["blend", "momentum"])
def test_resume_is_bitwise_while_the_momentum_is_scheduled(past: str, how: str) -> None:
    """What the averages were designed for goes with them."""
    params = parameters()
    make = lambda of: lk.SGD(of, lr=0.1, momentum=0.95, delay=4, past=past)
    optimizer = make(params)

    def train(optimizer: lk.SGD, params: list[Tensor], momenta: list[float]) -> None:
        for i, momentum in enumerate(momenta):
            steps(optimizer, params, 1, seed=i)
            optimizer.param_groups[0]["momentum"] = momentum

    train(optimizer, params, [0.94, 0.92, 0.9, 0.88, 0.86, 0.85])
    twins, other = copy.deepcopy((params, optimizer))
    if how == "file":
        twins = parameters()
        other = make(twins)
        take(twins, params)
        other.load_state_dict(saved(optimizer))
    if how == "another group":
        other.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    for momenta in ([], [0.86, 0.9, 0.95]):
        train(optimizer, params, momenta)
        train(other, twins, momenta)
        for a, b in zip(params, twins, strict=True):
            assert torch.equal(optimizer.past_weight(a), other.past_weight(b))


def test_a_checkpoint_that_does_not_say_what_its_averages_were_designed_for_loads() -> None:
    params = parameters()
    optimizer = lk.AdamW(params, lr=0.05, delay=3)
    steps(optimizer, params, 8, seed=1)
    state = saved(optimizer)
    for group in state["param_groups"]:
        del group["designed_for"]
    others = parameters()
    take(others, params)
    other = lk.AdamW(others, lr=0.05, delay=3)
    other.load_state_dict(state)
    for a, b in zip(params, others, strict=True):
        assert torch.equal(optimizer.past_weight(a), other.past_weight(b))


MAKERS: dict[str, tuple[Any, Any]] = {
    "SGD": (lambda p, **past: lk.SGD(p, 0.1, momentum=0.9, **past), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "plain SGD": (lambda p, **past: lk.SGD(p, 0.1, **past), lambda p: torch.optim.SGD(p, 0.1)),
    "AdamW": (lambda p, **past: lk.AdamW(p, 0.1, **past), lambda p: torch.optim.AdamW(p, 0.1)),
    "Lamb": (lambda p, **past: lk.Lamb(p, 0.1, **past), None),
    "PastWeights": (lambda p, **past: lk.PastWeights(torch.optim.AdamW(p, 0.1), **past), torch.optim.AdamW),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("past", [*PASTS, {"past": lk.Latest(norm="match")}], ids=str)
def test_a_parameter_that_never_had_a_gradient_goes_through_a_checkpoint(kind: str, past: dict[str, Any]) -> None:
    make, theirs = MAKERS[kind]
    params, others = parameters(), parameters()
    optimizer, other = make(params, delay=4, **past), make(others, delay=4, **past)
    for param in params:
        param.grad = None
    steps(optimizer, params, 7, seed=1, late=True)
    take(others, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved(optimizer))
    runs = ((optimizer, params), (other, others))
    for late in (None, True, False):  # at once, while it still has no gradient, and when it has one
        for each, of in runs if late is not None else ():
            steps(each, of, 3, seed=4, late=bool(late))
        for a, b in zip(params, others, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(optimizer.past_weight(a), other.past_weight(b))
        if late is not False:
            torch.testing.assert_close(other.past_weight(others[-1]), others[-1], rtol=1e-6, atol=0)
    if theirs is not None:
        optimizer = make(params, delay=4, **past)
        steps(optimizer, params, 2, seed=1, late=True)
        torchs = theirs(params)
        torchs.load_state_dict(saved(optimizer))
        steps(torchs, params, 2, seed=1)


def test_a_norm_that_was_not_recorded_is_the_present_one() -> None:
    """With ``norm="match"`` from the middle of a run on, too: no past weights of norm 0."""
    params = parameters()
    optimizer = lk.SGD(params, lr=1e-4, momentum=0.9, delay=4, past="blend")
    steps(optimizer, params, 9, seed=1)
    optimizer.param_groups[0]["past"] = lk.Blend(norm="match")
    for param in params:
        torch.testing.assert_close(optimizer.past_weight(param).norm(), param.detach().norm())


def test_a_momentum_buffer_that_holds_nothing_yet_is_none_in_a_checkpoint() -> None:
    """The step that would have filled it failed: its zeros are no momentum, here and in torch."""
    params = [torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimizer = lk.SGD(params, backend="reference", **options)
    memory = torch.randn(3)
    params[0].data = params[1].data = memory
    for param in params:
        param.grad = torch.ones(3)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    for param in params:
        param.data = torch.zeros(3)
    state = saved(optimizer)
    assert state["state"][0]["momentum_buffer"] is None
    for library in (lk, torch.optim):
        others = [p.detach().clone().requires_grad_() for p in params]
        other = library.SGD(others, **options)
        other.load_state_dict(state)
        for param in others:
            param.grad = torch.ones(3)
        other.step()
        assert torch.equal(other.state[others[0]]["momentum_buffer"], torch.ones(3))
    twin, copied = copy.deepcopy((params, optimizer))
    for param in twin:
        param.grad = torch.ones(3)
    copied.step()
    assert torch.equal(copied.state[twin[0]]["momentum_buffer"], torch.ones(3))


@pytest.mark.parametrize("how", ["file", "deepcopy"])
def test_a_parameter_that_stood_still_is_remembered_as_such(how: str) -> None:
    """Its momentum buffer is not its newest update, after loading as before."""
    params = parameters()
    optimizer = lk.SGD(params, lr=0.1, momentum=0.9, delay=3, past="momentum")
    steps(optimizer, params, 5, seed=1)
    steps(optimizer, params, 1, seed=2, late=True)
    if how == "file":
        others = parameters()
        other = lk.SGD(others, lr=0.1, momentum=0.9, delay=3, past="momentum")
        take(others, params)
        other.load_state_dict(saved(optimizer))
        torch.optim.SGD(parameters(), lr=0.1, momentum=0.9).load_state_dict(saved(optimizer))
    else:
        others, other = copy.deepcopy((params, optimizer))
    assert torch.equal(optimizer.past_weight(params[-1]), params[-1])
    assert torch.equal(other.past_weight(others[-1]), others[-1])
    assert not torch.equal(other.past_weight(others[0]), others[0])


def test_a_group_added_in_the_middle_forgets_nothing_of_the_others() -> None:
    params = parameters()
    optimizer = lk.SGD(params, lr=0.1, momentum=0.9, delay=3, past="momentum")
    steps(optimizer, params, 5, seed=1, late=True)
    before = [optimizer.past_weight(p) for p in params]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert all(map(torch.equal, before, map(optimizer.past_weight, params)))
    assert optimizer.param_groups[1]["delay"] == 3


@pytest.mark.parametrize("dtypes", [(F32, F64), (F64, F32), (BF16, F32), (BF16, F64), (F32, BF16), (F64, BF16)])
@pytest.mark.parametrize("past", PASTS[:-1])
@pytest.mark.parametrize("name", ["SGD", "Adam", "Lamb", "PastWeights"])
def test_a_checkpoint_loads_into_parameters_of_another_dtype(
    name: str, past: dict[str, Any], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    def make(dtype: torch.dtype) -> tuple[list[Tensor], torch.optim.Optimizer]:
        params = parameters(dtype)
        if name == "PastWeights":
            return params, lk.PastWeights(torch.optim.SGD(params, lr=0.1), delay=3, **past)
        return params, getattr(lk, name)(params, lr=0.1, delay=3, **past)

    (source, old), (target, new) = map(make, dtypes)
    steps(old, source, 6, seed=1)
    take(target, source)
    new.load_state_dict(saved(old))
    for param, other in zip(source, target, strict=True):
        tolerance = 1e-2 if BF16 in dtypes else 1e-5
        want = old.past_weight(param).to(other.dtype)
        torch.testing.assert_close(new.past_weight(other), want, rtol=tolerance, atol=tolerance)
    steps(new, target, 2, seed=2)


def test_a_checkpoint_that_was_made_with_another_default_dtype_loads() -> None:
    params = parameters()
    theirs = torch.optim.Adam(params)
    torch.set_default_dtype(F64)
    try:
        steps(theirs, params, 2, seed=1)
    finally:
        torch.set_default_dtype(F32)
    assert theirs.state[params[0]]["step"].dtype == F64
    twins = [p.detach().clone().requires_grad_() for p in params]
    ours = lk.Adam(twins)
    ours.load_state_dict(saved(theirs))
    for optimizer, each in ((theirs, params), (ours, twins)):
        steps(optimizer, each, 2, seed=2)
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", MAKERS)
def test_the_backend_is_the_machines_and_no_checkpoints(kind: str) -> None:
    make, _ = MAKERS[kind]
    params = parameters()
    optimizer = make(params, delay=3, backend="reference")
    steps(optimizer, params, 4, seed=1)
    state = saved(optimizer)
    for group in state["param_groups"]:
        group["backend"] = "one that this machine lacks"
    other = make(parameters(), delay=3)
    other.load_state_dict(state)
    assert other.param_groups[0]["backend"] == "auto"
    steps(other, other.param_groups[0]["params"], 1, seed=2)


def test_hooks_may_change_what_is_loaded() -> None:
    """Another number of groups, and state of 16-bit parameters."""
    params = parameters(BF16)
    old = lk.SGD(params, lr=0.1, momentum=0.9, delay=3)
    steps(old, params, 4, seed=1)
    new = lk.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, momentum=0.9, delay=3)

    def split_and_halve(_: torch.optim.Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        (group,) = given["param_groups"]
        state = {i: {**s, "momentum_buffer": s["momentum_buffer"] / 2} for i, s in given["state"].items()}
        groups = [{**group, "params": group["params"][:1]}, {**group, "params": group["params"][1:]}]
        return {"state": state, "param_groups": groups}

    new.register_load_state_dict_pre_hook(split_and_halve)
    new.load_state_dict(saved(old))
    for param in params:
        buffer = new.state[param]["momentum_buffer"]
        assert buffer.dtype == F32
        assert torch.equal(buffer, old.state[param]["momentum_buffer"] / 2)
    assert len(new._optimizer_load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("library", [lk, torch.optim])
def test_adamw_stays_adamw_with_a_checkpoint_of_adams(library: Any) -> None:
    ours, theirs = parameters(), parameters()
    adam = library.Adam(parameters(), lr=0.05, weight_decay=0.1)
    steps(adam, adam.param_groups[0]["params"], 3, seed=1)
    for kind, params in ((lk.AdamW, ours), (torch.optim.AdamW, theirs)):
        optimizer = kind(params)
        optimizer.load_state_dict(saved(adam))
        steps(optimizer, params, 3, seed=2)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def halves(_: int) -> float:
    return 0.5


@pytest.mark.parametrize("kind", [lk.SGD, lambda params, **o: lk.PastWeights(torch.optim.SGD(params, lr=0.1), **o)])
def test_a_decay_that_is_a_function_stays_where_it_is(kind: Any) -> None:
    """A checkpoint with one could not be loaded with ``weights_only=True``."""
    params, others = parameters(), parameters()
    optimizer, other = (kind(p, delay=3, past=lk.EMA(decay=halves)) for p in (params, others))
    steps(optimizer, params, 5, seed=1)
    take(others, params)
    other.load_state_dict(saved(optimizer))
    assert other.param_groups[0]["past"].decay is halves
    steps(optimizer, params, 3, seed=2)
    steps(other, others, 3, seed=2)
    for a, b in zip(params, others, strict=True):
        assert torch.equal(optimizer.past_weight(a), other.past_weight(b))
