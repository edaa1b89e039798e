# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102, SIM108 - Triton has no starred tuples, and an `if` of the compiler's stands alone
"""One launch steps all tensors of a group: a program takes a chunk of one, whose addresses it reads from a table."""

import triton
import triton.language as tl

from layerpipe_kernels.triton import access
from layerpipe_kernels.triton.number import hash32
from layerpipe_kernels.triton.rule import (
    adam,
    adam_direction,
    adam_scalars,
    direction,
    direction_scalars,
    keep_past,
    past_at,
    sgd,
    sgd_scalars,
)

# A tensor's record: int64 numbers, addresses but the last; 0 where the group has no such array.
WEIGHT = tl.constexpr(0)
MASTER = tl.constexpr(1)
STATE = tl.constexpr(2)  # and the two after it
EMA = tl.constexpr(5)
PAST = tl.constexpr(6)
PREVIOUS = tl.constexpr(7)
COUNT = tl.constexpr(8)
NUMEL = tl.constexpr(9)
FIELDS = tl.constexpr(10)

MAX_EMAS = tl.constexpr(3)
TAIL = tl.constexpr(16)


@triton.jit
def _tile(
    arrays,
    states,
    emas,
    keys,
    start,
    left,
    factor,
    horizons,
    rule_scalars,
    past_scalars,
    RULE: tl.constexpr,
    MIXES: tl.constexpr,
    DECOUPLED: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_PAST: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
    OF_GRADIENT: tl.constexpr,
    SIZE: tl.constexpr,
    VEC: tl.constexpr,
):
    """``left`` elements from ``start`` on. I/O: read W or master, g, states, E_k; write W, master, states, E_k, and
    What if asked for; read and write u_ where weights are predicted. Adam's direction is written, with the states."""
    weight, master, grad, past, previous = arrays
    lane = tl.arange(0, SIZE)
    mask = lane < left
    # All reads come before the first write: the compiler may not move them past it.
    if RULE != "adam_direction":
        if HAS_MASTER:
            w = access.load(master, start, lane, mask, VEC)
        else:
            w = access.load(weight, start, lane, mask, VEC)
    g = access.load(grad, start, lane, mask, VEC) * factor
    own, averages = (), ()
    for j in tl.static_range(len(states)):
        own = own + (access.load(states[j], start, lane, mask, VEC),)
    for k in tl.static_range(len(emas)):
        averages = averages + (access.load(emas[k], start, lane, mask, VEC),)
    if HAS_PREVIOUS:
        w = tl.fma(horizons[0], access.load(previous, start, lane, mask, VEC), w)

    if RULE == "sgd":
        w, u, g, own = sgd(w, g, own, rule_scalars, MIXES)
    elif RULE == "adam":
        w, u, g, own = adam(w, g, own, rule_scalars, DECOUPLED, MIXES)
    elif RULE == "direction":
        w, u = direction(w, g, rule_scalars)
    else:
        w, own = adam_direction(g, own, rule_scalars, MIXES)
    if HAS_PREVIOUS:
        w = tl.fma(-horizons[1], u, w)
    if RULE != "adam_direction":
        averages, estimate = keep_past(w, u, g, averages, past_scalars, OF_GRADIENT)

    access.store(weight, start, lane, mask, w, VEC)
    if HAS_MASTER:
        access.stream(master, start, lane, mask, w, VEC)
    for j in tl.static_range(len(states)):
        access.stream(states[j], start, lane, mask, own[j], VEC)
    if HAS_PREVIOUS:
        access.stream(previous, start, lane, mask, u, VEC)
    access.stream_averages(emas, start, lane, mask, averages, keys, VEC)
    if HAS_PAST:
        access.store(past, start, lane, mask, estimate, VEC)


