"""The groups of a row by their moments about one α, and what Taylor's formula makes of them at another: with a bound.

float64, a thread a group. The formulas are those of theory/computation.md, «One sweep» and «The bound».
"""

# ruff: noqa: RUF005 - Triton knows no starred tuples

from typing import NamedTuple

import triton
import triton.language as tl

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.double import exp64, inverse, log64, sums_of_4, sums_of_8
from qstar_kernels.gpu.scratch import INF, outside

# 1/j!
R2 = tl.constexpr(1 / 2)
R3 = tl.constexpr(1 / 6)
R4 = tl.constexpr(1 / 24)
R5 = tl.constexpr(1 / 120)
R6 = tl.constexpr(1 / 720)
R7 = tl.constexpr(1 / 5040)


class Sums(NamedTuple):
    """What a sweep stored of a row."""

    partial: tl.tensor  # a pointer
    o: tl.tensor  # [G], a number a group, and some more
    groups: tl.tensor
    inv_temperature: tl.tensor  # float64


class Curve(NamedTuple):
    """The groups about one centre, [G] each."""

    f: tl.tensor  # log-mass
    mean: tl.tensor  # of d
    moments: tl.tuple  # central ones, from the second on
    most: tl.tensor  # the last of these, at least
    reach: tl.tensor  # the greatest |d − mean|, at least
    spread: tl.tensor  # the root of the mean square of d
    lost: tl.tensor  # mass that may have underflowed, in parts of the group's


@triton.jit
def column(sums, k):
    """A column of the sums [G], float64, 0 beyond the groups."""
    at = sums.partial + sums.o * scratch.GROUP_COLUMNS + k
    return tl.load(at, mask=sums.o < sums.groups, other=0.0).to(tl.float64)


@triton.jit
def moments_of(sums, first, COUNT: tl.constexpr):
    """The mass [G] that the sums from column `first` on hold, the first `COUNT` moments of d about 0, and 1/mass."""
    mass = tl.maximum(column(sums, first), scratch.UNDERFLOW)
    per = inverse(mass)
    scale, moments = per, ()
    for k in tl.static_range(COUNT):
        scale *= sums.inv_temperature
        moments = moments + (column(sums, first + 1 + k) * scale,)
    return mass, moments, per


@triton.jit
def side_of(sums, first, lean, shift, grow, present):
    """The `Curve` at 2 − c or −c, whose five sums begin at column `first`; `grow`: half the way there from c."""
    mass, raw, per = moments_of(sums, first, 4)
    r1, r2, r3, r4 = raw
    square = r1 * r1
    c4 = tl.maximum(r4 - r1 * (4 * r3 - r1 * (6 * r2 - 3 * square)), 0.0)
    reach = column(sums, scratch.REACH) * sums.inv_temperature
    return Curve(
        tl.where(present, lean + log64(mass), -INF),
        shift + r1,
        (tl.maximum(r2 - square, 0.0), r3 - r1 * (3 * r2 - 2 * square), c4),
        # E (|d| + |mean|)⁴ ≤ 2⁴ E d⁴ is what its terms sum up to, each with the rounding of two sums
        c4 + r4 * (2 * 16 * scratch.OF_A_SUM),
        reach + tl.abs(r1),
        tl.sqrt(tl.maximum(r2, 0.0)),
        exp64(tl.minimum(2 * tl.abs(grow) * reach, 600.0)) * per * scratch.UNDERFLOW,
    )


@triton.jit
def center_of(sums, lean, shift, present):
    """The `Curve` at c with six moments; and −log of the mass: [G]."""
    mass, raw, per = moments_of(sums, scratch.MOMENTS, 6)
    r1, r2, r3, r4, r5, r6 = raw
    square = r1 * r1
    c6 = tl.maximum(r6 - r1 * (6 * r5 - r1 * (15 * r4 - r1 * (20 * r3 - r1 * (15 * r2 - 5 * square)))), 0.0)
    moments = (
        tl.maximum(r2 - square, 0.0),
        r3 - r1 * (3 * r2 - 2 * square),
        tl.maximum(r4 - r1 * (4 * r3 - r1 * (6 * r2 - 3 * square)), 0.0),
        r5 - r1 * (5 * r4 - r1 * (10 * r3 - r1 * (10 * r2 - 4 * square))),
        c6,
    )
    reach = column(sums, scratch.REACH) * sums.inv_temperature
    log_mass = log64(mass)
    curve = Curve(
        tl.where(present, lean + log_mass, -INF),
        shift + r1,
        moments,
        c6 + r6 * (2 * 64 * scratch.OF_A_SUM),
        reach + tl.abs(r1),
        tl.sqrt(tl.maximum(r2, 0.0)),
        per * scratch.UNDERFLOW,
    )
    return curve, -log_mass


