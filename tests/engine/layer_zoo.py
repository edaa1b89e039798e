"""Layers that use their weights in all kinds of ways, from ``(N, WIDTH)`` and what else a stage sends to as much."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 8


class Stage(nn.Module, ABC):
    """What earlier stages have sent besides is mixed in."""

    def forward(self, h: Tensor, *more: Tensor) -> Tensor | tuple[Tensor, ...]:
        for x in more:
            if x.is_floating_point() or x.is_complex():
                h = h + 0.3 * (x.real if x.is_complex() else x).mean()
        return self.run(h)

    @abstractmethod
    def run(self, h: Tensor) -> Tensor | tuple[Tensor, ...]: ...


class Layers(Stage):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def run(self, h: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.layers(h)


class Weights(Stage):
    """Two linear layers and a weight of their own, used by ``use``."""

    def __init__(self, use: Callable[[Weights, Tensor], Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.w = nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH))
        self.register_buffer("running", torch.ones(1, WIDTH))
        self.running: Tensor
        self.use = use

    def run(self, h: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.use(self, h)


def _attention(layer: Weights, h: Tensor) -> Tensor:
    q, k, v = (x.view(1, -1, 2, WIDTH // 2).transpose(1, 2) for x in (layer.a(h), layer.b(h), h @ layer.w))
    return h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, WIDTH)


def _spectral(layer: Weights, h: Tensor) -> Tensor:
    copied = torch.view_as_complex(layer.w[: WIDTH // 2 + 1, :2].contiguous())
    viewed = torch.view_as_complex(layer.w.view(WIDTH, WIDTH // 2, 2))[: WIDTH // 2 + 1, 0].conj()
    return h + torch.fft.irfft(torch.fft.rfft(h) * copied * viewed, n=WIDTH)


def _running(layer: Weights, h: Tensor) -> tuple[Tensor, Tensor]:
    y = layer.a(h)
    with torch.no_grad():
        layer.running.mul_(0.9).add_(0.1 * y.abs().mean())
    return y, layer.running


def _by_value(layer: Weights, h: Tensor) -> Tensor:
    y = layer.a(h)
    return y if h.detach().sum() > 0 else layer.b(torch.relu(y))


def _view(layer: Weights, h: Tensor) -> tuple[Tensor, Tensor]:
    turned = layer.w.t()
    return torch.addmm(layer.a.bias, h, turned), turned


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad @ w, grad.t() @ x


def _frozen() -> nn.Module:
    stage = Weights(lambda s, h: s.b(torch.relu(s.a(h))))
    stage.a.weight.requires_grad_(False)
    return stage


def _normed() -> nn.Module:
    return Layers(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh())


#: Names and factories.
ZOO: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Layers(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
    "no weights": lambda: Layers(nn.Tanh()),
    "batch norm": lambda: Layers(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True)),
    "layer norm": lambda: Layers(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()),
    "convolutions": lambda: Layers(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(),
        nn.Conv2d(4, 2, 3, padding=1), nn.Flatten(),
    ),
    "attention": lambda: Weights(_attention),
    "bilinear": lambda: Weights(
        lambda s, h: torch.tanh(F.bilinear(h, h, s.w[:, None] * s.a.weight[..., None], s.b.bias)),
    ),
    "twice": lambda: Weights(lambda s, h: s.a(torch.relu(s.a(h))) + F.linear(h, s.a.weight.t())),
    "frozen": _frozen,
    "weight norm": _normed,
    "spectral": lambda: Weights(_spectral),
    "slices": lambda: Weights(lambda s, h: (h @ s.w[2:].t() @ s.w[2:]) * s.w.diagonal() + s.w[0]),
    "checkpoint": lambda: Weights(
        lambda s, h: s.b(checkpoint(lambda x: torch.tanh(s.a(x)) @ s.w, h, use_reentrant=False))
    ),
    "function of one's own": lambda: Weights(lambda s, h: _Product.apply(_Product.apply(h, s.w), s.a.weight)),
    "weights by value": lambda: Weights(_by_value),
    "sends a weight": lambda: Weights(lambda s, h: (torch.tanh(h @ s.w), s.w)),
    "sends a view": lambda: Weights(_view),
    "sends a buffer": lambda: Weights(_running),
    "sends its input": lambda: Weights(lambda s, h: (s.a(h), h)),
    "sends an output twice": lambda: Weights(lambda s, h: (y := s.a(h), y, y[:, :4], y > 0)),
    "sends complex numbers": lambda: Weights(lambda s, h: (y := s.a(h), torch.fft.rfft(y))),
    "sends a constant": lambda: Weights(lambda s, h: (s.a(h), s.b(h).detach())),
}  # fmt: skip
