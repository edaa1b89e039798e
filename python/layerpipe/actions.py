"""A stage's work in a tick: forwards, backwards, updates, and the channels that their tensors pass through."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from layerpipe.executors.base import Executor, Tick
from layerpipe.executors.channels import Channel
from layerpipe.executors.norms import NormChannel
from layerpipe.measured import Event
from layerpipe.schedule import Action
from layerpipe.stage import Stage
from layerpipe.tracing.spans import CHANNEL, Recorder


class Actions:
    """Does the work of one action of one stage; called by the executor, in whatever thread it likes.

    Args:
        stages: how many there are, in all processes.
        own: the numbers of those in this one.
        loss_fn: called in the last stage.
        losses: where their values go.

    Attributes:
        trace: the first ticks, for a picture of the schedule.
    """

    def __init__(
        self, stages: int, own: Sequence[int], loss_fn: Callable[..., Tensor], losses: collections.deque[Tensor]
    ) -> None:
        self._last, self._own, self._loss_fn, self._losses = stages - 1, own, loss_fn, losses
        self.trace: list[Event] = []
        self._traced = 64 * len(own)  # actions that are in it at most, about: threads may write down one more

    def connect(self, executor: Executor, stages: Sequence[Stage]) -> None:
        """Make the channels of this executor between the stages of this process and their neighbours."""
        channel, last = executor.channel, self._last
        self._executor = executor
        self._acting = dict(zip(self._own, executor.acting(stages), strict=True))
        self._input, self._target = channel("input", 0, 0), channel("target", last, last)
        self._activations = [channel(f"activations {i} -> {i + 1}", i, i + 1) for i in range(last)]
        self._gradients = [channel(f"gradients {i + 1} -> {i}", i + 1, i) for i in range(last)]
        norms = {stage.index: stage.network_norm for stage in stages}
        if any(norms.values()):
            for i in range(last):
                one, other = norms.get(i), norms.get(i + 1)
                self._activations[i] = NormChannel(self._activations[i], one, other, before=True)
                self._gradients[i] = NormChannel(self._gradients[i], other, one, before=False)

    def feed(self, inputs: tuple[Any, ...], target: Any) -> None:
        """Put a minibatch where its stages look for it, if they are in this process."""
        if 0 in self._own:
            self._input.put(inputs)
        if self._last in self._own:
            self._target.put(target)

    def run(self, action: Action, tick: Tick) -> None:
        """Do one action, with the optimizer's options of this tick."""
        issued = time.perf_counter() if len(self.trace) < self._traced else 0.0
        at, kind, minibatch = action
        stage, last = self._acting[at], at == self._last
        spans: Recorder | None = stage.spans
        start = None if spans is None else spans.now()
        if kind == "F":
            inputs = _receive(spans, self._activations[at - 1] if at else self._input)
            outputs = stage.forward(minibatch, inputs)
            if last:
                self._losses.append(loss := stage.loss(minibatch, self._loss_fn, self._target.get()))
                self._executor.computed(loss)
            else:
                self._activations[at].put(outputs)
        else:
            upstream = stage.backward(minibatch, None if last else _receive(spans, self._gradients[at]))
            if at:
                self._gradients[at - 1].put(upstream)
            stage.backward_weights()
            self._executor.before_update(at)
            stage.update(tick.options[at])
        if spans is not None:
            spans.add(f"{kind}{minibatch}", start)
        if issued:
            self.trace.append(Event(tick.number, action, issued, time.perf_counter()))

    def close(self) -> None:
        """Nobody waits for a tensor any more."""
        for channel in (self._input, self._target, *self._activations, *self._gradients):
            channel.close()


def _receive(spans: Recorder | None, channel: Channel) -> Any:
    if spans is None:
        return channel.get()
    start = spans.now()
    item = channel.get()
    spans.add(CHANNEL, start)
    return item
