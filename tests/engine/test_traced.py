"""What is cut is the model, whatever its code asks of what it is given; or it is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerpipe import split
from layerpipe.models.resnet import resnet18
from layerpipe.partition.forward import trace


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)


class Optional(Base):
    """Does one thing more where it is not given something."""

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        h = self.a(x)
        h = torch.tanh(h) if noise is None else h + noise
        return self.b(h)  # type: ignore[no-any-return]


class Named(Base):
    def forward(self, x: Tensor, *, scale: float = 2.0, how: str | None = None) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(h) * scale if how is None else h)  # type: ignore[no-any-return]


class Causal(nn.Module):
    """Hands what it was not given on to a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rest, self.last = nn.Linear(6, 6), nn.ModuleList([Attention(), Attention()]), nn.Linear(6, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.first(x)
        for layer in self.rest:
            x = layer(x, mask)
        return self.last(x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x[:, None]).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)[:, 0]


class Asking(Base):
    def forward(self, x: Any) -> Tensor:
        h = self.a(x)
        return self.b(torch.tanh(h) if isinstance(h, Tensor) else h)  # type: ignore[no-any-return]


class Frozen(Base):
    """Trains its second layer alone."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x)
        return self.b(h)  # type: ignore[no-any-return]


class Mixed(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.a(x)
        return self.b(h.float())  # type: ignore[no-any-return]


class Noisy(Base):
    """Draws another noise every time."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) + torch.randn(6)
        return self.b(h)  # type: ignore[no-any-return]


class Adding(Base):
    """In place, on a tensor that has no other name."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)[:, :5]
        h += x[:, :5]
        h = F.pad(h, (0, 1))
        h *= 2
        return self.b(h)  # type: ignore[no-any-return]


class Dropping(Base):
    """A function that does nothing in evaluation, and a constant that is made where the input lies."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.a(x), 0.5, self.training)
        return self.b(h + torch.ones(6, device=h.device))  # type: ignore[no-any-return]


class Overwriting(Base):
    """In place, on a part of a tensor that is looked at as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 2
        part = h[:, :3]
        part += 1
        return self.b(h)  # type: ignore[no-any-return]


def outcome(model: nn.Module, stages: list[nn.Module], x: Tensor) -> list[Tensor | None]:
    """Output, and the weights' gradients."""
    model.zero_grad()
    torch.manual_seed(1)
    y: Any = x
    for stage in stages:
        y = stage(*y) if isinstance(y, tuple) else stage(y)
    y.sum().backward()
    return [y, *(None if p.grad is None else p.grad.clone() for p in model.parameters())]


MODELS = (Optional, Named, Causal, Asking, Frozen, Mixed, Noisy, Adding, Overwriting)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("balance", ["params", "flops"])
def test_what_is_cut_computes_what_the_model_does(kind: type[nn.Module], balance: str) -> None:
    x = torch.randn(5, 6)
    model = kind()
    before = copy.deepcopy(model.state_dict())
    stages = split(model, 2, (x,), balance=balance)
    for _ in range(2):
        for a, b in zip(outcome(model, [model], x), outcome(model, stages, x), strict=True):
            assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", [Optional, Named, Causal])
def test_without_examples_what_has_a_default_is_not_given(kind: type[nn.Module]) -> None:
    x, model = torch.randn(5, 6), kind()
    stages = split(model, 2, balance="params")
    assert torch.equal(outcome(model, stages, x)[0], outcome(model, [model], x)[0])  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        stages[0](x, torch.randn(5, 6))


def test_what_is_given_is_used_and_a_none_that_is_given_is_none() -> None:
    x, noise, model = torch.randn(5, 6), torch.randn(5, 6), Optional()
    first, second = split(model, 2, (x, noise))
    assert torch.equal(second(first(x, noise)), model(x, noise))
    first, second = split(model, 2, (x, None))
    assert torch.equal(second(first(x, None)), model(x))


def test_what_torch_fx_can_follow_is_cut_as_finely_as_it_can() -> None:
    with_fx = [str(node.target) for node in trace(Adding(), (torch.randn(5, 6),)).nodes]
    assert "a" in with_fx
    assert not any("aten" in name for name in with_fx)
    assert "a" in [str(node.target) for node in trace(Dropping(), (torch.randn(5, 6),)).nodes]
    pytest.importorskip("torchvision")
    model = resnet18(width=4)
    names = [str(node.target) for node in trace(model, (torch.randn(2, 3, 8, 8),)).nodes]
    assert "layer1.0.conv1" in names
