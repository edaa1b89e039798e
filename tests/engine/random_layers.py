"""Layers that do with weights, buffers, gradients and hooks what people do, from ``(N, WIDTH)`` to ``(N, WIDTH)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH = 6

Forward = Callable[["Layer", Tensor], Tensor]


class Layer(nn.Module):
    """A linear layer, a weight, a buffer, and a forward."""

    def __init__(
        self, run: Forward, attach: Callable[[Layer], None] | None = None, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(WIDTH, WIDTH), norm
        self.w = nn.Parameter(0.4 * torch.randn(WIDTH, WIDTH))
        self.register_buffer("scale", torch.ones(WIDTH))
        self.scale: Tensor
        self.plain = torch.ones(WIDTH)  # a tensor that is no buffer
        self.calls = 0
        self.run, self._attach = run, attach
        self.attach()

    def attach(self) -> None:
        if self._attach is not None:
            self._attach(self)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.run(self, x)


class _Kept(torch.autograd.Function):
    """Keeps what it needs as attributes instead of with save_for_backward: ``how`` says what."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, s: Tensor, how: str) -> Tensor:
        ctx.x, ctx.s = x, s
        if how == "view":
            ctx.w = w.t()
            ctx.turned = True
        else:
            ctx.w = w
            ctx.turned = False
        if how == "closure":
            ctx.weight = lambda: w
        return x @ w.t() * s

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        w = ctx.weight() if hasattr(ctx, "weight") else ctx.w.t() if ctx.turned else ctx.w
        grad = grad * ctx.s
        return grad @ w, grad.t() @ ctx.x, None, None


