"""Parameters in any order in memory: every optimizer treats them as it treats their memory."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import layerpipe_kernels as lk
from layerpipe_kernels import layout, native
from tests.backends import needs_cpp

BACKENDS = [pytest.param("cpp", marks=needs_cpp), "reference"]
LAST = torch.channels_last
Make = Callable[..., Any]


def nadam(params: Any, **past: Any) -> lk.PastWeights:
    return lk.PastWeights(torch.optim.NAdam(params, lr=0.01), **past)


KINDS: list[tuple[Make, dict[str, Any]]] = [
    (lk.SGD, {"lr": 0.1, "momentum": 0.9, "past": "blend"}),
    (lk.SGD, {"lr": 0.1, "momentum": 0.9, "past": lk.Blend(dtype=torch.bfloat16, order=3)}),
    (lk.SGD, {"lr": 0.1, "past": lk.EMA(materialize=True)}),
    (lk.SGD, {"lr": 0.1, "momentum": 0.9, "past": "stash"}),
    (lk.SGD, {"lr": 0.1, "momentum": 0.9, "past": "blend", "capturable": True}),
    (lk.SGD, {"lr": 0.1, "momentum": 0.9, "past": "stash", "capturable": True}),
    (lk.AdamW, {"past": "blend", "amsgrad": True}),
    (lk.AdamW, {"past": lk.Blend(norm="match", materialize=True)}),
    (lk.Lamb, {"past": "blend"}),
    (nadam, {"past": "ema"}),
    (nadam, {"past": lk.Blend(dtype=torch.bfloat16, materialize=True)}),
]
IDS = [f"{make.__name__}-{options['past']}-{i}" for i, (make, options) in enumerate(KINDS)]
ORDERS = {
    "channels_last": (0, 2, 3, 1),
    "transposed": (1, 0, 2, 3),
    "reversed": (3, 2, 1, 0),
}


def dense(shape: tuple[int, ...], dims: tuple[int, ...]) -> Tensor:
    """Random, with its dimensions in the order ``dims`` in memory."""
    inverse = [dims.index(d) for d in range(len(dims))]
    return torch.randn([shape[d] for d in dims]).permute(inverse)


@pytest.mark.parametrize("dims", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("make", "options"), KINDS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_order_in_memory_is_that_memory(
    make: Make, options: dict[str, Any], backend: str, dims: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Bit for bit as the same memory in its natural order, whatever order the gradients have."""
    shape = (6, 5, 3, 2)
    param = torch.nn.Parameter(dense(shape, dims).to(dtype))
    twin = torch.nn.Parameter(param.detach().permute(dims).clone())
    assert twin.is_contiguous()
    assert not param.is_contiguous()
    bias = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2)]
    ours, theirs = (make([p, b], delay=3, backend=backend, **options) for p, b in zip((param, twin), bias, strict=True))
    for step in range(9):
        grad = torch.randn(shape, dtype=dtype)
        param.grad = grad if step % 3 else dense(shape, dims).to(dtype).copy_(grad)
        twin.grad = grad.permute(dims).contiguous()
        if step == 5:  # an update without it
            param.grad = twin.grad = None
        for b in bias:
            b.grad = torch.ones_like(b)
        ours.step()
        theirs.step()
        for past in (
            ours.past_weight(param),
            ours.past_view(param),
            ours.past_weight(param, out=torch.empty(shape, dtype=dtype)),
        ):
            assert torch.equal(past.permute(dims), theirs.past_weight(twin))
        assert ours.past_view(param).stride() == param.stride()
        assert torch.equal(param.detach().permute(dims), twin.detach())
    assert ours.history_bytes() == theirs.history_bytes()
    kept = [v for v in ours.state[param].values() if isinstance(v, Tensor) and v.shape[-4:] == shape]
    assert all(layout.follows(v, param) for v in kept)


@needs_cpp
def test_its_steps_are_routine(monkeypatch: pytest.MonkeyPatch) -> None:
    """They need not be looked at again and again."""
    looked: list[int] = []
    step_group = lk.SGD._step_group
    monkeypatch.setattr(lk.SGD, "_step_group", lambda self, i, *rest: (looked.append(i), step_group(self, i, *rest))[1])
    conv = torch.nn.Conv2d(4, 8, 3).to(memory_format=LAST)
    optimizer = lk.SGD(conv.parameters(), lr=0.1, momentum=0.9, delay=3, backend="cpp")
    for _ in range(6):
        optimizer.zero_grad()
        conv(torch.randn(2, 4, 8, 8).to(memory_format=LAST)).square().mean().backward()
        optimizer.step()
        optimizer.past_view(conv.weight)
    assert looked == [0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("make", "options"), KINDS, ids=IDS)
