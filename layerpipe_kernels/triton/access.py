# mypy: ignore-errors
"""Memory at addresses that were themselves read from memory, in 16-byte pieces where ``VEC > 1`` says it is aligned.

``VEC`` is the number of elements per piece of the narrowest type. A mask must then be the same for ``VEC`` neighbours.
"""

import triton
import triton.language as tl

from layerpipe_kernels.triton.number import hash32, round_stochastic


@triton.jit
def pointer(record, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(record + FIELD).to(tl.pointer_type(DTYPE))


@triton.jit
def _at(base, start, VEC: tl.constexpr):
    # The hint must stand on an operation, not on an argument: inlining would lose it.
    first = base + start
    if VEC > 1:
        first = tl.multiple_of(first, 16)
    return first


@triton.jit
def load(base, start, lane, mask, VEC: tl.constexpr):
    """As float32. Everything is read once per step, so it need not stay in the caches."""
    return tl.load(_at(base, start, VEC) + lane, mask=mask, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def store(base, start, lane, mask, value, VEC: tl.constexpr):
    """Weights and past weights: the next forward and backward read them."""
    tl.store(_at(base, start, VEC) + lane, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def stream(base, start, lane, mask, value, VEC: tl.constexpr):
    """Cache policy of memory that is not touched before the next step."""
    tl.store(_at(base, start, VEC) + lane, value.to(base.dtype.element_ty), mask=mask, cache_modifier=".cs")


@triton.jit
def stream_averages(emas, start, lane, mask, averages, keys, VEC: tl.constexpr):
    """Each with its own key: what is kept as bfloat16 is rounded by the random bits of key and place."""
    for k in tl.static_range(len(emas)):
        if emas[k].dtype.element_ty == tl.bfloat16:
            random = hash32((start + lane).to(tl.uint32) ^ keys[k])
            stream(emas[k], start, lane, mask, round_stochastic(averages[k], random), VEC)
        else:
            stream(emas[k], start, lane, mask, averages[k], VEC)
