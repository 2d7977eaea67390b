"""From the sums of a sweep to α, its diagnostics and the groups' masses, or to the news that float32 is not enough.

One program a row, a thread a group, float64. The formulas and the bounds that decide are those of
theory/computation.md, «One sweep».
"""

# ruff: noqa: RUF005 - Triton knows no starred tuples

from typing import NamedTuple

import triton
import triton.language as tl

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.double import exp64, inverse, log1p64, log64, maxima_of_4, sums_of_4, sums_of_8
from qstar_kernels.gpu.scratch import (
    INF,
    as_double,
    budget_of,
    budget_step,
    entropy_of,
    is_sound,
    kls_of,
    outside,
    own_settings,
    store_diagnostics,
)

# 1/j!
R2 = tl.constexpr(1 / 2)
R3 = tl.constexpr(1 / 6)
R4 = tl.constexpr(1 / 24)
R5 = tl.constexpr(1 / 120)
R6 = tl.constexpr(1 / 720)
R7 = tl.constexpr(1 / 5040)


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
def column(partial, k, o, groups):
    """A column of the sums [G], float64, 0 beyond the groups."""
    return tl.load(partial + o * scratch.GROUP_COLUMNS + k, mask=o < groups, other=0.0).to(tl.float64)


@triton.jit
def moments_of(partial, first, COUNT: tl.constexpr, o, groups, inv_temperature):
    """The mass [G] that the sums from column `first` on hold, the first `COUNT` moments of d about 0, and 1/mass."""
    mass = tl.maximum(column(partial, first, o, groups), scratch.UNDERFLOW)
    per = inverse(mass)
    scale, moments = per, ()
    for k in tl.static_range(COUNT):
        scale *= inv_temperature
        moments = moments + (column(partial, first + 1 + k, o, groups) * scale,)
    return mass, moments, per


@triton.jit
def side_of(partial, first, lean, shift, grow, present, o, groups, inv_temperature):
    """The `Curve` at 2 − c or −c, whose five sums begin at column `first`; `grow`: half the way there from c."""
    mass, raw, per = moments_of(partial, first, 4, o, groups, inv_temperature)
    r1, r2, r3, r4 = raw
    square = r1 * r1
    c4 = tl.maximum(r4 - r1 * (4 * r3 - r1 * (6 * r2 - 3 * square)), 0.0)
    reach = column(partial, scratch.REACH, o, groups) * inv_temperature
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
def center_of(partial, lean, shift, present, o, groups, inv_temperature):
    """The `Curve` at c with six moments; and −log of the mass: [G]."""
    mass, raw, per = moments_of(partial, scratch.MOMENTS, 6, o, groups, inv_temperature)
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
    reach = column(partial, scratch.REACH, o, groups) * inv_temperature
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


