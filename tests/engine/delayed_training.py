"""Delayed training in plain torch, without a line of the engine: slow and obvious.

One thread, one graph per minibatch and stage. Before a backward, the values that its forward saw are copied into the
very parameters that the graph refers to, and afterwards the current ones, which the optimizer has apart, back.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Values = list[Tensor]
Tensors = tuple[Tensor, ...]


class DelayedTraining:
    """Trains ``stages`` in place.

    Args:
        stages: as the pipeline takes them.
        loss_fn: ``loss_fn(*outputs, target)``.
        optimizer: of a stage's parameters.
        schedule: ``lockstep``, ``1f1b`` or ``sequential``.
        past: ``stash`` or ``latest``.
        max_norm: of each stage's gradient.
        accumulate: minibatches per update.
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
    ) -> None:
        self.stages, self.loss_fn = stages, loss_fn
        self.schedule, self.past, self.max_norm = schedule, past, max_norm
        self.accumulate, self.backwards = accumulate, [0] * len(stages)
        self.params = [[p for p in stage.parameters() if p.requires_grad] for stage in stages]
        self.current = [[nn.Parameter(p.detach().clone()) for p in params] for params in self.params]
        self.optimizers = [optimizer(params) if params else None for params in self.current]

    def train(self, data: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Fill the pipe, train on all minibatches, drain; returns their losses."""
        self.data: Sequence[tuple[Tensor, Tensor]] = data
        self.sent: dict[tuple[str, int, int], Any] = {}  # what, to which stage, of which minibatch
        self.kept: dict[tuple[int, int], tuple[Tensors, Tensors, Values]] = {}
        self.losses: list[Tensor] = []
        for tick in range(len(data) + 2 * len(self.stages)):
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
        inputs = tuple(_leaf(x) for x in self.sent.pop(("activations", s, m))) if s else (self.data[m][0],)
        outputs = self.stages[s](*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if s == len(self.stages) - 1:
            outputs = (self.loss_fn(*outputs, self.data[m][1]),)
            self.losses.append(outputs[0].detach())
        else:
            self.sent["activations", s + 1, m] = [copy.deepcopy(y.detach()) for y in outputs]  # strides, too
        self.kept[s, m] = inputs, outputs, [p.detach().clone() for p in self.params[s]]

    def backward(self, s: int, m: int) -> None:
        inputs, outputs, then = self.kept.pop((s, m))
        params, current, optimizer = self.params[s], self.current[s], self.optimizers[s]
        grads = self.sent.pop(("gradients", s, m), [None])
        for param, values in zip(params, then if self.past == "stash" else current, strict=True):
            param.grad = None
            param.data.copy_(values.detach())
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
        self.backwards[s] += 1
        if optimizer is not None and self.backwards[s] % self.accumulate == 0:
            if self.max_norm is not None:
                nn.utils.clip_grad_norm_(current, self.max_norm)
            optimizer.step()
            optimizer.zero_grad()
        for param, own in zip(params, current, strict=True):
            param.data.copy_(own.detach())


def _leaf(x: Tensor) -> Tensor:
    return x.requires_grad_(x.is_floating_point() or x.is_complex())
