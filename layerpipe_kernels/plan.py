"""A parameter group made ready for its step: checked once, run every step."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from layerpipe_kernels import layout, native, reference
from layerpipe_kernels.checks import check_disjoint, check_like, check_tensor, describe
from layerpipe_kernels.options import (
    NO_PAST,
    STEADY,
    AdamOptions,
    DirectionOptions,
    Options,
    PastDesign,
    SgdOptions,
    StepArguments,
)

#: The optimizer's own state per rule, in the kernels' order; the last of Adam's is AMSGrad's.
STATES: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum buffer",),
    "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "adam_direction": ("exp_avg", "exp_avg_sq"),
    "direction": (),
}
#: How many of these a rule cannot do without; with any, it counts its steps.
_NEEDED = {"sgd": 0, "adam": 2, "adam_direction": 2, "direction": 0}


class Arrays(NamedTuple):
    """A group's tensors: lists with one tensor per parameter, empty where the group has no such tensors."""

    weights: Sequence[Tensor]  # (*) each, updated in place; of "adam_direction" its results, written
    states: tuple[Sequence[Tensor], ...] = ()  # (*) each, updated in place; see STATES
    emas: Sequence[Tensor] = ()  # (K, *) each, updated in place; float32 or bfloat16
    pasts: Sequence[Tensor] = ()  # (*) each, written
    masters: Sequence[Tensor] = ()  # (*) float32 each, updated in place; the weights are their rounded copies
    counts: Sequence[Tensor] = ()  # () float32 each, steps made so far, counted up; Adam needs them
    previous: Sequence[Tensor] = ()  # (*) each, updated in place: the last updates, where weights are predicted

    def written(self) -> list[Tensor]:
        lists = (self.weights, *self.states, self.emas, self.pasts, self.masters, self.counts, self.previous)
        return [tensor for tensors in lists for tensor in tensors]


class Runner(Protocol):
    """A backend's own form of a group."""

    def run(
        self, grads: Sequence[Tensor], first: Sequence[bool], options: Options, design: PastDesign, args: StepArguments
    ) -> None:
        """Make the step on checked gradients."""


