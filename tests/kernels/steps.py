"""Cases of a step for every backend: random groups, the fp64 oracle, and how close a result must come to it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels import reference
from layerpipe_kernels.checks import check_options
from layerpipe_kernels.options import (
    STEADY,
    AdamOptions,
    DirectionOptions,
    Options,
    PastDesign,
    SgdOptions,
    StepArguments,
)
from layerpipe_kernels.plan import STATES, Arrays, StepPlan

SIZES = [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 1023, 1025]

SGD = SgdOptions(lr=0.1, momentum=0.9, weight_decay=1e-2)
ADAM = AdamOptions(lr=0.01, weight_decay=1e-2)
OPTIONS: dict[str, Options] = {
    "sgd": SGD,
    "adam": ADAM,
    "adam_direction": ADAM._replace(weight_decay=0.0),
    "direction": DirectionOptions(lr=0.1, weight_decay=1e-2),
}
#: Of predicted weights: the horizon shrinks in the step.
PREDICTED = StepArguments(horizon=3.0, horizon_before=5.0)
DECAYS, TAPS = (0.5, 0.8, 0.9), (-3.0, 5.0, 1.5)


@dataclasses.dataclass(frozen=True)
class Case:
    """A group of tensors. ``offset`` elements into their storage, they are not aligned to 16 bytes."""

    rule: str = "sgd"
    dtype: torch.dtype = torch.float32
    grad: torch.dtype | None = None
    ema: torch.dtype | None = None
    emas: int = 2
    past: bool = True
    master: bool = False
    states: int = -1  # how many kinds, -1 for all but AMSGrad's
    counts: bool = False  # SGD's; Adam always counts
    offset: int = 0
    sizes: tuple[int, ...] = tuple(SIZES)
    device: str = "cpu"
    previous: bool = False  # the weights are predicted

    def __str__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return "-".join(f"{k}={v}" for k, v in changed.items() if v != getattr(Case(), k)) or "default"

    def design(self, **changed: Any) -> PastDesign:
        design = PastDesign(0, DECAYS[: self.emas], TAPS[: self.emas], 2.0, seed=7)
        return design._replace(**changed)

    def options(self) -> Options:
        return OPTIONS[self.rule]

    def make(self) -> tuple[Arrays, list[Tensor]]:
        """Arrays and gradients. The past weights are poisoned: what is not written stays NaN."""
        full = reference.state_dtype(self.dtype)
        kinds = len(STATES[self.rule]) - (self.rule == "adam") if self.states < 0 else self.states

        def array(*shape: int, dtype: torch.dtype = full) -> Tensor:
            memory = torch.randn(torch.Size(shape).numel() + self.offset, dtype=full, device=self.device).to(dtype)
            return memory[self.offset :].view(shape)

        weights, states, emas, pasts, masters, grads, counts = [], [[] for _ in range(kinds)], [], [], [], [], []
        previous = []
        for size in self.sizes:
            weight = array(size, dtype=self.dtype)
            weights.append(weight)
            grads.append(array(size, dtype=self.grad or self.dtype))
            for j in range(kinds):
                state = array(size)
                states[j].append(state.square_() if j > 0 else state)  # Adam's second moment is never negative
            if self.emas:
                emas.append(array(self.emas, size, dtype=self.ema or full))
            if self.past:
                pasts.append(
                    torch.full_like(weight, float("nan"))
                    if not self.offset
                    else array(size, dtype=self.dtype).fill_(float("nan"))
                )
            if self.master:
                masters.append(array(size, dtype=torch.float32).copy_(weight))
            if self.previous:
                previous.append(array(size))
            if self.counts or self.rule.startswith("adam"):
                counts.append(torch.tensor(float(size % 5), device=self.device))
        return Arrays(weights, tuple(states), emas, pasts, masters, counts, previous), grads


def cloned(arrays: Arrays, dtype: torch.dtype | None = None) -> Arrays:
    """A copy that keeps the alignment; in another dtype if one is given, step counts excepted."""

    def copy(tensor: Tensor) -> Tensor:
        if dtype is not None:
            return tensor.to(dtype, copy=True)
        offset = tensor.storage_offset()
        memory = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)
        return memory[offset:].view(tensor.shape).copy_(tensor)

    lists = [
        [copy(t) for t in tensors]
        for tensors in (arrays.weights, *arrays.states, arrays.emas, arrays.pasts, arrays.masters, arrays.previous)
    ]
    kinds = len(arrays.states)
    counts = [c.clone() for c in arrays.counts]
    *rest, previous = lists[1 + kinds :]
    return Arrays(lists[0], tuple(lists[1 : 1 + kinds]), *rest, counts, previous)


def run(
    rule: str,
    arrays: Arrays,
    grads: list[Tensor],
    backend: str,
    options: Options,
    design: PastDesign,
    args: StepArguments = STEADY,
    first: bool = False,
    chunk: int = 0,
) -> Arrays:
    """One step on copies."""
    copies = cloned(arrays)
    names = [f"weights[{i}]" for i in range(len(grads))]
    plan = StepPlan(rule, copies, names=names, backend=backend, grad_dtype=grads[0].dtype, chunk=chunk)
    check_options(options, design, args, plan.ema_count, plan.device)
    plan.step(plan.check_grads(grads), options, design, args, [True] * len(grads) if first else ())
    return copies


def oracle(
    rule: str,
    arrays: Arrays,
    grads: list[Tensor],
    options: Options,
    design: PastDesign,
    args: StepArguments = STEADY,
    first: bool = False,
) -> Arrays:
    """The reference in float64, nothing rounded in between."""
    wide = cloned(arrays, torch.float64)
    for i, grad in enumerate(grads):
        states = [state[i] for state in wide.states]
        lists = (wide.emas, wide.pasts, wide.counts, wide.previous)
        ema, past, count, previous = (x[i] if x else None for x in lists)
        weight = wide.masters[i] if wide.masters else wide.weights[i]
        if isinstance(options, SgdOptions):
            velocity = states[0] if states else None
            reference.sgd_step_(
                weight, grad.double(), velocity, ema, past, options, design, args, previous=previous, count=count,
                first=first, tensor=i,
            )  # fmt: skip
        elif isinstance(options, DirectionOptions):
            reference.direction_step_(
                weight, grad.double(), ema, past, options, design, args, previous=previous, count=count, tensor=i
            )
        elif rule == "adam_direction":
            reference.adam_direction_(weight, grad.double(), states[0], states[1], count, options, args)
        else:
            largest = states[2] if len(states) > 2 else None
            reference.adam_step_(
                weight, grad.double(), states[0], states[1], largest, count, ema, past, options, design, args,
                previous=previous, tensor=i,
            )  # fmt: skip
        wide.weights[i].copy_(weight)
    return wide


def magnitudes(
    rule: str, arrays: Arrays, grads: list[Tensor], options: Options, design: PastDesign, args: StepArguments
) -> list[dict[str, Tensor]]:
    """Per tensor, the sums of absolute values that go into each kind of result: what rounding is relative to."""
    result = []
    lr = float(options.lr)
    scale = 1.0 if args.grad_scale is None else 1 / float(args.grad_scale)
    taps = [abs(t) for t in design.taps] if args.t == 0 else [float(max(args.t, design.delay))] * len(design.taps)
    for i, grad in enumerate(grads):
        w = (arrays.masters if arrays.masters else arrays.weights)[i].double().abs()
        if rule == "adam_direction":
            w = torch.zeros_like(w)
        if arrays.previous:
            w = w + args.horizon_before * arrays.previous[i].double().abs()
        g = grad.double().abs() * scale + options.weight_decay * w
        if isinstance(options, DirectionOptions):
            u, states = lr * g, []
        elif isinstance(options, SgdOptions):
            v = g + (arrays.states[0][i].double().abs() if arrays.states else 0)
            newest = options.newest_share * (1 - options.dampening) / (1 - options.momentum) if arrays.states else 0
            u, states = lr * (g + v + newest * g), [v]
        else:
            m = arrays.states[0][i].double().abs() + g
            q = arrays.states[1][i].double() + g * g
            after = oracle(rule, only(arrays, i), [grad], options, design, args)
            step = float(after.counts[0])
            largest = after.states[-1][0] if len(arrays.states) > 2 else after.states[1][0]
            root = largest.sqrt() / (1 - options.beta2**step) ** 0.5 + options.eps
            m_hat = m / (1 - options.beta1**step)
            u = lr * ((m_hat + options.newest_share * g) / root * 4 + options.weight_decay * w)
            states = [m, q, q + (arrays.states[2][i].double() if len(arrays.states) > 2 else 0)]
        w = w + u * (1 + args.horizon)
        e = g if design.ema_of_gradient else u
        e = e + arrays.emas[i].double().abs() if arrays.emas else e
        if design.turn:
            e = e + abs(design.turn) * e.flip(0)[-2:].sum(0) * 2
        past = w + (abs(design.update_tap) + abs(design.fill_tap)) * u + (args.t * u if args.t else 0)
        if arrays.emas:
            past = past + sum(tap * e[k] for k, tap in enumerate(taps))
        result.append({"weights": w, "states": states, "emas": e, "pasts": past, "masters": w, "previous": u})
    return result


def only(arrays: Arrays, i: int) -> Arrays:
    """One tensor of a group."""
    states = tuple([tensors[i]] for tensors in arrays.states)
    rest = ([tensors[i]] if tensors else [] for tensors in arrays[2:])
    return Arrays([arrays.weights[i]], states, *rest)


def assert_close(got: Tensor, want: Tensor, magnitude: Tensor, what: str, ulps: float = 4.0) -> None:
    """Within a few units in the last place of float32 (or float64) of what went in, and one of its own."""
    assert not got.isnan().any(), f"{what} has elements that were never written"
    compute = torch.float64 if got.dtype == torch.float64 else torch.float32
    bound = ulps * torch.finfo(compute).eps * magnitude.to(want.device)
    if got.dtype != compute:
        info = torch.finfo(got.dtype)
        bound = bound + info.eps * want.abs() + info.smallest_normal * info.eps
    error = (got.double() - want).abs()
    worst = (error / bound.clamp(min=1e-300)).max() if error.numel() else 0
    assert (error <= bound).all(), f"{what}: {worst:.3g} of the bound"


def check(case: Case, backend: str, *, ulps: float = 4.0, **overrides: Any) -> Arrays:
    """One step of a backend against the oracle."""
    arrays, grads = case.make()
    options = overrides.pop("options", case.options())
    design = overrides.pop("design", case.design())
    args, first = overrides.get("args", STEADY), overrides.get("first", False)
    got = run(case.rule, arrays, grads, backend, options, design, **overrides)
    want = oracle(case.rule, arrays, grads, options, design, args, first)
    for i, size in enumerate(magnitudes(case.rule, arrays, grads, options, design, args)):
        name = f"{case}: tensor {i} ({case.sizes[i]} elements), "
        for what in ("weights", "emas", "pasts", "masters", "previous"):
            if getattr(got, what):
                expected = wanted_of(want, what)[i]
                assert_close(getattr(got, what)[i], expected, size[what], name + what, ulps)
        for j, states in enumerate(got.states):
            assert_close(states[i], want.states[j][i], size["states"][j], name + STATES[case.rule][j], ulps)
    assert [float(c) for c in got.counts] == [float(c) for c in want.counts]
    return got


def wanted_of(want: Arrays, what: str) -> Any:
    """A master is what the oracle computes with, as its weights."""
    return want.weights if what == "masters" else getattr(want, what)


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

#: (dtype, gradients, master) of every supported group on every backend; float64 is the CPU's.
DTYPES = [(F32, None, False)] + [
    (dtype, grad, master) for dtype, grad, master in itertools.product((BF16, F16), (None, F32), (False, True))
]
#: Every dtype with every kind of averages, for all rules that move weights.
COVERING = [
    Case(rule=rule, dtype=dtype, grad=grad, master=master, ema=ema, emas=emas, past=past, previous=emas == 2)
    for rule in ("sgd", "adam", "direction")
    for dtype, grad, master in DTYPES
    for ema, emas, past in ((None, 0, False), (None, 1, True), (None, 2, False), (BF16, 2, True), (BF16, 3, False))
]
#: What a group may or may not have.
STRUCTURES = [
    Case(rule, states=states, emas=emas, past=past, previous=previous)
    for rule, kinds in (("sgd", (0, 1)), ("adam", (2, 3)), ("direction", (0,)))
    for states, emas, past, previous in itertools.product(kinds, range(4), (False, True), (False, True))
]
