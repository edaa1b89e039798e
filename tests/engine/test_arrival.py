"""The gradients that a stage hands upstream are those that autograd would hand on in a network that is not cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerpipe
import layerpipe_kernels as lk
from tests.engine.models import chain
from tests.engine.pipelines import EXECUTORS, sgd

Strides = list[tuple[int, ...]]


class Watched(nn.Module):
    """A convolution that notes how the gradients of its output lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(6, 6, 3, padding=1)
        self.strides: Strides = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        if y.requires_grad:
            y.register_hook(lambda g: self.strides.append(g.stride()))
        return y


class Transposed(nn.Module):
    """Its input's gradient comes out with the last two dimensions the other way round in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2).contiguous()  # type: ignore[no-any-return]


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Watched(), Transposed(), Watched(), Transposed(), nn.Sequential(nn.Flatten(), nn.Linear(30, 3))]


def data(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 6, 5), torch.randint(0, 3, (4,))) for _ in range(count)]


def plain(modules: list[nn.Module], count: int, **options: Any) -> dict[str, Tensor]:
    model = nn.Sequential(*modules)
    optimizers = [lk.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in modules if list(m.parameters())]
    for x, y in data(count):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for optimizer in optimizers:
            if options:
                nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], **options)
            optimizer.step()
    return model.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_gradient_keeps_its_order_in_memory(executor: str, split: bool) -> None:
    torch.set_num_threads(1)
    whole, parts = layers(), layers()
    expected = plain(whole, 6)
    options: dict[str, Any] = {"executor": executor, "schedule": "sequential", "split_backward": split}
    with layerpipe.Pipeline(parts, F.cross_entropy, sgd, **options) as pipe:
        for i, (x, y) in enumerate(data(6)):
            pipe.step(x, y)
            if i == 3:
                pipe.drain()  # after which it is found out anew
        assert same(pipe.state_dict(), expected)
    for a, b in zip(whole, parts, strict=True):
        if isinstance(a, Watched) and isinstance(b, Watched):
            assert set(b.strides) == set(a.strides)
            assert len(set(a.strides)) == 1
            assert a.strides[0] != (30, 5, 1)  # or there is nothing to see here


def test_gradients_that_lie_as_their_inputs_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = []
    register = Tensor.register_hook
    monkeypatch.setattr(Tensor, "register_hook", lambda x, hook: watched.append(x) or register(x, hook))  # type: ignore[func-returns-value]
    with layerpipe.Pipeline(chain(), F.cross_entropy, sgd) as pipe:
        for _ in range(10):
            pipe.step(torch.randn(4, 6), torch.randint(0, 3, (4,)))
        assert len(watched) == len(pipe.stages) - 1


class Position(nn.Module):
    """Gradients of input and weight are views of the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return (x.view(2, 12) + self.position.view(2, 12)).view(4, 6)


@pytest.mark.parametrize("schedule", ["sequential", "lockstep"])
def test_clipping_leaves_gradients_that_were_handed_on_alone(schedule: str) -> None:
    torch.manual_seed(0)
    parts = [nn.Linear(6, 6), Position(), nn.Linear(6, 3)]
    arrived: list[list[float]] = [[], []]  # in the first stage, without and with clipping
    x, y = torch.randn(4, 6), torch.randint(0, 3, (4,))
    for norms, max_norm in zip(arrived, (None, 1e-3), strict=True):
        first, *others = copy.deepcopy(parts)

        def note(_: Any, __: Any, output: Tensor, norms: list[float] = norms) -> None:
            output.register_hook(lambda g: norms.append(g.norm().item()))

        first.register_forward_hook(note)
        frozen = lambda params, **past: lk.SGD(params, lr=0.0, **past)
        options: dict[str, Any] = {"schedule": schedule, "max_norm": max_norm}
        with layerpipe.Pipeline([first, *others], F.cross_entropy, frozen, **options) as pipe:
            for _ in range(6):
                pipe.step(x, y)
            pipe.drain()
    assert arrived[0] == arrived[1]