class StepPlan:
    """The arrays of one parameter group and the backend that runs their step.

    Args:
        rule: ``"sgd"``, ``"adam"`` (AdamW too), ``"direction"`` for updates whose direction is given in the gradient's
            place, or ``"adam_direction"``, which makes such a direction of a gradient and moves no weight.
        arrays: of the group.
        names: of the weights, for messages.
        backend: as :func:`layerpipe_kernels.backend.choose` says.
        grad_dtype: of the gradients: the weights', or float32 where those are narrower.
        chunk: elements per unit of work; 0 for the backend's own choice.
        reuse: take the tables of an earlier plan of the same pointers, where there is one.

    Raises:
        TypeError: a sparse or non-floating-point tensor.
        ValueError: a tensor with gaps in memory or of another order there than its weight
            (:mod:`layerpipe_kernels.layout`), mixed devices or dtypes, overlapping memory.
    """

    def __init__(
        self,
        rule: str,
        arrays: Arrays,
        *,
        names: Sequence[str],
        backend: str,
        grad_dtype: torch.dtype | None = None,
        chunk: int = 0,
        reuse: bool = False,
    ) -> None:
        self.rule, self.arrays, self.names, self.backend = rule, arrays, names, backend
        self.weights = arrays.weights
        self.device, self.dtype = self.weights[0].device, self.weights[0].dtype
        self.grad_dtype = grad_dtype or self.dtype
        self.ema_count = len(arrays.emas[0]) if arrays.emas else 0
        self._check()
        written = arrays.written()
        # No graph saves an optimizer's state; where the arrays are a caller's own, it may.
        self.versioned = written if reuse else [*arrays.weights, *arrays.pasts]
        self._pointers = [t.data_ptr() for t in written]
        self._sizes = [w.numel() for w in self.weights]
        self._shapes = [w.shape for w in self.weights]
        self._orders = [layout.order(w) for w in self.weights]
        self.runner = self._reused() if reuse else self._runner(chunk)

    def _reused(self) -> Runner:
        """Tables know pointers only, so they serve any tensors that lie at the same place."""
        if self.backend == "reference":
            return self._runner(0)
        a = self.arrays
        shape = tuple(map(len, (*a.states, a.emas, a.pasts, a.masters, a.counts, a.previous))), self.ema_count
        dtypes = self.dtype, self.grad_dtype, a.emas[0].dtype if a.emas else None
        key = self.backend, self.rule, self.device, dtypes, shape, tuple(self._pointers), tuple(self._sizes)
        runner = _runners.pop(key, None) or self._runner(0)
        _runners[key] = runner
        while len(_runners) > MAX_REUSED:
            _runners.popitem(last=False)  # in one go: other threads do the same
        return runner

    def _runner(self, chunk: int) -> Runner:
        if self.backend in ("cpp", "cuda"):
            return native.NativeRunner(self.rule, self.arrays, self.grad_dtype, chunk)
        if self.backend == "triton":
            from layerpipe_kernels.triton import TritonRunner  # imports Triton, which not every machine has

            return TritonRunner(self.rule, self.arrays, self.grad_dtype)
        return ReferenceRunner(self.rule, self.arrays)

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Returns whether these, in the order of :meth:`Arrays.written`, are the arrays that the plan was made for."""
        return (
            [t.data_ptr() for t in tensors] == self._pointers
            and [w.numel() for w in self.weights] == self._sizes
            and all(w.dtype == self.dtype for w in self.weights)
            and [layout.order(w) for w in self.weights] == self._orders
        )

    def _check(self) -> None:
        arrays, kinds = self.arrays, STATES[self.rule]
        check_tensor(self.names[0], self.weights[0], "parameter")
        full = reference.state_dtype(self.dtype)
        needed = _NEEDED[self.rule]
        if not needed <= len(arrays.states) <= len(kinds):
            raise ValueError(f"{self.rule} keeps {', '.join(kinds)}, got {len(arrays.states)} lists of states")
        if needed and not arrays.counts:
            raise ValueError(f"{self.rule} needs `counts`, the number of steps that each parameter has made")
        if self.rule == "adam_direction" and (self.dtype != full or any(arrays[2:5]) or arrays.previous):
            raise ValueError(f"adam_direction writes directions in {full}, and moves no weights that have a past")
        if arrays.masters and self.dtype == full:
            raise ValueError(f"master weights are for weights of 16 bits, not {self.dtype}")
        if self.grad_dtype not in (self.dtype, full):
            raise ValueError(f"gradients must be {self.dtype} or {full}, not {self.grad_dtype}")
        average = arrays.emas[0].dtype if arrays.emas else full
        if average not in (full, torch.bfloat16) or (average == torch.bfloat16 and full == torch.float64):
            raise ValueError(f"EMAs of {self.dtype} weights are {full} or bfloat16 (never for float64), not {average}")
        lists = {
            **{kind: (tensors, full) for kind, tensors in zip(kinds, arrays.states, strict=False)},
            "past weight": (arrays.pasts, self.dtype),
            "master weight": (arrays.masters, torch.float32),
            "previous update": (arrays.previous, full),
        }
        for what, tensors in (*((k, v) for k, (v, _) in lists.items()), ("ema", arrays.emas), ("count", arrays.counts)):
            if tensors and len(tensors) != len(self.weights):
                raise ValueError(f"{len(self.weights)} weights, but {len(tensors)} of: {what}")
        for i, (name, weight) in enumerate(zip(self.names, self.weights, strict=True)):
            check_tensor(name, weight, "parameter")
            if weight.device != self.device or weight.dtype != self.dtype:
                raise ValueError(
                    f"parameters of different devices or dtypes in one group: "
                    f"{describe(self.names[0], self.weights[0])} and {describe(name, weight)}; make a group for each"
                )
            for what, (tensors, dtype) in lists.items():
                if tensors:
                    check_like(name, tensors[i], weight, what, dtype)
                    check_tensor(name, tensors[i], f"{what} of", weight)
            if arrays.emas:
                wanted = (self.ema_count, *weight.shape)
                got = arrays.emas[i]
                if got.shape != wanted or got.dtype != average or got.device != self.device:
                    raise ValueError(
                        f"the ema of {describe(name, weight)} must be {wanted}, {average}, on its device, "
                        f"got {describe('ema', got)}"
                    )
                check_tensor(name, got, "ema of", weight)
            if arrays.counts:
                count = arrays.counts[i]
                if count.numel() != 1 or count.dtype != torch.float32 or count.device != self.device:
                    raise ValueError(
                        f"the step count of {describe(name, weight)} must be one float32 number on its device, "
                        f"got {describe('count', count)}"
                    )
        named = [("", self.weights), *((f"{what} of ", tensors) for what, (tensors, _) in lists.items())]
        named += [("ema of ", arrays.emas), ("step count of ", arrays.counts)]
        check_disjoint(
            [kind + name for kind, tensors in named for name, _ in zip(self.names, tensors, strict=False)],
            [t for _, tensors in named for t in tensors],
        )

    def check_grads(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients in their weights' order, or an error that names the parameter whose gradient cannot be used."""
        checked = []
        for i, (grad, shape) in enumerate(zip(grads, self._shapes, strict=True)):
            if grad.layout != torch.strided:
                raise TypeError(
                    f"the gradient of {describe(self.names[i], self.weights[i])} is {grad.layout}; only dense "
                    "gradients are supported (for nn.Embedding: sparse=False)"
                )
            # What autograd and the setter of .grad guarantee, checked cheaply; the details make the message.
            if grad.dtype != self.grad_dtype or grad.shape != shape or grad.device.type != self.device.type:
                check_like(self.names[i], grad, self.weights[i], "gradient", self.grad_dtype)
            # The gradient of a number that stands for an imaginary part may be a view with the other sign.
            plain = layout.like(grad.resolve_neg(), self.weights[i])
            if self._sizes[i] and not plain.is_meta and not plain.data_ptr():
                plain = plain.clone()  # of zeros without memory
                check_tensor(self.names[i], plain, "the gradient of")
            checked.append(plain)
        return checked

    def step(
        self,
        grads: Sequence[Tensor],
        options: Options,
        design: PastDesign = NO_PAST,
        args: StepArguments = STEADY,
        first: Sequence[bool] = (),
    ) -> None:
        """Make the step, without a graph; the formulas are those of :mod:`layerpipe_kernels.reference`.

        Args:
            grads: from :meth:`check_grads`; nothing where the runner has collected them itself.
            options: of the plan's rule.
            design: what to keep of the past.
            args: of this step.
            first: per parameter, whether its momentum buffer holds nothing yet; empty if none is.

        Options, design and arguments are taken as they are: see
        :func:`layerpipe_kernels.checks.check_options`.
        """
        self.runner.run(grads, first, options, design, args)
        # A delayed backward that saved these tensors without the stage's hooks must fail, not be silently wrong.
        torch.autograd.graph.increment_version(self.versioned)


