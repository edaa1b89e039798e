# mypy: ignore-errors
# ruff: noqa: RUF005 - Triton has no starred tuples
"""The formulas of a step, on scalars and blocks in registers; their notation is that of ``csrc/step.h``.

  g  = sign * grad / grad_scale
  SGD:  g += weight_decay * W            Adam: g += weight_decay * W   (unless decoupled)
        v  = momentum v + (1 - dampening) g    m = beta1 m + (1 - beta1) g,  q = beta2 q + (1 - beta2) g^2
        d  = nesterov ? g + momentum v : v     d = m / (sqrt(max q) / sqrt(1 - beta2^step) + eps) / (1 - beta1^step)
        u  = lr * d                            u = lr * d (+ lr * weight_decay * W where decoupled)
  With a share b of the newest gradient, SGD's v in d is (1 - b) v + b (1 - dampening) / (1 - momentum) g, and Adam's m
  is (1 - b) m + b (1 - beta1^step) g. A given direction d:  u = lr * d + lr * weight_decay * W
  Of predicted weights F: W = F + p_before u_ before the step, F = W - p u and u_ = u after it
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
def sgd(w, g, states, s, MIXES: tl.constexpr):
    """Returns ``W``, ``u``, ``g`` and the states. ``MIXES``: the direction is not ``v`` alone."""
    momentum, rest, weight_decay, of_v, of_g, lr, first = s
    g = tl.where(weight_decay != 0.0, tl.fma(w, weight_decay, g), g)  # 0 * W would be NaN for an infinite W
    d = g
    if len(states) > 0:
        v = tl.where(first, g, tl.fma(g, rest, momentum * states[0]))
        states = (v,)
        d = v
        if MIXES:
            d = tl.fma(v, of_v, of_g * g)
    return tl.fma(d, -lr, w), lr * d, g, states


@triton.jit
def adam_scalars(numbers, lr, step, DECOUPLED: tl.constexpr):
    beta1, rest1, log1, beta2, rest2, log2, eps, weight_decay, share = numbers
    shrink = lr * 0.0
    if DECOUPLED:
        shrink = lr * weight_decay
    correction = one_minus_exp(step * log1)
    step_size = tl.div_rn(lr, correction)
    root = tl.sqrt_rn(one_minus_exp(step * log2))
    return beta1, rest1, beta2, rest2, eps, weight_decay, step_size, root, shrink, 1.0 - share, share * correction


@triton.jit
def _adam_direction(g, states, s, MIXES: tl.constexpr):
    """Returns ``d`` before the step size, and the states: ``m``, ``q`` and with AMSGrad the largest ``q``."""
    beta1, rest1, beta2, rest2, eps, _, _, root, _, of_m, of_g = s
    m = states[0]
    m = tl.where(rest1 < 0.5, tl.fma(rest1, g - m, m), tl.fma(-beta1, g - m, g))
    q = tl.fma(rest2 * g, g, beta2 * states[1])
    largest = q
    if len(states) > 2:
        largest = tl.where(q <= states[2], states[2], q)  # a NaN stays one
        states = (m, q, largest)
    else:
        states = (m, q)
    if MIXES:
        m = tl.fma(of_g, g, of_m * m)
    return tl.div_rn(m, tl.div_rn(tl.sqrt_rn(largest), root) + eps), states


@triton.jit
def adam(w, g, states, s, DECOUPLED: tl.constexpr, MIXES: tl.constexpr):
    """Returns ``W``, ``u``, ``g`` and the states."""
    weight_decay, step_size, shrink = s[5], s[6], s[8]
    if not DECOUPLED:
        g = tl.where(weight_decay != 0.0, tl.fma(w, weight_decay, g), g)
    d, states = _adam_direction(g, states, s, MIXES)
    u = tl.fma(step_size, d, shrink * w)
    return tl.fma(-step_size, d, (1.0 - shrink) * w), u, g, states


@triton.jit
def adam_direction(g, states, s, MIXES: tl.constexpr):
    """Returns the direction that a weight is to take, and the states."""
    d, states = _adam_direction(g, states, s, MIXES)
    return s[6] * d, states


@triton.jit
def direction_scalars(numbers, lr):
    return lr, lr * numbers[0]


@triton.jit
def direction(w, d, s):
    """Returns ``W`` and ``u``."""
    lr, shrink = s
    return tl.fma(-lr, d, (1.0 - shrink) * w), tl.fma(lr, d, shrink * w)


@triton.jit
def past_at(decays, rests, taps, turn, update_tap, fill_tap, fill_ratio, delay, t):
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
        update_tap = tl.where(filling, fill_tap, update_tap)
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
