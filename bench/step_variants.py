"""The ways to step, average and reconstruct that ``bench.step`` compares, each checked against a float64 reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import layerpipe_kernels as lk
from bench.parameter_lists import Shape, parameters
from layerpipe_kernels import reference
from layerpipe_kernels.options import AdamOptions, PastDesign, SgdOptions, StepArguments
from layerpipe_kernels.traffic import Traffic

LR, MOMENTUM, WEIGHT_DECAY, DELAY = 1e-3, 0.9, 1e-2, 6


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    shapes: tuple[Shape, ...]
    optimizer: str  # "sgd" or "adamw"
    device: str
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        return parameters(list(self.shapes))

    @property
    def traffic(self) -> Traffic:
        return Traffic(weight=self.dtype, states=1 if self.optimizer == "sgd" else 2)

    def parameters(self, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        made = []
        for shape in self.shapes:
            p = torch.randn(shape, generator=generator, device=self.device).to(self.dtype).requires_grad_()
            p.grad = torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
            made.append(p)
        return made


class Variant:
    """One way to do the work on its own copy of the parameters."""

    launches: int | None = None
    bytes_per_parameter: int

    def __init__(self, name: str, case: Case) -> None:
        self.name, self.case = name, case
        self.params = case.parameters()

    def step(self) -> None:
        raise NotImplementedError

    def pasts(self) -> Sequence[Tensor]:
        """The past weights after the last step."""
        raise NotImplementedError


class Ours(Variant):
    def __init__(self, backend: str, case: Case) -> None:
        super().__init__(f"layerpipe, {backend}", case)
        options: dict[str, Any] = {"past": lk.EMA(materialize=True), "delay": DELAY, "backend": backend, "lr": LR}
        if case.optimizer == "sgd":
            self.optimizer: Any = lk.SGD(self.params, momentum=MOMENTUM, **options)
        else:
            self.optimizer = lk.AdamW(self.params, **options)
        self.bytes_per_parameter = case.traffic.one_pass()
        self.step = self.optimizer.step  # type: ignore[method-assign]

    def pasts(self) -> Sequence[Tensor]:
        return [self.optimizer.past_view(p) for p in self.params]

    def count_launches(self) -> None:
        runner = self.optimizer._ready_groups[0].plan.runner
        self.launches = getattr(runner, "launches", None)


class Chain(Variant):
    """torch's optimizer, then the averages, then the past weights, each a pass over memory of its own.

    The average runs over the momentum buffer (SGD, whose updates are a multiple of it) or over ``exp_avg`` (Adam, whose
    updates torch does not keep): the same bytes, and for Adam less work than the updates themselves would take.
    """

    def __init__(self, implementation: str, case: Case) -> None:
        super().__init__(f"torch {implementation} chain", case)
        kind: Any = torch.optim.SGD if case.optimizer == "sgd" else torch.optim.AdamW
        options = {"momentum": MOMENTUM} if case.optimizer == "sgd" else {}
        self.optimizer = kind(self.params, lr=LR, **options, **{implementation: True})
        self.bytes_per_parameter = case.traffic.separate_passes()
        self.key = "momentum_buffer" if case.optimizer == "sgd" else "exp_avg"
        self.decay = lk.decay.matched(DELAY)
        self.emas = [torch.zeros_like(p, dtype=reference.state_dtype(p.dtype)) for p in self.params]
        self.out = [torch.empty_like(p, requires_grad=False) for p in self.params]
        self.t = 0

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.t += 1
        mean = (self.t - 1) / self.t
        decay = mean if self.t <= DELAY else min(self.decay, mean)
        updates = [self.optimizer.state[p][self.key] for p in self.params]
        if updates[0].dtype == self.emas[0].dtype:
            torch._foreach_lerp_(self.emas, updates, 1 - decay)
        else:  # of 16 bits, which torch does not take beside averages in float32
            torch._foreach_mul_(self.emas, decay)
            torch._foreach_add_(self.emas, updates, alpha=1 - decay)
        scale = LR * min(self.t, DELAY)
        if self.case.device == "cuda":  # one launch for all; on the CPU a loop without allocations is faster
            self.out = torch._foreach_add(self.params, self.emas, alpha=scale)
        else:
            for p, e, out in zip(self.params, self.emas, self.out, strict=True):
                torch.add(p, e, alpha=scale, out=out)

    def pasts(self) -> Sequence[Tensor]:
        return self.out


def _reference_steps(
    weights: Any, grads: Any, states: Any, counts: Any, emas: Any, pasts: Any, decay: Any, tap: Any
) -> None:
    """The reference's step of every tensor: what ``torch.compile`` is given."""
    design = PastDesign(0, (decay,), (tap,))
    for i, (w, g, own, e, past) in enumerate(zip(weights, grads, states, emas, pasts, strict=True)):
        if counts:
            options = AdamOptions(LR, weight_decay=WEIGHT_DECAY)
            reference.adam_step_(w, g, own[0], own[1], None, counts[i], e, past, options, design)
        else:
            reference.sgd_step_(w, g, own[0], e, past, SgdOptions(LR, MOMENTUM), design)


