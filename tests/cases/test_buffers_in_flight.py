"""Buffers and tensors at boundaries that change while minibatches are in flight."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import layerpipe
import layerpipe_kernels as lk
from layerpipe.stage import saved
from tests.cases.alike import SGD, trained_alike
from tests.engine.models import chain, minibatches
from tests.engine.random_layers import LAYERS

BUFFERS = [name for name in LAYERS if name.startswith("buffer")]


def sgd(params: list[Tensor], **past: Any) -> lk.SGD:
    return lk.SGD(params, **SGD, **past)


@pytest.mark.parametrize("executor", ["serial", "threads"])
@pytest.mark.parametrize("name", BUFFERS)
def test_a_backward_has_the_buffers_of_its_forward(name: str, executor: str) -> None:
    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Linear(6, 6), LAYERS[name](), nn.Linear(6, 3)]

    trained_alike(stages, minibatches(9), executor)


class Copied(nn.BatchNorm1d):
    """Normalizes with copies of the statistics where it does not update them."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        mean, var = self.running_mean.clone(), self.running_var.clone()
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)


@pytest.mark.parametrize("executor", ["serial", "threads"])
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
def test_a_mode_may_be_switched_while_the_pipe_is_full(schedule: str, executor: str) -> None:
    def trained(norm: type[nn.Module]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        stages = [nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), norm(6), nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 3)]
        with layerpipe.Pipeline(
            stages, F.cross_entropy, sgd, past="stash", schedule=schedule, executor=executor
        ) as pipe:
            for i, (x, y) in enumerate(minibatches(20)):
                if i % 4 == 0:
                    pipe.train(i % 8 == 0)
                pipe.step(x * 3 + 1, y)
            pipe.drain()
            return pipe.state_dict()

    want, got = trained(Copied), trained(nn.BatchNorm1d)
    assert all(torch.equal(value, got[name]) for name, value in want.items())


class WithMask(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x.clone()


class MaskInPlace(nn.Linear):
    def forward(self, h: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        mask[mask < 0] = 0.0
        return super().forward(h * mask)


class MaskByNumpy(nn.Linear):
    def forward(self, h: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(h * float(mask.numpy().mean()))


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.elu_(x))


@pytest.mark.parametrize("executor", ["serial", "threads"])
@pytest.mark.parametrize("kind", ["relu", "elu", "mask in place", "numpy"])
def test_what_arrives_may_be_used_as_in_a_network_that_is_not_cut(kind: str, executor: str) -> None:
    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        return {
            "relu": [nn.Linear(6, 6), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6)), nn.Linear(6, 3)],
            "elu": [nn.Linear(6, 6), Rectified(6, 6), nn.Linear(6, 3)],
            "mask in place": [WithMask(6, 6), MaskInPlace(6, 6), nn.Linear(6, 3)],
            "numpy": [WithMask(6, 6), MaskByNumpy(6, 6), nn.Linear(6, 3)],
        }[kind]

    plain, ours = stages(), stages()
    optimizer = torch.optim.SGD([p for stage in plain for p in stage.parameters()], foreach=False, **SGD)
    with layerpipe.Pipeline(ours, F.cross_entropy, sgd, schedule="sequential", executor=executor) as pipe:
        for x, y in minibatches(6):
            out: Any = (x,)
            for stage in plain:
                out = stage(*out)
                out = out if isinstance(out, tuple) else (out,)
            optimizer.zero_grad()
            F.cross_entropy(*out, y).backward()
            optimizer.step()
            pipe.step(x, y)
        pipe.drain()
    for mine, other in zip(ours, plain, strict=True):
        assert all(map(torch.equal, mine.parameters(), other.parameters()))


