"""Training with delayed gradients as a pipeline of stages makes it, exactly, in one process and without the engine.

Minibatches are cut into ``m`` microbatches, and a stage updates once in ``m`` of them with the mean gradient. A stage
followed by ``S`` others forwards microbatch ``k`` when ``k − d`` have come back, ``d = S`` under 1F1B and ``2 S`` in
lockstep, so with ``max(start, floor((k − d)/m))`` updates, ``start`` of them in minibatches that were trained one after
the other. Its gradient is that of the network at every stage's weights of then, which a stage's newest versions keep;
or, where the past is reconstructed, the backward goes through the network at the estimates of these weights, with the
activations of the forward, as the engine's does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerpipe.study.optimizers import DelayedOptimizer
from layerpipe.study.past import PastWeights
from layerpipe.study.settings import Settings

Minibatch = tuple[Tensor, Tensor]


@dataclasses.dataclass
class Task:
    """A network, its stages and its data.

    Attributes:
        stage_of: a parameter's name to the first of ``pieces`` equal pieces that it may be in.
        pieces: into how many the network can be cut at most.
        matrices: whether the parameter of this name is preconditioned as one.
        quality: test loss in nats per byte, or test accuracy in per cent.
        validation: the same on data that is neither trained nor tested with; NaN where there is none.
    """

    model: nn.Module
    stage_of: Callable[[str], int]
    pieces: int
    matrices: Callable[[str], bool]
    minibatches: Iterator[Minibatch]
    loss: Callable[[nn.Module, Minibatch], Tensor]
    quality: Callable[[nn.Module], float]
    validation: Callable[[nn.Module], float] = lambda model: math.nan


#: Microbatches between a stage's forward and backward for each stage that follows it.
SCHEDULES = {"sequential": 0, "1f1b": 1, "lockstep": 2}


@dataclasses.dataclass(frozen=True)
class Horizon:
    """The learning rate's factor: linear over ``warmup`` minibatches, then a cosine down to ``final`` at ``steps``."""

    steps: int
    warmup: int = 100
    final: float = 0.1

    def factor(self, k: int) -> float:
        if k < self.warmup:
            return (k + 1) / self.warmup
        progress = min(1.0, (k - self.warmup) / max(1, self.steps - self.warmup))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