class Compiled(Variant):
    """``torch.compile`` of the reference."""

    def __init__(self, case: Case) -> None:
        super().__init__("torch.compile of the reference", case)
        self.bytes_per_parameter = case.traffic.one_pass()
        full = reference.state_dtype(case.dtype)
        kinds = 1 if case.optimizer == "sgd" else 2
        self.states = [
            [torch.zeros_like(p, dtype=full, requires_grad=False) for _ in range(kinds)] for p in self.params
        ]
        self.counts = [torch.zeros((), device=p.device) for p in self.params] if kinds == 2 else []
        self.emas = [torch.zeros((1, *p.shape), dtype=full, device=p.device) for p in self.params]
        self.out = [torch.empty_like(p, requires_grad=False) for p in self.params]
        self.compiled = torch.compile(_reference_steps, dynamic=False)
        self.scalars: dict[float, Tensor] = {}  # as tensors, so that another value is not another program
        self.t = 0

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        decays, taps, _ = PastDesign(DELAY, (lk.decay.matched(DELAY),), (float(DELAY),)).at(self.t)
        grads = [p.grad for p in self.params]
        weights = [p.detach() for p in self.params]
        decay, tap = (
            self.scalars.setdefault(x, torch.tensor(x, device=weights[0].device)) for x in (decays[0], taps[0])
        )
        self.compiled(weights, grads, self.states, self.counts, self.emas, self.out, decay, tap)

    def pasts(self) -> Sequence[Tensor]:
        return self.out


def verify(variant: Variant) -> None:
    """Three steps against the float64 reference on the first tensors; raises where they differ."""
    case = variant.case
    before = [p.detach().double() for p in variant.params]
    for _ in range(3):
        variant.step()
    design = PastDesign(DELAY, (0.5,), (float(DELAY),))  # while the delay fills, its decays do not matter
    pasts = variant.pasts()
    for i in sorted(range(len(before)), key=lambda i: before[i].numel())[:8]:
        w, g = before[i].clone(), variant.params[i].grad
        assert g is not None
        v, e = torch.zeros_like(w), torch.zeros_like(w)[None]
        if case.optimizer == "sgd":
            past = torch.empty_like(w)
            for t in range(1, 4):
                reference.sgd_step_(w, g.double(), v, e, past, SgdOptions(LR, MOMENTUM), design, StepArguments(t=t))
            torch.testing.assert_close(pasts[i].double(), past, rtol=2e-2 if case.dtype != torch.float32 else 1e-4,
                                       atol=1e-5 if case.dtype == torch.float32 else 2e-2)  # fmt: skip
        else:
            q, count, options = (
                torch.zeros_like(w),
                torch.zeros((), device=w.device),
                AdamOptions(LR, weight_decay=WEIGHT_DECAY),
            )
            for t in range(1, 4):
                reference.adam_step_(w, g.double(), v, q, None, count, e, None, options, design, StepArguments(t=t))
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if case.dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(variant.params[i].detach().double(), w, **tolerance)


def variants(case: Case, compiled: bool, *, fresh: bool = True) -> list[Variant]:
    """Every way to do a case's work, on copies of its own; ``fresh`` forgets what was compiled for another case."""
    backends = [b for b in lk.available_backends() if (b == "cpp") == (case.device == "cpu") and b != "reference"]
    made: list[Variant] = [Ours(backend, case) for backend in backends]
    for implementation in ("fused", "foreach"):
        # torch 2.13's fused SGD left blocks of 16-bit parameters on the CPU as they were: never a measure there.
        if case.device == "cuda" or case.dtype == torch.float32 or implementation == "foreach":
            made.append(Chain(implementation, case))
    if compiled and len(case.shapes) <= 64:  # longer lists compile for minutes
        if fresh:
            torch.compiler.reset()  # earlier cases count against how often one function may be compiled
        made.append(Compiled(case))
    return made
