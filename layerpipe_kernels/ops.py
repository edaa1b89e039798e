"""The kernels as functions on tensors.

Each takes contiguous, dense, floating-point tensors on one device, refuses anything else by name before it writes, and
chooses its backend as :func:`layerpipe_kernels.backend.choose` says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from layerpipe_kernels import backend as _backend
from layerpipe_kernels import reference
from layerpipe_kernels.plan import SgdPlan, check_disjoint, check_like, check_tensor
from layerpipe_kernels.reference import SgdOptions

MAX_EMAS = 3
MAX_TERMS = 4


@torch.no_grad()
def sgd_step_(
    weights: Sequence[Tensor],  # (*) each
    grads: Sequence[Tensor],  # (*) each
    velocities: Sequence[Tensor] | None = None,  # (*) each
    emas: Sequence[Tensor] | None = None,  # (K, *) each
    pasts: Sequence[Tensor] | None = None,  # (*) each
    *,
    options: SgdOptions,
    first: bool = False,
    backend: str = "auto",
) -> None:
    """SGD, the EMAs of the updates and the past weights of a list of tensors, in one pass and in place.

    The formulas are those of :func:`layerpipe_kernels.reference.sgd_step_`. An optimizer that steps again and again
    keeps its :class:`layerpipe_kernels.plan.SgdPlan` instead of calling this.
    """
    if len(grads) != len(weights):
        raise ValueError(f"{len(weights)} weights but {len(grads)} gradients")
    if not weights:
        return
    names = [f"weights[{i}]" for i in range(len(weights))]
    plan = SgdPlan(weights, velocities, emas, pasts, names=names, backend=_backend.choose(weights[0], backend))
    plan.step(plan.check_grads(grads), [first] * len(weights), options)


@torch.no_grad()
def ema_update_(emas: Sequence[Tensor], update: Tensor, decays: Sequence[float], *, backend: str = "auto") -> None:
    """``E_k = decays[k] E_k + (1 - decays[k]) u`` for one to three EMAs of one update, in place.

    Args:
        emas: ``(*)`` each, of the update's shape and dtype.
        update: ``(*)``.
        decays: one per EMA, in ``[0, 1]``.

    Raises:
        ValueError: lengths or shapes that do not fit, a decay out of range, a non-contiguous tensor.
        TypeError: a sparse or non-floating-point tensor.
    """
    if not 1 <= len(emas) <= MAX_EMAS or len(emas) != len(decays):
        raise ValueError(f"1 to {MAX_EMAS} EMAs with one decay each, got {len(emas)} and {len(decays)}")
    check_tensor("update", update)
    for i, (e, decay) in enumerate(zip(emas, decays, strict=True)):
        check_tensor(f"emas[{i}]", e)
        check_like(f"emas[{i}]", e, update, "ema")
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decays[{i}] must be in [0, 1], got {decay}")
    names = [f"emas[{i}]" for i in range(len(emas))]
    check_disjoint([*names, "update"], [*emas, update])
    if _backend.choose(update, backend) == "cpp":
        run = getattr(_backend.extension(), f"ema_update_{_backend.CPP_DTYPES[update.dtype]}")
        run(
            [e.data_ptr() for e in emas],
            update.data_ptr(),
            update.numel(),
            list(decays),
            torch.get_num_threads(),
        )
    else:
        reference.ema_update_(emas, update, decays)
    torch.autograd.graph.increment_version(list(emas))


def reconstruct(
    weight: Tensor,
    terms: Sequence[Tensor],
    taps: Sequence[float],
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``What = W + sum_k taps[k] terms[k]``: past weights from the current ones and up to four states.

    Args:
        weight: ``(*)``, read.
        terms: ``(*)`` each: EMAs of updates, a momentum buffer. Float32 where the weight is half precision.
        taps: one factor per term.
        out: ``(*)``, written; made if not given. May not share memory with what is read.

    Raises:
        ValueError: lengths, shapes, devices or dtypes that do not fit, non-contiguous or overlapping tensors.
        TypeError: a sparse or non-floating-point tensor.
    """
    if len(terms) != len(taps) or len(terms) > MAX_TERMS:
        raise ValueError(f"0 to {MAX_TERMS} terms with one tap each, got {len(terms)} and {len(taps)}")
    check_tensor("weight", weight)
    if out is None:
        out = torch.empty_like(weight, requires_grad=False)
    else:
        check_tensor("out", out)
        check_like("out", out, weight, "out")
        check_disjoint(["out", "weight"], [out, weight])
    for i, term in enumerate(terms):
        check_tensor(f"terms[{i}]", term)
        check_like(f"terms[{i}]", term, weight, "term", reference.state_dtype(weight.dtype))
        check_disjoint(["out", f"terms[{i}]"], [out, term])
    with torch.no_grad():
        if _backend.choose(weight, backend) == "cpp":
            _backend.RECONSTRUCT[weight.dtype](
                out.data_ptr(),
                weight.data_ptr(),
                weight.numel(),
                [term.data_ptr() for term in terms],
                list(taps),
                torch.get_num_threads(),
            )
            torch.autograd.graph.increment_version(out)
        else:
            reference.reconstruct(weight, terms, taps, out)
    return out


def mix(
    weight: Tensor,
    velocity: Tensor | None,
    velocity_tap: float,
    ema: Tensor | None,
    ema_taps: Sequence[float],
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`reconstruct` for an optimizer's own state, which its plan has checked: called for every weight in every
    delayed backward, so it checks nothing again.

    Args:
        weight: ``(*)``, contiguous.
        velocity: ``(*)`` or ``None``.
        ema: ``(K, *)``, contiguous, or ``None``; its first ``len(ema_taps)`` averages are used.
        out: ``(*)``, contiguous.
    """
    out = torch.empty_like(weight, requires_grad=False) if out is None else out
    if _backend.choose(weight, backend) == "cpp":
        terms, taps = [], []
        if velocity is not None:
            terms.append(velocity.data_ptr())
            taps.append(velocity_tap)
        if ema is not None:
            first, step = ema.data_ptr(), weight.nbytes
            terms += [first + k * step for k in range(len(ema_taps))]
            taps += ema_taps
        run = _backend.RECONSTRUCT[weight.dtype]
        run(out.data_ptr(), weight.data_ptr(), weight.numel(), terms, taps, torch.get_num_threads())
        return out
    with torch.no_grad():
        states = [] if velocity is None else [velocity]
        factors = [] if velocity is None else [velocity_tap]
        if ema is not None:
            states += ema.unbind(0)[: len(ema_taps)]
            factors += ema_taps
        reference.reconstruct(weight, states, factors, out)
    return out
