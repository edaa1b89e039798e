"""Everything around a step that a training script may use of torch's optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim.optimizer import register_optimizer_step_post_hook

import layerpipe_kernels as lk

MAKE: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "Adam": ("Adam", {"lr": 0.01}),
    "AdamW": ("AdamW", {"lr": 0.01}),
}
PAST: list[dict[str, Any]] = [{}, {"delay": 3}]


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(8, 6, generator=generator), torch.randint(2, (8,), generator=generator)) for _ in range(count)]


class Both:
    """torch's loop and ours, side by side on twin networks."""

    def __init__(self, kind: str, past: dict[str, Any]) -> None:
        name, options = MAKE[kind]
        self.models = network(), network()
        self.optimizers: tuple[torch.optim.Optimizer, Any] = (
            getattr(torch.optim, name)(self.models[0].parameters(), foreach=False, **options),
            getattr(lk, name)(self.models[1].parameters(), **options, **past),
        )

    def __iter__(self) -> Any:
        return iter(zip(self.models, self.optimizers, strict=True))

    def check(self) -> None:
        for a, b in zip(*(m.parameters() for m in self.models), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def backward(model: nn.Module, batch: tuple[Tensor, Tensor], scale: float = 1.0) -> Tensor:
    loss = nn.functional.cross_entropy(model(batch[0]), batch[1]) * scale
    loss.backward()
    return loss


SCHEDULERS: dict[str, Any] = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=25),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1, threshold=0.5),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("past", PAST, ids=str)
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_clipping_and_accumulation_agree_with_torch(kind: str, past: dict[str, Any], scheduler: Any) -> None:
    both = Both(kind, past)
    for model, optimizer in both:
        schedule = scheduler(optimizer)
        for first, second in pairs(batches(40)):
            optimizer.zero_grad()
            loss = backward(model, first, 0.5) + backward(model, second, 0.5)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            plateau = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
            schedule.step(*([loss.item()] if plateau else []))
    both.check()
    assert both.optimizers[0].param_groups[0]["lr"] == both.optimizers[1].param_groups[0]["lr"]


def pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("past", PAST, ids=str)
def test_a_closure_is_called_with_gradients_and_its_loss_returned(kind: str, past: dict[str, Any]) -> None:
    both = Both(kind, past)
    losses: list[list[float]] = []
    for model, optimizer in both:

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            return backward(model, batches(1)[0])

        with torch.no_grad():
            losses.append([optimizer.step(closure).item() for _ in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    both.check()


@pytest.mark.parametrize("kind", MAKE)
def test_hooks_may_look_and_may_change_the_arguments(kind: str) -> None:
    _, (model, optimizer) = Both(kind, {"delay": 2})
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("pre"))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 42.0), {}))
    handle = optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("post"))
    everywhere = register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("any"))
    backward(model, batches(1)[0])
    try:
        assert optimizer.step() == 42.0
    finally:
        everywhere.remove()
    assert seen == ["pre", "post", "any"]
    handle.remove()
    optimizer.step()
    assert seen == ["pre", "post", "any", "pre"]


@pytest.mark.parametrize("kind", MAKE)
def test_the_profiler_names_the_step(kind: str) -> None:
    _, (model, optimizer) = Both(kind, {})
    backward(model, batches(1)[0])
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert f"Optimizer.step#{kind}.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("past", PAST, ids=str)
def test_a_compiled_step_and_a_compiled_training_step_agree(kind: str, past: dict[str, Any]) -> None:
    both = Both(kind, past)
    (plain, expected), (model, optimizer) = both
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter)

    def train(batch: tuple[Tensor, Tensor]) -> None:
        backward(model, batch)
        optimizer.step()

    compiled = torch.compile(train, backend="eager")
    for i, batch in enumerate(batches(10)):
        expected.zero_grad()
        backward(plain, batch)
        expected.step()
        optimizer.zero_grad()
        if i < 5:
            backward(model, batch)
            step()
        else:
            compiled(batch)
    both.check()
    assert counter.frame_count == 0  # called as it is: nothing to compile, nothing to compile again
    if past:
        assert optimizer.param_groups[0]["updates"] == 10


