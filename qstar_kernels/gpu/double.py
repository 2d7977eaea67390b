"""Arithmetic in float64 without branches and divisions, and several sums by one reduction."""

import triton
import triton.language as tl

from qstar_kernels.gpu.scratch import INF, LOG2E

LN2_HIGH = tl.constexpr(0.6931471803691238)  # 33 bits of log 2, and the rest
LN2_LOW = tl.constexpr(1.9082149292705877e-10)


@triton.jit
def inverse(x):
    """1/x in float64, of what float32 can hold: half of the instructions of a division, and no branch."""
    y = (1.0 / x.to(tl.float32)).to(tl.float64)
    y = y * (2 - x * y)
    return y * (2 - x * y)


@triton.jit
def exp64(x):
    """e^x in float64 without a branch, 0 below −700 and infinite above 700."""
    n = tl.floor(x * LOG2E + 0.5)
    n = tl.minimum(tl.maximum(n, -1020.0), 1020.0)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = r * (1 / 39916800) + 1 / 3628800
    p = p * r + 1 / 362880
    p = p * r + 1 / 40320
    p = p * r + 1 / 5040
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 1 / 2
    p = (p * r + 1) * r + 1
    scale = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    y = tl.where(x < -700, 0.0, p * scale)
    return tl.where(x > 700, x * INF, y)


@triton.jit
def log64(x):
    """log x in float64 without a branch, of x > 0 that is not denormal; −inf of 0."""
    bits = x.to(tl.int64, bitcast=True)
    high = ((bits >> 32) & 0xFFFFF) >= 0x6A09E  # the mantissa is √2 or more
    exponent = (bits >> 52) - tl.where(high, 1022, 1023)
    mantissa = (bits & 0xFFFFFFFFFFFFF) | tl.where(high, 0x3FE0000000000000, 0x3FF0000000000000)
    m = mantissa.to(tl.float64, bitcast=True)  # from √½ to √2
    z = (m - 1) * inverse(m + 1)
    z2 = z * z
    p = z2 * (2 / 21) + 2 / 19
    p = p * z2 + 2 / 17
    p = p * z2 + 2 / 15
    p = p * z2 + 2 / 13
    p = p * z2 + 2 / 11
    p = p * z2 + 2 / 9
    p = p * z2 + 2 / 7
    p = p * z2 + 2 / 5
    p = p * z2 + 2 / 3
    p = (p * z2 + 2) * z
    n = exponent.to(tl.float64)
    y = n * LN2_HIGH + (n * LN2_LOW + p)
    y = tl.where((x > 0) & (x < INF), y, tl.where(x == 0, -INF, x))
    return tl.where(x < 0, float("nan"), y)


@triton.jit
def log1p64(x):
    """log(1 + x) in float64."""
    small = x * (1 - x * (0.5 - x * (1 / 3 - x * 0.25)))
    return tl.where(tl.abs(x) < 1e-4, small, log64(1 + x))


@triton.jit
def sums_of_4(a, b, c, d):
    """The sums of four blocks [G], by one reduction."""
    left, right = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=0))  # [2] each: a and b over c and d
    a, b = tl.split(left)
    c, d = tl.split(right)
    return a, b, c, d


@triton.jit
def sums_of_8(a, b, c, d, e, f, g, h):
    """The sums of eight blocks [G], by one reduction."""
    left = tl.join(tl.join(a, b), tl.join(c, d))  # [G, 2, 2]
    right = tl.join(tl.join(e, f), tl.join(g, h))  # [G, 2, 2]
    left, right = tl.split(tl.sum(tl.join(left, right), axis=0))  # [2, 2] each
    first, second = tl.split(left)
    third, fourth = tl.split(right)
    a, b = tl.split(first)
    c, d = tl.split(second)
    e, f = tl.split(third)
    g, h = tl.split(fourth)
    return a, b, c, d, e, f, g, h


@triton.jit
def maxima_of_4(a, b, c, d):
    """The maxima of four blocks [G], by one reduction."""
    left, right = tl.split(tl.max(tl.join(tl.join(a, b), tl.join(c, d)), axis=0))
    a, b = tl.split(left)
    c, d = tl.split(right)
    return a, b, c, d
