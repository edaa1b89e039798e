"""One training run from a config to a result."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from layerpipe import models
from layerpipe.cli import optimizers
from layerpipe.cli.config import TrainConfig
from layerpipe.cli.processes import gather_after_interrupt
from layerpipe.cli.signals import number_of
from layerpipe.data import Images
from layerpipe.errors import DivergenceError, StageInterrupted, UsageError
from layerpipe.executors.interrupts import Held
from layerpipe.measured import Event, StageMemory, stage_memory
from layerpipe.partition import split
from layerpipe.pipeline import Pipeline
from layerpipe.stage.probe import Reading, ReconstructionProbe
from layerpipe.tracing import Trace

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: Ticks in a profile.
PROFILED = 50


class Step(NamedTuple):
    """A minibatch whose loss has come out of the pipe."""

    step: int
    loss: float
    accuracy: float
    lr: float
    samples_per_s: float
    phase: str


class Earlier(NamedTuple):
    """An interrupted run: its last checkpoint, and what its metrics say."""

    checkpoint: Path | None  # in the process that reads and writes it
    steps: list[Step]
    tests: list[tuple[int, float]]  # (step, test accuracy)


class StageResult(NamedTuple):
    layers: str
    delay: int  # the rule's n
    measured: dict[int, int]  # n seen -> how often
    error: float | None  # relative mean-square error of the past weights; None for n = 0
    readings: list[Reading]
    memory: StageMemory


@dataclasses.dataclass
class Result:
    """The results of a run. Where it diverged or was interrupted, what it had given by then."""

    steps: list[Step]
    tests: list[tuple[int, float]]  # (step, test accuracy)
    stages: list[StageResult]  # empty where another process was interrupted and did not answer
    trace: list[Event]
    seconds: float
    profile: Trace | None = None
    diverged: str | None = None
    signal: int | None = None  # that ended it

    @property
    def interrupted(self) -> bool:
        return self.signal is not None

    @property
    def test_accuracy(self) -> float | None:
        return self.tests[-1][1] if self.tests and not self.diverged else None

    @property
    def kept_bytes(self) -> int:
        """Weights and what is kept for their past."""
        return sum(s.memory.weights + s.memory.history for s in self.stages)


class _LossAndAccuracy:
    """Cross entropy that also counts hits; called by the last stage, read by the caller in the same order.

    The hits go into a ring beside the outputs: of a captured loss, nothing but its work on tensors is repeated.

    Args:
        unread: the most minibatches whose loss is there and has not been read.
    """

    def __init__(self, unread: int) -> None:
        self._size, self._read = unread + 1, 0
        self._hits: Tensor | None = None
        self._at: Tensor | None = None

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        if self._hits is None or self._at is None:
            self._hits = torch.zeros(self._size, device=output.device)
            self._at = torch.zeros(1, dtype=torch.int64, device=output.device)
        hits = (output.detach().argmax(-1) == target).float().mean()
        self._hits.index_copy_(0, self._at, hits.view(1))
        self._at.add_(1).remainder_(self._size)
        return F.cross_entropy(output.flatten(0, -2), target.flatten())

    def accuracy(self) -> float:
        """Of the next minibatch, whose loss is there; not known where another process computes it."""
        if self._hits is None:
            return math.nan
        value = self._hits[self._read % self._size].item()
        self._read += 1
        return value


def make_stages(config: TrainConfig, images: Images) -> list[nn.Module]:
    """The model of a config, cut; the weights depend on ``seed`` alone, not on the number of stages.

    Raises:
        ValueError: more stages than the model can be cut into.
    """
    torch.manual_seed(config.seed)
    model = models.make_for(images.train_x[0], config.model, width=config.width, classes=images.classes)
    device = _device(config.device)
    model.to(device)
    if config.channels_last:
        if config.model == "resnet18":
            models.check_channels_last(config.width, device)
        model.to(memory_format=torch.channels_last)
    count = config.batch_size if config.balance == "time" else min(8, len(images.train_x))
    return split(model, config.stages, (images.train_x[:count].to(device),), balance=config.balance, at=config.at)


def make_pipeline(config: TrainConfig, images: Images, loss_fn: Callable[[Tensor, Tensor], Tensor]) -> Pipeline:
    """Model, stages and pipeline of a config.

    Raises:
        ValueError: options that do not fit together or the model.
    """
    optimizers.check(config)
    stages = make_stages(config, images)
    return Pipeline(
        stages,
        loss_fn,
        optimizers.factory(config),
        mesh=_mesh(config.dp),
        schedule=config.schedule,
        executor=config.executor,
        accumulate=config.accumulate,
        sync_steps=config.sync_steps,
        max_norm=config.max_norm,
        split_backward=config.split_backward,
        past=config.past,
    )


def _mesh(replicas: int) -> DeviceMesh | None:
    """All processes as so many replicas; none is needed for one."""
    if replicas == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("dp", "pp"))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta has tensors, but no numbers
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def train(
    config: TrainConfig,
    images: Images,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    on_test: Callable[[int, float], None] = lambda step, accuracy: None,
    tests: int = 10,
    checkpoint: Path | None = None,
    noted: Callable[[], dict[str, Any]] = dict,
    resume: Earlier | None = None,
    profile: bool = False,
) -> Result:
    """Train as configured. ``on_step`` is called with each loss as it comes, ``on_test`` with ``tests`` evaluations.

    A diverging run and Ctrl-C end it early; the result says so. With ``config.checkpoint_every`` the pipe is drained
    that often and written to ``checkpoint``, by the process that gives one, with what is ``noted`` then; ``resume``
    goes on from there. A Ctrl-C waits until what has been measured is written.
    With ``profile`` the result holds a trace of ``PROFILED`` ticks of the full pipe.

    Raises:
        DataError: a batch larger than the data.
        ValueError: options that do not fit together.
    """
    loss_fn = _LossAndAccuracy(2 * config.stages + 2)
    total = config.total_steps(len(images.train_x))
    with make_pipeline(config, images, loss_fn) as pipe:
        device = _device(config.device)
        probes = [ReconstructionProbe(s, every=max(1, total // 100)) if s.delay else None for s in pipe.stages]
        scheduler = torch.optim.lr_scheduler.LambdaLR(pipe.optimizer, lambda step: config.lr_factor(step, total))
        result = Result([], [], [], pipe.trace, 0.0)
        done, start = 0, time.perf_counter()
        if resume is not None:
            state = pipe.resume(resume.checkpoint)
            done, start = state["step"], start - state["seconds"]
            scheduler.load_state_dict(state["scheduler"])
            result.steps, result.tests = [s for s in resume.steps if s.step <= done], list(resume.tests)
            for stage, probe in zip(pipe.stages, probes, strict=True):
                if probe is not None:
                    probe.readings = [Reading(*reading) for reading in state["readings"][stage.index]]
        batches = images.batches(config.batch_size, config.seed, done)
        minibatch = next(batches)
        paused = 0.0  # in evaluations
        # Profiled: the pipe is full then, and holds no minibatch from before its stages were captured as graphs.
        first = done + min(max(10, 6 * config.stages), 1 + (total - done) // 2)
        lrs: collections.deque[float] = collections.deque()

        def report(loss: Tensor, phase: str) -> None:
            number = len(result.steps) + 1
            rate = number * config.batch_size / (time.perf_counter() - start - paused)
            found = [(loss.item(), loss_fn.accuracy())]
            if pipe.replicas > 1:  # each has the accuracy in the process of its last stage
                found = pipe.ranks.gather_all(found[0])
            hits = [hit for _, hit in found if not math.isnan(hit)]
            mean = sum(value for value, _ in found) / len(found)
            step = Step(number, mean, sum(hits) / len(hits) if hits else math.nan, lrs.popleft(), rate, phase)
            with Held():
                result.steps.append(step)
                on_step(step)

        def test(step: int) -> None:
            found = step, accuracy(pipe, images, device)
            with Held():
                result.tests.append(found)
                on_test(*found)

        def save(step: int) -> None:
            for loss in pipe.drain():
                report(loss, "drain")  # before the file says so: what it counts is in the metrics
            pipe.checkpoint(
                checkpoint, step=step, seconds=time.perf_counter() - start - paused, scheduler=scheduler.state_dict(),
                readings=pipe.ranks.by_stage([[tuple(r) for r in p.readings] if p else [] for p in probes]),
                config=config.to_json(), **noted(),
            )  # fmt: skip

        try:
            with pipe:  # tells other processes why, if it is an error
                for step in range(done + 1, total + 1):
                    if profile and step == first:
                        result.profile = Trace(pipe.names)
                        pipe.watch(result.profile)
                    elif profile and step == first + PROFILED:
                        pipe.watch(None)
                    lrs.append(float(scheduler.get_last_lr()[0]))
                    loss = pipe.step(*(tensor.chunk(pipe.replicas)[pipe.replica].to(device) for tensor in minibatch))
                    if step < total:
                        scheduler.step()
                    if loss is not None:
                        report(loss, pipe.phase)
                    minibatch = next(batches)
                    if step < total and step % max(1, total // tests) == 0:
                        watched = result.profile if step < first + PROFILED else None
                        if watched:
                            pipe.watch(None)
                        before = time.perf_counter()
                        test(step)
                        paused += time.perf_counter() - before
                        if watched:
                            pipe.watch(watched)
                    if config.checkpoint_every and step % config.checkpoint_every == 0:
                        save(step)
                for loss in pipe.drain():
                    report(loss, "drain")
                result.seconds = time.perf_counter() - start - paused
                test(total)
        except DivergenceError as error:
            result.diverged = str(error)
        except (KeyboardInterrupt, StageInterrupted) as interrupt:
            result.signal = number_of(interrupt)
        result.seconds = result.seconds or time.perf_counter() - start - paused
        apart = result.interrupted and pipe.ranks.processes > 1  # the processes may be anywhere
        if apart:
            result.profile = None
        elif result.profile:
            pipe.watch(None)
        own = [
            StageResult(
                pipe.names[stage.index],
                stage.delay,
                dict(stage.measured),
                probe.relative_error() if probe else None,
                probe.readings if probe else [],
                stage_memory(stage),
            )
            for stage, probe in zip(pipe.stages, probes, strict=True)
        ]
        parts = (
            gather_after_interrupt((pipe.trace, own))[-pipe.ranks.size :]
            if apart
            else pipe.ranks.gather((pipe.trace, own))
        )
        result.trace = [event for part in parts if part is not None for event in part[0]]
        if None not in parts:
            result.stages = [stage for part in parts if part is not None for stage in part[1]]
    return result


@torch.no_grad()
def accuracy(pipe: Pipeline, images: Images, device: torch.device, batch: int = 256) -> float:
    """Test accuracy in percent, of text that of its next bytes, with the current weights; minibatches in the pipe are
    not disturbed."""
    pipe.eval()
    hits = 0.0
    for start in range(0, len(images.test_y), batch):
        x, y = images.test_x[start : start + batch], images.test_y[start : start + batch]
        hits += float((pipe(x.to(device)).argmax(-1) == y.to(device)).sum())
    pipe.train()
    return 100 * hits / images.test_y.numel()