#: The tables of the last groups stepped through an operator, the latest used last.
_runners: collections.OrderedDict[object, Runner] = collections.OrderedDict()
MAX_REUSED = 32


class ReferenceRunner:
    """The step in plain torch, one tensor after the other, each in the order of memory: so elements are numbered where
    averages are rounded stochastically."""

    def __init__(self, rule: str, arrays: Arrays) -> None:
        self.orders = [layout.order(w) or () for w in arrays.weights]
        ordered = self._in_memory
        self.arrays = Arrays(
            ordered(arrays.weights),
            tuple(map(ordered, arrays.states)),
            ordered(arrays.emas),
            ordered(arrays.pasts),
            ordered(arrays.masters),
            arrays.counts,
            ordered(arrays.previous),
        )
        self.rule = rule

    @torch.no_grad()
    def _in_memory(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [layout.in_memory(t, dims) for t, dims in zip(tensors, self.orders, strict=False)]

    @torch.no_grad()
    def run(
        self, grads: Sequence[Tensor], first: Sequence[bool], options: Options, design: PastDesign, args: StepArguments
    ) -> None:
        a = self.arrays
        for i, (weight, grad) in enumerate(zip(a.weights, self._in_memory(grads), strict=True)):
            states = [tensors[i] for tensors in a.states]
            lists = (a.emas, a.pasts, a.masters, a.counts, a.previous)
            ema, past, master, count, previous = (x[i] if x else None for x in lists)
            if isinstance(options, SgdOptions):
                velocity = states[0] if states else None
                reference.sgd_step_(
                    weight, grad, velocity, ema, past, options, design, args, master=master, previous=previous,
                    count=count, first=bool(first and first[i]), tensor=i,
                )  # fmt: skip
            elif isinstance(options, DirectionOptions):
                reference.direction_step_(
                    weight, grad, ema, past, options, design, args, master=master, previous=previous, count=count,
                    tensor=i,
                )  # fmt: skip
            elif self.rule == "adam_direction":
                assert count is not None
                reference.adam_direction_(weight, grad, states[0], states[1], count, options, args)
            else:
                assert isinstance(options, AdamOptions)
                assert count is not None
                largest = states[2] if len(states) > 2 else None
                reference.adam_step_(
                    weight, grad, states[0], states[1], largest, count, ema, past, options, design, args,
                    master=master, previous=previous, tensor=i,
                )  # fmt: skip
        if reference.overflowed(args):
            return
        if args.clock is not None:
            args.clock.add_(1)
        if args.horizon_at is not None:
            args.horizon_at.fill_(args.horizon)