class Moments(NamedTuple):
    """A whole row about its centre."""

    central: tl.tuple  # of d, 2 to 6
    last: tl.tensor  # the last of these, at least
    reach: tl.tensor  # the greatest |d − mean|


@triton.jit
def row_moments(curve):
    """`Moments` from those of the groups [G]."""
    w = exp64(curve.f)
    mass, mean, _w, _w = sums_of_4(w, w * curve.mean, w, w)
    per = inverse(mass)
    y = curve.mean - mean * per
    c2, c3, c4, c5, c6 = curve.moments
    m2, m3, m4, m5, m6, more, _w, _w = sums_of_8(
        w * (c2 + y * y),
        w * (c3 + y * (3 * c2 + y * y)),
        w * (c4 + y * (4 * c3 + y * (6 * c2 + y * y))),
        w * (c5 + y * (5 * c4 + y * (10 * c3 + y * (10 * c2 + y * y)))),
        w * (c6 + y * (6 * c5 + y * (15 * c4 + y * (20 * c3 + y * (15 * c2 + y * y))))),
        w * (curve.most - c6),
        w,
        w,
    )
    reach = tl.max(tl.where(w > 0, tl.abs(y) + curve.reach, 0.0))
    return Moments((m2 * per, m3 * per, m4 * per, m5 * per, m6 * per), (m6 + more) * per, reach)


@triton.jit
def exponential(moments, x):
    """E e^{xy} by its Taylor polynomial and that one's first two derivatives, from the central moments of y."""
    c2, c3, c4, c5, c6 = moments
    value = 1 + x * x * (c2 * R2 + x * (c3 * R3 + x * (c4 * R4 + x * (c5 * R5 + x * (c6 * R6)))))
    first = x * (c2 + x * (c3 * R2 + x * (c4 * R3 + x * (c5 * R4 + x * (c6 * R5)))))
    second = c2 + x * (c3 + x * (c4 * R2 + x * (c5 * R3 + x * (c6 * R4))))
    return value, first, second


@triton.jit
def left_out(last, reach, x):
    """Bounds of what `exponential` leaves out of E e^{xy} and of its derivative: E|y|⁷ max(1, e^{xy}) |x|⁷/7!, ⁶/6!.

    `last`: E y⁶, at least.
    """
    size = tl.abs(x)
    most = reach * exp64(tl.minimum(size * reach, 600.0)) * last
    cube = size * size * size
    return most * (cube * cube * size * R7), most * (cube * cube * R6)


@triton.jit
def row_at(curve, x):
    """At c + x: the groups' log-masses [G], the mass of all, F' and F''."""
    value, first, second = exponential(curve.moments, x)
    per = inverse(value)
    tilt = first * per
    slope, width = curve.mean + tilt, tl.maximum(second * per - tilt * tilt, 0.0)
    f = tl.where(curve.f > -INF, curve.f + x * curve.mean + log64(value), -INF)
    w = exp64(f)
    mass, mean, square, _w = sums_of_4(w, w * slope, w * (slope * slope + width), w)
    per_row = inverse(mass)
    mean *= per_row
    return f, mass, mean, tl.maximum(square * per_row - mean * mean, 0.0)


