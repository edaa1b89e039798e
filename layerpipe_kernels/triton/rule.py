# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton has no starred tuples
"""The formulas of a step, on scalars and blocks in registers; their notation is that of ``csrc/step.h``.

  g  = sign * grad / grad_scale
  SGD:  g += weight_decay * W            Adam: g += weight_decay * W   (unless decoupled)
        v  = momentum v + (1 - dampening) g    m = beta1 m + (1 - beta1) g,  q = beta2 q + (1 - beta2) g^2
        d  = nesterov ? g + momentum v : v     d = m / (sqrt(max q) / sqrt(1 - beta2^step) + eps) / (1 - beta1^step)
        u  = lr * d                            u = lr * d (+ lr * weight_decay * W where decoupled)
  W   = W - u
  E_k = decay_k E_k + (1 - decay_k) u; if they turn, E_0 += turn (u - E_1), E_1 -= turn (u - E_0)
  What = W + update_tap u + sum_k tap_k E_k

Fused multiply-adds are written out and stand where torch's SGD has them; the launch forbids the compiler to add any.
"""

import triton
import triton.language as tl

from layerpipe_kernels.triton.number import one_minus_exp


@triton.jit
def sgd_scalars(numbers, lr, first):
    return numbers + (lr, first)


@triton.jit
def sgd(w, g, states, s, NESTEROV: tl.constexpr):
    """Returns ``W``, ``u``, ``g`` and the states."""
    momentum, rest, weight_decay, lr, first = s
    g = tl.where(weight_decay != 0.0, tl.fma(w, weight_decay, g), g)  # 0 * W would be NaN for an infinite W
    d = g
    if len(states) > 0:
        v = tl.where(first, g, tl.fma(g, rest, momentum * states[0]))
        states = (v,)
        d = v
        if NESTEROV:
            d = tl.fma(v, momentum, g)
    return tl.fma(d, -lr, w), lr * d, g, states


@triton.jit
def adam_scalars(numbers, lr, step, DECOUPLED: tl.constexpr):
    beta1, rest1, log1, beta2, rest2, log2, eps, weight_decay = numbers
    shrink = lr * 0.0
    if DECOUPLED:
        shrink = lr * weight_decay
    step_size = tl.div_rn(lr, one_minus_exp(step * log1))
    root = tl.sqrt_rn(one_minus_exp(step * log2))
    return beta1, rest1, beta2, rest2, eps, weight_decay, step_size, root, shrink


@triton.jit
def adam(w, g, states, s, DECOUPLED: tl.constexpr):
    """Returns ``W``, ``u``, ``g`` and the states: ``m``, ``q`` and with AMSGrad the largest ``q``."""
    beta1, rest1, beta2, rest2, eps, weight_decay, step_size, root, shrink = s
    if not DECOUPLED:
        g = tl.where(weight_decay != 0.0, tl.fma(w, weight_decay, g), g)
    m = states[0]
    m = tl.where(rest1 < 0.5, tl.fma(rest1, g - m, m), tl.fma(-beta1, g - m, g))
    q = tl.fma(rest2 * g, g, beta2 * states[1])
    largest = q
    if len(states) > 2:
        largest = tl.where(q <= states[2], states[2], q)  # a NaN stays one
        states = (m, q, largest)
    else:
        states = (m, q)
    d = tl.div_rn(m, tl.div_rn(tl.sqrt_rn(largest), root) + eps)
    u = tl.fma(step_size, d, shrink * w)
    return tl.fma(-step_size, d, (1.0 - shrink) * w), u, g, states


@triton.jit
def past_at(decays, rests, taps, turn, update_tap, fill_ratio, delay, t):
    """:meth:`layerpipe_kernels.options.PastDesign.at` of ``t``, which may have been read on the device; ``rests`` are
    ``1 - decays``."""
    filling = (t > 0) & (t <= delay)
    steps = tl.maximum(t, 1).to(tl.float32)
    one_step = tl.div_rn(steps * 0.0 + 1.0, steps)
    mean = tl.where(t > 0, tl.div_rn(steps - 1.0, steps), 1.0)
    decays_now, rests_now, taps_now = (), (), ()
    for k in tl.static_range(len(decays)):
        young = filling | (mean < decays[k])
        decays_now = decays_now + (tl.where(young, mean, decays[k]),)
        rests_now = rests_now + (tl.where(young, one_step, rests[k]),)
        if k == 0:
            taps_now = taps_now + (tl.where(filling, steps, taps[k]),)
        else:
            taps_now = taps_now + (tl.where(filling, 0.0, taps[k]),)
    if len(decays) > 0:
        update_tap = tl.where(filling, 0.0, update_tap)
    else:
        sum = steps * 0.0
        for _ in range(0, tl.where(filling, t, 0).to(tl.int32)):
            sum = tl.fma(sum, fill_ratio, 1.0)
        update_tap = tl.where(filling & (update_tap != 0.0), sum, update_tap)
    return decays_now, rests_now, taps_now, tl.where(filling, 0.0, turn), update_tap


@triton.jit
def averaged(emas, value, decays, rests, turn):
    averages = ()
    for k in tl.static_range(len(emas)):
        e = tl.fma(value, rests[k], decays[k] * emas[k])
        if (len(emas) > 1) and (k < 2):
            turned = tl.fma(turn if k == 0 else -turn, value - emas[1 - k], e)
            e = tl.where(turn != 0.0, turned, e)  # 0 * (u - E) would be NaN for an infinite u
        averages = averages + (e,)
    return averages


@triton.jit
def keep_past(w, u, g, emas, scalars, OF_GRADIENT: tl.constexpr):
    """Returns the EMAs, not yet rounded, and the past weights."""
    decays, rests, taps, turn, update_tap = scalars
    value = u
    if OF_GRADIENT:
        value = g
    past = tl.fma(update_tap, u, w)
    averages = averaged(emas, value, decays, rests, turn)
    for k in tl.static_range(len(emas)):
        past = tl.fma(taps[k], averages[k], past)
    return averages, past
