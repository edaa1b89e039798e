"""One stage of the pipeline: forward, backward on past weights, update."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from layerpipe.arguments import check_loss
from layerpipe.inputs import call, checked, tensors_of
from layerpipe.partition.first_layer import without_past
from layerpipe.stage import autograd
from layerpipe.stage.accumulation import Accumulation
from layerpipe.stage.arrival import Arrival, Seen
from layerpipe.stage.boundary import StageInputs, handed_on
from layerpipe.stage.copies import warn_of_copies
from layerpipe.stage.divergence import Divergence
from layerpipe.stage.flight import Flight
from layerpipe.stage.foreign import ForeignWeights, Owners
from layerpipe.stage.gradients import clip, memory_of, own, runs_hooks
from layerpipe.stage.history import drop_history
from layerpipe.stage.in_place import AsLeft, PastInPlace
from layerpipe.stage.network_norm import NetworkNorm
from layerpipe.stage.options import Options, StageOptions, check_stage, set_staleness
from layerpipe.stage.random_numbers import RandomNumbers
from layerpipe.stage.saved import SavedTensors
from layerpipe.stage.split_backward import SplitBackward
from layerpipe.stage.step import WatchedStep, unknown
from layerpipe.tracing.spans import LAYERS, STEP, WEIGHTS, Recorder
from layerpipe_kernels.optim import PastOptimizer

if TYPE_CHECKING:
    from layerpipe.executors.replicas import Replicas

Tensors = tuple[Tensor, ...]
_NOTHING = contextlib.nullcontext()


class Stage:
    """A part of the network with its own optimizer and its own count of updates.

    Its backward sees the past weights ``What(t - n)``, see :mod:`layerpipe.stage.saved`; with a delay of 0 the
    parameters themselves are the past weights.

    Args:
        module: the layers.
        optimizer: of the module's parameters, or ``None`` if it has none. With a delay it must have ``past_view``,
            ``restart_history`` and in its groups ``delay``, as the optimizers of :mod:`layerpipe_kernels` do.
        index: position in the pipeline, from the input.
        accumulation: how late its backwards come, and how many of them make one update.
        name: what messages call it.
        advice: what to try when the stage diverges.
        max_norm: clip the norm of this stage's gradient to this before each update.
        check_finite: look for NaN and infinity at the stage's boundaries.
        split_backward: leave weight gradients for :meth:`backward_weights`.
        last: whether the loss follows, for which it may return any structure of tensors.
        random: what the layers and the loss draw from; torch's own generator by default.
        owners: which stage has which parameter, for messages.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Any | None,
        *,
        index: int,
        accumulation: Accumulation,
        name: str,
        advice: str = "",
        max_norm: float | None = None,
        check_finite: bool = True,
        split_backward: bool = False,
        last: bool = False,
        random: RandomNumbers | None = None,
        owners: Owners | None = None,
    ) -> None:
        self.module, self.optimizer, self.random = module, optimizer, random
        self.index, self.name, self.accumulation, self.last = index, name, accumulation, last
        self.delay = delay = accumulation.delay  # the most updates between a forward and its backward
        self.n = 0  # updates between the forward and the backward of the minibatch that came back last
        self.max_norm = max_norm
        self.network_norm: NetworkNorm | None = None  # where max_norm is of all stages' gradients together
        self.replicas: Replicas | None = None  # of this stage, in other processes
        self.version = 0  # updates so far
        self.base = 0  # version when the pipe was last empty
        self.measured: collections.Counter[int] = collections.Counter()  # n seen in the backward -> how often
        self.activation_bytes = 0  # the most that was kept between forwards and backwards
        self.probe: Callable[[Stage], None] | None = None  # looks on, before each backward
        self.spans: Recorder | None = None  # what took how long, while somebody looks
        self._flights: dict[int, Flight] = {}
        self._kept_bytes = 0  # by all flights
        groups = optimizer.param_groups if optimizer is not None else []
        held = dict.fromkeys(p for group in groups for p in group["params"])
        self.all_params = list(dict.fromkeys([*module.parameters(), *held]))  # the loss's, too
        self.params = [p for p in self.all_params if p.requires_grad or p in held]
        self._foreign = ForeignWeights(index, name, module, self.params, owners)
        self._divergence = Divergence(name, self.params, advice) if check_finite else None
        self._look_for_copies = delay > 0  # in the first forward
        self._split_backward = split_backward and index > 0  # nobody waits for a gradient of the data
        self._inputs, self._arrival = StageInputs(), Arrival()
        others = optimizer is not None and unknown(optimizer)
        # Whether somebody writes into gradients: autograd, which adds to them, or an optimizer, as far as we know.
        self._writes_gradients = optimizer is not None and (
            others or accumulation.every > 1 or getattr(optimizer, "writes_gradients", True)
        )
        self._others: set[int] = set()  # the memory of the last backward's gradients of inputs and outputs
        self._rest: SplitBackward | None = None
        if optimizer is not None:
            check_stage(name, module, optimizer, delay, accumulation.every)
        self.without_past: set[nn.Parameter] = set()  # weights whose past no backward reads
        if delay and index == 0 and isinstance(optimizer, PastOptimizer):
            self.without_past = drop_history(optimizer, without_past(module))
        self.options = StageOptions(optimizer) if optimizer is not None else None
        self._step = WatchedStep(optimizer, self.params) if others else None
        self._past_view: Callable[[Tensor], Tensor] | None = None
        if delay and optimizer is not None:
            self._past_view = optimizer.past_view if accumulation.every == 1 else self._past_of_minibatch
        self._saved = SavedTensors(self.all_params, self._past_view)
        self.in_place = PastInPlace(module, self.params, self._saved)
        self.in_place.fixed = self.without_past

    def enter(self, minibatch: int, inputs: Tensors) -> Flight:
        """Its forward begins, on the weights as they are now."""
        self._flights[minibatch] = flight = Flight(self.version, inputs)
        return flight

    def leave(self, minibatch: int) -> Flight:
        """Its backward begins: ``n`` updates after its forward.

        Raises:
            RuntimeError: ``n`` is not what the schedule says.
        """
        flight = self._flights.pop(minibatch)
        self._kept_bytes -= flight.saved_bytes
        self.n = n = self.version - flight.version
        self.measured[n] += 1
        rule = self.accumulation.backward_begins()
        if n != rule:
            raise RuntimeError(f"minibatch {minibatch} is {n} updates old; the schedule says {rule}")
        if self.probe is not None:
            self.probe(self)
        return flight

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Run forwards and backwards that are no minibatch's and are not counted: all counts are then as they were.

        Weights, gradients and the optimizer's state are left as they have become.
        """
        version, measured, probe, spans = self.version, self.measured, self.probe, self.spans
        flights, kept_bytes = self._flights, self._kept_bytes
        self.measured, self.probe, self._flights = collections.Counter(), None, {}
        self.watch(None)
        try:
            yield
        finally:
            self.version, self.measured, self.probe = version, measured, probe
            self._flights, self._kept_bytes, self._rest = flights, kept_bytes, None
            self.watch(spans)

    def forward(self, minibatch: int, inputs: Tensors) -> Tensors:
        """Run the layers on a minibatch and keep its graph; returns outputs cut off from it.

        Args:
            minibatch: its number since the pipe was last empty.
            inputs: what the stage before has cut off, which get gradients of their own here; the caller's in the first.
        """
        flight = self.enter(minibatch, inputs)  # they are leaves: the stage before has cut them off
        given = inputs if not self.index or self._inputs.settled else self._inputs.given(inputs)
        # Without a delay there is nothing to hand out, and the first minibatch shows what is kept.
        hooked = self.accumulation.late or self.version == self.base or self._split_backward
        hooked = hooked or (self.random is not None and self.random.refuses_recomputation)
        start = None if self.spans is None else self.spans.now()
        if self.random is None:
            output = self._run_layers(flight, given, hooked)
        else:
            with self.random.during("forward"):
                output = self._run_layers(flight, given, hooked)
        if self.spans is not None:
            self.spans.add(LAYERS, start)
        flight.outputs = tensors = output if type(output) is tuple else (output,)
        if type(output) is not Tensor:
            tensors = checked(flight.outputs, last=self.last)
        if self._foreign.due():
            self._foreign.check_forward(tensors, inputs, flight.saved)
        if self._divergence is not None:
            self._divergence.check(tensors, "the output", minibatch, self.version, infinities=True)
        if self._look_for_copies:
            self._look_for_copies = False
            warn_of_copies(self.name, self.module, tensors)
        if hooked:
            self._count(flight)
        if given is not inputs:
            self._inputs.after(inputs, given)
        return tuple([handed_on(y, given) for y in tensors])

    def _run_layers(self, flight: Flight, given: Tensors, hooked: bool) -> Any:
        if not hooked:
            return call(self.module, given)
        saved = self._saved
        flight.saved = saved.begin()
        with saved:
            output = self.module(*given) if self.index else call(self.module, given)
        if saved.constants:
            saved.end(flight.inputs)
        if saved.unseen:
            flight.left = AsLeft(self.module, self.params)
        elif self.in_place.buffers:
            flight.buffers = [buffer._version for buffer in self.in_place.buffers]
        return output

    def loss(self, minibatch: int, loss_fn: Callable[..., Tensor], target: Any) -> Tensor:
        """Continue the last stage's forward to the loss; returns it cut off from the graph."""
        flight = self._flights[minibatch]
        start = None if self.spans is None else self.spans.now()
        with _NOTHING if self.random is None else self.random.during("loss"):
            if flight.saved is not None:
                self._saved.resume(flight.saved)
                with self._saved:
                    loss = loss_fn(*flight.outputs, target)
                if self._saved.constants:
                    self._saved.end([target] if isinstance(target, Tensor) else tensors_of(target))
                if self._saved.unseen and flight.left is None:
                    flight.left = AsLeft(self.module, self.params)
                self._count(flight)
            else:
                loss = loss_fn(*flight.outputs, target)
        if self.spans is not None:
            self.spans.add(LAYERS, start)
        check_loss(loss)
        if not loss.requires_grad:
            raise RuntimeError("the loss depends on no trained weight: is it detached, or everything frozen?")
        self._foreign.check_loss(loss, flight.inputs)
        if self._divergence is not None:
            self._divergence.check((loss,), "the loss", minibatch, self.version)
        flight.outputs = (loss,)
        return loss.detach()

    def _count(self, flight: Flight) -> None:
        assert flight.saved is not None
        saved_bytes = sum(flight.saved.values())
        self._kept_bytes = kept_bytes = self._kept_bytes + saved_bytes - flight.saved_bytes
        flight.saved_bytes = saved_bytes
        if kept_bytes > self.activation_bytes:
            self.activation_bytes = kept_bytes

    def _past_of_minibatch(self, param: Tensor) -> Tensor:
        """A parameter as the forward of the minibatch that comes back saw it; not all of them are equally late."""
        assert self.optimizer is not None
        default = min(self.version - self.base, self.delay)
        past: Tensor = self.optimizer.past_view(param, None if self.n == default else self.n)
        return past

    def backward(self, minibatch: int, grads: tuple[Tensor | None, ...] | None) -> tuple[Tensor | None, ...]:
        """Gradients of a minibatch: of the stage's inputs, returned, and of its parameters, into ``.grad``.

        With ``split_backward`` those of the parameters are complete after :meth:`backward_weights`.
        """
        flight = self.leave(minibatch)
        if self.accumulation.waiting:
            pass  # they are added to those that wait
        elif self._step is None:
            for param in self.params:
                param.grad = None
        else:
            self._step.clear_gradients()
        watches = self._writes_gradients or runs_hooks(self.optimizer)
        self._others = memory_of(grads) if watches and grads is not None else set()
        outputs, arrived = [], []
        if grads is None:
            outputs = [y for y in flight.outputs if y.requires_grad]
            arrived = [self.accumulation.loss_gradient(y) for y in outputs]
        else:
            for y, g in zip(flight.outputs, grads, strict=True):
                if g is not None and y.requires_grad:
                    outputs.append(y)
                    arrived.append(g)
        seen: Seen = {}
        if outputs:
            start = None if self.spans is None else self.spans.now()
            seen = self._arrival.watch(flight.inputs) if self.index else {}
            if self.random is None:
                self._differentiate(flight, outputs, arrived)
            else:
                with self.random.recomputing(flight.left is not None):
                    self._differentiate(flight, outputs, arrived)
            if self.spans is not None:
                self.spans.add(LAYERS, start)
        if not self.index:
            return ()
        upstream = self._arrival.gradients(flight.inputs, seen)
        if watches:
            self._others |= memory_of(upstream)
        if self._divergence is not None:
            self._divergence.check(upstream, "the gradient", minibatch, self.version)
        return upstream

    def _differentiate(self, flight: Flight, outputs: list[Tensor], grads: list[Tensor | None]) -> None:
        late = self.accumulation.late
        try:
            if late:
                self.in_place.begin(flight.left, flight.buffers)
            split = self._split_backward and flight.left is None  # what recomputes wants its graph walked at once
            if split and (leaves := [x for x in flight.inputs if x.requires_grad]):
                self._rest = SplitBackward(outputs, leaves)
                self._rest.activations(grads)
            else:
                autograd.backward(outputs, grads)
        finally:
            if late:
                self.in_place.end()

    @property
    def half_done(self) -> bool:
        """Return whether a split backward has left something to do for :meth:`backward_weights`."""
        return self._rest is not None

    def backward_weights(self) -> None:
        """Do what a split backward has left to do; nothing otherwise."""
        if self._rest is None:
            return
        start = None if self.spans is None else self.spans.now()
        rest, self._rest = self._rest, None
        rest.weights()  # a weight's own gradient does not depend on its values: they may be the latest
        if self.spans is not None:
            self.spans.add(WEIGHTS, start)

    def update(self, options: Options) -> None:
        """After a minibatch's backward: step the optimizer with these options per parameter group, as they were when
        the tick was submitted. Where gradients accumulate, one minibatch in so many does."""
        if not self.accumulation.complete():
            if self._others:
                own(self.params, self._others)
            return
        if self.options is not None:
            start = None if self.spans is None else self.spans.now()
            if options is not self.options.taken:
                self.options.take(options)
            if self.replicas is not None:
                self.replicas.average()
            if self.max_norm is not None:
                clip(self.params, self.max_norm, self.network_norm)
            elif self._others:
                own(self.params, self._others)
            if self._step is None:
                self.options.optimizer.step()
            else:
                self._step()
            if self.spans is not None:
                self.spans.add(STEP, start)
        self.version += 1

    def restart(self) -> None:
        """The pipe is empty: the next minibatch sees the weights as they are now, and delays fill up from 0.
        Gradients that wait for an update stay."""
        self.base = self.version
        self.accumulation.restart()
        self.look_again()
        self._foreign.restart()
        self._arrival = Arrival()  # as after a resumption
        if self.delay and self.optimizer is not None:
            self.optimizer.restart_history()
        set_staleness(self.optimizer, self.accumulation.mean_delay)

    def weights_loaded(self) -> None:
        """The pipe is empty, and somebody has replaced the weights."""
        if isinstance(self.optimizer, PastOptimizer):
            self.optimizer.weights_loaded()
        if self._divergence is not None:
            self._divergence.weights_loaded()
        self.restart()

    def look_again(self) -> None:
        """Find out anew whether layers draw random numbers or change their inputs in place, and their buffers: these
        may have changed."""
        self._inputs = StageInputs()
        if self.accumulation.late:
            self.in_place.buffers = list(self.module.buffers())
        if self.random is not None:
            self.random.look_again()

    @property
    def recomputes(self) -> bool:
        """Return whether a backward has needed past weights in the weights' own memory so far, as one that recomputes
        does."""
        return self.in_place.used

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    @property
    def scratch_bytes(self) -> int:
        """Of the largest past weight made for a backward, or of all that one had in place and of their copies."""
        return max(self.in_place.scratch_bytes, self._saved.scratch_bytes)

    def watch(self, spans: Recorder | None) -> None:
        """Write down what takes how long from now on, or stop."""
        self.spans = self._saved.spans = spans

    def mark(self) -> Any:
        """Note where a span begins, for :meth:`span`; nothing while nobody watches."""
        return None if self.spans is None else self.spans.now()

    def span(self, name: str, start: Any) -> None:
        """Write down what has been done since ``start``, while somebody watches."""
        if self.spans is not None:
            self.spans.add(name, start)

    def check_weights(self) -> None:
        """Find what the boundaries have not shown yet: the last update of a pipe that is empty now.

        Raises:
            DivergenceError: a weight is not finite.
        """
        if self._divergence is not None:
            self._divergence.check_weights(self.version)

    def forget(self) -> None:
        """Let go of the minibatches in flight."""
        self._flights.clear()
        self._kept_bytes, self._rest = 0, None