@triton.jit
def bounds_at(curve, f, deep, x, slope, beyond):
    """What F and F' at c + x may be off by: as Taylor's formula leaves it out, and by rounding. And each group's
    log-mass [G], both together.

    `f`: log-masses [G] at c + x; `deep`: see `center_of`; `beyond`: how far c is outside [0, 1].
    """
    value, first, second = exponential(curve.moments, x)
    per = inverse(value)
    size, w = tl.abs(x), exp64(f)
    off, off_tilt = left_out(curve.most, curve.reach, x)
    lost = curve.lost * exp64(tl.minimum(size * curve.reach, 600.0))
    off, off_tilt = (off + lost) * per, (off_tilt + lost * curve.reach) * per
    # the parts of an exponent come to (1 + 2e) of itself and 2e (1 + e) of |d|
    deep = tl.where(beyond > 0, tl.abs(deep), tl.maximum(deep, 0.0))
    nats = (deep + scratch.DEEPEST) * (1 + 2 * beyond) + 2 * beyond * (1 + beyond) * curve.spread
    weight = nats * scratch.OF_A_NAT + scratch.OF_AN_EXPONENTIAL
    tilt = first * per
    away = tl.abs(curve.mean + tilt - slope)
    width = tl.sqrt(tl.maximum(second * per - tilt * tilt, 0.0))
    # twice: F' and s are of the same weights, and a weight that is off moves each by no more than this
    rounding = (2 * weight + scratch.OF_A_SUM) * away + 2 * weight * width
    turn = size * curve.spread
    grown = exp64(tl.minimum(2 * turn, 600.0))
    rounding += 2 * curve.spread * scratch.OF_A_SUM * (1 + 4 * turn * grown)
    off += 4 * turn * turn * grown * scratch.OF_A_SUM
    mass, of_f, of_slope, of_sums, of_f_sums, _w, _w, _w = sums_of_8(
        w,
        w * off,
        w * (off * tl.abs(curve.mean - slope) + off_tilt),
        w * rounding,
        w * (weight + scratch.OF_A_SUM),
        w,
        w,
        w,
    )
    per_row = inverse(mass)
    of_f *= per_row
    grown = per_row * inverse(tl.maximum(1 - of_f, 0.5))
    return of_f * 2, of_slope * grown, of_sums * per_row, of_f_sums * per_row, off + weight + scratch.OF_A_SUM


@triton.jit
def side_at(side, x):
    """Of the groups [G] of a side at −x from it: the mass, F' and the bound of what is left out of the mass."""
    c2, c3, c4 = side.moments
    value = 1 + x * x * (c2 * R2 - x * (c3 * R3 - x * (c4 * R4)))
    first = -x * (c2 - x * (c3 * R2 - x * (c4 * R3)))
    per, size = inverse(value), tl.abs(x)
    w = tl.where(side.f > -INF, exp64(side.f - x * side.mean) * value, 0.0)
    fifth = size * size * size * size * size * R5
    off = (side.reach * side.most * fifth + side.lost) * exp64(tl.minimum(size * side.reach, 600.0)) * per
    turn = size * side.spread
    off += 4 * turn * turn * exp64(tl.minimum(2 * turn, 600.0)) * scratch.OF_A_SUM
    return w, side.mean + first * per, off


@triton.jit
def sides_at(high, low, x):
    """log Σ, F' and the bound of what is left out of the first, at 2 − c − x and at −c − x."""
    w_high, slope_high, off_high = side_at(high, x)
    w_low, slope_low, off_low = side_at(low, x)
    mass_high, slope_high, left_high, mass_low, slope_low, left_low, _w, _w = sums_of_8(
        w_high, w_high * slope_high, w_high * off_high, w_low, w_low * slope_low, w_low * off_low, w_low, w_low
    )
    per_high, per_low = inverse(mass_high), inverse(mass_low)
    at_high = (log64(mass_high), slope_high * per_high, left_high * per_high)
    return at_high, (log64(mass_low), slope_low * per_low, left_low * per_low)


@triton.jit
def rounding_of(of_slope, others, alpha, slope, width, norm, at_high, at_low, SECOND: tl.constexpr):
    """What rounding leaves open of F' in log-probabilities, given what it leaves of F' itself."""
    # Σ |e^a − e^b|, at most; squared by Cauchy and Schwarz, the last term by Jensen
    apart = exp64(norm) * (exp64(at_high) + exp64(at_low) - 2 * exp64(norm + (1 - 2 * alpha) * slope))
    apart = tl.where(outside(alpha) > 0, 2.0, tl.sqrt(tl.minimum(tl.maximum(apart, 0.0), 4.0)))
    rounding = of_slope + apart * (2 * scratch.OF_A_SUM)
    if SECOND:
        rounding += apart * (4 * scratch.OF_AN_EXPONENTIAL + 1e-6)
    else:
        rounding += 4 * scratch.OF_AN_EXPONENTIAL
    # where both models have one token for their greatest its d is 0 and its weight exact: only the rest, with the share
    # `part` of q or less, has a part in any sum
    rest = tl.maximum(others, 0.0) + 2 * scratch.OF_A_SUM
    part = tl.minimum(rest / 2, 1.0)
    weight = (scratch.DEEPEST - log64(part)) * scratch.OF_A_NAT + scratch.OF_AN_EXPONENTIAL
    of_rest = 1.2 * tl.sqrt(width * part) * (2 * weight + 3 * scratch.OF_A_SUM) + 2 * rest * scratch.OF_AN_EXPONENTIAL
    shared = (rest <= 0.3) & (norm >= -0.1)
    return tl.where(shared, tl.minimum(rounding, of_rest), rounding)
