"""The kernels as functions on tensors, registered as operators of the library ``layerpipe``.

Each takes dense, floating-point tensors on one device, in any order of their dimensions in memory that is the same for
all that belongs to one weight (:mod:`layerpipe_kernels.layout`), refuses anything else by name before it writes, and
chooses its backend as :func:`layerpipe_kernels.backend.choose` says. They work under :func:`torch.compile` without a
graph break, and they count what they write in the tensors' versions, so that autograd notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerpipe_kernels import backend as _backend
from layerpipe_kernels import layout, native, reference
from layerpipe_kernels.checks import check_disjoint, check_like, check_options, check_tensor, check_turn
from layerpipe_kernels.options import (
    MAX_EMAS,
    MAX_TERMS,
    NO_PAST,
    STEADY,
    AdamOptions,
    PastDesign,
    SgdOptions,
    StepArguments,
)
from layerpipe_kernels.plan import Arrays, StepPlan

Tensors = Sequence[Tensor]

_library = torch.library.Library("layerpipe", "DEF")

_ARRAYS = "Tensor(b!)[] emas, Tensor(c!)[] pasts, Tensor(d!)[] masters, Tensor(e!)[] counts, Tensor(j!)[] previous"
_MOMENT = (
    "int t, Tensor(f!)? clock, Tensor? grad_scale, Tensor? found_inf, float horizon, float horizon_before, "
    "Tensor(k!)? horizon_at, str backend"
)
_DESIGN = (
    "int delay, float[] decays, float[] taps, float update_tap, float fill_ratio, bool ema_of_gradient, int seed, "
    "float turn, float fill_tap"
)

_library.define(
    f"sgd_step_(Tensor(a!)[] weights, Tensor[] grads, Tensor(g!)[] velocities, {_ARRAYS}, float lr, Tensor? lr_at, "
    f"float momentum, float dampening, float weight_decay, bool nesterov, bool maximize, float newest_share, "
    f"{_DESIGN}, {_MOMENT}, bool first) -> ()"
)
_library.define(
    f"adamw_step_(Tensor(a!)[] weights, Tensor[] grads, Tensor(g!)[] exp_avgs, Tensor(h!)[] exp_avg_sqs, "
    f"Tensor(i!)[] max_exp_avg_sqs, {_ARRAYS}, float lr, Tensor? lr_at, float beta1, float beta2, float eps, "
    f"float weight_decay, bool decoupled, bool maximize, float newest_share, {_DESIGN}, {_MOMENT}) -> ()"
)
_library.define(
    "ema_update_(Tensor(a!)[] emas, Tensor update, float[] decays, int seed, float turn, str backend) -> ()"
)
_library.define("reconstruct(Tensor weight, Tensor[] terms, float[] taps, Tensor? taps_at, str backend) -> Tensor")
_library.define(
    "reconstruct_(Tensor(a!) out, Tensor weight, Tensor[] terms, float[] taps, Tensor? taps_at, str backend) -> ()"
)


def _run(
    rule: str,
    arrays: Arrays,
    grads: Sequence[Tensor],
    options: SgdOptions | AdamOptions,
    design: PastDesign,
    args: StepArguments,
    backend: str,
    first: bool = False,
) -> None:
    if len(grads) != len(arrays.weights):
        raise ValueError(f"{len(arrays.weights)} weights but {len(grads)} gradients")
    if not arrays.weights:
        return
    plan = StepPlan(
        rule,
        arrays,
        names=[f"weights[{i}]" for i in range(len(grads))],
        backend=_backend.choose(arrays.weights[0], backend),
        grad_dtype=grads[0].dtype,
        reuse=True,
    )
    check_options(options, design, args, plan.ema_count, plan.device)
    plan.step(plan.check_grads(grads), options, design, args, [True] * len(grads) if first else ())


def _unpacked(rest: Sequence[Any]) -> tuple[PastDesign, StepArguments, str]:
    """The end of a step's arguments, in the order of their classes' fields."""
    delay, decays, taps, *others = rest[: len(PastDesign._fields)]
    *args, backend = rest[len(PastDesign._fields) :]
    return PastDesign(delay, tuple(decays), tuple(taps), *others), StepArguments(*args), backend


@torch.library.impl(_library, "sgd_step_", "CompositeExplicitAutograd")
def _sgd_step(
    weights: Tensors,
    grads: Tensors,
    velocities: Tensors,
    emas: Tensors,
    pasts: Tensors,
    masters: Tensors,
    counts: Tensors,
    previous: Tensors,
    lr: float,
    lr_at: Tensor | None,
    *rest: Any,
) -> None:
    arrays = Arrays(weights, (velocities,) if velocities else (), emas, pasts, masters, counts, previous)
    own = len(SgdOptions._fields) - 1
    options = SgdOptions(lr if lr_at is None else lr_at, *rest[:own])
    *packed, first = rest[own:]
    design, args, backend = _unpacked(packed)
    _run("sgd", arrays, grads, options, design, args, backend, first)


@torch.library.impl(_library, "adamw_step_", "CompositeExplicitAutograd")
def _adamw_step(
    weights: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    emas: Tensors,
    pasts: Tensors,
    masters: Tensors,
    counts: Tensors,
    previous: Tensors,
    lr: float,
    lr_at: Tensor | None,
    *rest: Any,
) -> None:
    states = (exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if max_exp_avg_sqs else []))
    own = len(AdamOptions._fields) - 1
    options = AdamOptions(lr if lr_at is None else lr_at, *rest[:own])
    design, args, backend = _unpacked(rest[own:])
    arrays = Arrays(weights, states, emas, pasts, masters, counts, previous)
    _run("adam", arrays, grads, options, design, args, backend)


@torch.library.impl(_library, "ema_update_", "CompositeExplicitAutograd")
def _ema_update(emas: list[Tensor], update: Tensor, decays: list[float], seed: int, turn: float, backend: str) -> None:
    if not 1 <= len(emas) <= MAX_EMAS or len(emas) != len(decays):
        raise ValueError(f"1 to {MAX_EMAS} EMAs with one decay each, got {len(emas)} and {len(decays)}")
    check_tensor("update", update)
    full = reference.state_dtype(update.dtype)
    for i, (e, decay) in enumerate(zip(emas, decays, strict=True)):
        check_like(f"emas[{i}]", e, update, "ema", full, *([torch.bfloat16] if full == torch.float32 else []))
        check_tensor(f"emas[{i}]", e, weight=update)
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decays[{i}] must be in [0, 1], got {decay}")
    check_turn(decays, turn)
    check_disjoint([*(f"emas[{i}]" for i in range(len(emas))), "update"], [*emas, update])
    chosen = _backend.choose(update, backend)
    if chosen == "reference":
        dims = layout.order(update) or ()
        averages = [layout.in_memory(e, dims) for e in emas]
        reference.ema_update_(averages, layout.in_memory(update, dims), decays, seed, turn)
    elif chosen == "triton":
        from layerpipe_kernels import triton  # imports Triton, which not every machine has

        triton.ema_update_(emas, update, decays, seed, turn)
    else:
        native.ema_update_(emas, update, decays, seed, turn)
    torch.autograd.graph.increment_version(emas)


@torch.library.impl(_library, "reconstruct_", "CompositeExplicitAutograd")
def _reconstruct_(
    out: Tensor, weight: Tensor, terms: list[Tensor], taps: list[float], taps_at: Tensor | None, backend: str
) -> None:
    if taps_at is not None:
        if taps_at.ndim != 1:
            raise ValueError(f"taps must be a vector, got a tensor of shape {tuple(taps_at.shape)}")
        taps_at = taps_at.contiguous()
    factors = taps if taps_at is None else taps_at
    if len(terms) != len(factors) or len(terms) > MAX_TERMS:
        raise ValueError(f"0 to {MAX_TERMS} terms with one tap each, got {len(terms)} and {len(factors)}")
    check_tensor("weight", weight)
    full = reference.state_dtype(out.dtype)
    check_like("out", weight, out, "weight", out.dtype, full)
    check_tensor("out", out, weight=weight)
    check_disjoint(["out", "weight"], [out, weight])
    for i, term in enumerate(terms):
        narrow = [torch.bfloat16] if full == torch.float32 else []
        check_like(f"terms[{i}]", term, weight, "term", full, *narrow)
        check_tensor(f"terms[{i}]", term, weight=weight)
        check_disjoint(["out", f"terms[{i}]"], [out, term])
    if taps_at is not None and (taps_at.dtype != torch.float32 or taps_at.device != weight.device):
        raise ValueError(f"taps must be float32 on {weight.device}, got {taps_at.dtype} on {taps_at.device}")
    _reconstruct_unchecked(weight, terms, factors, out, _backend.choose(weight, backend))
    torch.autograd.graph.increment_version(out)


@torch.library.impl(_library, "reconstruct", "CompositeExplicitAutograd")
def _reconstruct(
    weight: Tensor, terms: list[Tensor], taps: list[float], taps_at: Tensor | None, backend: str
) -> Tensor:
    out = torch.empty_like(weight, requires_grad=False)
    _reconstruct_(out, weight, terms, taps, taps_at, backend)
    return out


for _name in ("sgd_step_", "adamw_step_", "ema_update_", "reconstruct_"):
    torch.library.register_fake(f"layerpipe::{_name}", lambda *_: None, lib=_library)
torch.library.register_fake("layerpipe::reconstruct", lambda weight, *_: torch.empty_like(weight), lib=_library)


def _present(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    for i, grad in enumerate(grads):
        if grad is None:
            raise ValueError(f"weights[{i}] has no gradient; leave it out of this step")
    return grads


def _lr(lr: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, lr) if isinstance(lr, Tensor) else (lr, None)


@torch.no_grad()
def sgd_step_(
    weights: Sequence[Tensor],  # (*) each, updated in place
    grads: Sequence[Tensor],  # (*) each, of the weights' dtype or float32
    velocities: Sequence[Tensor] | None = None,  # (*) each, updated in place
    emas: Sequence[Tensor] | None = None,  # (K, *) each, updated in place
    pasts: Sequence[Tensor] | None = None,  # (*) each, written
    *,
    options: SgdOptions,
    design: PastDesign = NO_PAST,
    args: StepArguments = STEADY,
    masters: Sequence[Tensor] | None = None,  # (*) float32 each, updated in place
    counts: Sequence[Tensor] | None = None,  # () float32 each, counted up
    previous: Sequence[Tensor] | None = None,  # (*) each, updated in place: last updates, where weights are predicted
    first: bool = False,
    backend: str = "auto",
) -> None:
    """SGD, the EMAs of the updates and the past weights of a list of tensors, in one pass and in place.

    The formulas are those of :func:`layerpipe_kernels.reference.sgd_step_`, the bytes moved those of
    :mod:`layerpipe_kernels.traffic`. An optimizer that steps again and again keeps its
    :class:`layerpipe_kernels.plan.StepPlan` instead of calling this.

    Raises:
        TypeError: a sparse or non-floating-point tensor.
        ValueError: tensors or options that do not fit together; the message names the one. Nothing is written then.
    """
    lr, lr_at = _lr(options.lr)
    torch.ops.layerpipe.sgd_step_(
        weights, _present(grads), velocities or (), emas or (), pasts or (), masters or (), counts or (),
        previous or (), lr, lr_at, *options[1:], *design, *args, backend, first,
    )  # fmt: skip


@torch.no_grad()
def adamw_step_(
    weights: Sequence[Tensor],  # (*) each, updated in place
    grads: Sequence[Tensor],  # (*) each, of the weights' dtype or float32
    exp_avgs: Sequence[Tensor],  # (*) each, updated in place
    exp_avg_sqs: Sequence[Tensor],  # (*) each, updated in place
    counts: Sequence[Tensor],  # () float32 each, steps so far, counted up
    emas: Sequence[Tensor] | None = None,  # (K, *) each, updated in place
    pasts: Sequence[Tensor] | None = None,  # (*) each, written
    *,
    options: AdamOptions,
    design: PastDesign = NO_PAST,
    args: StepArguments = STEADY,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,  # (*) each, updated in place: AMSGrad
    masters: Sequence[Tensor] | None = None,  # (*) float32 each, updated in place
    previous: Sequence[Tensor] | None = None,  # (*) each, updated in place: last updates, where weights are predicted
    backend: str = "auto",
) -> None:
    """AdamW (or Adam, with ``options.decoupled`` off) as :func:`sgd_step_` is SGD, with its errors.

    The formulas are those of :func:`layerpipe_kernels.reference.adam_step_`.
    """
    lr, lr_at = _lr(options.lr)
    torch.ops.layerpipe.adamw_step_(
        weights, _present(grads), exp_avgs, exp_avg_sqs, max_exp_avg_sqs or (), emas or (), pasts or (), masters or (),
        counts, previous or (), lr, lr_at, *options[1:], *design, *args, backend,
    )  # fmt: skip


@torch.no_grad()
def ema_update_(
    emas: Sequence[Tensor],
    update: Tensor,
    decays: Sequence[float],
    *,
    seed: int = 0,
    turn: float = 0.0,
    backend: str = "auto",
) -> None:
    """``E_k = decays[k] E_k + (1 - decays[k]) u`` for one to three EMAs of one update, in place.

    Args:
        emas: ``(*)`` each, of the update's shape; float32 (float64 with a float64 update), or bfloat16, which is
            rounded stochastically.
        update: ``(*)``.
        decays: one per EMA, in ``[0, 1]``.
        seed: of the rounding; another one in every update.
        turn: couples the first two, see :func:`layerpipe_kernels.reference.averaged`.

    Raises:
        ValueError: lengths or shapes that do not fit, a decay out of range, tensors of different orders in memory.
        TypeError: a sparse or non-floating-point tensor.
    """
    torch.ops.layerpipe.ema_update_(emas, update, decays, seed, turn, backend)


@torch.no_grad()
def reconstruct(
    weight: Tensor,
    terms: Sequence[Tensor],
    taps: Sequence[float] | Tensor,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``What = W + sum_k taps[k] terms[k]``: past weights from the current ones and up to four states.

    Args:
        weight: ``(*)``, read; the float32 master of a narrower ``out``, too.
        terms: ``(*)`` each: EMAs of updates, a momentum buffer. Float32 where the weight is half precision; bfloat16
            wherever float32 is.
        taps: one factor per term; numbers, or float32 ``(K,)`` on the weight's device.
        out: ``(*)``, written; made if not given. May not share memory with what is read.

    Raises:
        ValueError: lengths, shapes, devices or dtypes that do not fit, tensors of different orders in memory, or that
            share it.
        TypeError: a sparse or non-floating-point tensor.
    """
    numbers, at = ((), taps) if isinstance(taps, Tensor) else (taps, None)
    if out is None:
        result: Tensor = torch.ops.layerpipe.reconstruct(weight, terms, numbers, at, backend)
        return result
    torch.ops.layerpipe.reconstruct_(out, weight, terms, numbers, at, backend)
    return out


