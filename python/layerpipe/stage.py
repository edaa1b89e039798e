"""One stage of the pipeline: forward, backward on past weights, update."""

from __future__ import annotations

import bisect
import collections
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerpipe.copies import copied_parameters
from layerpipe.errors import DivergenceError

Tensors = tuple[Tensor, ...]


class _SavedWeight(NamedTuple):
    """A saved tensor that lives in a parameter's memory: not the values, but where they are."""

    param: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # elements behind the parameter's first


class _SavedActivation(NamedTuple):
    tensor: Tensor
    version: int  # a change in place after the forward must still be noticed


class _Flight:
    """A minibatch between its forward and its backward."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.inputs: Tensors = ()
        self.outputs: Tensors = ()
        self.saved: dict[int, int] = {}  # what autograd keeps, weights apart: address -> bytes
        self.saved_bytes = 0


class Stage:
    """A part of the network with its own optimizer and its own count of updates.

    Autograd saves references to parameters, which the optimizer then changes in place. A stage packs them as
    ``(parameter, view)`` and hands the backward the same view of the past weights ``What(t - n)`` instead, made layer
    by layer, just in time. With a delay of 0 the parameters themselves are the past weights.

    Args:
        module: the layers.
        optimizer: of the module's parameters, or ``None`` if it has none. With a delay it must have ``past_view``, as
            the optimizers of :mod:`layerpipe_kernels` do.
        index: position in the pipeline, from the input.
        delay: ``n`` of this stage in steady state, in updates.
        name: what messages call it.
        advice: what to try when the stage diverges.
        max_norm: clip the norm of this stage's gradient to this before each update.
        check_finite: look for NaN and infinity at the stage's boundaries.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Any | None,
        *,
        index: int,
        delay: int,
        name: str,
        advice: str = "",
        max_norm: float | None = None,
        check_finite: bool = True,
    ) -> None:
        self.module, self.optimizer = module, optimizer
        self.index, self.delay, self.name = index, delay, name
        self.advice, self.max_norm, self.check_finite = advice, max_norm, check_finite
        self.version = 0  # updates so far
        self.base = 0  # version when the pipe was last empty
        self.measured: collections.Counter[int] = collections.Counter()  # n seen in the backward -> how often
        self.scratch_bytes = 0  # the largest past weight made for a backward
        self.activation_bytes = 0  # the most that was kept between forwards and backwards
        self.probe: Callable[[Stage], None] | None = None  # looks on, before each backward
        self._flights: dict[int, _Flight] = {}
        self._all_params = list(module.parameters())
        self._params = [p for p in self._all_params if p.requires_grad]
        self._look_for_copies = delay > 0  # in the first forward
        if optimizer is not None:
            held = {p for group in optimizer.param_groups for p in group["params"]}
            missing = [n for n, p in module.named_parameters() if p.requires_grad and p not in held]
            if missing:
                raise ValueError(f"{name}: the optimizer was given {missing[0]}, but holds it in no parameter group")
        if delay and optimizer is not None and not hasattr(optimizer, "past_view"):
            raise TypeError(
                f"{name} gets its gradients {delay} updates late, and {type(optimizer).__name__} does not know its "
                "past weights; use layerpipe_kernels.SGD and pass it the pipeline's keywords: "
                "optimizer=lambda params, **past: layerpipe_kernels.SGD(params, lr=..., **past)"
            )
        for group in optimizer.param_groups if delay and optimizer is not None else ():
            if group["delay"] != delay:
                raise ValueError(
                    f"{name} has a delay of {delay}, its optimizer one of {group['delay']}; pass the pipeline's "
                    "keywords on: optimizer=lambda params, **past: layerpipe_kernels.SGD(params, lr=..., **past)"
                )

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(self, minibatch: int, inputs: Tensors) -> Tensors:
        """Run the layers on a minibatch and keep its graph; returns outputs cut off from it."""
        flight = _Flight(self.version)
        if self.index:
            inputs = tuple(x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in inputs)
        flight.inputs = inputs
        with self._saving(flight):
            outputs = self.module(*inputs)
        flight.outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for output in flight.outputs:
            if not isinstance(output, Tensor):
                raise TypeError(f"a stage returns a tensor or a tuple of tensors, got {type(output).__name__}")
        self._check_finite(flight.outputs, "output", minibatch)
        self._flights[minibatch] = flight
        if self._look_for_copies:
            self._look_for_copies = False
            self._warn_of_copies(flight.outputs)
        self._count(flight)
        return tuple(y.detach() for y in flight.outputs)

    def loss(self, minibatch: int, loss_fn: Callable[..., Tensor], target: Any) -> Tensor:
        """Continue the last stage's forward to the loss; returns it cut off from the graph."""
        flight = self._flights[minibatch]
        with self._saving(flight):
            loss = loss_fn(*flight.outputs, target)
        if loss.numel() != 1:
            raise ValueError(f"loss_fn must return one number, got a tensor of shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise RuntimeError("the loss depends on no trained weight: is it detached, or everything frozen?")
        self._check_finite((loss,), "loss", minibatch)
        flight.outputs = (loss,)
        self._count(flight)
        return loss.detach()

    def _count(self, flight: _Flight) -> None:
        flight.saved_bytes = sum(flight.saved.values())
        self.activation_bytes = max(self.activation_bytes, sum(f.saved_bytes for f in self._flights.values()))

    # -- backward ------------------------------------------------------------------------------------------------

    def backward(self, minibatch: int, grads: tuple[Tensor | None, ...] | None) -> tuple[Tensor | None, ...]:
        """Gradients of a minibatch, its parameters' into ``.grad``; returns those of the stage's inputs."""
        flight = self._flights.pop(minibatch)
        n = self.version - flight.version
        self.measured[n] += 1
        if n != min(self.version - self.base, self.delay):
            raise RuntimeError(f"minibatch {minibatch} is {n} updates old; the schedule says {self.delay}")
        if self.probe is not None:
            self.probe(self)
        for param in self._params:
            param.grad = None
        wanted = [(y, None if grads is None else grads[i]) for i, y in enumerate(flight.outputs) if y.requires_grad]
        if grads is not None:
            wanted = [(y, g) for y, g in wanted if g is not None]
        if wanted:
            torch.autograd.backward([y for y, _ in wanted], [g for _, g in wanted])
        upstream = tuple(x.grad for x in flight.inputs) if self.index else ()
        self._check_finite([g for g in upstream if g is not None], "gradient", minibatch)
        return upstream

    def update(self, options: list[dict[str, Any]]) -> None:
        """Step the optimizer with these options per parameter group, as they were when the tick was submitted."""
        if self.optimizer is not None:
            for group, values in zip(self.optimizer.param_groups, options, strict=True):
                group.update(values)
            if self.max_norm is not None:
                nn.utils.clip_grad_norm_(self._params, self.max_norm)
            self.optimizer.step()
        self.version += 1

    def restart(self) -> None:
        """The pipe is empty: the next minibatch sees the weights as they are now, and delays fill up from 0."""
        self.base = self.version
        if self.delay and self.optimizer is not None:
            self.optimizer.restart_history()

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    def _check_finite(self, tensors: Any, what: str, minibatch: int) -> None:
        if not self.check_finite:
            return
        for tensor in tensors:
            # On an accelerator, reading the value would make the host wait for the device.
            if tensor.device.type == "cpu" and tensor.is_floating_point() and not _finite(tensor):
                self._diverged(f"the {what} of minibatch {minibatch}")

    def check_weights(self) -> None:
        """Find what the boundaries have not shown yet: the last update of a pipe that is empty now.

        Raises:
            DivergenceError: a weight is not finite.
        """
        if self.check_finite and not all(_finite(p.detach()) for p in self._params):
            self._diverged("a weight")

    def _diverged(self, what: str) -> None:
        advice = f"; {self.advice}" if self.advice else ""
        raise DivergenceError(self.name, f"{what} is not finite after {self.version} updates{advice}")

    def forget(self) -> None:
        """Let go of the minibatches in flight."""
        self._flights.clear()

    # -- saved tensors -------------------------------------------------------------------------------------------

    @contextmanager
    def _saving(self, flight: _Flight) -> Iterator[None]:
        if not self.delay and flight.version > self.base:
            yield  # nothing to hand out, and the first minibatch has shown what is kept
            return
        # A parameter may have been moved to other memory (module.to, load_state_dict(assign=True)): look now.
        owners = sorted(((p.data_ptr(), i) for i, p in enumerate(self._all_params) if p.numel()))
        starts = [start for start, _ in owners]
        params = [self._all_params[i] for _, i in owners]
        # The graph keeps the hooks, and a flight keeps its graph: through the stage, that would be a cycle for ever.
        stage, kept, delayed = weakref.proxy(self), flight.saved, self.delay > 0

        def pack(tensor: Tensor) -> Tensor | _SavedWeight | _SavedActivation:
            pointer = tensor.data_ptr()
            at = bisect.bisect_right(starts, pointer) - 1
            if at >= 0 and pointer < starts[at] + params[at].nbytes:
                owner = params[at]
                if delayed and owner.requires_grad:
                    offset = (pointer - starts[at]) // owner.itemsize
                    return _SavedWeight(owner, tensor.size(), tensor.stride(), offset)
            else:
                kept[pointer] = tensor.nbytes
            # The tensor itself may be the output of the node that saves it: a cycle that no collector sees.
            return _SavedActivation(tensor.detach(), tensor._version)

        def unpack(saved: _SavedWeight | _SavedActivation) -> Tensor:
            if isinstance(saved, _SavedActivation):
                tensor, version = saved
                if tensor._version != version:
                    raise RuntimeError(
                        f"a tensor of shape {tuple(tensor.shape)} needed for the backward was modified in place: "
                        f"it is at version {tensor._version}, expected {version}"
                    )
                return tensor
            assert isinstance(saved, _SavedWeight)
            param, size, stride, offset = saved
            past: Tensor = stage.optimizer.past_view(param)
            if past.nbytes > stage.scratch_bytes:
                stage.scratch_bytes = past.nbytes
            return past.as_strided(size, stride, past.storage_offset() + offset)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def _warn_of_copies(self, outputs: Tensors) -> None:
        names = {param: name for name, param in self.module.named_parameters()}
        copied = [names[p] for p in dict.fromkeys(copied_parameters(outputs)) if p in names]
        if copied:
            warnings.warn(
                f"{self.name}: the forward works on copies of {', '.join(copied)} (autocast or weight norm?), which "
                "are kept for every minibatch in flight; their past values are exact, but stashed",
                stacklevel=2,
            )


def _finite(tensor: Tensor) -> bool:
    """Of a real tensor on the CPU; a sum is not finite if a term is not."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return math.isfinite(tensor.sum(dtype=torch.float32 if half else None).item())
