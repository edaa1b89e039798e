"""All stages from one thread, each on streams of its own: what may run at the same time on a device, does.

Autograd runs a backward on the streams of its forward. So a minibatch's forward and backward in a stage share a stream,
and two or three streams in turn are enough for a forward and the backward of another minibatch to overlap::

    lockstep, two stages     tick 2    tick 3    tick 4
    stage 0, stream a        B0 U      F3                   n = 2: three streams
             stream b                  B1 U      F4
             stream c        F2                  B2 U
    stage 1, its only one    F1 B1 U   F2 B2 U   F3 B3 U    n = 0

The host only issues; it waits for nothing. What waits is a stream, for an event:

* everything in a stage for its last update ``U``, which changes weights in place;
* an update for the stage's forwards since the last one, which read those weights, and for its own backward, whose
  stream it is on;
* a forward for the stage's last one: BatchNorm's running statistics have one order;
* a receiver for the sender's tensors (:class:`StreamChannel`);
* the caller for a loss, and the stages for what the caller did with the weights between two ticks.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from layerpipe import accelerator
from layerpipe.accelerator import Accelerator
from layerpipe.executors.base import Run, Tick
from layerpipe.executors.channels import Channel, Lent, moved, tensors_in
from layerpipe.executors.serial import Serial
from layerpipe.schedule import Action
from layerpipe.stage import Stage
from layerpipe.tracing.spans import WAIT, Clock, DeviceClock


class Lane:
    """One stage's streams, and the events that order them.

    Args:
        stage: whose work goes here.
        device: its device.
    """

    def __init__(self, stage: Stage, device: Accelerator) -> None:
        self.stage, self.device = stage, device
        self.streams = [device.stream() for _ in range(ring(stage.accumulation.lag))]
        self.forward, self.updated = device.event(), device.event()  # of the last forward and update
        self.outside: list[Any] = []  # events of the caller's work on the weights, until an update has waited for them
        # The node that puts a parameter's gradient down lives as long as any graph with the parameter, so always, on
        # the stream where it was made. One stream, and no other work there: nothing waits for it in vain.
        self.home = device.stream()
        self._params = [p for p in stage.params if p.requires_grad]
        # Layers that a backward calls again, and past weights in the weights' memory, wait as an update does.
        stage.in_place.before = lambda: device.current().wait_event(self.forward)
        with device.use(self.home):
            self._nodes = [get_gradient_edge(p).node for p in self._params]

    def stream(self, minibatch: int) -> Any:
        return self.streams[minibatch % len(self.streams)]

    def begin(self, action: Action, stream: Any) -> None:
        """Before an action, on its stream."""
        stream.wait_event(self.updated)
        for event in self.outside:
            stream.wait_event(event)
        if action.kind == "F":
            stream.wait_event(self.forward)

    def before_update(self) -> None:
        start = self.stage.mark()
        current = self.device.current()
        current.wait_event(self.forward)
        for param in self._params:
            if param.grad is not None:  # a copy, where autograd had to make one, is memory of the home stream
                self.device.keep(param.grad, current)
                if self.stage.accumulation.every > 1:  # to which the next minibatch's is added there
                    self.device.keep(param.grad, self.home)
        self.stage.span(WAIT, start)

    def end(self, action: Action, stream: Any) -> None:
        if action.kind == "F":
            self.forward.record(stream)
        else:
            self.updated.record(stream)
            self.outside = []

    def wait_all(self, stream: Any) -> None:
        """A stream waits for everything that the stage has been given."""
        stream.wait_event(self.forward)
        stream.wait_event(self.updated)


def ring(lag: int) -> int:
    """Return the number of streams that keep a stage's forward apart from the backward of ``lag`` minibatches ago."""
    return next(k for k in range(1, lag + 3) if lag % k or not lag)


