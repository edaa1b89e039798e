"""Delayed training in plain torch, without a line of the engine: slow and obvious.

One thread, one graph per minibatch and stage. Each minibatch has a copy of the stage, with the weights, buffers and
modes that its forward found, and its backward runs on that copy: nothing that comes between can change anything there.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Tensors = tuple[Tensor, ...]
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


class DelayedTraining:
    """Trains ``stages`` in place.

    Args:
        stages: as the pipeline takes them. A module with a method ``attach`` is called when it has been copied, for
            what a copy loses, such as hooks on its parameters.
        loss_fn: ``loss_fn(*outputs, target)``.
        optimizer: of a stage's parameters.
        schedule: ``lockstep``, ``1f1b`` or ``sequential``.
        past: ``stash`` or ``latest``.
        max_norm: of each stage's gradient.
        accumulate: minibatches per update.
        random: the state of each stage's generator; torch's own is drawn from by default.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        loss_fn: Callable[..., Tensor],
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        *,
        schedule: str,
        past: str,
        max_norm: float | None = None,
        accumulate: int = 1,
        random: Sequence[Tensor] | None = None,
    ) -> None:
        self.stages, self.loss_fn = stages, loss_fn
        self.schedule, self.past, self.max_norm = schedule, past, max_norm
        self.accumulate, self.backwards = accumulate, [0] * len(stages)
        self.random = list(random) if random is not None else None
        self.optimizers = [optimizer(params) if (params := _trained(stage)) else None for stage in stages]

    def train(
        self, data: Sequence[tuple[Tensor, Tensor]], before: Mapping[int, Callable[[], Any]] | None = None
    ) -> list[Tensor]:
        """Fill the pipe, train on all minibatches, drain; returns their losses.

        Args:
            before: what to call before a tick.
        """
        self.data: Sequence[tuple[Tensor, Tensor]] = data
        self.sent: dict[tuple[str, int, int], Any] = {}  # what, to which stage, of which minibatch
        self.kept: dict[tuple[int, int], tuple[nn.Module, Tensors, Tensors]] = {}
        self.losses: list[Tensor] = []
        for tick in range(len(data) + 2 * len(self.stages)):
            if before and tick in before:
                before[tick]()
            for kind, s, m in self.actions(tick):
                if 0 <= m < len(data):
                    (self.forward if kind == "F" else self.backward)(s, m)
        assert not self.kept
        return self.losses

    def actions(self, tick: int) -> Iterator[tuple[str, int, int]]:
        """Forward or backward, stage, minibatch."""
        last = len(self.stages) - 1
        for s in range(last + 1):
            yield "F", s, tick - (0 if self.schedule == "sequential" else s)
        for s in range(last, -1, -1):
            yield "B", s, tick - {"lockstep": 2 * last - s, "1f1b": last, "sequential": 0}[self.schedule]

    def forward(self, s: int, m: int) -> None:
        leaves = self.sent.pop(("activations", s, m)) if s else (self.data[m][0],)
        layers = copy.deepcopy(self.stages[s])
        for module in layers.modules():
            if hasattr(module, "attach"):
                module.attach()
        inputs = tuple(x.clone() if x.requires_grad and getattr(layers, "changes_inputs", False) else x for x in leaves)
        if self.random is not None:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.random[s])
        outputs = layers(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if s == len(self.stages) - 1:
            outputs = (self.loss_fn(*outputs, self.data[m][1]),)
            self.losses.append(outputs[0].detach())
        else:
            handed = [copy.deepcopy(y.detach()).requires_grad_(y.requires_grad) for y in outputs]  # strides, too
            self.sent["activations", s + 1, m] = handed
        if self.random is not None:
            self.random[s] = torch.get_rng_state()
            torch.set_rng_state(outside)
        _take_state(self.stages[s], layers)
        self.kept[s, m] = layers, tuple(leaves), outputs

    def backward(self, s: int, m: int) -> None:
        layers, inputs, outputs = self.kept.pop((s, m))
        params, current, optimizer = _trained(layers), _trained(self.stages[s]), self.optimizers[s]
        grads = self.sent.pop(("gradients", s, m), [None])
        for param, now in zip(params, current, strict=True):
            param.grad = None
            if self.past == "latest":
                param.data.copy_(now.detach())
        arrived = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
        if s < len(self.stages) - 1:
            arrived = [(y, g) for y, g in arrived if g is not None]
        upstream: list[Tensor | None] = [None] * len(inputs)
        for i, x in enumerate(inputs if s else ()):
            if x.requires_grad:
                x.register_hook(functools.partial(upstream.__setitem__, i))
        if arrived:
            begin = [g if s < len(self.stages) - 1 else torch.full_like(y, 1 / self.accumulate) for y, g in arrived]
            torch.autograd.backward([y for y, _ in arrived], begin)
        if s:
            # As the layers made it; the leaf's own may be a copy that lies otherwise in memory.
            self.sent["gradients", s - 1, m] = upstream
        for param, own in zip(params, current, strict=True):
            if param.grad is not None:
                grad = param.grad.clone(memory_format=torch.contiguous_format)
                own.grad = grad if own.grad is None else own.grad + grad
        if self.schedule == "sequential" or s == len(self.stages) - 1:  # no delay: a recomputation is plain torch's
            _take_state(self.stages[s], layers)
        self.backwards[s] += 1
        if optimizer is not None and self.backwards[s] % self.accumulate == 0:
            if self.max_norm is not None:
                nn.utils.clip_grad_norm_(current, self.max_norm)
            optimizer.step()
            optimizer.zero_grad()


def _trained(stage: nn.Module) -> list[nn.Parameter]:
    return [p for p in stage.parameters() if p.requires_grad]


def _take_state(to: nn.Module, of: nn.Module) -> None:
    """What a forward changes besides weights: buffers and other attributes."""
    for mine, theirs in zip(to.modules(), of.modules(), strict=True):
        for name, buffer in theirs._buffers.items():
            if buffer is not None:
                mine._buffers[name] = _taken(mine._buffers[name], buffer)
        for name, value in vars(theirs).items():
            if isinstance(value, Tensor):
                setattr(mine, name, _taken(getattr(mine, name), value))
            elif isinstance(value, int | float | str):
                mine.__dict__[name] = value


def _taken(mine: Tensor | None, theirs: Tensor) -> Tensor:
    if mine is None or mine.shape != theirs.shape:
        return theirs.detach().clone()
    return mine.detach().copy_(theirs.detach())


def delayed_sgd(stages: list[nn.Module], data: list[tuple[Tensor, Tensor]], schedule: str = "lockstep") -> nn.Module:
    """The stages in one, trained with stored weights by torch's SGD."""
    simulated = DelayedTraining(
        stages, F.cross_entropy, lambda params: torch.optim.SGD(params, **SGD), schedule=schedule, past="stash"
    )
    simulated.train(data)
    return nn.Sequential(*stages)