class _Saved(torch.autograd.Function):
    """Saves a view of its weight and the weight detached."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w.t(), w.detach())
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, turned, w = ctx.saved_tensors
        return grad @ (0.5 * turned.t() + 0.5 * w), grad.t() @ x


def _buffer(how: str) -> Forward:
    def run(layer: Layer, x: Tensor) -> Tensor:
        h = layer.a(x)
        new = 0.9 * layer.scale + 0.1 * h.detach().abs().mean(0)
        if how == "copy_":
            layer.scale.copy_(new)
        elif how == "data.copy_":
            layer.scale.data.copy_(new)
        elif how == "data =":
            layer.scale.data = new
        elif how == "set_":
            with torch.no_grad():
                layer.scale.set_(new)
        elif how == "new":
            layer.scale = new
        elif how == "in place":
            with torch.no_grad():
                layer.scale.mul_(0.9).add_(0.1 * h.abs().mean(0))
        elif how == "plain":
            layer.plain.mul_(0.9).add_(0.1 * h.detach().abs().mean(0))
            return torch.tanh(h * layer.plain)
        elif how == "view":
            layer.scale.data.copy_(new)
            return torch.tanh(h * layer.scale.view(2, 3).reshape(WIDTH)[None])
        return torch.tanh(h * layer.scale)

    return run


def _penalized(layer: Layer, x: Tensor) -> Tensor:
    """Uses the gradient of its own output for its output, as gradient penalties and energy models do."""
    if not x.requires_grad:
        x = x.clone().requires_grad_()
    y = torch.tanh(layer.a(x)) @ layer.w
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return y + 0.1 * slope


def _first_order(layer: Layer, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_() if not x.requires_grad else x
    y = torch.tanh(layer.a(x)) @ layer.w
    (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    return y + 0.1 * slope


def _func(how: str) -> Forward:
    def run(layer: Layer, x: Tensor) -> Tensor:
        if how == "grad":
            return x + 0.3 * torch.func.vmap(torch.func.grad(lambda v: torch.tanh(layer.a(v)).sum()))(x)
        if how == "vmap":
            return torch.func.vmap(lambda v: torch.tanh(layer.w @ v))(x)
        if how == "jvp":
            return torch.func.jvp(lambda v: torch.tanh(F.linear(v, layer.w)), (x,), (torch.ones_like(x),))[1]
        if how == "functional_call":
            halves = {name: p * 0.9 for name, p in layer.a.named_parameters()}
            return torch.tanh(torch.func.functional_call(layer.a, halves, (x,)))
        return torch.tanh(torch.func.functional_call(layer.a, {"weight": layer.w.t()}, (x,)))

    return run


def _inner(layer: Layer, x: Tensor) -> Tensor:
    return torch.tanh(layer.a(x)) @ layer.w


def _normed(layer: Layer, x: Tensor) -> Tensor:
    assert layer.norm is not None
    y: Tensor = layer.norm(layer.a(x))
    return y


def _recomputed(inner: Forward, every: int, *, reentrant: bool) -> Forward:
    def run(layer: Layer, x: Tensor) -> Tensor:
        if layer.calls % every:
            return inner(layer, x)
        return checkpoint(inner, layer, x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    return run


def _hooked(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor], inner: Forward = _inner) -> Forward:
    def run(layer: Layer, x: Tensor) -> Tensor:
        with saved_tensors_hooks(pack, unpack):
            return inner(layer, x)

    return run


def _offloaded(layer: Layer, x: Tensor) -> Tensor:
    with save_on_cpu():
        return _inner(layer, x)


def _disabled(layer: Layer, x: Tensor) -> Tensor:
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        return _inner(layer, x)


def _gradient_hook(layer: Layer, x: Tensor) -> Tensor:
    y = layer.a(x)
    if y.requires_grad:
        y.register_hook(lambda g: g * (1 + 0.1 * layer.w.detach().mean()))
    return torch.tanh(y) @ layer.w


def _clipped(layer: Layer) -> None:
    layer.w.register_hook(lambda g: g.clamp(-0.05, 0.05))


def _clipped_in_place(layer: Layer) -> None:
    def clip(param: Tensor) -> None:
        assert param.grad is not None
        param.grad.clamp_(-0.05, 0.05)

    layer.w.register_post_accumulate_grad_hook(clip)


def _frozen(layer: Layer) -> None:
    layer.a.requires_grad_(False)


def _module_hook(layer: Layer) -> None:
    def scaled(module: nn.Module, got: Any, grads: Any) -> Any:
        return tuple(None if g is None else g * (1 + module.weight.detach().mean()) for g in got)

    if not layer.a._backward_hooks:
        layer.a.register_full_backward_hook(scaled)


#: Names and what makes them.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Layer(lambda s, x: torch.tanh(s.a(x))),
    "two linear": lambda: Layer(_inner),
    "in place": lambda: Layer(lambda s, x: F.relu_(s.a(x)) @ s.w),
    "batch norm": lambda: Layer(_normed, norm=nn.BatchNorm1d(WIDTH)),
    "twice": lambda: Layer(lambda s, x: s.a(torch.tanh(s.a(x))) + F.linear(x, s.a.weight.t())),
    "by value": lambda: Layer(lambda s, x: s.a(x) if float(x.detach().sum()) > 0 else torch.tanh(x @ s.w)),
    "kept": lambda: Layer(lambda s, x: torch.tanh(_Kept.apply(x, s.w, s.scale, ""))),
    "kept view": lambda: Layer(lambda s, x: torch.tanh(_Kept.apply(x, s.w, s.scale, "view"))),
    "kept in a closure": lambda: Layer(lambda s, x: torch.tanh(_Kept.apply(x, s.w, s.scale, "closure"))),
    "saved view": lambda: Layer(lambda s, x: torch.tanh(_Saved.apply(x, s.w))),
    "penalty": lambda: Layer(_penalized),
    "first order": lambda: Layer(_first_order),
    "func grad": lambda: Layer(_func("grad")),
    "func vmap": lambda: Layer(_func("vmap")),
    "func jvp": lambda: Layer(_func("jvp")),
    "functional call": lambda: Layer(_func("functional_call")),
    "functional call of another": lambda: Layer(_func("another")),
    "offloaded": lambda: Layer(_offloaded),
    "hooks that do nothing": lambda: Layer(_hooked(lambda t: t, lambda t: t)),
    "hooks that cast": lambda: Layer(_hooked(lambda t: t.double(), lambda t: t.float())),
    "hooks around a buffer": lambda: Layer(_hooked(lambda t: t, lambda t: t, _buffer("data.copy_"))),
    "hooks disabled": lambda: Layer(_disabled),
    "checkpoint": lambda: Layer(_recomputed(_inner, 1, reentrant=False)),
    "checkpoint for some": lambda: Layer(_recomputed(_inner, 3, reentrant=False)),
    "reentrant": lambda: Layer(_recomputed(_inner, 1, reentrant=True)),
    "reentrant for some": lambda: Layer(_recomputed(_inner, 2, reentrant=True)),
    "checkpoint of a norm": lambda: Layer(_recomputed(_normed, 2, reentrant=False), norm=nn.BatchNorm1d(WIDTH)),
    "weight norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh()),
    "spectral norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Tanh()),
    "gradient hook": lambda: Layer(_gradient_hook),
    "module hook": lambda: Layer(_inner, _module_hook),
    "clipped": lambda: Layer(_inner, _clipped),
    "clipped in place": lambda: Layer(_inner, _clipped_in_place),
    "frozen": lambda: Layer(_inner, _frozen),
    "dropout": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)),
    "sparse": lambda: Layer(
        lambda s, x: torch.tanh(torch.sparse.mm(torch.eye(WIDTH).to_sparse(), (x @ s.w).t()).t())
    ),
    **{f"buffer {how}": lambda how=how: Layer(_buffer(how)) for how in
       ("copy_", "data.copy_", "data =", "set_", "new", "in place", "plain", "view")},
}  # fmt: skip