@triton.jit
def _walk(
    arrays,
    states,
    emas,
    keys,
    begin,
    count,
    factor,
    horizons,
    rule_scalars,
    past_scalars,
    RULE: tl.constexpr,
    MIXES: tl.constexpr,
    DECOUPLED: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_PAST: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
    OF_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """A chunk: blocks of whole pieces, so that masks do not split a piece, then the up to ``VEC - 1`` elements left."""
    whole = count // VEC * VEC
    for at in range(0, whole, BLOCK):
        _tile(arrays, states, emas, keys, begin + at, whole - at, factor, horizons, rule_scalars, past_scalars,
              RULE, MIXES, DECOUPLED, HAS_MASTER, HAS_PAST, HAS_PREVIOUS, OF_GRADIENT, BLOCK, VEC)  # fmt: skip
    if VEC > 1:
        if whole < count:
            _tile(arrays, states, emas, keys, begin + whole, count - whole, factor, horizons,
                  rule_scalars, past_scalars,
                  RULE, MIXES, DECOUPLED, HAS_MASTER, HAS_PAST, HAS_PREVIOUS, OF_GRADIENT, TAIL, 1)  # fmt: skip


@triton.jit
def _count_step(records, clock, horizon_at, horizon, tensors, HAS_COUNTS: tl.constexpr):
    if HAS_COUNTS:
        for i in range(0, tensors, 128):
            tensor = i + tl.arange(0, 128)
            mask = tensor < tensors
            count = tl.load(records + tensor * FIELDS + COUNT, mask=mask).to(tl.pointer_type(tl.float32))
            tl.store(count, tl.load(count, mask=mask) + 1.0, mask=mask)
    if clock is not None:
        tl.store(clock, tl.load(clock) + 1)
    if horizon_at is not None:
        tl.store(horizon_at, horizon)


# Scalars are no part of what is compiled, not even where they are 1 or multiples of 16; floats never are.
@triton.jit(
    do_not_specialize=["records", "grads", "chunks", "done", "lr_at", "clock", "grad_scale", "found_inf", "horizon_at"]
    + ["delay", "t", "seed", "tensors"]
)
def step_kernel(
    records,  # (tensors, FIELDS) int64
    grads,  # (2, tensors) int64: addresses; whether the momentum buffer holds nothing yet
    chunks,  # (programs, 2) int64: tensor, first element
    done,  # () int32, programs that have finished; 0 before and after
    lr_at,  # () float32 or None, instead of `lr`
    clock,  # () int64 or None, updates before this one, instead of `t`; counted up
    grad_scale,  # () float32 or None
    found_inf,  # () float32 or None; nonzero: change nothing
    horizon_at,  # () float32 or None, instead of `horizon_before`; set to `horizon`
    numbers,  # floats, as the rules' scalars are made of them
    decays,  # floats, per EMA; likewise `rests` and `taps`
    rests,
    taps,
    lr,
    sign,
    turn,
    update_tap,
    fill_tap,
    fill_ratio,
    horizon,
    horizon_before,
    delay,
    t,
    seed,
    tensors,
    RULE: tl.constexpr,
    MIXES: tl.constexpr,  # SGD's and Adam's direction is not of the average alone
    DECOUPLED: tl.constexpr,  # Adam's weight decay
    STATES: tl.constexpr,
    EMAS: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_PAST: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    OF_GRADIENT: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    EMA_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,  # every array starts at a multiple of 16 bytes; otherwise each tensor is looked at
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One step of every tensor in the tables. Counts and clock are advanced by the last program, when all have read
    them."""
    if found_inf is not None:
        if tl.load(found_inf) != 0.0:
            return
    tensor = tl.load(chunks + tl.program_id(0) * 2)
    begin = tl.load(chunks + tl.program_id(0) * 2 + 1)
    record = records + tensor * FIELDS
    numel = tl.load(record + NUMEL)
    grad = access.pointer(grads + tensor, 0, GRAD_TYPE)
    weight = access.pointer(record, WEIGHT, WEIGHT_TYPE)
    master = access.pointer(record, MASTER, tl.float32)
    past = access.pointer(record, PAST, WEIGHT_TYPE)
    previous = access.pointer(record, PREVIOUS, tl.float32)
    ema = access.pointer(record, EMA, EMA_TYPE)
    states, emas, keys = (), (), ()
    for j in tl.static_range(STATES):
        states = states + (access.pointer(record, STATE + j, tl.float32),)

    if clock is not None:
        t = tl.load(clock) + 1
    t = t.to(tl.int64)
    key = hash32(seed.to(tl.uint32) ^ hash32(t.to(tl.uint32))) + tensor.to(tl.uint32) * MAX_EMAS
    for k in tl.static_range(EMAS):
        emas = emas + (ema + k * numel,)
        keys = keys + (hash32(key + k),)
    past_scalars = past_at(decays, rests, taps, turn, update_tap, fill_tap, fill_ratio, delay, t)

    if lr_at is not None:
        lr = tl.load(lr_at)
    factor = sign
    if grad_scale is not None:
        factor = tl.div_rn(sign, tl.load(grad_scale))
    count = 0.0
    if HAS_COUNTS:
        count = tl.load(access.pointer(record, COUNT, tl.float32))
    if RULE == "sgd":
        if HAS_COUNTS:
            first = count == 0.0
        else:
            first = tl.load(grads + tensors + tensor) != 0
        rule_scalars = sgd_scalars(numbers, lr, first)
    elif RULE == "direction":
        rule_scalars = direction_scalars(numbers, lr)
    else:
        rule_scalars = adam_scalars(numbers, lr, count + 1.0, DECOUPLED)
    if horizon_at is not None:
        horizon_before = tl.load(horizon_at)
    horizons = (horizon_before, horizon)

    arrays = (weight, master, grad, past, previous)
    size = tl.minimum(numel - begin, CHUNK).to(tl.int32)
    if ALIGNED:
        _walk(arrays, states, emas, keys, begin, size, factor, horizons, rule_scalars, past_scalars,
              RULE, MIXES, DECOUPLED, HAS_MASTER, HAS_PAST, HAS_PREVIOUS, OF_GRADIENT, BLOCK, VEC)  # fmt: skip
    else:
        starts = tl.load(grads + tensor)
        for field in tl.static_range(COUNT):
            starts |= tl.load(record + field)
        if EMAS > 1:
            starts |= numel * (EMA_TYPE.primitive_bitwidth // 8)
        if starts % 16 == 0:
            _walk(arrays, states, emas, keys, begin, size, factor, horizons, rule_scalars, past_scalars,
                  RULE, MIXES, DECOUPLED, HAS_MASTER, HAS_PAST, HAS_PREVIOUS, OF_GRADIENT, BLOCK, VEC)  # fmt: skip
        else:
            _walk(arrays, states, emas, keys, begin, size, factor, horizons, rule_scalars, past_scalars,
                  RULE, MIXES, DECOUPLED, HAS_MASTER, HAS_PAST, HAS_PREVIOUS, OF_GRADIENT, BLOCK // 4, 1)  # fmt: skip

    if HAS_COUNTS or clock is not None or horizon_at is not None:
        tl.debug_barrier()  # all threads of this program have read
        if tl.atomic_add(done, 1) == tl.num_programs(0) - 1:
            _count_step(records, clock, horizon_at, horizon, tensors, HAS_COUNTS)
            tl.store(done, 0)
