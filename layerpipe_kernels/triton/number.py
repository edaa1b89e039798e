# mypy: ignore-errors
"""Random bits, stochastic rounding and ``1 - exp(x)``, as in :mod:`layerpipe_kernels.reference`."""

import triton
import triton.language as tl


@triton.jit
def hash32(x):
    """:func:`layerpipe_kernels.reference.hash32` of uint32 numbers, which may wrap."""
    x = tl.mul(x ^ (x >> 16), 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def round_stochastic(x, random):
    """float32 to bfloat16, up or down with the probability that makes the mean exact; ``random`` uint32."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = tl.where(finite, bits + (random & 0xFFFF), bits) >> 16
    rounded = tl.where(x != x, (bits >> 16) | 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def one_minus_exp(x):
    """``1 - exp(x)`` of ``x <= 0``. Near 0 its Taylor series, because the difference would have lost its digits."""
    near = tl.maximum(x, -1.0)
    series = near * 0.0 + 1.0
    for i in tl.static_range(11):
        series = tl.fma(series, near * (1.0 / (12.0 - i)), 1.0)
    return tl.where(x > -1.0, -near * series, 1.0 - tl.exp(x))