@pytest.mark.parametrize("when", ["before a past", "before a step"])
def test_a_model_may_change_its_order(make: Make, options: dict[str, Any], backend: str, when: str) -> None:
    """``model.to(memory_format=...)`` between steps changes no number but what is rounded stochastically."""
    past = lk.past.parse(options.get("past", "blend"))
    if past.dtype is not None:
        options = {**options, "past": dataclasses.replace(past, dtype=None)}
    params = [torch.nn.Parameter(torch.randn(4, 3, 2, 2)) for _ in range(2)]
    params[1].data.copy_(params[0].data)
    runs = [make([p], delay=3, backend=backend, **options) for p in params]
    for step in range(12):
        if when == "before a step" and step in (4, 8):
            turn(params[0], step)
        grad = torch.randn(4, 3, 2, 2)
        for param, run in zip(params, runs, strict=True):
            param.grad = grad.clone()
            run.step()
        if when == "before a past" and step in (4, 8):
            turn(params[0], step)
        want = runs[1].past_weight(params[1])
        same = torch.testing.assert_close if past.norm or make is lk.Lamb else exactly
        same(runs[0].past_view(params[0]), want)
        same(runs[0].past_weight(params[0]), want)
        same(params[0].detach(), params[1].detach())


def exactly(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b)


def turn(param: torch.nn.Parameter, step: int) -> None:
    param.grad = None
    param.data = param.data.contiguous(memory_format=LAST if step == 4 else torch.contiguous_format)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("past", ["blend", "stash"])
def test_a_checkpoint_of_another_order_goes_on(past: str, backend: str) -> None:
    def grads(param: Tensor, steps: range) -> None:
        for step in steps:
            param.grad = torch.sin(torch.arange(48.0) * step).view(4, 3, 2, 2)
            optimizers[id(param)].step()

    plain = torch.nn.Parameter(torch.randn(4, 3, 2, 2))
    optimizers: dict[int, Any] = {}

    def make(param: torch.nn.Parameter) -> Any:
        optimizers[id(param)] = lk.SGD([param], lr=0.1, momentum=0.9, delay=3, past=past, backend=backend)
        return optimizers[id(param)]

    first = make(plain)
    grads(plain, range(5))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    last = torch.nn.Parameter(plain.detach().clone().contiguous(memory_format=LAST))
    make(last).load_state_dict(torch.load(file))
    assert torch.equal(optimizers[id(last)].past_weight(last), first.past_weight(plain))
    for param in (plain, last):
        grads(param, range(5, 9))
    assert torch.equal(plain, last)
    assert torch.equal(optimizers[id(last)].past_weight(last), first.past_weight(plain))
    again = copy.deepcopy(optimizers[id(last)])  # with its parameters, as they lie in memory
    assert layout.follows(again.state[again.param_groups[0]["params"][0]]["momentum_buffer"], last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("past", ["blend", "stash"])
def test_an_order_may_change_under_inference_mode(past: str, backend: str) -> None:
    """What is rearranged there is stepped on later."""
    param = torch.nn.Parameter(torch.randn(4, 3, 2, 2))
    optimizer = lk.SGD([param], lr=0.1, momentum=0.9, delay=3, past=past, backend=backend)
    for step in range(8):
        param.grad = torch.randn(4, 3, 2, 2)
        optimizer.step()
        if step == 4:
            turn(param, step)
            with torch.inference_mode():
                optimizer.past_weight(param)


def test_past_weights_aligns_the_state_of_the_optimizer_it_wraps() -> None:
    """torch's fused steps go by address."""
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 48).view(4, 3, 2, 2).clone()) for _ in range(2)]
    runs = [lk.PastWeights(torch.optim.AdamW([p], lr=0.01, fused=True), delay=3) for p in params]
    for step in range(8):
        if step == 4:
            turn(params[0], step)
        for param, run in zip(params, runs, strict=True):
            param.grad = torch.empty_like(param).copy_(torch.sin(torch.arange(48.0) + step).view(4, 3, 2, 2))
            run.step()
    torch.testing.assert_close(params[0].detach(), params[1].detach())


