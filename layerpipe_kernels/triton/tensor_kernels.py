# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102 - Triton has no starred tuples, and an `if` of the compiler's stands alone
"""One tensor's past weights, and one tensor's averages: a program per block."""

import triton
import triton.language as tl

from layerpipe_kernels.triton import access
from layerpipe_kernels.triton.number import hash32
from layerpipe_kernels.triton.rule import averaged

TAIL = tl.constexpr(16)


@triton.jit
def _reconstruct_tile(out, weight, terms, taps, start, left, SIZE: tl.constexpr, VEC: tl.constexpr):
    """I/O: read W and terms; write What."""
    lane = tl.arange(0, SIZE)
    mask = lane < left
    past = access.load(weight, start, lane, mask, VEC)
    for k in tl.static_range(len(terms)):
        past = tl.fma(access.load(terms[k], start, lane, mask, VEC), taps[k], past)
    access.store(out, start, lane, mask, past, VEC)


@triton.jit(do_not_specialize=["out", "weight", "terms", "taps_at", "numel"])
def reconstruct_kernel(
    out,
    weight,
    terms,
    taps,  # floats; empty where `taps_at` says them
    taps_at,  # (terms,) float32 or None
    numel,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``What = W + sum_k taps[k] terms[k]``."""
    if taps_at is not None:
        for k in tl.static_range(len(terms)):
            taps = taps + (tl.load(taps_at + k),)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    whole = numel.to(tl.int64) // VEC * VEC
    _reconstruct_tile(out, weight, terms, taps, start, whole - start, BLOCK, VEC)
    if VEC > 1:
        if (whole < numel) & (tl.program_id(0) == 0):
            _reconstruct_tile(out, weight, terms, taps, whole, numel - whole, TAIL, 1)


@triton.jit
def _ema_tile(emas, update, decays, rests, turn, keys, start, left, SIZE: tl.constexpr, VEC: tl.constexpr):
    """I/O: read u and E_k; write E_k."""
    lane = tl.arange(0, SIZE)
    mask = lane < left
    u = access.load(update, start, lane, mask, VEC)
    before = ()
    for k in tl.static_range(len(emas)):
        before = before + (access.load(emas[k], start, lane, mask, VEC),)
    averages = averaged(before, u, decays, rests, turn)
    access.stream_averages(emas, start, lane, mask, averages, keys, VEC)


@triton.jit(do_not_specialize=["emas", "update", "seed", "numel"])
def ema_kernel(emas, update, decays, rests, turn, seed, numel, VEC: tl.constexpr, BLOCK: tl.constexpr):
    """``E_k = decays[k] E_k + (1 - decays[k]) u``; ``rests`` are ``1 - decays``, and ``turn`` couples the first two."""
    key, keys = hash32(seed.to(tl.uint32)), ()
    for k in tl.static_range(len(emas)):
        keys = keys + (hash32(key + k),)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    whole = numel.to(tl.int64) // VEC * VEC
    _ema_tile(emas, update, decays, rests, turn, keys, start, whole - start, BLOCK, VEC)
    if VEC > 1:
        if (whole < numel) & (tl.program_id(0) == 0):
            _ema_tile(emas, update, decays, rests, turn, keys, whole, numel - whole, TAIL, 1)