class DelayedTraining:
    """Trains ``task.model`` as ``stages`` stages of a schedule would.

    Args:
        microbatches: ``m``, into which a minibatch is cut.
        sync_steps: minibatches that are trained one after the other, without a delay, at the beginning.
        past: the weights that a backward sees, see :func:`layerpipe.study.past.parse`.

    Attributes:
        delays: of each stage, in updates; the mean over a minibatch's microbatches.
        errors: of each stage, the squared distances of the past weights, and of the newest ones, from the true ones,
            summed over every tenth minibatch after the warm-up.
    """

    def __init__(
        self,
        task: Task,
        stages: int,
        schedule: str,
        settings: Settings,
        horizon: Horizon,
        *,
        microbatches: int = 1,
        sync_steps: int = 0,
        past: str = "stash",
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r} is unknown; there are: {', '.join(SCHEDULES)}")
        if not 1 <= stages <= task.pieces:
            raise ValueError(f"stages={stages} is not between 1 and the {task.pieces} pieces of the network")
        self.task, self.settings, self.horizon = task, settings, horizon
        self.microbatches, self.sync_steps = microbatches, sync_steps
        self.ahead = [SCHEDULES[schedule] * (stages - 1 - s) for s in range(stages)]  # microbatches
        self.delays = [ahead / microbatches for ahead in self.ahead]
        self.params: list[list[nn.Parameter]] = [[] for _ in range(stages)]
        matrices: list[list[bool]] = [[] for _ in range(stages)]
        for name, param in task.model.named_parameters():
            stage = task.stage_of(name) * stages // task.pieces
            self.params[stage].append(param)
            matrices[stage].append(task.matrices(name))
        self.weights = [[p.detach().clone() for p in params] for params in self.params]
        self.optimizers = [DelayedOptimizer(w, m, settings) for w, m in zip(self.weights, matrices, strict=True)]
        self.versions = [[[w.clone() for w in weights]] for weights in self.weights]  # by stage, the newest last
        self.past = [
            PastWeights(
                past, weights, math.ceil(n), correlation=settings.decay(n), horizon=settings.weight_prediction * n
            )
            for weights, n in zip(self.weights, self.delays, strict=True)
        ]
        self.errors = [[0.0, 0.0] for _ in range(stages)]
        self.step_count = 0

    def delay(self, stage: int, microbatch: int = 0) -> int:
        """Updates between the forward of this microbatch of the next minibatch and now."""
        k = self.step_count * self.microbatches + microbatch
        return self.step_count - min(
            self.step_count, max(self.sync_steps, (k - self.ahead[stage]) // self.microbatches)
        )

    def step(self) -> float:
        """Trains one minibatch; returns its loss."""
        for params in self.params:
            for param in params:
                param.grad = None
        x, y = next(self.task.minibatches)
        total = 0.0
        for microbatch, part in enumerate(zip(x.chunk(self.microbatches), y.chunk(self.microbatches), strict=True)):
            delays = [self.delay(s, microbatch) for s in range(len(self.versions))]
            self._show([versions[-1 - n] for versions, n in zip(self.versions, delays, strict=True)])
            loss = self.task.loss(self.task.model, part) / self.microbatches
            if not all(past.exact for past in self.past):
                self._show([self._past(s, n) for s, n in enumerate(delays)])  # in place of what autograd has saved
            loss.backward()
            total += loss.item()
        lr = self.settings.lr * self.horizon.factor(self.step_count)
        for stage, (params, optimizer) in enumerate(zip(self.params, self.optimizers, strict=True)):
            n = self.delays[stage] if self.step_count >= self.sync_steps else 0.0
            then = self.versions[stage][-1 - self.delay(stage)]
            exact = self.past[stage].exact
            before = [] if exact else [w.clone() for w in self.weights[stage]]
            seen = optimizer.step([_gradient(p) for p in params], lr, n, then)
            if not exact:
                self.past[stage].see([a - b for a, b in zip(before, self.weights[stage], strict=True)])
            self.versions[stage].append([w.clone() for w in seen])
            del self.versions[stage][: -1 - math.ceil(self.delays[stage])]
        self.step_count += 1
        return total

    def _past(self, stage: int, n: int) -> list[Tensor]:
        """Return what the backward of a minibatch sees whose forward was ``n`` updates ago."""
        true, newest, past = self.versions[stage][-1 - n], self.versions[stage][-1], self.past[stage]
        if past.exact or not n:
            return true
        seen = past.at(newest, n)
        if self.step_count >= self.horizon.warmup and self.step_count % 10 == 0:
            for i, weights in enumerate((seen, newest)):
                pairs = zip(weights, true, strict=True)
                self.errors[stage][i] += sum((a - b.view_as(a)).square().sum().item() for a, b in pairs)
        return seen

    def _show(self, values: Sequence[Sequence[Tensor]]) -> None:
        """To the network's own parameters, by stage."""
        for params, stage in zip(self.params, values, strict=True):
            for param, value in zip(params, stage, strict=True):
                param.data.copy_(value.view_as(param))

    def quality(self) -> float:
        """Of the newest weights, not of predicted ones."""
        self._show(self.weights)
        return self.task.quality(self.task.model)


def _gradient(param: nn.Parameter) -> Tensor:
    return torch.zeros_like(param) if param.grad is None else param.grad


def train(training: DelayedTraining, every: int = 50) -> dict[str, Any]:
    """Trains to the horizon; the mean training loss of every ``every`` minibatches, and the quality at the end."""
    steps, losses, curve = training.horizon.steps, [], []
    for k in range(1, steps + 1):
        losses.append(training.step())
        if k % every == 0 or k == steps:
            curve.append(sum(losses) / len(losses))
            losses = []
            if not math.isfinite(curve[-1]):
                return {"delays": training.delays, "curve": curve, "quality": math.nan}
    return {"delays": training.delays, "curve": curve, "quality": training.quality()}
