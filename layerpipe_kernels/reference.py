"""The semantics of every kernel, in plain torch and the notation of docs/maths.md. Every backend is tested against it.

Symbols: ``W`` weights, ``F`` predicted weights, ``g`` gradient, ``v`` momentum buffer, ``m`` and ``q`` Adam's averages,
``d`` direction, ``u`` update, ``E`` EMA of updates, ``What`` past weights.
Half-precision weights are computed with in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from layerpipe_kernels.options import (
    NO_PAST,
    STEADY,
    AdamOptions,
    DirectionOptions,
    PastDesign,
    SgdOptions,
    StepArguments,
)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of optimizer state and of all arithmetic for weights of ``dtype``."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def sgd_step_(
    weight: Tensor,  # (*) updated in place
    grad: Tensor,  # (*)
    velocity: Tensor | None,  # (*) updated in place; None without momentum
    ema: Tensor | None,  # (K, *) updated in place; None without EMAs
    past: Tensor | None,  # (*) written; None where the past weights are made later
    o: SgdOptions,
    design: PastDesign = NO_PAST,
    args: StepArguments = STEADY,
    *,
    master: Tensor | None = None,  # (*) float32, updated in place; `weight` is then its rounded copy
    previous: Tensor | None = None,  # (*) updated in place: u_, where the weights are predicted
    count: Tensor | None = None,  # () float32, steps so far; counted up
    first: bool = False,
    tensor: int = 0,
) -> None:
    """Runs one step of SGD, the EMAs of its updates and, if asked for, the past weights.

    ``u = lr * d``, ``W -= u``, with ``d`` as in :class:`torch.optim.SGD`; then ``E_k`` and ``What`` as in
    :class:`layerpipe_kernels.options.PastDesign`. ``first`` says that ``velocity`` holds nothing yet; where there is a
    ``count``, that says it. ``tensor`` is the number of this one in its group: of its random numbers.

    With ``previous``, the last update ``u_``, the weights are predicted: ``weight`` (and ``master``) hold ``F``. The
    step is that of ``W = F + horizon_before u_``, and leaves ``F = W - horizon u``, ``u_ = u``. ``E_k`` are averages of
    ``u``, ``What`` is an estimate of a past ``F``.
    """
    if overflowed(args):
        return
    w = _current(_full(weight, master), previous, args)
    g = _gradient(grad, w, args, o.maximize)
    if o.weight_decay != 0:
        g = g.add(w, alpha=o.weight_decay)
    d = g
    if velocity is not None:
        if first if count is None else bool(count == 0):
            velocity.copy_(g)
        else:
            velocity.mul_(o.momentum).add_(g, alpha=1 - o.dampening)
        d = velocity
        if o.nesterov:
            d = g.add(velocity, alpha=o.momentum)
        elif o.newest_share:
            d = velocity * (1 - o.newest_share) + g * (o.newest_share * (1 - o.dampening) / (1 - o.momentum))
    lr = _scalar(o.lr, w)
    w, u = w.add(d * -lr) if isinstance(lr, Tensor) else w.add(d, alpha=-lr), d * lr
    _keep(w, u, g, weight, master, ema, past, previous, design, args, tensor)
    if count is not None:
        count.add_(1)


def adam_step_(
    weight: Tensor,  # (*) updated in place
    grad: Tensor,  # (*)
    exp_avg: Tensor,  # (*) updated in place
    exp_avg_sq: Tensor,  # (*) updated in place
    max_exp_avg_sq: Tensor | None,  # (*) updated in place; None without AMSGrad
    count: Tensor,  # () float32, steps so far; counted up
    ema: Tensor | None,  # (K, *) updated in place; None without EMAs
    past: Tensor | None,  # (*) written; None where the past weights are made later
    o: AdamOptions,
    design: PastDesign = NO_PAST,
    args: StepArguments = STEADY,
    *,
    master: Tensor | None = None,  # (*) float32, updated in place; `weight` is then its rounded copy
    previous: Tensor | None = None,  # (*) updated in place: u_, where the weights are predicted
    tensor: int = 0,
) -> None:
    """Runs one step of Adam or AdamW, otherwise as :func:`sgd_step_`. The update ``u`` includes the weight decay."""
    if overflowed(args):
        return
    count.add_(1)
    w = _current(_full(weight, master), previous, args)
    g = _gradient(grad, w, args, o.maximize)
    if o.weight_decay != 0 and not o.decoupled:
        g = g.add(w, alpha=o.weight_decay)
    lr = _scalar(o.lr, w)
    d = _adam_direction(g, exp_avg, exp_avg_sq, max_exp_avg_sq, count, lr, o)
    shrink = lr * o.weight_decay if o.decoupled else 0.0
    u = d + w * shrink
    w = w * (1 - shrink) - d
    _keep(w, u, g, weight, master, ema, past, previous, design, args, tensor)


def adam_direction_(
    out: Tensor,  # (*) float32 or float64, written
    grad: Tensor,  # (*)
    exp_avg: Tensor,  # (*) updated in place
    exp_avg_sq: Tensor,  # (*) updated in place
    count: Tensor,  # () float32, steps so far; counted up
    o: AdamOptions,
    args: StepArguments = STEADY,
) -> None:
    """Write what Adam would subtract from a weight, weight decay left out: ``lr ((1 - b) mhat + b g) / (sqrt(qhat) +
    eps)`` with ``b = newest_share``. For optimizers that make more of it before :func:`direction_step_`."""
    if overflowed(args):
        return
    count.add_(1)
    g = _gradient(grad, out, args, o.maximize)
    out.copy_(_adam_direction(g, exp_avg, exp_avg_sq, None, count, _scalar(o.lr, out), o))


def direction_step_(
    weight: Tensor,  # (*) updated in place
    direction: Tensor,  # (*) d
    ema: Tensor | None,  # (K, *) updated in place; None without EMAs
    past: Tensor | None,  # (*) written; None where the past weights are made later
    o: DirectionOptions,
    design: PastDesign = NO_PAST,
    args: StepArguments = STEADY,
    *,
    master: Tensor | None = None,  # (*) float32, updated in place; `weight` is then its rounded copy
    previous: Tensor | None = None,  # (*) updated in place: u_, where the weights are predicted
    count: Tensor | None = None,  # () float32, steps so far; counted up
    tensor: int = 0,
) -> None:
    """Runs ``u = lr d + lr weight_decay W`` for a direction ``d``, otherwise as :func:`sgd_step_`; ``grad_scale``
    divides the direction."""
    if overflowed(args):
        return
    w = _current(_full(weight, master), previous, args)
    d = _gradient(direction, w, args, False)
    lr = _scalar(o.lr, w)
    shrink = lr * o.weight_decay
    u = d * lr + w * shrink
    w = w * (1 - shrink) - d * lr
    _keep(w, u, d, weight, master, ema, past, previous, design, args, tensor)
    if count is not None:
        count.add_(1)


def _adam_direction(
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    count: Tensor,
    lr: float | Tensor,
    o: AdamOptions,
) -> Tensor:
    """Returns ``lr d`` of step ``count``, its averages updated in place."""
    exp_avg.lerp_(g, 1 - o.beta1)
    exp_avg_sq.mul_(o.beta2).addcmul_(g, g, value=1 - o.beta2)
    largest = exp_avg_sq
    if max_exp_avg_sq is not None:
        largest = torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
    # 1 - beta**step, with digits to spare where it is small.
    step = count.double()
    correction1, correction2 = -torch.expm1(step * _log(o.beta1)), -torch.expm1(step * _log(o.beta2))
    root, rate = correction2.sqrt().to(g.dtype), (lr / correction1).to(g.dtype)
    m = exp_avg
    if o.newest_share:
        m = exp_avg * (1 - o.newest_share) + g * (o.newest_share * correction1).to(g.dtype)
    return m / (largest.sqrt() / root + o.eps) * rate


def _log(x: float) -> float:
    return math.log(x) if x else -math.inf


def overflowed(args: StepArguments) -> bool:
    return args.found_inf is not None and bool(args.found_inf != 0)


def _full(weight: Tensor, master: Tensor | None) -> Tensor:
    return weight.to(state_dtype(weight.dtype)) if master is None else master


def _current(w: Tensor, previous: Tensor | None, args: StepArguments) -> Tensor:
    """Returns ``W`` for predicted weights ``F``, other weights as they are."""
    if previous is None:
        return w
    before = args.horizon_before if args.horizon_at is None else float(args.horizon_at)
    return w.add(previous, alpha=before)


def _gradient(grad: Tensor, w: Tensor, args: StepArguments, maximize: bool) -> Tensor:
    g = grad.to(w.dtype)
    if args.grad_scale is not None:
        g = g * args.grad_scale.to(w.dtype).view(()).reciprocal()
    return -g if maximize else g


def _scalar(value: float | Tensor, like: Tensor) -> float | Tensor:
    return value.to(like.dtype).view(()) if isinstance(value, Tensor) else value


def _keep(
    w: Tensor,
    u: Tensor,
    g: Tensor,
    weight: Tensor,
    master: Tensor | None,
    ema: Tensor | None,
    past: Tensor | None,
    previous: Tensor | None,
    design: PastDesign,
    args: StepArguments,
    tensor: int,
) -> None:
    """Store the new weights, predicted or not, average the update, and write the past weights."""
    if previous is not None:
        w = w.sub(u, alpha=args.horizon)
        previous.copy_(u)
    t = args.t if args.clock is None else int(args.clock) + 1
    decays, taps, update_tap = design.at(t)
    weight.copy_(w)
    if master is not None:
        master.copy_(w)
    emas = ema.unbind(0) if ema is not None else ()
    averages = averaged(emas, g if design.ema_of_gradient else u, decays, design.turn_at(t))  # not yet rounded
    for k, (e, average) in enumerate(zip(emas, averages, strict=True)):
        _store_average(e, average, hash32(hash32(design.seed ^ hash32(t)) + tensor * 3 + k))
    if past is not None:
        estimate = w.add(u, alpha=update_tap)
        for average, tap in zip(averages, taps, strict=True):
            estimate.add_(average * tap)
        past.copy_(estimate)


def _store_average(e: Tensor, average: Tensor, key: int) -> None:
    if e.dtype == torch.bfloat16:
        e.copy_(round_stochastic(average, key))
    else:
        e.copy_(average)


def averaged(emas: Sequence[Tensor], u: Tensor, decays: Sequence[float], turn: float) -> list[Tensor]:
    """Returns ``E_k = decays[k] E_k + (1 - decays[k]) u``, not yet rounded.

    With a ``turn``, ``E_0 += turn (u - E_1)`` and ``E_1 -= turn (u - E_0)`` of the averages before.
    """
    before = [e.to(u.dtype) for e in emas]
    after = [e * decay + u * (1 - decay) for e, decay in zip(before, decays, strict=True)]
    if turn:
        after[0] = after[0] + turn * (u - before[1])
        after[1] = after[1] - turn * (u - before[0])
    return after


def ema_update_(
    emas: Sequence[Tensor], update: Tensor, decays: Sequence[float], seed: int = 0, turn: float = 0.0
) -> None:
    """Runs :func:`averaged` in place."""
    averages = averaged(emas, update.to(state_dtype(update.dtype)), decays, turn)
    for k, (e, average) in enumerate(zip(emas, averages, strict=True)):
        _store_average(e, average, hash32(hash32(seed) + k))


def reconstruct(weight: Tensor, terms: Sequence[Tensor], taps: Sequence[float] | Tensor, out: Tensor) -> None:
    """Writes ``What = W + sum_k taps[k] terms[k]`` to ``out``; ``taps`` numbers, or a tensor ``(K,)``."""
    estimate = weight.to(state_dtype(weight.dtype), copy=True)
    for term, tap in zip(terms, taps, strict=True):
        estimate.add_(term.to(estimate.dtype) * tap)
    out.copy_(estimate)


_MASK = 0xFFFFFFFF


def _hash(x: Tensor) -> Tensor:
    """Returns :func:`hash32` of every element of an int64 tensor."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def hash32(x: int) -> int:
    """Returns a bijection of 32-bit numbers that spreads every bit (Chris Wellons' lowbias32), as random bits."""
    x &= _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def round_stochastic(x: Tensor, key: int) -> Tensor:
    """Rounds float32 ``(*)`` to bfloat16, up or down with the probability that makes the mean exact.

    The random bits of an element depend on ``key`` and on its index alone, and are the same on every backend.
    """
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    random = _hash(index ^ (key & _MASK)) & 0xFFFF
    bits = x.contiguous().view(torch.int32).to(torch.int64) & _MASK
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = (torch.where(finite, bits + random, bits) >> 16) & 0xFFFF
    rounded = torch.where(x.isnan(), 0x7FC0 | (bits >> 16), rounded)
    signed = torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16)
    return signed.view(torch.bfloat16)
