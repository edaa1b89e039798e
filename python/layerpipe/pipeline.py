"""The pipeline: stages, the channels between them, a schedule and whoever runs it."""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerpipe import arguments, checkpoint, delays, executors, own_part
from layerpipe import schedule as schedules
from layerpipe import sharded as sharded_checkpoint
from layerpipe.actions import Actions
from layerpipe.current_weights import CurrentWeights
from layerpipe.executors import agreement
from layerpipe.executors import mesh as meshes
from layerpipe.executors.base import Tick
from layerpipe.inputs import Intake, packed
from layerpipe.loss import LossWeights
from layerpipe.measured import StageMemory, stage_memory
from layerpipe.network import Network
from layerpipe.optimizer import common_optimizer
from layerpipe.own_part import Materialize
from layerpipe.pacing import Pacing
from layerpipe.partition import share_threads
from layerpipe.schedule import Action, Schedule, Sequential
from layerpipe.stage.accumulation import Accumulation
from layerpipe.stage.build import OptimizerFactory, build
from layerpipe.tracing import Trace
from layerpipe.tracing.spans import Recorder, Span
from layerpipe_kernels.past import Past, option, parse

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self


class Pipeline(Network):
    """Trains a chain of stages; every stage does a forward and a backward in every tick.

    Args:
        stages: modules from :func:`layerpipe.split` or by hand, each taking what the one before returns.
        loss_fn: ``loss_fn(output, target)`` to a scalar, called in the last stage; ``loss_fn(*outputs, target)``
            where that returns a tuple; the last stage may return any structure. Of a module, the last stage's optimizer
            trains the parameters, too.
        optimizer: ``optimizer(params, **past)``, called once per stage that has parameters; hands ``past``, which is
            the stage's ``delay`` and the pipeline's ``past``, on to an optimizer of :mod:`layerpipe_kernels`.
            Embeddings and the last stage's last layer are marked before
            (:func:`layerpipe_kernels.mark_embeddings_and_output`), so that SOAP and Muon know them.
        past: how past weights are had: ``"blend"``, ``"ema"``, ``"momentum"``, ``"latest"`` or ``"stash"``, or with
            options a value such as ``layerpipe_kernels.Blend(order=3)``; see :mod:`layerpipe_kernels.past`.
        schedule: ``"lockstep"``, ``"1f1b"``, ``"sequential"`` or ``"auto"``; see :mod:`layerpipe.schedule`.
        executor: how a process runs its stages, ``"serial"``, ``"threads"``, on CUDA devices ``"streams"`` or
            ``"graphs"``; ``"distributed"`` is ``"serial"`` with the stages in all processes of torch's default group.
        mesh: which process holds which stages (``"pp"``) of which replica (``"dp"``), see
            :mod:`layerpipe.executors.mesh`; by default one process has all. Gradients are averaged over the replicas.
        materialize: called with this process's stages, in order, where they are on the meta device, to give them memory
            and values, such as :meth:`layerpipe.DeferredInit.materialize`. The others stay there.
        devices: one per stage, which is moved there before its optimizer is made; by default the stages stay where they
            are. Tensors are copied from stage to stage and from the caller to the first and last.
        threads_per_stage: torch's intra-op threads in each worker thread, one number for all or one per stage; by
            default the caller's setting is shared by what the stages cost, see
            :func:`layerpipe.partition.share_threads`.
        accumulate: make one update in so many minibatches, with the mean of their gradients, at as many times smaller a
            delay; see :mod:`layerpipe.schedule`.
        sync_steps: so many first minibatches go through the pipe one at a time, without a delay.
        delay_policy: decides that for every minibatch, in place of ``sync_steps``; see :mod:`layerpipe.delays`.
        max_norm: clip the norm of each stage's gradient, or of their mean, to this before its update.
        max_norm_of: ``"stage"``, or ``"network"`` to clip the norm of all stages' gradients together, of which a stage
            knows its own and of the others what came with their last tensors; see :mod:`layerpipe.stage.network_norm`.
        split_backward: send the gradients of activations on before those of weights are computed; the same numbers.
        loss_params: of ``loss_fn``, trained by the last stage's optimizer; by default all that a module has.
        check_finite: stop with a :class:`layerpipe.DivergenceError` at the first NaN or infinity; on a device,
            :meth:`drain` finds it in the weights.

    Raises:
        ValueError: no stages, an unknown name, options that contradict each other.
        TypeError: stages that are one module, a loss or an optimizer that is no function, or an optimizer that does
            not know its past weights where a delay needs them.

    All processes, where there are several, make the same pipeline and call the same methods in the same order: each
    trains its own :attr:`stages`, the first takes the inputs of :meth:`step`, the last the targets. Each replica takes
    minibatches of its own, as many as the others do, and returns their losses.

    Weights do not depend on the executor: a stage's work is done in the same order by the same kernels, and its random
    layers draw on the CPU from a generator of its own (:mod:`layerpipe.stage.random_numbers`), seeded from torch's. A
    different number of intra-op threads breaks that, and compiled random layers in threads do.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        loss_fn: Callable[[Any, Any], Tensor],
        optimizer: OptimizerFactory,
        *,
        past: str | Past = "blend",
        schedule: str = "lockstep",
        executor: str = "serial",
        mesh: DeviceMesh | None = None,
        materialize: Materialize | None = None,
        devices: Sequence[Any] | None = None,
        threads_per_stage: int | Sequence[int] | None = None,
        accumulate: int = 1,
        sync_steps: int = 0,
        delay_policy: delays.DelayPolicy | None = None,
        max_norm: float | None = None,
        max_norm_of: str = "stage",
        split_backward: bool = False,
        check_finite: bool = True,
        loss_params: Iterable[nn.Parameter] | None = None,
    ) -> None:
        arguments.check_made_of(stages, loss_fn, optimizer, max_norm)
        arguments.check_accumulate(accumulate, executor)
        arguments.check_max_norm_of(max_norm_of, max_norm, executor)
        executors.check(executor)
        threads = executors.per_stage(threads_per_stage, len(stages))
        self.schedule = schedules.make(schedule, len(stages), executor)
        self.accumulate = accumulate
        self._running: Schedule = self.schedule  # while minibatches go through one at a time, another one
        self._accumulations = [Accumulation(lag, accumulate) for lag in self.schedule.delays()]
        self.delays = [accumulation.delay for accumulation in self._accumulations]
        ranks = meshes.make(executor, mesh, len(stages))
        own_part.materialize(stages, ranks, materialize)
        super().__init__(stages, devices, ranks)
        self.pacing = Pacing(delays.make(delay_policy, sync_steps), self.schedule.ticks(1), self.ranks.mean)
        agreement.check_same(
            self.ranks, stages,
            {"past": str(parse(past)), "schedule": self.schedule.name,
             "max_norm": max_norm, "max_norm_of": max_norm_of, "split_backward": split_backward,
             "check_finite": check_finite, "accumulate": accumulate, "sync_steps": sync_steps,
             "delay_policy": type(delay_policy).__name__},
        )  # fmt: skip
        self.ranks.check_trained(stages)
        self.loss_fn, self.loss_weights = loss_fn, LossWeights(loss_fn, loss_params, stages)
        self.loss_weights.move(self._devices[-1] if devices is not None else None)
        self.losses: collections.deque[Tensor] = collections.deque()
        self._undelivered: list[Tensor] = []  # losses that a checkpoint which failed had drained
        self._actions = Actions(len(stages), self.ranks.own, loss_fn, self.losses)
        self.trace = self._actions.trace  # the first ticks, for a picture of the schedule
        self._watched: Trace | None = None
        names = [f"stage {i} ({name})" for i, name in enumerate(self.names)]
        self.stages = build(
            stages,
            optimizer,
            past=option(past),
            accumulations=self._accumulations,
            names=names,
            loss=self.loss_weights,
            random=executors.random_numbers(executor, stages, self.ranks),
            ranks=self.ranks,
            max_norm=max_norm,
            network_norm=max_norm_of == "network",
            check_finite=check_finite,
            split_backward=split_backward,
        )
        self.weights = CurrentWeights([stage.optimizer for stage in self.stages], self._synchronize)
        self.optimizer = common_optimizer(self.stages, self._synchronize, self.ranks, replayed=executor == "graphs")
        self._executor = executors.make(
            executor,
            self._actions.run,
            names,
            self.stages,
            self._devices,
            ranks=self.ranks,
            losses=self.losses,
            close_channels=self._actions.close,
            threads_per_stage=(
                [threads[i] for i in self.ranks.own]
                if threads
                else share_threads(torch.get_num_threads(), self.modules)
            ),
        )
        self._actions.connect(self._executor, self.stages)
        self._intake = Intake(stages[0]) if 0 in self.ranks.own else None
        self._restart()

    def step(self, inputs: Any, target: Any, **kwargs: Any) -> Tensor | None:
        """Feed one minibatch and run one tick. Its tensors are kept, not copied, until it has left the pipe: give each
        minibatch tensors of its own.

        Args:
            inputs: what the first stage takes: a tensor or another single argument, a tuple of arguments, or a dict of
                keyword arguments. A dict or a tuple that is one argument goes into a tuple: ``(batch,)``.
            target: what ``loss_fn`` takes besides the output.
            kwargs: more keyword arguments of the first stage.

        Returns:
            The loss of the minibatch whose forward left the pipe (detached, a scalar), in the order they were fed;
            ``None`` while the pipe fills: for ``latency`` ticks. Losses that come at once, as a policy makes the pipe
            empty itself, are returned by as many calls.

        Raises:
            StageError: a stage raised; the message names it, ``__cause__`` is the original.
            DivergenceError: a stage met NaN or infinity.
            RuntimeError: inside ``torch.no_grad()`` or ``torch.autocast``, which reach no other thread.
            ValueError: the inputs require gradients.
            TypeError: keyword arguments that the first stage does not take. Nothing was fed then.
            SpecializationError: :func:`layerpipe.split` has traced the model for other inputs. Nothing was fed then.
        """
        self._executor.check_outside()
        given = packed(inputs, kwargs)
        arguments.check_fed(given)
        if self._intake is not None:
            self._intake.check(given)
        self.weights.hide()
        if self.pacing.next() is self.synchronous:
            self._change_pace()
        self._submit((given, target))
        expected = self._owed + max(self.fed - self.latency, 0)
        if expected <= self._returned:
            return None
        self._executor.wait(lambda: self._returned + len(self.losses) >= expected)
        self._returned += 1
        loss = self._executor.hand_over([self.losses.popleft()])[0]
        self.pacing.returned(loss)
        return loss

    def drain(self) -> list[Tensor]:
        """Finish every minibatch in the pipe; returns the losses that :meth:`step` had still to return.

        Afterwards every stage has made one update per ``accumulate`` minibatches fed, and the delays fill up anew from
        0. Gradients of the :attr:`waiting` last ones stay in ``.grad`` for an update that the next ones complete.
        Predicted weights become the weights themselves.
        """
        self._empty()
        left = self._executor.hand_over(self.losses)
        self.pacing.drained(left)
        rest, self._undelivered = [*self._undelivered, *left], []
        self._restart()
        return rest

    def _empty(self) -> None:
        """Finish every minibatch in the pipe."""
        self._executor.check_outside()
        self.weights.hide()
        if self.tick:
            self._executor.check()
        if self.ranks.notices is not None:
            self.ranks.notices.drains()
        while self.tick < self._running.ticks(self.fed):
            self._submit()
        self._synchronize()
        if self.tick:
            self._executor.check()  # it may have been closed meanwhile
        try:
            for stage in self.stages:
                stage.check_weights()
            self._executor.drained(self.fed)
            self.ranks.meet()
            for stage in self.stages:
                if stage.replicas is not None:
                    stage.replicas.share_buffers()
        except BaseException as error:
            self._executor.abort(error)  # other processes' stages may wait for this one's
            raise

    def _change_pace(self) -> None:
        """Let minibatches follow each other, or go through one at a time, where those before did the opposite."""
        synchronous = not self.synchronous
        if self.tick:
            self._empty()
        self._running = Sequential(len(self.delays)) if synchronous else self.schedule
        for accumulation in self._accumulations:
            accumulation.pace(synchronous=synchronous)
        self._refill()

    @property
    def synchronous(self) -> bool:
        """Return whether the policy lets minibatches through one at a time at present."""
        return self._accumulations[0].synchronous

    @property
    def latency(self) -> int:
        """Calls of :meth:`step` that return ``None`` before the first loss of a pipe that fills."""
        return self._executor.latency(self._running)

    @property
    def waiting(self) -> int:
        """Minibatches whose gradients wait in an empty pipe for the rest of ``accumulate``."""
        self._refuse_minibatches()
        return self._accumulations[self.ranks.own.start].waiting

    @property
    def phase(self) -> str:
        """``fill``, ``steady`` or ``drain``."""
        return self._running.phase(max(self.tick - 1, 0), self.fed)

    @property
    def in_flight(self) -> int:
        """Minibatches that have entered and not yet been trained on by every stage."""
        self._synchronize()
        return max(self.ranks.by_stage([stage.in_flight for stage in self.stages]))

    def _restart(self) -> None:
        self.losses.clear()
        self.fed = self._owed = self._returned = 0
        self._refill()

    def _refill(self) -> None:
        """The pipe is empty and begins to fill; losses may be there that :meth:`step` has still to return."""
        self._owed += self.fed
        self.tick = self.fed = 0
        self.weights.training = False
        self.optimizer.refresh()
        for stage in self.stages:
            stage.restart()

    def _submit(self, minibatch: tuple[tuple[Any, ...], Any] | None = None) -> None:
        """Run the next tick, with a new minibatch unless the pipe is being drained."""
        by_stage = iter(self.optimizer.options_by_stage())
        try:
            if minibatch is not None:
                self._actions.feed(*minibatch)
                self.fed += 1
                if self.ranks.notices is not None:
                    self.ranks.notices.fed = self.fed
                self.weights.training = True
            options = {s.index: next(by_stage) if s.optimizer is not None else [] for s in self.stages}
            tick = Tick(self.tick, self._own_actions(self._running.tick(self.tick, self.fed)), options)
            start = time.perf_counter()
            self._executor.submit(tick)
            if self._watched is not None and self._executor.issues:
                self._watched.host.append(Span(f"tick {self.tick}", start, time.perf_counter()))
            self.tick += 1
        except BaseException as error:
            self._executor.abort(error)  # some stages may have the tick and others not
            raise

    def _own_actions(self, actions: list[Action]) -> list[Action]:
        """Those of the stages in this process."""
        own = self.ranks.own
        return actions if self.ranks.size == 1 else [action for action in actions if action.stage in own]

    def watch(self, trace: Trace | None) -> None:
        """Time what every stage does from now on; ``None`` or another trace ends that and fills the trace in.

        ``"serial"`` and ``"threads"`` have the host's clock, ``"streams"`` and ``"graphs"`` the devices' and the host's
        for a row of its own. It waits for the stages, and for the devices, here and in no tick.
        """
        self._executor.check_outside()
        self._executor.settle()
        if self._watched is not None:
            own = [stage.spans.spans() for stage in self.stages if stage.spans is not None]
            self._watched.add(self.ranks.by_stage(own))
        self._watched = trace
        recorders = [Recorder(clock) for clock in self._executor.clocks()] if trace is not None else []
        for stage in self.stages:
            stage.watch(recorders[stage.index] if recorders else None)

    def train(self, mode: bool = True) -> Self:
        """Switch all stages between training and evaluation, once everything submitted is done: forwards from the next
        :meth:`step` on see it, and backwards have what their forwards saw."""
        super().train(mode)
        for stage in self.stages:
            stage.look_again()  # dropout that was off draws now
        return self

    @property
    def replica(self) -> int:
        """The replica that this process holds stages of, from 0: it takes minibatches of its own."""
        return self.ranks.replica

    @property
    def replicas(self) -> int:
        """The number of replicas of the stages, in as many processes each."""
        return self.ranks.replicas

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Load weights and buffers, into an empty pipe.

        Raises:
            RuntimeError: minibatches are in the pipe, or names or shapes do not fit.
        """
        self._refuse_minibatches()
        super().load_state_dict(state, strict)
        for stage in self.stages:
            stage.weights_loaded()

    def checkpoint(self, path: str | os.PathLike[str] | None, *, sharded: bool = False, **extra: Any) -> list[Tensor]:
        r"""Drain the pipe and write everything that training goes on from into a file, which is whole at any moment.

        A pipeline that goes on, and one that :meth:`resume`\ s from the file, do the same bit for bit: weights,
        buffers, optimizers with their averages, random numbers. The data's order and a scheduler are the caller's.

        Args:
            path: replaced in one move when the new content is on the disk. Of several processes, the first that
                gives a path writes it; the others' paths may be ``None`` and are not touched.
            sharded: make ``path`` a directory, on a file system that all processes share, into which each writes its
                own stages (:mod:`layerpipe.sharded`): none has the whole model in memory.
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
            if sharded:
                sharded_checkpoint.save(self, Path(arguments.checked_path(path)), extra)
            else:
                checkpoint.save(self, None if path is None else Path(path), extra)
        except BaseException:
            self._undelivered = losses
            raise
        return losses

    def resume(self, path: str | os.PathLike[str] | None, *, missing_ok: bool = False) -> dict[str, Any]:
        """Go on from a file that :meth:`checkpoint` wrote, with the same stages, schedule and ``past``.

        Args:
            path: of several processes, the first that gives one reads it, and hands the content to the others. A
                directory is given in all of them, each of which reads its own stages.
            missing_ok: begin anew where no process finds anything there, as a job does that is started again after a
                failure, whenever that came.

        Returns:
            ``extra``, as it was given to :meth:`checkpoint`; ``{}`` of a beginning.

        Raises:
            RuntimeError: minibatches are in the pipe.
            FileNotFoundError: the file is not there; in all processes, whichever was to read it.
            CheckpointError: the file is no checkpoint, or one of another pipeline, or a bit of it is not as it was
                written. Nothing has been loaded then.
        """
        self._refuse_minibatches()
        there = None if path is None else sharded_checkpoint.existing(Path(path))
        if missing_ok and not any(self.ranks.gather_all(there is not None and there.exists())):
            return {}
        if all(self.ranks.gather_all(there is not None and there.is_dir())):
            extra = sharded_checkpoint.load(self, Path(arguments.checked_path(path)))
        else:
            extra = checkpoint.load(self, None if path is None else Path(path))
        self._restart()
        return extra

    def _refuse_minibatches(self) -> None:
        if self.tick:
            self._executor.check()  # after an error nothing drains it any more
            raise RuntimeError("minibatches are in the pipe and need the weights they began with; call drain() first")

    def measured_delays(self) -> list[dict[int, int]]:
        """Per stage: how many backwards found their weights how many updates old."""
        self._synchronize()
        return self.ranks.by_stage([dict(stage.measured) for stage in self.stages])

    def memory(self) -> list[StageMemory]:
        """Return the bytes that each stage has kept so far, counted on the tensors themselves."""
        self._synchronize()
        return self.ranks.by_stage([stage_memory(stage) for stage in self.stages])

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
        self._executor.check_outside()
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