def test_what_needs_no_gradient_arrives_without_one() -> None:
    seen: list[bool] = []

    class Looks(MaskInPlace):
        def forward(self, h: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            seen.extend((h.requires_grad, mask.requires_grad))
            return super().forward(h, mask)

    with layerpipe.Pipeline([WithMask(6, 6), Looks(6, 6), nn.Linear(6, 3)], F.cross_entropy, sgd) as pipe:
        for x, y in minibatches(4):
            pipe.step(x, y)
    assert set(zip(seen[::2], seen[1::2], strict=True)) == {(True, False)}


def test_an_input_changed_in_place_that_shares_its_memory_with_another_is_refused() -> None:
    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y, y[:, :3]

    class InPlace(nn.Linear):
        def forward(self, x: Tensor, part: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(F.relu_(x)) + part.sum()

    with (
        layerpipe.Pipeline([Twice(6, 6), InPlace(6, 3)], F.cross_entropy, sgd) as pipe,
        pytest.raises(layerpipe.StageError, match=r"stage 1 .*input 0 in place.*same memory as input 1.*clone"),
    ):
        for x, y in minibatches(3):
            pipe.step(x, y)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.view(5, 6) + self.table.view(5, 6)).view(1, 5, 6)


class Head(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


@pytest.mark.parametrize("kind", ["of the optimizer", "of all optimizers"])
def test_a_hook_that_clips_in_place_leaves_upstream_gradients_alone(kind: str) -> None:
    def clip(optimizer: Any, *_: Any) -> None:
        nn.utils.clip_grad_value_([p for g in optimizer.param_groups for p in g["params"]], 1e-3)

    def trained(make: Any) -> list[nn.Module]:
        torch.manual_seed(0)
        stages = [nn.Linear(6, 6), Positions(), Positions(), Head(6, 3)]
        handle = register_optimizer_step_pre_hook(clip) if kind == "of all optimizers" else None
        g = torch.Generator().manual_seed(1)
        step = make(stages)
        for _ in range(8):
            step(torch.randn(1, 5, 6, generator=g), torch.randint(3, (5,), generator=g))
        if handle is not None:
            handle.remove()
        return stages

    def hooked(optimizer: Any) -> Any:
        if kind == "of the optimizer":
            optimizer.register_step_pre_hook(clip)
        return optimizer

    def plain(stages: list[nn.Module]) -> Any:
        network = nn.Sequential(*stages)
        optimizer = hooked(torch.optim.SGD(network.parameters(), **SGD))

        def step(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()

        return step

    def piped(stages: list[nn.Module]) -> Any:
        pipe = layerpipe.Pipeline(
            stages, F.cross_entropy, lambda params, **past: hooked(sgd(params, **past)), schedule="sequential"
        )
        return pipe.step

    for mine, other in zip(trained(piped), trained(plain), strict=True):
        for ours, theirs in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_large_constant_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """But what is written to it between a forward and its backward is noticed."""

    monkeypatch.setattr(saved, "_LARGEST_COPY", 100)

    class Large(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 6)
            self.register_buffer("table", torch.ones(26, 1))
            self.table: Tensor

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y + 1e-9 * (self.table * y.mean()).mean()

    stages = [*chain(2)[:1], Large(), nn.Linear(6, 3)]
    with (
        layerpipe.Pipeline(stages, F.cross_entropy, sgd) as pipe,
        pytest.raises(layerpipe.StageError, match=r"stage 1 .*modified in place"),
    ):
        for x, y in minibatches(6):
            pipe.step(x, y)
            stages[1].table.mul_(0.5)  # type: ignore[union-attr,operator]


class KeptBuffer(torch.autograd.Function):
    """Multiplies by a buffer, which it keeps in a way that autograd does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: Tensor, clone: bool) -> Tensor:
        ctx.buffer = buffer.clone() if clone else buffer
        return x * buffer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.buffer[1:].repeat(2)[:6], None, None


class Growing(nn.Module):
    def __init__(self, clone: bool, writes: bool) -> None:
        super().__init__()
        self.layer, self.clone, self.writes = nn.Linear(6, 6), clone, writes
        self.register_buffer("scale", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.scale.mul_(1.1)
        return KeptBuffer.apply(self.layer(x), self.scale, self.clone)


@pytest.mark.parametrize("schedule", ["lockstep", "1f1b"])
@pytest.mark.parametrize(("clone", "writes"), [(False, True), (True, True), (False, False)])
def test_a_buffer_that_a_backward_reads_is_that_of_its_forward_or_refused(
    clone: bool, writes: bool, schedule: str
) -> None:
    stages = [nn.Linear(6, 6), Growing(clone, writes), nn.Linear(6, 6), nn.Linear(6, 3)]
    pipe = layerpipe.Pipeline(
        stages, F.cross_entropy, lambda params, **past: lk.SGD(params, lr=0.1, **past), schedule=schedule
    )
    refused = contextlib.nullcontext()
    if writes and not clone:
        refused = pytest.raises(layerpipe.StageError, match=r"stage 1 .*reads the buffer scale.*save_for_backward")
    with pipe, refused:
        for x, y in minibatches(6):
            pipe.step(x, y)