@pytest.mark.parametrize("shape", [(3, 2), (6,)])
@pytest.mark.parametrize("dims", [(0, 1), (1, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_another_shape_is_refused(shape: tuple[int, ...], dims: tuple[int, int], backend: str) -> None:
    weight = dense((2, 3), dims)
    with pytest.raises(ValueError, match=r"gradient of weights\[0\]"):
        lk.ops.sgd_step_([weight], [torch.ones(shape)], options=lk.options.SgdOptions(0.1), backend=backend)


@needs_cpp
@pytest.mark.parametrize("exchange", [True, False], ids=["DLPack", "by calls"])
def test_numbers_that_are_not_finite_are_found_in_any_order(exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiled search, wherever the memory is dense; torch's is many times slower."""
    if not exchange:
        monkeypatch.setattr(native, "EXCHANGE", None)
    slow: list[Tensor] = []
    monkeypatch.setattr(torch, "isfinite", lambda t, search=torch.isfinite: (slow.append(t), search(t))[1])
    tensors = [dense((4, 3, 2, 5), dims) for dims in ((0, 1, 2, 3), *ORDERS.values())]
    tensors += [
        torch.randn(1, 8, 1, 3).permute(2, 1, 0, 3),
        torch.randn(8, 1, 3, 1).to(memory_format=LAST),
        torch.ones(()),
    ]
    for tensor in tensors:
        assert native.all_finite(tensor)
        tensor[(-1,) * tensor.ndim] = float("nan")
        assert not native.all_finite(tensor)
    assert not slow
    gapped = torch.full((4, 6), float("inf"))
    gapped[:, ::2] = 1.0
    assert native.all_finite(gapped[:, ::2])
    assert not native.all_finite(gapped[:, ::3])
    assert native.all_finite(torch.ones(1).expand(4))
    assert len(slow) == 2


def test_what_has_gaps_has_no_order() -> None:
    assert layout.order(torch.empty(4, 6)) == (0, 1)
    assert layout.order(torch.empty(4, 6).t()) == (1, 0)
    assert layout.order(torch.empty(4, 6)[:, :3]) is None
    assert layout.order(torch.empty(1).expand(4)) is None
    assert layout.order(torch.empty(2, 1, 3).permute(2, 1, 0)) is not None  # dimensions of one element lie anywhere
    assert layout.order(torch.empty(0, 3).t()) == (0, 1)
    with pytest.raises(ValueError, match=r"gaps or overlaps in memory.*\(6, 1\)"):
        lk.ops.ema_update_([torch.empty(4, 3)], torch.empty(4, 6)[:, :3], [0.5])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(2, 3, 4, 5),
        torch.empty(2, 3, 4, 5).contiguous(memory_format=LAST),
        torch.empty(5, 4).t(),
        torch.empty(()),
    ],
)
@pytest.mark.parametrize("lead", [(), (1,), (3,)])
def test_arrays_are_arranged_as_their_weight(tensor: Tensor, lead: tuple[int, ...]) -> None:
    numbers = torch.randn((*lead, *tensor.shape))
    made = layout.arrange(torch.empty(numbers.numel()), tensor, *lead).copy_(numbers)
    assert torch.equal(made, numbers)
    assert layout.follows(made, tensor)
    assert layout.like(made, tensor) is made
    again = layout.like(numbers, tensor)
    assert layout.follows(again, tensor)
    assert torch.equal(again, numbers)


def test_the_elements_of_an_expanded_tensor_once_each() -> None:
    tensor = torch.zeros(2, 1, 3).expand(5, 2, 4, 3)
    once = layout.distinct(tensor)
    assert once.shape == (1, 2, 1, 3)
    once += 1
    assert tensor.eq(1).all()
    assert layout.distinct(torch.ones(()).expand(2, 3)).shape == (1, 1)


@pytest.mark.parametrize("tensor", [torch.ones(2, 3).t(), torch.ones(1, 3).expand(1, 3), torch.ones(0, 1).expand(0, 4)])
def test_a_tensor_that_repeats_nothing_is_left_as_it_is(tensor: Tensor) -> None:
    assert layout.distinct(tensor) is tensor


LAID: list[Callable[[], Tensor]] = [
    lambda: torch.randn(3, 4).t(),
    lambda: torch.randn(2, 6)[:, ::2],
    lambda: torch.randn(2, 9).chunk(3, 1)[1].t(),
    lambda: torch.randn(2, 1, 3).expand(5, 2, 4, 3),
    lambda: torch.randn(8)[::2].view(2, 1, 2).expand(2, 3, 2),
    lambda: torch.randn(10).unfold(0, 4, 2),
    lambda: torch.randn(0, 1).expand(0, 4),
    lambda: torch.randn(()),
    lambda: torch.randn(3, 3).to_sparse(),
]


@pytest.mark.parametrize("make", LAID)
def test_a_replica_lies_in_memory_as_the_tensor_does(make: Callable[[], Tensor]) -> None:
    tensor = make()
    copied = layout.replica(tensor)
    assert torch.equal(copied.to_dense(), tensor.to_dense())
    if not tensor.is_sparse:
        assert copied.stride() == tensor.stride()
        assert copied.numel() == 0 or copied.data_ptr() != tensor.data_ptr()
        assert layout.replica(tensor, torch.device("meta")).stride() == tensor.stride()


def test_room_takes_what_repeats_at_least_as_much() -> None:
    for room in (torch.zeros(2, 3), layout.room_like(torch.zeros(1, 3).expand(2, 3))):
        layout.fill(room, torch.arange(3.0).expand(2, 3))
        assert room.tolist() == [[0, 1, 2]] * 2
