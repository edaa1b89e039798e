"""Training with delayed gradients as a pipeline of stages makes it, exactly, in one process and without the engine.

Minibatches are cut into ``m`` microbatches, and a stage updates once in ``m`` of them with the mean gradient. A stage
followed by ``S`` others forwards microbatch ``k`` when ``k − d`` have come back, ``d = S`` under 1F1B and ``2 S`` in
lockstep, so with ``max(start, floor((k − d)/m))`` updates, ``start`` of them in minibatches that were trained one after
the other. Its gradient is that of the network at every stage's weights of then, which a stage's newest versions keep.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.delayed_optimizers import DelayedOptimizer, Settings
from examples import gpt
from layerpipe import data, models
from layerpipe.models.gpt import GPT

Minibatch = tuple[Tensor, Tensor]


@dataclasses.dataclass
class Task:
    """A network, its stages and its data.

    Attributes:
        stage_of: a parameter's name to the first of ``pieces`` equal pieces that it may be in.
        pieces: into how many the network can be cut at most.
        matrices: whether the parameter of this name is preconditioned as one.
        quality: test loss in nats per byte, or test accuracy in per cent.
    """

    model: nn.Module
    stage_of: Callable[[str], int]
    pieces: int
    matrices: Callable[[str], bool]
    minibatches: Iterator[Minibatch]
    loss: Callable[[nn.Module, Minibatch], Tensor]
    quality: Callable[[nn.Module], float]


def _loss(model: nn.Module, minibatch: Minibatch) -> Tensor:
    x, y = minibatch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def gpt_task(seed: int, *, blocks: int = 8, width: int = 128, batch: int = 16, context: int = 64) -> Task:
    """A GPT on the bytes of Python's library; embeddings belong to the first block, the head to the last."""
    torch.manual_seed(seed)
    model = GPT(layers=blocks, width=width, heads=4, context=context, vocabulary=256)
    text, unseen = gpt.sources()

    def draw(source: Tensor, generator: torch.Generator) -> Minibatch:
        starts = torch.randint(len(source) - context, (batch,), generator=generator)
        windows = torch.stack([source[start : start + context + 1] for start in starts.tolist()])
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def endless() -> Iterator[Minibatch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield draw(text, generator)

    generator = torch.Generator().manual_seed(999)
    tests = [draw(unseen, generator) for _ in range(-(-32768 // (batch * context)))]

    def stage_of(name: str) -> int:
        if name.startswith("blocks"):
            return int(name.split(".")[1])
        return 0 if name.startswith(("tokens", "positions")) else blocks - 1

    @torch.no_grad()
    def quality(model: nn.Module) -> float:
        return sum(_loss(model, test).item() for test in tests) / len(tests)

    matrices = lambda name: name.startswith("blocks") and model.get_parameter(name).dim() == 2
    return Task(model, stage_of, blocks, matrices, endless(), _loss, quality)


def resnet_task(seed: int, *, width: int = 8, batch: int = 64) -> Task:
    """A ResNet-18 on Fashion-MNIST; the pieces are the stem, eight blocks and the head."""
    images = data.load("fashion-mnist", data.DEBIAN_FASHION_MNIST)
    torch.manual_seed(seed)
    model = models.make("resnet18", width=width, channels=1, size=28, classes=10)
    blocks = [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]

    def stage_of(name: str) -> int:
        block = name[: len("layer1.0")]
        return 1 + blocks.index(block) if block in blocks else 9 if name.startswith("fc") else 0

    @torch.no_grad()
    def quality(model: nn.Module) -> float:
        model.eval()
        pairs = zip(images.test_x.split(500), images.test_y.split(500), strict=True)
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in pairs)
        model.train()
        return 100 * right / len(images.test_y)

    matrices = lambda name: model.get_parameter(name).dim() > 1 and not name.startswith("fc")
    return Task(model, stage_of, 10, matrices, images.batches(batch, seed), _loss, quality)


TASKS: dict[str, Callable[..., Task]] = {"gpt": gpt_task, "resnet18": resnet_task}

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

    Attributes:
        delays: of each stage, in updates; the mean over a minibatch's microbatches.
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
            self._show([versions[-1 - self.delay(s, microbatch)] for s, versions in enumerate(self.versions)])
            loss = self.task.loss(self.task.model, part) / self.microbatches
            loss.backward()
            total += loss.item()
        lr = self.settings.lr * self.horizon.factor(self.step_count)
        for stage, (params, optimizer) in enumerate(zip(self.params, self.optimizers, strict=True)):
            n = self.delays[stage] if self.step_count >= self.sync_steps else 0.0
            then = self.versions[stage][-1 - self.delay(stage)]
            seen = optimizer.step([_gradient(p) for p in params], lr, n, then)
            self.versions[stage].append([w.clone() for w in seen])
            del self.versions[stage][: -1 - math.ceil(self.delays[stage])]
        self.step_count += 1
        return total

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
