"""The gradients that a stage hands upstream are those that autograd would hand on in a network that is not cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import layerpipe
from tests.engine.layouts import Minibatches, Shift, Watched, data, joining, summing, turning
from tests.engine.models import chain
from tests.engine.pipelines import EXECUTORS, assert_equal_state, sgd


def plain(
    modules: list[nn.Module], minibatches: Minibatches, max_norm: float | None = None, optimizer: Any = sgd
) -> dict[str, Tensor]:
    """Trained without a cut; the norm is that of each module's gradient."""
    model = nn.Sequential(*modules)
    trained = [m for m in modules if list(m.parameters())]
    optimizers = [optimizer(list(m.parameters())) for m in trained]
    for x, y in minibatches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            p.grad = p.grad.clone() if p.grad is not None else None  # or weights share what is scaled in place
        for module, each in zip(trained, optimizers, strict=True):
            if max_norm is not None:
                nn.utils.clip_grad_norm_(module.parameters(), max_norm)
            each.step()
    return model.state_dict()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("layers", [turning, summing, joining])
def test_a_gradient_lies_in_memory_as_it_was_made(layers: Any, executor: str, split: bool) -> None:
    torch.set_num_threads(1)
    whole, parts = layers(), layers()
    expected = plain(whole, data(6))
    options: dict[str, Any] = {"executor": executor, "schedule": "sequential", "split_backward": split}
    with layerpipe.Pipeline(parts, F.cross_entropy, sgd, **options) as pipe:
        for i, (x, y) in enumerate(data(6)):
            pipe.step(x, y)
            if i == 3:
                pipe.drain()
        assert_equal_state(pipe.state_dict(), expected)
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


class Sometimes(nn.Module):
    """Its input's gradient is an expanded one, or none such."""

    expanded = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(1)
        return self.inner(y.sum(1, keepdim=True) * y.new_ones(1, 30) if self.expanded else y)  # type: ignore[no-any-return]


def test_whether_gradients_are_copied_is_looked_at_again_after_a_drain() -> None:
    """As a resumed pipeline does."""
    watched, last = Watched(), Sometimes()
    with layerpipe.Pipeline([watched, last], F.cross_entropy, sgd) as pipe:
        for last.expanded in (False, True):
            for x, y in data(4):
                pipe.step(x, y)
            pipe.drain()
    assert watched.strides == [(30, 5, 1)] * 4 + [(1, 0, 0)] * 4


class Twice(nn.Module):
    """A recomputation inside of the backward gives the input a part of its gradient, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        turned = lambda layer, x: layer(x.transpose(1, 2)).transpose(1, 2)
        once: Tensor = checkpoint(lambda h: turned(self.one, x) * h, x * 2, use_reentrant=True)
        return (once + turned(self.other, x)).contiguous()


def test_parts_of_a_gradient_are_not_taken_for_the_whole() -> None:
    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        return [Shift(), Twice(), nn.Sequential(nn.Flatten(), nn.Linear(30, 3))]

    expected = plain(stages(), data(3))
    with layerpipe.Pipeline(stages(), F.cross_entropy, sgd, schedule="sequential") as pipe:
        for x, y in data(3):
            pipe.step(x, y)
        for name, value in pipe.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


class Position(nn.Module):
    """Gradients of input and weight are views of the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return (x.view(2, 12) + self.position.view(2, 12)).view(4, 6)


class Doubled(Position):
    """The same, in memory that is not what it received."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Full(nn.Module):
    """The same, but the weight's gradient is computed in the second part of a split backward."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.weight = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x.view(24).view(4, 6) + torch.addmm(self.bias.view(4, 6), x.tanh(), self.weight)


class Handing(nn.Module):
    """Its weight's gradient is a view of what it received, which the next stage may still need."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.position.view(4, 6) + x.mean()


def nesterov(params: list[Tensor], **_: Any) -> torch.optim.Optimizer:
    """Writes into the gradients that it is given."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, foreach=True)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("optimizer", "max_norm"), [(sgd, 1e-2), (nesterov, None)])
@pytest.mark.parametrize("middle", [Position, Doubled, Full])
@pytest.mark.parametrize("first", [lambda: nn.Linear(6, 6), Handing])
def test_clipping_and_updates_change_no_gradient_of_a_neighbours(
    first: Any, middle: Any, optimizer: Any, max_norm: float | None, executor: str, split: bool
) -> None:
    torch.set_num_threads(1)

    def stages() -> list[nn.Module]:
        torch.manual_seed(0)
        return [first(), middle(), nn.Linear(6, 3)]

    minibatches = [(torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(5)]
    expected = plain(stages(), minibatches, max_norm, optimizer)
    options: dict[str, Any] = {"executor": executor, "schedule": "sequential", "split_backward": split}
    with layerpipe.Pipeline(stages(), F.cross_entropy, optimizer, max_norm=max_norm, **options) as pipe:
        for x, y in minibatches:
            pipe.step(x, y)
        pipe.drain()
        assert_equal_state(pipe.state_dict(), expected)


def test_sparse_gradients_are_clipped() -> None:
    embedding = nn.Embedding(5, 6, sparse=True)
    stages = [nn.Identity(), embedding, nn.Linear(6, 3)]
    optimizer = lambda params, **_: torch.optim.SGD(params, lr=0.1)
    before = embedding.weight.detach().clone()
    options: dict[str, Any] = {"schedule": "sequential", "max_norm": 0.01}
    with layerpipe.Pipeline(stages, F.cross_entropy, optimizer, **options) as pipe:
        pipe.step(torch.randint(0, 5, (4,)), torch.randint(0, 3, (4,)))
    moved = (embedding.weight.detach() - before).norm()
    assert 0 < moved <= 0.1 * 0.01 * 1.001