@triton.jit
def row_moments(curve):
    """Of the whole row at c, from its groups' [G]: central moments 2 to 6 of d, the last of them at least, and the
    greatest |d − mean|."""
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
    return (m2 * per, m3 * per, m4 * per, m5 * per, m6 * per), (m6 + more) * per, reach


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
def sides_at(high, low, x):
    """log Σ, F' and the bound of what is left out of the first, at 2 − c − x and at −c − x."""
    h2, h3, h4 = high.moments
    l2, l3, l4 = low.moments
    value_high = 1 + x * x * (h2 * R2 - x * (h3 * R3 - x * (h4 * R4)))
    value_low = 1 + x * x * (l2 * R2 - x * (l3 * R3 - x * (l4 * R4)))
    first_high = -x * (h2 - x * (h3 * R2 - x * (h4 * R3)))
    first_low = -x * (l2 - x * (l3 * R2 - x * (l4 * R3)))
    per_high, per_low = inverse(value_high), inverse(value_low)
    w_high = tl.where(high.f > -INF, exp64(high.f - x * high.mean) * value_high, 0.0)
    w_low = tl.where(low.f > -INF, exp64(low.f - x * low.mean) * value_low, 0.0)
    size = tl.abs(x)
    fifth = size * size * size * size * size * R5
    off_high = (high.reach * high.most * fifth + high.lost) * exp64(tl.minimum(size * high.reach, 600.0)) * per_high
    off_low = (low.reach * low.most * fifth + low.lost) * exp64(tl.minimum(size * low.reach, 600.0)) * per_low
    turn_high, turn_low = size * high.spread, size * low.spread
    off_high += 4 * turn_high * turn_high * exp64(tl.minimum(2 * turn_high, 600.0)) * scratch.OF_A_SUM
    off_low += 4 * turn_low * turn_low * exp64(tl.minimum(2 * turn_low, 600.0)) * scratch.OF_A_SUM
    mass_high, slope_high, left_high, mass_low, slope_low, left_low, _w, _w = sums_of_8(
        w_high,
        w_high * (high.mean + first_high * per_high),
        w_high * off_high,
        w_low,
        w_low * (low.mean + first_low * per_low),
        w_low * off_low,
        w_low,
        w_low,
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


@triton.jit
def quartics_at(curve, rests, there, x):
    """Log-mass, F' and F'' of the row at x, by quartics for the groups' log-masses; `rests`: see `guess_of`."""
    c2, c3, _c, _c, _c = curve.moments
    rest = tl.where(x > 0, rests[0], rests[1])
    f = curve.f + x * curve.mean + x * x * (c2 * R2 + x * (c3 * R3 + x * rest))
    w = tl.where(there, exp64(f), 0.0)
    slope = curve.mean + x * (c2 + x * (c3 * R2 + x * (4 * rest)))
    width = tl.maximum(c2 + x * (c3 + x * (12 * rest)), 0.0)
    mass, mean, square, _w = sums_of_4(w, w * slope, w * (slope * slope + width), w)
    per = inverse(mass)
    mean, square = mean * per, square * per
    return mass, mean, square - mean * mean


@triton.jit
def guess_of(curve, at_one, at_zero, budget, METHOD: tl.constexpr):
    """x about where F' vanishes, or where a KL has its budget, by quartics for the groups' log-masses that also pass
    through those at α = 0 and 1 [G]; c is ½."""
    c2, c3, _c, _c, _c = curve.moments
    there = curve.f > -INF
    rest_one = tl.where(there, 16 * (at_one - curve.f - 0.5 * curve.mean) - 2 * c2 - c3 * (1 / 3), 0.0)
    rest_zero = tl.where(there, 16 * (at_zero - curve.f + 0.5 * curve.mean) - 2 * c2 + c3 * (1 / 3), 0.0)
    x = tl.full([], 0.0, tl.float64)
    low, high, go = x - 0.5, x + 0.5, 1
    for _ in range(8):
        if go == 1:
            mass, slope, width = quartics_at(curve, (rest_one, rest_zero), there, x)
            width = tl.maximum(width, 1e-30)
            if (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):
                gap, _steep, kl, away = budget_of(0.5 + x, slope, log64(mass), 0.0, 0.0, width, budget, METHOD)
                change = budget_step(kl, away, width, budget)
                step = x - change if METHOD == "kl_budget" else x + change
            else:
                gap = slope
                step = x - gap * inverse(width)
            low, high = tl.where(gap < 0, x, low), tl.where(gap < 0, high, x)
            step = tl.where((step > low) & (step < high), step, (low + high) / 2)
            go = (tl.abs(step - x) > 1e-5).to(tl.int32)
            x = step
    return x


@triton.jit
def far_root(curve, x, c):
    """x where F' vanishes by the groups' Taylor polynomials, from x."""
    go = 1
    for _ in range(6):
        if go == 1:
            _f, _mass, slope, width = row_at(curve, x)
            step = tl.minimum(tl.maximum(x - slope * inverse(tl.maximum(width, 1e-30)), -c), 1 - c)
            go = (tl.abs(step - x) > 1e-9).to(tl.int32)
            x = step
    return x


@triton.jit
def far_budget_root(curve, x, c, budget, METHOD: tl.constexpr):
    """x where a KL has its budget by the groups' Taylor polynomials, from x."""
    go = 1
    for _ in range(8):
        if go == 1:
            _f, mass, slope, width = row_at(curve, x)
            _gap, _steep, kl, away = budget_of(c + x, slope, log64(mass), 0.0, 0.0, width, budget, METHOD)
            change = budget_step(kl, away, width, budget)
            step = x - change if METHOD == "kl_budget" else x + change
            step = tl.minimum(tl.maximum(step, -c), 1 - c)
            go = (tl.abs(step - x) > 1e-9).to(tl.int32)
            x = step
    return x


@triton.jit
def ess_root(high, low, x, c):
    """x where both ESS are equal, from x."""
    go = 1
    for _ in range(10):
        if go == 1:
            at_high, at_low = sides_at(high, low, x)
            step = x - (at_low[0] - at_high[0]) * inverse(tl.maximum(at_high[1] - at_low[1], 1e-30))
            step = tl.minimum(tl.maximum(step, -c), 1 - c)
            go = (tl.abs(step - x) > 1e-9).to(tl.int32)
            x = step
    return x


@triton.jit
def rise_of(moments, high, low):
    """log E e^{y high} − log E e^{y low} by Taylor's polynomials: relative to F'', however small it is."""
    at_low, _first, _second = exponential(moments, low)
    c2, c3, c4, c5, c6 = moments
    high2, low2 = high * high, low * low
    high4, low4 = high2 * high2, low2 * low2
    difference = c2 * R2 * (high2 - low2) + c3 * R3 * (high2 * high - low2 * low) + c4 * R4 * (high4 - low4)
    difference += c5 * R5 * (high4 * high - low4 * low) + c6 * R6 * (high4 * high2 - low4 * low2)
    return log1p64(difference * inverse(at_low))


@triton.jit
def tilt_of(moments, x):
    """The first two derivatives of log E e^{xy} by the row's moments."""
    value, first, second = exponential(moments, x)
    per = inverse(value)
    tilt = first * per
    return tilt, second * per - tilt * tilt


@triton.jit
def near_residual(moments, x, c, rise, METHOD: tl.constexpr):
    """What vanishes at the root of the rule at c + x, and its derivative, by the row's moments: relative to F''.

    `rise`: that of log E e^{xy} from α = 0 to 1.
    """
    if METHOD == "ess_balance":
        high, low = 2 - 2 * c - x, -2 * c - x
        tilt_high, _width = tilt_of(moments, high)
        tilt_low, _width = tilt_of(moments, low)
        return 2 * rise - rise_of(moments, high, low), tilt_high - tilt_low
    else:
        tilt, width = tilt_of(moments, x)
        return tilt - rise, width


@triton.jit
def near_kl(moments, x, end):
    """KL of q at c + x from the model at c + `end`, by the row's moments: K(end) − K(x) − (end − x) K'(x); and K''(x).

    That model has no mass outside the common support."""
    tilt, width = tilt_of(moments, x)
    return rise_of(moments, end, x) - (end - x) * tilt, width


@triton.jit
def near_kl_bound(last, reach, x, end):
    """What the moments leave out of `near_kl`."""
    off_end, _off = left_out(last, reach, end)
    off, off_tilt = left_out(last, reach, x)
    return 1.1 * (off_end + off + tl.abs(end - x) * off_tilt)


@triton.jit
def near_budget_root(moments, c, end, budget):
    """x where `near_kl` has its budget, between −c and 1 − c: from where a parabola has it."""
    inward = tl.where(end > 0, -1.0, 1.0)
    x = end + inward * tl.sqrt(2 * budget * inverse(tl.maximum(moments[0], 1e-30)))
    x = tl.minimum(tl.maximum(x, -c), 1 - c)
    for _ in range(5):
        kl, width = near_kl(moments, x, end)
        x += inward * budget_step(kl, tl.abs(end - x), tl.maximum(width, 0.0), budget)
        x = tl.minimum(tl.maximum(x, -c), 1 - c)
    return x


@triton.jit
def near_bound(last, reach, x, c, METHOD: tl.constexpr):
    """What the moments leave out of `near_residual`."""
    off_high, _off = left_out(last, reach, 1 - c)
    off_low, _off = left_out(last, reach, -c)
    if METHOD == "ess_balance":
        far_high, _off = left_out(last, reach, 2 - 2 * c - x)
        far_low, _off = left_out(last, reach, -2 * c - x)
        return 1.1 * (2 * (off_high + off_low) + far_high + far_low)
    else:
        _off, off = left_out(last, reach, x)
        return 1.1 * (off + off_high + off_low)


@triton.jit
def near_root(moments, c, rise, METHOD: tl.constexpr):
    """x where `near_residual` vanishes, between −c and 1 − c."""
    x = c * 0
    for _ in range(5):
        gap, steep = near_residual(moments, x, c, rise, METHOD)
        x = tl.minimum(tl.maximum(x - gap * inverse(tl.maximum(steep, 1e-30)), -c), 1 - c)
    return x


@triton.jit
def reverse_alpha(moments, last, reach, f_one, slope_one, f_zero, slope_zero, c):
    """α of `reverse_kl_symmetry` from F' at both ends, and what it may be off by.

    By the row's moments, or by log-mass and F' [G] of each group at α = 1 and 0.
    """
    rise = rise_of(moments, 1 - c, -c)
    near_high, _width = near_residual(moments, 1 - c, c, rise, "kl_symmetry")
    near_low, _width = near_residual(moments, -c, c, rise, "kl_symmetry")
    off = near_bound(last, reach, 1 - c, c, "kl_symmetry")
    off += near_bound(last, reach, -c, c, "kl_symmetry")
    one, zero = exp64(f_one), exp64(f_zero)
    far_high, far_low, size, _w = sums_of_4(
        one * slope_one, zero * slope_zero, one * tl.abs(slope_one) + zero * tl.abs(slope_zero), one
    )
    near = off <= (near_high - near_low) * scratch.MOST_OF_ALPHA
    high, low = tl.where(near, near_high, far_high), tl.where(near, near_low, far_low)
    rounding = (1 + size) * (4 * (scratch.OF_A_SUM + scratch.OF_AN_EXPONENTIAL))
    spread = high - low
    some = spread > 1e-14
    alpha = tl.where(some, high / tl.where(some, spread, 1.0), 0.5)
    doubt = tl.where(near, off, rounding) / tl.where(some, spread, 1.0)
    return alpha, tl.where(near | (doubt <= scratch.ROUNDING_OF_ALPHA), doubt, INF)


@triton.jit
def entropy_of_row(partial, first: tl.constexpr, drop, o, groups, inv_temperature):
    """Entropy of one row from its groups; `drop` [G]: their maxima below the row's, over the temperature."""
    present = o < groups
    count = column(partial, scratch.ENTROPY + first, o, groups)
    others = column(partial, scratch.ENTROPY + first + 1, o, groups)
    tilted = column(partial, scratch.ENTROPY + first + 2, o, groups) * inv_temperature
    scale, mass = tl.where(present, exp64(drop), 0.0), count + others
    # the maxima of the row are those of the groups that reach it
    maxima, others, tilted, _w = sums_of_4(
        tl.where(present & (drop == 0), count, 0.0),
        scale * tl.where(drop == 0, others, mass),
        tl.where(scale > 0, scale * (tilted + drop * mass), 0.0),
        scale,
    )
    return entropy_of(maxima, others, tilted)


class Norms(NamedTuple):
    """What the sums say of a row beside the curve."""

    drop_theta: tl.tensor  # [G], the groups' maxima less the row's, over the temperature
    drop_t: tl.tensor
    theta: tl.tensor  # log-normalisers of the rows less their maxima
    t: tl.tensor
    secant: tl.tensor  # their difference, with more digits
    others: tl.tensor  # the masses of all but the maxima of both rows, relative to those
    theta_alone: tl.tensor  # whether π_θ allows a token that π_t forbids
    t_alone: tl.tensor


@triton.jit
def norms_of(partial, row, present, o, groups, inv_temperature, TEMPERED: tl.constexpr):
    """Merge what does not depend on the centre, and write it down; which groups have mass, and the row's status."""
    at = partial + o * scratch.GROUP_COLUMNS
    tops_theta = tl.load(at + scratch.MAX_THETA, mask=present, other=scratch.NO_MAXIMUM)
    tops_t = tl.load(at + scratch.MAX_T, mask=present, other=scratch.NO_MAXIMUM)
    flags = tl.load(at + scratch.FLAGS, mask=present, other=0.0).to(tl.int32)
    nan, theta_alone = (flags & scratch.HAS_NAN).to(tl.float32), (flags & scratch.THETA_ALONE).to(tl.float32)
    top_theta, top_t, nan, theta_alone = maxima_of_4(tops_theta, tops_t, nan, theta_alone)
    theta_alone, t_alone = theta_alone > 0, tl.max(flags & scratch.T_ALONE) > 0
    status = tl.where((top_theta == scratch.NO_MAXIMUM) | (top_t == scratch.NO_MAXIMUM), scratch.STATUS_NO_SUPPORT, 0)
    infinite = (top_theta >= scratch.LARGEST) | (top_t >= scratch.LARGEST)
    status = tl.where(infinite, scratch.STATUS_POSITIVE_INFINITY, status)
    status = tl.where(nan > 0, scratch.STATUS_NAN, status)

    cold_theta = tl.maximum(tops_theta - top_theta, scratch.FLOOR).to(tl.float64)
    cold_t = tl.maximum(tops_t - top_t, scratch.FLOOR).to(tl.float64)
    drop_theta, drop_t = cold_theta * inv_temperature, cold_t * inv_temperature
    scale_theta, scale_t = exp64(drop_theta), exp64(drop_t)
    end_theta = column(partial, scratch.END_THETA, o, groups)
    mass_theta, mass_t = scale_theta * end_theta, scale_t * column(partial, scratch.END_T, o, groups)
    # of the masses themselves close pairs, and those of one nearly certain token, would leave nothing
    difference = scale_t * column(partial, scratch.DIFFERENCE, o, groups) + (scale_theta - scale_t) * end_theta
    cold_mass_theta, cold_mass_t = mass_theta, mass_t
    if TEMPERED:
        cold_mass_theta = exp64(cold_theta) * column(partial, scratch.COLD_THETA, o, groups)
        cold_mass_t = exp64(cold_t) * column(partial, scratch.COLD_T, o, groups)
    sum_theta, sum_t, cold_sum_theta, cold_sum_t, difference, _w, _w, _w = sums_of_8(
        mass_theta, mass_t, cold_mass_theta, cold_mass_t, difference, mass_t, mass_t, mass_t
    )
    s = tl.where(difference > 0, log1p64(difference / sum_t), -log1p64(-difference / sum_theta))
    norm_t = log64(sum_t)
    norms = Norms(drop_theta, drop_t, norm_t + s, norm_t, s, sum_theta + sum_t - 2, theta_alone, t_alone)
    tl.store(row + scratch.STATUS, status.to(tl.float64))
    tl.store(row + scratch.TOP_THETA, top_theta.to(tl.float64))
    tl.store(row + scratch.TOP_T, top_t.to(tl.float64))
    tl.store(row + scratch.SECANT, s)
    tl.store(row + scratch.LOG_COLD_THETA, log64(cold_sum_theta))
    tl.store(row + scratch.LOG_COLD_T, log64(cold_sum_t))
    tl.store(row + scratch.THETA_OUTSIDE, theta_alone.to(tl.float64))
    tl.store(row + scratch.T_OUTSIDE, t_alone.to(tl.float64))
    return norms, present & (tops_theta > scratch.NO_MAXIMUM) & (tops_t > scratch.NO_MAXIMUM), status


@triton.jit
def solve(
    partial,
    curve,
    of_row,
    high,
    low,
    norms,
    present,
    o,
    groups,
    c,
    inv_temperature,
    budget,
    METHOD: tl.constexpr,
    SECOND: tl.constexpr,
):
    """α before it is clamped; the centre to try next should it not be accepted; 1 if it is from the row's moments; and
    what it may be off by under the rules that have no residual."""
    moments, last, reach = of_row
    near, guess, doubt = 0, c, c * 0
    if METHOD == "entropy":
        entropy_theta = entropy_of_row(partial, 0, norms.drop_theta, o, groups, inv_temperature)
        entropy_t = entropy_of_row(partial, 3, norms.drop_t, o, groups, inv_temperature)
        total = entropy_theta + entropy_t
        alpha = tl.where(total > 0, entropy_theta / tl.where(total > 0, total, 1.0), 0.5)
        return alpha, alpha, near, tl.where(total > scratch.SMALL_ENTROPY, doubt + scratch.ENTROPY_DOUBT, INF)
    else:
        uneven = norms.theta_alone | norms.t_alone
        end_theta = tl.maximum(column(partial, scratch.END_THETA, o, groups), scratch.UNDERFLOW)
        end_t = tl.maximum(column(partial, scratch.END_T, o, groups), scratch.UNDERFLOW)
        at_one = tl.where(present, norms.drop_theta - norms.theta + log64(end_theta), -INF)
        at_zero = tl.where(present, norms.drop_t - norms.t + log64(end_t), -INF)
        if METHOD == "reverse_kl_symmetry":
            shift = norms.drop_theta - norms.drop_t - norms.secant
            tilt_one = column(partial, scratch.TILTS, o, groups) * inv_temperature
            tilt_zero = column(partial, scratch.TILTS + 1, o, groups) * inv_temperature
            alpha, doubt = reverse_alpha(
                moments, last, reach, at_one, shift + tilt_one / end_theta, at_zero, shift + tilt_zero / end_t, c
            )
            return alpha, alpha, near, tl.where(uneven, INF, doubt)
        elif (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):
            end, alone = (1 - c, norms.theta_alone) if METHOD == "kl_budget" else (-c, norms.t_alone)
            x = near_budget_root(moments, c, end, budget)
            _kl, width = near_kl(moments, x, end)
            off, away = near_kl_bound(last, reach, x, end), tl.abs(end - x)
            near = ((off <= away * width * scratch.MOST_OF_ALPHA) & (alone == 0)).to(tl.int32)
            if near == 0:
                x = c * 0
                if SECOND == 0:
                    x = guess_of(curve, at_one, at_zero, budget, METHOD)
                guess = c + x
                x = far_budget_root(curve, x, c, budget, METHOD)
            else:
                guess = c + x
            return c + x, guess, near, doubt
        else:
            rise = rise_of(moments, 1 - c, -c)
            x = near_root(moments, c, rise, METHOD)
            _gap, steep = near_residual(moments, x, c, rise, METHOD)
            off = near_bound(last, reach, x, c, METHOD)
            near = ((off <= steep * scratch.MOST_OF_ALPHA) & (uneven == 0)).to(tl.int32)
            if near == 0:
                x = c * 0
                if SECOND == 0:
                    x = guess_of(curve, at_one, at_zero, budget, METHOD)
                    if METHOD == "ess_balance":
                        # to leading order the root lies three times as far from 1/2 as that of the KL rule
                        x = tl.minimum(tl.maximum(3 * x, -0.48), 0.48)
                guess = c + x
                if METHOD == "ess_balance":
                    x = ess_root(high, low, x, c)
                    guess = tl.where(tl.abs(x) < 0.48, c + x, guess)
                else:
                    x = far_root(curve, x, c)
            return c + x, guess, near, doubt


@triton.jit
def settle_row(
    partial,
    row,
    masses,
    out,
    rows,
    groups,
    norms,
    present,
    o,
    c,
    inv_temperature,
    alpha,
    alpha_min,
    alpha_max,
    budget,
    tol,
    METHOD: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Find α (that of `fixed` is given), and accept it or not.

    Of log-probabilities, not logits: their norms are 0 and F' is the difference of the two KLs.
    """
    lean = norms.drop_t - norms.t
    shift = norms.drop_theta - norms.drop_t - norms.secant
    curve, deep = center_of(partial, lean + c * shift, shift, present, o, groups, inv_temperature)
    high = side_of(
        partial, scratch.SIDE_HIGH, lean + (2 - c) * shift, shift, 1 - c, present, o, groups, inv_temperature
    )
    low = side_of(partial, scratch.SIDE_LOW, lean - c * shift, shift, c, present, o, groups, inv_temperature)
    guess, near, doubt = alpha, 0, c * 0
    if METHOD != "fixed":
        of_row = row_moments(curve)
        alpha, guess, near, doubt = solve(
            partial, curve, of_row, high, low, norms, present, o, groups, c, inv_temperature, budget, METHOD, SECOND
        )
    alpha = tl.minimum(tl.maximum(alpha, alpha_min), alpha_max)
    x = alpha - c
    f, mass, slope, width = row_at(curve, x)
    beyond = outside(c) if METHOD == "fixed" else c * 0
    off_f, off_slope, rounding, rounding_f, slack = bounds_at(curve, f, deep, x, slope, beyond)
    at_high, at_low = sides_at(high, low, x)
    norm = log64(mass)
    rounding = rounding_of(rounding, norms.others, alpha, slope, width, norm, at_high[0], at_low[0], SECOND)
    _kl_theta, _kl_t, size = kls_of(alpha, slope, norm, 0.0, 0.0)

    # a comparison with NaN is false: sums that overflowed are not accepted
    fit = (off_f <= size * scratch.MOST_OF_F) & (off_slope <= tol * size) & (rounding <= size * scratch.ROUNDING)
    fit = fit & (at_high[2] <= scratch.MOST_OF_ESS) & (at_low[2] <= scratch.MOST_OF_ESS)
    fit = fit & is_sound(alpha, slope, norm, at_high[0], at_low[0], 0.0, 0.0, alpha_min, alpha_max, 1e-5)
    # what a token's exponentials leave of the models' own norms
    reach = tl.max(tl.where(present, column(partial, scratch.REACH, o, groups), 0.0)) * inv_temperature
    fit = fit & (reach * tl.maximum(c, 1 - c) <= scratch.FARTHEST)
    if METHOD == "fixed":
        # beyond [0, 1] the KLs have F' times as much, and the norms
        of_norms = scratch.OF_AN_EXPONENTIAL + scratch.OF_A_NAT * scratch.DEEPEST + scratch.OF_A_SUM
        of_kl = (1 + beyond) * (rounding + 2 * of_norms) + rounding_f
        least = (beyond == 0) | ((of_kl <= size * scratch.ROUNDING_OUTSIDE) & ((1 + beyond) * off_slope <= tol * size))
        fit = fit & least
    if (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):
        residual, steep, kl, away = budget_of(alpha, slope, norm, 0.0, 0.0, width, budget, METHOD)
        off, rounding = away * off_slope + off_f, away * rounding + 4 * rounding_f
        if near == 1:
            moments, last, far = of_row
            end = 1 - c if METHOD == "kl_budget" else -c
            kl, width_here = near_kl(moments, x, end)
            residual = budget - kl if METHOD == "kl_budget" else kl - budget
            steep, off = away * width_here, near_kl_bound(last, far, x, end)
            rounding = 16 * rounding_f * steep * away * (1 + tl.sqrt(width))
        stopped = ((alpha <= alpha_min) & (residual >= 0)) | ((alpha >= alpha_max) & (residual <= 0))
        known = (off <= steep * scratch.MOST_OF_ALPHA) & (rounding <= steep * scratch.ROUNDING_OF_ALPHA)
        known = known | (width <= scratch.FLAT)
        fit = fit & (stopped | (known & (tl.abs(residual) + off <= tol * tl.maximum(kl, 1.0))))
        open_still = tl.abs(residual) + off + rounding
        doubt = tl.minimum(
            open_still / tl.maximum(steep, 1e-30), tl.sqrt(2 * open_still * inverse(tl.maximum(width, 1e-30)))
        )
        given = alpha_min == alpha_max
        doubt = tl.where(given | (stopped & (tl.abs(residual) > off + rounding)), 0.0, doubt)
        guess = tl.where(given, alpha, guess)
    if (METHOD == "kl_symmetry") | (METHOD == "ess_balance"):
        residual, steep, off = slope, width, off_slope
        stoppable = slope == slope
        if METHOD == "ess_balance":
            residual, steep, off = at_low[0] - at_high[0], at_high[1] - at_low[1], at_high[2] + at_low[2]
            rounding = 4 * rounding_f + 2 * rounding
            stoppable = (norms.theta_alone | norms.t_alone) == 0
        if near == 1:
            moments, last, far = of_row
            residual, steep = near_residual(moments, x, c, rise_of(moments, 1 - c, -c), METHOD)
            off = near_bound(last, far, x, c, METHOD)
            rounding = 16 * rounding_f * steep * (tl.abs(x) + tl.sqrt(width))
        stopped = ((alpha <= alpha_min) & (residual >= 0)) | ((alpha >= alpha_max) & (residual <= 0))
        stopped = stopped & stoppable
        known = (off <= steep * scratch.MOST_OF_ALPHA) & (rounding <= steep * scratch.ROUNDING_OF_ALPHA)
        known = known | (width <= scratch.FLAT)
        fit = fit & (stopped | (known & (tl.abs(residual) + off <= tol * size)))
        open_still = tl.abs(residual) + off + rounding
        doubt = tl.where(stopped & (tl.abs(residual) > off + rounding), 0.0, open_still / tl.maximum(steep, 1e-30))
    fit = fit & (doubt <= 1)
    tl.store(row + scratch.SETTLED, fit.to(tl.float64))
    tl.store(row + scratch.ALPHA, tl.where(fit, alpha, tl.minimum(tl.maximum(guess, alpha_min), alpha_max)))
    if fit:
        tl.store(masses + o, f, mask=o < groups)
        # where a group's mass may have underflowed nearly all of it is unknown
        slack = tl.where(slack < 0.3, 1.5 * slack, log64(1 + slack) + 50)
        tl.store(masses + groups + o, slack, mask=o < groups)
        whole = norm + alpha * norms.theta + (1 - alpha) * norms.t
        tl.store(row + scratch.LOG_NORM, whole)
        tl.store(row + scratch.TOP_X, whole)
        tl.store(row + scratch.FLOOR_X, -INF)
        tl.store(row + scratch.FLOOR_T, -INF)
        tl.store(row + scratch.DOUBT, doubt)
        tl.store(row + scratch.SLOPE, slope + norms.secant)
        tl.store(row + scratch.DEVIATION, tl.sqrt(width))
        store_diagnostics(
            out, rows, alpha, slope, norm, at_high[0], at_low[0], 0.0, 0.0, norms.theta_alone, norms.t_alone
        )


@triton.jit(do_not_specialize=["rows", "groups", "s_partial", "center"])
def settle_kernel(
    partial,
    row,
    own,
    masses,
    out,
    rows,
    groups,
    s_partial,
    center,
    inv_temperature,
    inv_temperature_low,
    fixed_alpha,
    fixed_alpha_low,
    alpha_min,
    alpha_min_low,
    alpha_max,
    alpha_max_low,
    kl_budget,
    kl_budget_low,
    tol,
    TEMPERED: tl.constexpr,
    METHOD: tl.constexpr,
    SECOND: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """After each sweep; a row that is settled or unusable is left as it is."""
    i_row = tl.program_id(0).to(tl.int64)
    inv_temperature = as_double(inv_temperature, inv_temperature_low)
    alpha_min, alpha_max = as_double(alpha_min, alpha_min_low), as_double(alpha_max, alpha_max_low)
    alpha, budget = as_double(fixed_alpha, fixed_alpha_low), as_double(kl_budget, kl_budget_low)
    row += i_row * scratch.ROW_COLUMNS
    c = as_double(center, 0.0)
    if own is not None:
        alpha, alpha_min, alpha_max, budget, good = own_settings(own + i_row * scratch.OWN_COLUMNS, METHOD)
        if (METHOD == "fixed") | (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):
            c = alpha.to(tl.float32).to(tl.float64)
    wanted = i_row >= 0
    if SECOND:
        wanted = (tl.load(row + scratch.STATUS) == 0) & (tl.load(row + scratch.SETTLED) == 0)
        c = tl.load(row + scratch.ALPHA).to(tl.float32).to(tl.float64)
    if wanted:
        partial += i_row * s_partial
        o = tl.arange(0, GROUPS)  # [G]
        norms, present, status = norms_of(partial, row, o < groups, o, groups, inv_temperature, TEMPERED)
        if own is not None:
            status = tl.where(good, status, scratch.STATUS_BAD_SETTING)
            tl.store(row + scratch.STATUS, status.to(tl.float64))
        if status == 0:
            settle_row(
                partial,
                row,
                masses + i_row * 2 * groups,
                out + i_row,
                rows,
                groups,
                norms,
                present,
                o,
                c,
                inv_temperature,
                alpha,
                alpha_min,
                alpha_max,
                budget,
                tol,
                METHOD,
                SECOND,
            )
