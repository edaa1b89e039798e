"""Stages that are replayed from graphs: a tick is three launches per stage, and Python only says which.

A graph works on the same memory every time. So each of a stage's ``n + 1`` minibatches in flight has a *slot*: tensors
that its inputs and incoming gradients are copied into, and graphs of its forward, its backward and its update::

    forward    inputs -> outputs, and what autograd keeps (in the last stage also: target -> loss)
    backward   grads  -> upstream gradients, gradients of the weights
    update     gradients of the weights, learning rate -> weights, history, the clock of the updates

The graphs run on the streams of :mod:`layerpipe.executors.streams` and wait as there. A stage is captured once its
delay has filled up, and runs like any other until then, after every :meth:`layerpipe.Pipeline.drain` too: the same
kernels on the same values give the same bits. What a forward or a loss does besides work on tensors is done in the
capture only.

Memory comes from pools, in which a graph is given what an earlier one has freed, and each replay writes over it again:

* a pool per slot for its forward and loss: what autograd keeps there waits for the backward while the forwards of other
  slots run;
* one pool per stage for all backwards and updates, which run one after the other and leave nothing behind: upstream
  gradients are copied out of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from layerpipe.executors.base import Tick
from layerpipe.executors.buffers import Buffers, owned, plain
from layerpipe.executors.capturable import (
    addresses,
    check_optimizer,
    count_update,
    held_by,
    no_garbage_collection,
    own_learning_rates,
    uncounted,
)
from layerpipe.executors.channels import Lent
from layerpipe.executors.streams import Lane, Streams
from layerpipe.partition.guard import guard_of
from layerpipe.stage import Stage, Tensors
from layerpipe.stage.options import Options, same
from layerpipe.tracing.spans import LAYERS, STEP, WEIGHTS, Recorder


class _Slot:
    """One minibatch in flight: its tensors, and the graphs that work on them."""

    def __init__(
        self, inputs: Buffers, target: Buffers | None, grads: Buffers | None, upstream: Buffers | None, read: Any
    ) -> None:
        self.inputs, self.target, self.grads = inputs, target, grads
        self.needed: tuple[bool, ...] = ()  # of which inputs a gradient
        self.outputs: Tensors = ()
        self.loss: Tensor | None = None
        self.room = upstream  # for the upstream gradients, outside of the graphs' memory
        self.upstream: tuple[Tensor | None, ...] = ()
        self.read = read  # the event that a neighbour has read them
        self.graphs: dict[str, Any] = {}


class CapturedStage:
    """A captured stage, called in a :class:`Stage`'s place.

    Args:
        lane: the stage and its streams.

    Raises:
        ValueError: an optimizer that counts its updates on the host.
    """

    def __init__(self, lane: Lane) -> None:
        self.stage, self._lane, self._device = lane.stage, lane, lane.device
        check_optimizer(self.stage)
        self._guard = guard_of(self.stage.module)
        self._slots: list[_Slot] = []
        self._replayed: dict[int, _Slot] = {}  # of the minibatches whose forward was a replay
        self._slot: _Slot | None = None  # of the backward whose update comes next
        self._seen: dict[str, Any] = {}  # what the stage was called with, until it is captured
        self._options: Options = []  # that the graphs were captured with
        self._random = False  # whether a forward draws random numbers
        self._taken: Options | None = None  # the last that were found to agree with those
        self._addresses: list[Any] = []
        self._held: list[Any] = []  # what the graphs read and do not keep

    @property
    def spans(self) -> Recorder | None:
        return self.stage.spans

    def ready(self) -> bool:
        """Return whether the delay has filled up: from here on every tick is like the next."""
        return not self.stage.accumulation.synchronous and self.stage.version - self.stage.base > self.stage.delay

    def revalidate(self) -> None:
        """The caller may have replaced something: then the stage is captured anew."""
        own_learning_rates(self.stage, self._device.device)
        if self._slots and self._addresses != addresses(self.stage):
            if self._replayed:
                raise RuntimeError("weights or state were replaced while minibatches are in the pipe; drain it first")
            self._slots = []

    def _see(self, what: str, value: Any) -> None:
        if not self._slots:
            self._seen[what] = value

    # -- what the pipeline calls ---------------------------------------------------------------------------------

    def forward(self, minibatch: int, inputs: Tensors) -> Tensors:
        if not self.ready():
            inputs = owned(inputs, self._device.current())
            self._see("inputs", inputs)
            before = self._device.drawn()
            outputs = self.stage.forward(minibatch, inputs)
            self._random = self._random or self._device.drawn() != before
            return outputs
        if not self._slots:
            self._capture()
        if self._guard is not None:
            self._guard.check_model()  # which a replay does not
        self._replayed[minibatch] = slot = self._slots[minibatch % len(self._slots)]
        self.stage.enter(minibatch, ())
        slot.inputs.fill(inputs, self._device.current())
        self._replay(slot, "forward", LAYERS)
        return Lent(slot.outputs)  # the gradients that come back for them say that they have been read

    def loss(self, minibatch: int, loss_fn: Callable[..., Tensor], target: Any) -> Tensor:
        slot = self._replayed.get(minibatch)
        if slot is None:
            self._see("target", target)
            self._see("loss_fn", loss_fn)
            return self.stage.loss(minibatch, loss_fn, target)
        assert slot.target is not None
        assert slot.loss is not None
        slot.target.fill(target, self._device.current())
        self._replay(slot, "loss", LAYERS)
        return slot.loss.clone()  # the caller may keep it

    def backward(self, minibatch: int, grads: tuple[Tensor | None, ...] | None) -> tuple[Tensor | None, ...]:
        stage, current = self.stage, self._device.current()
        self._slot = slot = self._replayed.pop(minibatch, None)
        if slot is None:
            grads = owned(grads, current)
            self._see("grads", grads)
            upstream = stage.backward(minibatch, grads)
            self._see("upstream", upstream)
            return upstream
        stage.leave(minibatch)
        if slot.grads is not None:
            slot.grads.fill(grads, current)
        current.wait_event(slot.read)
        self._replay(slot, "backward", LAYERS)
        return Lent(slot.upstream, slot.read)

    def backward_weights(self) -> None:
        if self._slot is None:
            self.stage.backward_weights()
        elif "weights" in self._slot.graphs:
            self._replay(self._slot, "weights", WEIGHTS)

    def update(self, options: Options) -> None:
        if self._slot is None:
            self._seen["options"] = options
            self.stage.update(options)
            return
        if "update" in self._slot.graphs:
            self._take(options)
            self._replay(self._slot, "update", STEP)
        self.stage.version += 1
        count_update(self.stage)

    def _replay(self, slot: _Slot, graph: str, span: str) -> None:
        start = self.stage.mark()
        slot.graphs[graph].replay()
        self.stage.span(span, start)

    def _take(self, options: Options) -> None:
        """Hand a learning rate to the graphs; everything else has become part of them."""
        if options is self._taken:
            return
        assert self.stage.options is not None
        for old, new in zip(self._options, options, strict=True):
            for name in new:
                if name != "lr" and not same(new[name], old.get(name)):
                    raise ValueError(
                        f"executor='graphs' has captured {name}={old.get(name)!r} and cannot change it to "
                        f"{new[name]!r}; only lr may change"
                    )
        self.stage.options.take(options)
        self._taken = options

    # -- capturing -----------------------------------------------------------------------------------------------

    def _capture(self) -> None:
        stage, device = self.stage, self._device
        if stage.delay and stage.recomputes:
            raise ValueError(
                "executor='graphs' cannot capture torch.utils.checkpoint in a stage with a delay, whose backward puts "
                "past weights in the parameters' place; use executor='streams'"
            )
        if self._random:  # a replay writes where in the generator's numbers it is to a place that all graphs read
            raise ValueError(
                "executor='graphs' cannot capture a stage that draws random numbers (dropout?): graphs that run at the "
                "same time share one generator; use executor='streams'"
            )
        self._addresses, self._options, self._taken = addresses(stage), self._seen["options"], None
        updates, now = device.pool(), stage.version
        slots = [self._make_slot() for _ in range(stage.delay + 1)]
        device.forget_workspaces()
        try:
            with stage.rehearsal():  # unwatched: an event in a graph has no time of its own
                for i, slot in enumerate(slots):
                    stage.version = now - stage.delay + i
                    activations = device.pool()
                    self._graph(slot, "forward", activations, functools.partial(_forward, stage, slot, i))
                    if slot.target is not None:
                        self._graph(slot, "loss", activations, functools.partial(self._loss, slot, i))
                for i, slot in enumerate(slots):
                    stage.version = now + i
                    self._graph(slot, "backward", updates, functools.partial(_backward, stage, slot, i))
                    if stage.half_done:
                        self._graph(slot, "weights", updates, stage.backward_weights)
                    if stage.optimizer is not None:
                        self._graph(slot, "update", updates, lambda: stage.update(self._options))
        finally:
            device.forget_workspaces()
        for param in stage.all_params:
            param.grad = None  # which was the graphs' memory
        self._slots, self._held = slots, held_by(stage)
        first = slots[0]
        content = {"inputs": first.inputs, "target": first.target, "grads": first.grads, "upstream": first.room}
        self._seen.update({what: buffers.content for what, buffers in content.items() if buffers is not None})

    def _make_slot(self) -> _Slot:
        seen, last = self._seen, "target" in self._seen
        upstream = None
        if self.stage.index:  # in the order in memory of the gradients, where there are any
            pairs = zip(plain(seen["inputs"]), seen["upstream"], strict=True)
            upstream = Buffers("upstream gradients", tuple([x if g is None else g for x, g in pairs]))
        slot = _Slot(
            Buffers("inputs", plain(seen["inputs"])),
            Buffers("targets", seen["target"]) if last else None,
            None if last else Buffers("gradients", seen["grads"]),
            upstream,
            self._device.event(),
        )
        slot.needed = tuple([isinstance(x, Tensor) and x.requires_grad for x in plain(seen["inputs"])])
        return slot

    def _graph(self, slot: _Slot, name: str, pool: Any, work: Callable[[], None]) -> None:
        try:
            # On the stream of the nodes that put gradients down, which would otherwise be one outside of the capture.
            # cuBLAS has a workspace per thread and stream: a backward's, of autograd's thread, is not a forward's.
            with no_garbage_collection(), uncounted(self.stage):
                slot.graphs[name] = self._device.capture(pool, self._lane.home, work)
        except RuntimeError as error:
            kind = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else RuntimeError
            raise kind(
                f"executor='graphs' could not capture the {name} of this stage: {error}; go on with another executor "
                "in a new process: a failed capture may leave torch's random numbers unusable in this one"
            ) from error

    def _loss(self, slot: _Slot, minibatch: int) -> None:
        assert slot.target is not None
        slot.loss = self.stage.loss(minibatch, self._seen["loss_fn"], slot.target.content)


def _forward(stage: Stage, slot: _Slot, minibatch: int) -> None:
    inputs = [x.detach().requires_grad_() if n else x for x, n in zip(slot.inputs.content, slot.needed, strict=True)]
    slot.outputs = stage.forward(minibatch, tuple(inputs))


def _backward(stage: Stage, slot: _Slot, minibatch: int) -> None:
    upstream = stage.backward(minibatch, slot.grads.content if slot.grads is not None else None)
    if slot.room is not None:
        slot.upstream = slot.room.copied(upstream)


class Graphs(Streams):
    """Streams whose stages are replayed from graphs in steady state."""

    name = "graphs"

    def acting(self, stages: Sequence[Stage]) -> Sequence[Any]:
        self._captured = [CapturedStage(lane) for lane in self.lanes]
        return self._captured

    def submit(self, tick: Tick) -> None:
        if self._outside:
            for stage in self._captured:
                stage.revalidate()
        super().submit(tick)