COMPILED: dict[str, Any] = {
    "SGD": lambda params: lk.SGD(params, lr=0.1, momentum=0.9, delay=3),
    "AdamW": lambda params: lk.AdamW(params, lr=0.1, delay=3, past=lk.Blend(dtype=torch.bfloat16)),
    "Lamb": lambda params: lk.Lamb(params, lr=0.1, delay=3),
    "PastWeights": lambda params: lk.PastWeights(torch.optim.SGD(params, lr=0.1, momentum=0.9), delay=3),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_a_compiled_step_gives_the_bits_of_one_that_is_not(kind: str) -> None:
    """Whatever the compiler: nothing is compiled, not even once in every step for its new numbers."""
    runs = []
    for how in ("called", "compiled"):
        params = list(network().parameters())
        optimizer, counter = COMPILED[kind](params), CompileCounter()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        step = torch.compile(optimizer.step, backend=counter) if how == "compiled" else optimizer.step
        generator = torch.Generator().manual_seed(3)
        for _ in range(8):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator)
            step()
            schedule.step()
        assert counter.op_count == 0
        runs.append([*params, *(optimizer.past_weight(p) for p in params)])
    assert all(map(torch.equal, *runs))


def test_a_step_refuses_to_be_part_of_a_full_graph() -> None:
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    optimizer = lk.SGD([param], lr=0.1, momentum=0.9, delay=3)

    def train() -> Tensor:
        optimizer.step()
        return param * 2

    with pytest.raises(RuntimeError, match="_uncompiled_step"):
        torch.compile(train, fullgraph=True, backend="eager")()
    assert torch.equal(param, torch.ones(3))
    assert optimizer.param_groups[0]["updates"] == 0


@pytest.mark.parametrize("kind", MAKE)
def test_groups_are_added_and_steps_go_on(kind: str) -> None:
    both = Both(kind, {"delay": 2})
    extra = [torch.ones(4, requires_grad=True) for _ in range(2)]
    for (model, optimizer), param in zip(both, extra, strict=True):
        for i, batch in enumerate(batches(6)):
            optimizer.zero_grad(set_to_none=i % 2 == 0)
            backward(model, batch)
            if i == 3:
                optimizer.add_param_group({"params": [param], "lr": 0.5})
            if i >= 3:
                param.grad = torch.full((4,), 0.1 * i)
            optimizer.step()
    both.check()
    torch.testing.assert_close(*extra, rtol=1e-5, atol=1e-6)


def test_the_options_are_in_the_representation() -> None:
    shown = repr(lk.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.25, delay=6))
    assert shown.startswith("SGD (\nParameter Group 0\n")
    for line in ("lr: 0.25", "delay: 6", "past: blend", "weight_decay: 0.0"):
        assert line in shown


class Sharded(torch.nn.Parameter):
    """What a DTensor is recognised by."""

    def to_local(self) -> Tensor:
        return self.data


@pytest.mark.parametrize("make", [lk.SGD, lk.AdamW, lk.Lamb])
def test_dtensors_are_refused_by_name(make: Any) -> None:
    with pytest.raises(TypeError, match="'shard' is a DTensor, which is not supported"):
        make([("shard", Sharded(torch.ones(3)))])


@pytest.mark.parametrize("kind", MAKE)
def test_without_a_delay_nothing_extra_is_kept(kind: str) -> None:
    (plain, expected), (model, optimizer) = Both(kind, {})
    for each, stepper in ((plain, expected), (model, optimizer)):
        backward(each, batches(1)[0])
        stepper.step()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        kept = {k for k, v in expected.state[a].items() if v is not None}
        assert set(optimizer.state[b]) == kept
    assert optimizer.history_bytes() == 0


@pytest.mark.parametrize("make", [lk.Adam, lk.AdamW, lk.Lamb])
def test_betas_in_tensors_design_a_past(make: Any) -> None:
    pasts = []
    for betas in ((0.9, 0.99), (torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64))):
        param = torch.nn.Parameter(torch.ones(5))
        optimizer = make([{"params": [param], "betas": betas}], lr=0.1, delay=3)
        for step in range(5):
            param.grad = torch.full((5,), 1.0 + step)
            optimizer.step()
        pasts.append(optimizer.past_weight(param))
    assert torch.equal(*pasts)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("past", [{}, {"delay": 2}, {"delay": 2, "past": "stash"}])
def test_parameters_on_the_meta_device_are_stepped_without_memory(kind: str, past: dict[str, Any]) -> None:
    param = torch.nn.Parameter(torch.ones(5, device="meta"))
    optimizer = getattr(lk, kind)([param], lr=0.1, **past)
    for _ in range(4):
        param.grad = torch.ones(5, device="meta")
        optimizer.step()
        assert optimizer.past_weight(param).is_meta
