"""The pipeline: stages, the channels between them, a schedule and whoever runs it."""

from __future__ import annotations

import collections
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerpipe import arguments, checkpoint, executors
from layerpipe import schedule as schedules
from layerpipe.errors import divergence_advice
from layerpipe.executors import ranks
from layerpipe.executors.base import Tick
from layerpipe.executors.channels import Channel
from layerpipe.measured import Event, StageMemory, stage_memory
from layerpipe.network import Network
from layerpipe.optimizer import PipelineOptimizer, options_of
from layerpipe.partition import share_threads
from layerpipe.schedule import Action
from layerpipe.stage import Stage
from layerpipe.stage.accumulation import Accumulation
from layerpipe.tracing import Trace
from layerpipe.tracing.spans import CHANNEL, Recorder, Span
from layerpipe_kernels import mark_embeddings_and_output

if TYPE_CHECKING:
    from typing_extensions import Self

OptimizerFactory = Callable[..., torch.optim.Optimizer]


class Pipeline(Network):
    """Trains a chain of stages; every stage does a forward and a backward in every tick.

    Args:
        stages: modules, from input to output, each taking what the one before returns (a tensor or a tuple); from
            :func:`layerpipe.split`, or made by hand.
        loss_fn: ``loss_fn(output, target)`` to a scalar, called in the last stage; ``loss_fn(*outputs, target)``
            where that returns a tuple.
        optimizer: ``optimizer(params, **past)``, called once per stage that has parameters; hands ``past`` on to an
            optimizer of :mod:`layerpipe_kernels`. It holds the stage's ``delay`` and the options below. Embeddings and
            the last stage's last layer are marked before (:func:`layerpipe_kernels.mark_embeddings_and_output`), so
            that SOAP and Muon know them.
        past: how past weights are had, ``"blend"``, ``"ema"``, ``"momentum"``, ``"latest"`` or ``"stash"``.
        order: number of EMAs of a blend.
        ema_decay: decay rule; by default what suits ``past``.
        schedule: ``"lockstep"``, ``"1f1b"``, ``"sequential"``, or ``"auto"``, which chooses by the executor; see
            :mod:`layerpipe.schedule`.
        executor: ``"serial"``, ``"threads"``, on CUDA devices ``"streams"`` or ``"graphs"``, or ``"distributed"``
            with the stages in several processes; see :mod:`layerpipe.executors`.
        devices: one per stage, which is moved there before its optimizer is made; by default the stages stay where they
            are. Tensors are copied from stage to stage and from the caller to the first and last.
        threads_per_stage: torch's intra-op threads in each worker thread, one number for all or one per stage; by
            default the caller's setting is shared by what the stages cost, see
            :func:`layerpipe.partition.share_threads`.
        accumulate: make one update in so many minibatches, with the mean of their gradients, at as many times smaller a
            delay; see :mod:`layerpipe.retiming.accumulation`.
        max_norm: clip the norm of each stage's gradient (the mean, where gradients accumulate) to this before its
            update.
        split_backward: send the gradients of activations on before those of weights are computed; the same numbers.
        check_finite: stop with a :class:`layerpipe.DivergenceError` at the first NaN or infinity; on a device,
            :meth:`drain` finds it in the weights.

    Raises:
        ValueError: no stages, an unknown name, options that contradict each other.
        TypeError: stages that are one module, a loss or an optimizer that is no function, or an optimizer that does
            not know its past weights where a delay needs them.

    Where there are several processes, all of them make the same pipeline and call the same methods in the same order:
    each trains its own :attr:`stages`, the first takes the inputs of :meth:`step`, the last the targets.

    Weights do not depend on the executor: a stage's work is done in the same order by the same kernels, and its random
    layers draw on the CPU from a generator of its own (:mod:`layerpipe.stage.random_numbers`), seeded from torch's when
    the pipeline is made. A different number of intra-op threads breaks that, and compiled random layers in threads do.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        loss_fn: Callable[[Any, Any], Tensor],
        optimizer: OptimizerFactory,
        *,
        past: str = "blend",
        order: int = 2,
        ema_decay: Any = None,
        schedule: str = "lockstep",
        executor: str = "serial",
        devices: Sequence[Any] | None = None,
        threads_per_stage: int | Sequence[int] | None = None,
        accumulate: int = 1,
        max_norm: float | None = None,
        split_backward: bool = False,
        check_finite: bool = True,
    ) -> None:
        arguments.check_made_of(stages, loss_fn, optimizer, max_norm)
        arguments.check_accumulate(accumulate, executor)
        executors.check(executor)
        threads = executors.per_stage(threads_per_stage, len(stages))
        self.schedule = schedules.make(schedule, len(stages), executor)
        self.accumulate = accumulate
        self._accumulations = [Accumulation(lag, accumulate) for lag in self.schedule.delays()]
        self.delays = [accumulation.delay for accumulation in self._accumulations]
        super().__init__(stages, devices, ranks.make(executor, len(stages)))
        self.ranks.check_same(stages)
        self.ranks.check_trained(stages)
        self.stages: list[Stage] = []
        self.loss_fn = loss_fn
        self.losses: collections.deque[Tensor] = collections.deque()
        self._undelivered: list[Tensor] = []  # losses that a checkpoint which failed had drained
        self.trace: list[Event] = []  # the first ticks, for a picture of the schedule
        self._watched: Trace | None = None
        names = [f"stage {i} ({name})" for i, name in enumerate(self.names)]
        random = executors.random_numbers(executor, stages, self.ranks)

        def make_stage(i: int) -> Stage:
            module = stages[i]
            options = {"delay": self.delays[i], "past": past, "order": order, "ema_decay": ema_decay}
            params = [p for p in module.parameters() if p.requires_grad]
            mark_embeddings_and_output(module, output=i == len(stages) - 1)
            return Stage(
                module,
                optimizer(params, **options) if params else None,
                index=i,
                accumulation=self._accumulations[i],
                name=names[i],
                advice=divergence_advice(past, order, max(self.delays)),
                max_norm=max_norm,
                check_finite=check_finite,
                split_backward=split_backward,
                random=random[i],
            )

        error: Exception | None = None
        try:
            self.stages += [make_stage(i) for i in self.ranks.own]
        except Exception as caught:
            error = caught
        self.ranks.agree(error, RuntimeError)
        options = [stage.options for stage in self.stages if stage.options is not None]
        groups, rank = self.ranks.gather(options_of([own.optimizer for own in options])), self.ranks.rank
        self.optimizer = PipelineOptimizer(
            options,
            self._synchronize,
            before=[*itertools.chain(*groups[:rank])],
            after=[*itertools.chain(*groups[rank + 1 :])],
            replayed=executor == "graphs",
        )
        self._executor = executors.make(
            executor,
            self._run,
            names,
            self.stages,
            self._devices,
            ranks=self.ranks,
            losses=self.losses,
            close_channels=self._close_channels,
            threads_per_stage=threads or share_threads(torch.get_num_threads(), stages),
        )
        self._acting = dict(zip(self.ranks.own, self._executor.acting(self.stages), strict=True))
        channel = self._executor.channel
        self._last = last = len(stages) - 1
        self._input, self._target = channel("input", 0, 0), channel("target", last, last)
        self._activations = [channel(f"activations {i} -> {i + 1}", i, i + 1) for i in range(last)]
        self._gradients = [channel(f"gradients {i + 1} -> {i}", i + 1, i) for i in range(last)]
        self._restart()

    # -- training ------------------------------------------------------------------------------------------------

    def step(self, inputs: Any, target: Any) -> Tensor | None:
        """Feed one minibatch and run one tick. Its tensors are kept, not copied, until it has left the pipe: give each
        minibatch tensors of its own.

        Args:
            inputs: what the first stage takes, a tensor or a tuple.
            target: what ``loss_fn`` takes besides the output.

        Returns:
            The loss of the minibatch whose forward left the pipe (detached, a scalar), in the order they were fed;
            ``None`` while the pipe fills: for ``latency`` ticks.

        Raises:
            StageError: a stage raised; the message names it, ``__cause__`` is the original.
            DivergenceError: a stage met NaN or infinity.
            RuntimeError: inside ``torch.no_grad()`` or ``torch.autocast``, which reach no other thread.
            ValueError: the inputs require gradients.
        """
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        arguments.check_fed(inputs)
        self._submit((inputs, target))
        expected = self.fed - self.latency
        if expected <= 0:
            return None
        self._executor.wait(lambda: self._returned + len(self.losses) >= expected)
        self._returned += 1
        return self._executor.hand_over([self.losses.popleft()])[0]

    def drain(self) -> list[Tensor]:
        """Finish every minibatch in the pipe; returns the losses that :meth:`step` had still to return.

        Afterwards every stage has made one update per minibatch fed, and the delays fill up anew from 0. Where
        gradients accumulate, it has made one per ``accumulate`` minibatches; those of the :attr:`waiting` last ones
        stay in ``.grad`` for the update that the next minibatches complete.
        """
        if self.tick:
            self._executor.check()
        while self.tick < self.schedule.ticks(self.fed):
            self._submit()
        self._synchronize()
        if self.tick:
            self._executor.check()  # it may have been closed meanwhile
        try:
            for stage in self.stages:
                stage.check_weights()
            self._executor.drained(self.fed)
        except BaseException as error:
            self._executor.abort(error)  # other processes' stages may wait for this one's
            raise
        rest = [*self._undelivered, *self._executor.hand_over(self.losses)]
        self._undelivered = []
        self._restart()
        return rest

    @property
    def latency(self) -> int:
        """Calls of :meth:`step` that return ``None`` before the first loss."""
        return self._executor.latency(self.schedule)

    @property
    def waiting(self) -> int:
        """Minibatches whose gradients wait in an empty pipe for the rest of ``accumulate``."""
        self._refuse_minibatches()
        return self._accumulations[self.ranks.own.start].waiting

    @property
    def phase(self) -> str:
        """``fill``, ``steady`` or ``drain``."""
        return self.schedule.phase(max(self.tick - 1, 0), self.fed)

    @property
    def in_flight(self) -> int:
        """Minibatches that have entered and not yet been trained on by every stage."""
        self._executor.synchronize()
        return max(self.ranks.by_stage([stage.in_flight for stage in self.stages]))

    def _restart(self) -> None:
        self.tick = self.fed = self._returned = 0
        self.losses.clear()
        self.optimizer.refresh()
        for stage in self.stages:
            stage.restart()

    def _submit(self, minibatch: tuple[tuple[Any, ...], Any] | None = None) -> None:
        """Run the next tick, with a new minibatch unless the pipe is being drained."""
        by_stage = iter(self.optimizer.options_by_stage())
        try:
            if minibatch is not None:
                if 0 in self.ranks.own:
                    self._input.put(minibatch[0])
                if self._last in self.ranks.own:
                    self._target.put(minibatch[1])
                self.fed += 1
            options = {s.index: next(by_stage) if s.optimizer is not None else [] for s in self.stages}
            tick = Tick(self.tick, self.schedule.tick(self.tick, self.fed), options)
            start = time.perf_counter()
            self._executor.submit(tick)
            if self._watched is not None and self._executor.issues:
                self._watched.host.append(Span(f"tick {self.tick}", start, time.perf_counter()))
            self.tick += 1
        except BaseException as error:
            self._executor.abort(error)  # some stages may have the tick and others not
            raise

    def _run(self, action: Action, tick: Tick) -> None:
        issued = time.perf_counter()
        at, _, minibatch = action
        stage, last = self._acting[at], at == self._last
        spans: Recorder | None = stage.spans
        start = None if spans is None else spans.now()
        if action.kind == "F":
            inputs = self._receive(spans, self._activations[at - 1] if at else self._input)
            outputs = stage.forward(minibatch, inputs)
            if last:
                self.losses.append(loss := stage.loss(minibatch, self.loss_fn, self._target.get()))
                self._executor.computed(loss)
            else:
                self._activations[at].put(outputs)
        else:
            upstream = stage.backward(minibatch, None if last else self._receive(spans, self._gradients[at]))
            if at:
                self._gradients[at - 1].put(upstream)
            stage.backward_weights()
            self._executor.before_update(at)
            stage.update(tick.options[at])
        if spans is not None:
            spans.add(f"{action.kind}{minibatch}", start)
        if len(self.trace) < 64 * len(self.stages):
            self.trace.append(Event(tick.number, action, issued, time.perf_counter()))

    @staticmethod
    def _receive(spans: Recorder | None, channel: Channel) -> Any:
        if spans is None:
            return channel.get()
        start = spans.now()
        item = channel.get()
        spans.add(CHANNEL, start)
        return item

    def watch(self, trace: Trace | None) -> None:
        """Time what every stage does from now on; ``None`` or another trace ends that and fills the trace in.

        ``"serial"`` and ``"threads"`` have the host's clock, which sees work on the CPU; ``"streams"`` and ``"graphs"``
        have the devices', whose events cost the host a few microseconds each, and the host's for a row of its own. It
        waits for the stages, and for the devices, here and in no tick.
        """
        self._executor.settle()
        if self._watched is not None:
            own = [stage.spans.spans() for stage in self.stages if stage.spans is not None]
            self._watched.add(self.ranks.by_stage(own))
        self._watched = trace
        recorders = [Recorder(clock) for clock in self._executor.clocks()] if trace is not None else []
        for stage in self.stages:
            stage.watch(recorders[stage.index] if recorders else None)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for stage in self.stages:
            stage.look_again()  # dropout that was off draws now
        return self

    # -- between runs --------------------------------------------------------------------------------------------

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Load weights and buffers, into an empty pipe.

        Raises:
            RuntimeError: minibatches are in the pipe, or names or shapes do not fit.
        """
        self._refuse_minibatches()
        super().load_state_dict(state, strict)
        for stage in self.stages:
            stage.weights_loaded()

    def checkpoint(self, path: str | os.PathLike[str] | None, **extra: Any) -> list[Tensor]:
        r"""Drain the pipe and write everything that training goes on from into a file, which is whole at any moment.

        A pipeline that goes on, and one that :meth:`resume`\ s from the file, do the same bit for bit: weights,
        buffers, optimizers with their averages, random numbers. The data's order and a scheduler are the caller's.

        Args:
            path: replaced in one move when the new content is on the disk. Of several processes, the first that
                gives a path writes it; the others' paths may be ``None`` and are not touched.
            extra: what :meth:`resume` shall return: tensors, numbers, strings, lists and dicts of them. Of several
                processes, the first one's.

        Returns:
            The losses that :meth:`step` had still to return, as :meth:`drain` does.

        Raises:
            TypeError: ``extra`` holds something else, which :meth:`resume` would refuse. As after every error, the file
                is left as it was, and the next :meth:`drain` returns the losses.
        """
        losses = self.drain()
        try:
            checkpoint.save(self, None if path is None else Path(path), extra)
        except BaseException:
            self._undelivered = losses
            raise
        return losses

    def resume(self, path: str | os.PathLike[str] | None) -> dict[str, Any]:
        """Go on from a file that :meth:`checkpoint` wrote, with the same stages, schedule and ``past``.

        Args:
            path: of several processes, the first that gives one reads it, and hands the content to the others.

        Returns:
            ``extra``, as it was given to :meth:`checkpoint`.

        Raises:
            RuntimeError: minibatches are in the pipe.
            FileNotFoundError: the file is not there; in all processes, whichever was to read it.
            CheckpointError: the file is no checkpoint, or one of another pipeline, or a bit of it is not as it was
                written. Nothing has been loaded then.
        """
        self._refuse_minibatches()
        extra = checkpoint.load(self, None if path is None else Path(path))
        self._restart()
        return extra

    def _refuse_minibatches(self) -> None:
        if self.tick:
            self._executor.check()  # after an error nothing drains it any more
            raise RuntimeError("minibatches are in the pipe and need the weights they began with; call drain() first")

    # -- reports -------------------------------------------------------------------------------------------------

    def measured_delays(self) -> list[dict[int, int]]:
        """Per stage: how many backwards found their weights how many updates old."""
        self._executor.synchronize()
        return self.ranks.by_stage([dict(stage.measured) for stage in self.stages])

    def memory(self) -> list[StageMemory]:
        """What each stage has kept so far, measured from the tensors themselves."""
        self._executor.synchronize()
        return self.ranks.by_stage([stage_memory(stage) for stage in self.stages])

    # -- end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop the workers and let go of the minibatches in the pipe. Weights stay readable. Idempotent.

        Called from inside a stage, it waits for no other stage, and each ends what it is at; a :meth:`step` or
        :meth:`drain` that waits for them raises a RuntimeError.
        """
        self._executor.close()
        if not self._executor.inside_stage():
            for stage in self.stages:
                stage.forget()

    def _synchronize(self) -> None:
        self._executor.synchronize()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._executor.abort(error)  # other processes are told why
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_executor"):
            self.close()

    def _close_channels(self) -> None:
        for channel in (self._input, self._target, *self._activations, *self._gradients):
            channel.close()