class StreamChannel(Channel):
    """A channel that hands over what is still being computed: the receiver's stream waits, not the host.

    Between devices the tensors are copied when they are received, on a stream of the sender's device that does nothing
    else (torch runs a copy between devices on the source's current stream, and lets the receiver's wait for it).

    Args:
        sender: its device.
        receiver: its device.
    """

    def __init__(self, name: str, sender: Accelerator, receiver: Accelerator) -> None:
        super().__init__(name, blocking=False)
        self._sender, self._receiver = sender, receiver
        self._copies = sender.stream() if sender.device != receiver.device else None
        self._events: list[Any] = []  # read by nobody any more

    def put(self, item: Any) -> None:
        event = self._events.pop() if self._events else self._sender.event()
        event.record(self._sender.current())
        super().put((item, event))

    def get(self) -> Any:
        item, event = super().get()
        stream = self._receiver.current()
        reader = stream if self._copies is None else self._copies
        reader.wait_event(event)
        self._events.append(event)
        if not isinstance(item, Lent):
            for tensor in tensors_in(item):
                if tensor.device == self._sender.device:
                    self._sender.keep(tensor, reader)
        if self._copies is None:
            return moved(item, self._receiver.device)
        with self._sender.use(reader), self._receiver.use(stream):
            copied = moved(item, self._receiver.device)
        if isinstance(item, Lent):
            item.was_read(reader)
        return copied


class Streams(Serial):
    """Issues every action on its stage's streams, in the order of the schedule.

    Args:
        stages: one per name.
        devices: one per stage.
    """

    name = "streams"
    issues = True

    def __init__(
        self, names: Sequence[str], run: Run, stages: Sequence[Stage], devices: Sequence[torch.device]
    ) -> None:
        super().__init__(names, self._issue)
        self._work = run
        known = {device: accelerator.of(device, self.name) for device in dict.fromkeys(devices)}
        self._devices = list(known.values())
        self.lanes = [Lane(stage, known[device]) for stage, device in zip(stages, devices, strict=True)]
        self._outside = True  # the caller may have touched the weights since the last tick

    def channel(self, name: str, sender: int, receiver: int) -> Channel:
        return StreamChannel(name, self.lanes[sender].device, self.lanes[receiver].device)

    def submit(self, tick: Tick) -> None:
        if self._outside:
            self._outside = False
            for device in self._devices:
                event = device.event()
                event.record(device.current())
                for lane in self._of(device):
                    lane.outside.append(event)
        super().submit(tick)

    def _issue(self, action: Action, tick: Tick) -> None:
        lane = self.lanes[action.stage]
        stream = lane.stream(action.minibatch)
        with lane.device.use(stream):
            lane.begin(action, stream)
            self._work(action, tick)
            lane.end(action, stream)

    def before_update(self, stage: int) -> None:
        self.lanes[stage].before_update()

    def hand_over(self, losses: Iterable[Tensor]) -> list[Tensor]:
        lane = self.lanes[-1]
        current = lane.device.current()
        current.wait_event(lane.forward)
        handed = list(losses)
        for loss in handed:
            lane.device.keep(loss, current)
        return handed

    def synchronize(self) -> None:
        """The caller's streams wait for the stages' work; the host does not."""
        self._outside = True
        for device in self._devices:
            for lane in self._of(device):
                lane.wait_all(device.current())

    def settle(self) -> None:
        for device in self._devices:
            device.wait()

    def close(self) -> None:
        if not self._closed:
            with contextlib.suppress(RuntimeError):  # of a device that has failed, which was or will be reported
                self.settle()  # what has been issued still uses memory that goes with the pipeline
        super().close()

    def clocks(self) -> Sequence[Clock]:
        """The devices'. Each has an origin of its own, recorded while all of them are idle."""
        origins = {}
        for device in self._devices:
            origin = device.event(timed=True)
            origin.record(device.current())
            origins[device] = origin, time.perf_counter()
        return [DeviceClock(lane.device, lane.streams, *origins[lane.device]) for lane in self.lanes]

    def _of(self, device: Accelerator) -> Iterator[Lane]:
        return (lane for lane in self.lanes if lane.device is device)
