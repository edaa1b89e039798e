"""The semantics of every kernel, in plain torch and MATH notation. Every backend is tested against it.

Symbols: ``W`` weights, ``g`` gradient, ``v`` momentum buffer, ``u`` update, ``E`` EMA of updates,
``What`` past weights.
Half-precision weights are computed with in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of optimizer state and of all arithmetic for weights of ``dtype``."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class SgdOptions(NamedTuple):
    """What one step of SGD needs besides the arrays, the same for all tensors of a group."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    ema_of_gradient: bool = False
    decays: Sequence[float] = ()  # per EMA
    taps: Sequence[float] = ()  # per EMA
    update_tap: float = 0.0


def sgd_step_(
    weight: Tensor,  # (*) updated in place
    grad: Tensor,  # (*)
    velocity: Tensor | None,  # (*) updated in place; None without momentum
    ema: Tensor | None,  # (K, *) updated in place; None without EMAs
    past: Tensor | None,  # (*) written; None where the past weights are made later
    o: SgdOptions,
    *,
    first: bool = False,
) -> None:
    """One step of SGD, the EMAs of its updates and, if asked for, the past weights.

    ``u = lr * d``, ``W -= u``, ``E_k = decays[k] E_k + (1 - decays[k]) u``,
    ``What = W + update_tap u + sum_k taps[k] E_k``, with ``d`` as in :class:`torch.optim.SGD`. ``first`` says that
    ``velocity`` holds nothing yet. ``ema_of_gradient`` feeds the EMAs the gradient (weight decay included) instead.
    """
    compute = state_dtype(weight.dtype)
    w = weight.to(compute)
    g = grad.to(compute)
    if o.maximize:
        g = -g
    if o.weight_decay != 0:
        g = g.add(w, alpha=o.weight_decay)
    d = g
    if velocity is not None:
        if first:
            velocity.copy_(g)
        else:
            velocity.mul_(o.momentum).add_(g, alpha=1 - o.dampening)
        d = g.add(velocity, alpha=o.momentum) if o.nesterov else velocity
    w = w.add(d, alpha=-o.lr)
    u = d * o.lr
    weight.copy_(w)
    if ema is not None:
        ema_update_(list(ema.unbind(0)), g if o.ema_of_gradient else u, o.decays)
    if past is not None:
        estimate = w.add(u, alpha=o.update_tap)
        for e, tap in zip(ema.unbind(0) if ema is not None else (), o.taps, strict=True):
            estimate.add_(e, alpha=tap)
        past.copy_(estimate)


def ema_update_(emas: Sequence[Tensor], update: Tensor, decays: Sequence[float]) -> None:
    """``E_k = decays[k] E_k + (1 - decays[k]) u``, in place."""
    for e, decay in zip(emas, decays, strict=True):
        e.mul_(decay).add_(update.to(e.dtype), alpha=1 - decay)


def reconstruct(weight: Tensor, terms: Sequence[Tensor], taps: Sequence[float], out: Tensor) -> None:
    """``What = W + sum_k taps[k] terms[k]``, written to ``out``."""
    estimate = weight.to(state_dtype(weight.dtype), copy=True)
    for term, tap in zip(terms, taps, strict=True):
        estimate.add_(term.to(estimate.dtype), alpha=tap)
    out.copy_(estimate)