def _reconstruct_unchecked(
    weight: Tensor, terms: Sequence[Tensor], taps: Sequence[float] | Tensor, out: Tensor, chosen: str
) -> None:
    if chosen in ("cpp", "cuda"):
        native.reconstruct(weight, terms, taps, out, out.numel())
    elif chosen == "triton":
        from layerpipe_kernels import triton  # imports Triton, which not every machine has

        triton.reconstruct(weight, terms, taps, out, out.numel())
    else:
        with torch.no_grad():
            reference.reconstruct(weight, terms, taps, out)


def mix(
    weight: Tensor,
    velocity: Tensor | None,
    velocity_tap: float,
    ema: Tensor | None,
    ema_taps: Sequence[float],
    *,
    out: Tensor,
    backend: str = "auto",
) -> Tensor:
    """:func:`reconstruct` for an optimizer's own state, which its plan has checked: called for every weight in every
    delayed backward, so it checks nothing again, and counts no version.

    Args:
        weight: ``(*)``, dense: the parameter, or its float32 master. The rest is in its order in memory.
        velocity: ``(*)`` or ``None``.
        ema: ``(K, *)`` or ``None``; its first ``len(ema_taps)`` averages are used.
        out: ``(*)``, of the parameter's dtype.
    """
    chosen = _backend.choose(weight, backend)
    if chosen in ("cpp", "cuda"):
        native.mix(weight, velocity, velocity_tap, ema, ema_taps, out)
        return out
    terms = [] if velocity is None else [velocity]
    taps = [] if velocity is None else [velocity_tap]
    if ema is not None:
        terms += ema.unbind(0)[: len(ema_taps)]
        taps += ema_taps
    _reconstruct_unchecked(weight, terms, taps, out, chosen)
    return out
