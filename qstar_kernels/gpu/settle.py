"""From the sums of a sweep to α, its diagnostics and the groups' masses, or to the news that float32 is not enough.

One program a row, a thread a group, float64. The formulas and the bounds that decide are those of
theory/computation.md, «One sweep».
"""

# ruff: noqa: RUF005 - Triton knows no starred tuples

from typing import NamedTuple

import triton
import triton.language as tl

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.scratch import INF, as_double, entropy_of, is_sound, kls_of, store_diagnostics

# 1/j!
R2 = tl.constexpr(1 / 2)
R3 = tl.constexpr(1 / 6)
R4 = tl.constexpr(1 / 24)
R5 = tl.constexpr(1 / 120)
R6 = tl.constexpr(1 / 720)
R7 = tl.constexpr(1 / 5040)


class Curve(NamedTuple):
    """The groups about one centre, [G] each: log-mass, mean of d, its central moments (a tuple), greatest |d − mean|."""

    f: tl.tensor
    mean: tl.tensor
    moments: tl.tuple
    reach: tl.tensor
    lost: tl.tensor  # mass that may have underflowed, in parts of the group's


@triton.jit
def column(partial, k, o, groups):
    """A column of the sums [G], float64, 0 beyond the groups."""
    return tl.load(partial + o * scratch.GROUP_COLUMNS + k, mask=o < groups, other=0.0).to(tl.float64)


@triton.jit
def sums_of_4(a, b, c, d):
    """The sums of four blocks [G], by one reduction."""
    left, right = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=0))  # [2] each: a and b over c and d
    a, b = tl.split(left)
    c, d = tl.split(right)
    return a, b, c, d


@triton.jit
def shares_of(f):
    """log Σ e^f of log-masses [G], and the shares of the sum [G]."""
    top = tl.max(f)
    top = tl.where(top > -INF, top, 0.0)
    w = tl.exp(f - top)
    mass = tl.sum(w)
    return top + tl.log(mass), w / mass


@triton.jit
def exponential(moments, x):
    """E e^{xy} by its Taylor polynomial and that one's first two derivatives, from the central moments of y."""
    c2, c3, c4, c5, c6 = moments
    value = 1 + x * x * (c2 * R2 + x * (c3 * R3 + x * (c4 * R4 + x * (c5 * R5 + x * (c6 * R6)))))
    first = x * (c2 + x * (c3 * R2 + x * (c4 * R3 + x * (c5 * R4 + x * (c6 * R5)))))
    second = c2 + x * (c3 + x * (c4 * R2 + x * (c5 * R3 + x * (c6 * R4))))
    return value, first, second


@triton.jit
def side_of(partial, first, lean, shift, grow, present, o, groups, inv_temperature):
    """The `Curve` at 2 − c or −c, whose five sums begin at column `first`: four moments. `grow`: half the way from c."""
    mass = tl.maximum(column(partial, first, o, groups), scratch.UNDERFLOW)
    scale = inv_temperature / mass
    r1 = column(partial, first + 1, o, groups) * scale
    scale *= inv_temperature
    r2 = column(partial, first + 2, o, groups) * scale
    scale *= inv_temperature
    r3 = column(partial, first + 3, o, groups) * scale
    r4 = column(partial, first + 4, o, groups) * scale * inv_temperature
    square = r1 * r1
    moments = (
        tl.maximum(r2 - square, 0.0),
        r3 - r1 * (3 * r2 - 2 * square),
        tl.maximum(r4 - r1 * (4 * r3 - r1 * (6 * r2 - 3 * square)), 0.0),
    )
    reach = column(partial, scratch.REACH, o, groups) * inv_temperature
    f = tl.where(present, lean + tl.log(mass), -INF)
    lost = tl.exp(tl.minimum(2 * grow * reach, 600.0)) * scratch.UNDERFLOW / mass
    return Curve(f, shift + r1, moments, reach + tl.abs(r1), lost)


@triton.jit
def center_of(partial, lean, shift, present, o, groups, inv_temperature):
    """The `Curve` at c with six moments, and the root of the mean square of d [G]."""
    mass = tl.maximum(column(partial, scratch.MOMENTS, o, groups), scratch.UNDERFLOW)
    scale = inv_temperature / mass
    r1 = column(partial, scratch.MOMENTS + 1, o, groups) * scale
    scale *= inv_temperature
    r2 = column(partial, scratch.MOMENTS + 2, o, groups) * scale
    scale *= inv_temperature
    r3 = column(partial, scratch.MOMENTS + 3, o, groups) * scale
    scale *= inv_temperature
    r4 = column(partial, scratch.MOMENTS + 4, o, groups) * scale
    scale *= inv_temperature
    r5 = column(partial, scratch.MOMENTS + 5, o, groups) * scale
    r6 = column(partial, scratch.MOMENTS + 6, o, groups) * scale * inv_temperature
    square = r1 * r1
    moments = (
        tl.maximum(r2 - square, 0.0),
        r3 - r1 * (3 * r2 - 2 * square),
        tl.maximum(r4 - r1 * (4 * r3 - r1 * (6 * r2 - 3 * square)), 0.0),
        r5 - r1 * (5 * r4 - r1 * (10 * r3 - r1 * (10 * r2 - 4 * square))),
        tl.maximum(r6 - r1 * (6 * r5 - r1 * (15 * r4 - r1 * (20 * r3 - r1 * (15 * r2 - 5 * square)))), 0.0),
    )
    reach = column(partial, scratch.REACH, o, groups) * inv_temperature
    f = tl.where(present, lean + tl.log(mass), -INF)
    lost = (1 / mass) * scratch.UNDERFLOW
    return Curve(f, shift + r1, moments, reach + tl.abs(r1), lost), tl.sqrt(tl.maximum(r2, 0.0))


@triton.jit
def row_moments(curve, share):
    """Mean of d, central moments 2 to 6 and the greatest |d − mean| of the whole row at c, from its groups' [G]."""
    mean, _, _, _ = sums_of_4(share * curve.mean, share, share, share)
    y = curve.mean - mean
    c2, c3, c4, c5, c6 = curve.moments
    m2, m3, m4, m5 = sums_of_4(
        share * (c2 + y * y),
        share * (c3 + y * (3 * c2 + y * y)),
        share * (c4 + y * (4 * c3 + y * (6 * c2 + y * y))),
        share * (c5 + y * (5 * c4 + y * (10 * c3 + y * (10 * c2 + y * y)))),
    )
    m6 = tl.sum(share * (c6 + y * (6 * c5 + y * (15 * c4 + y * (20 * c3 + y * (15 * c2 + y * y))))))
    return mean, (m2, m3, m4, m5, m6), tl.max(tl.where(share > 0, tl.abs(y) + curve.reach, 0.0))


@triton.jit
def rise_of(moments, high, low):
    """log E e^{y high} − log E e^{y low} by Taylor's polynomials: relative to F'', however small it is."""
    at_high, _, _ = exponential(moments, high)
    at_low, _, _ = exponential(moments, low)
    c2, c3, c4, c5, c6 = moments
    high2, low2 = high * high, low * low
    difference = c2 * R2 * (high2 - low2) + c3 * R3 * (high2 * high - low2 * low) + c4 * R4 * (high2 * high2 - low2 * low2)
    difference += c5 * R5 * (high2 * high2 * high - low2 * low2 * low)
    difference += c6 * R6 * (high2 * high2 * high2 - low2 * low2 * low2)
    part = difference / at_low
    small = part - part * part * (R2 - part * (1 / 3 - part / 4))
    return tl.where(tl.abs(part) < 1e-4, small, tl.log(at_high) - tl.log(at_low))


@triton.jit
def left_out(moments, reach, x):
    """Bounds of what `exponential` leaves out of E e^{xy} and of its derivative: E|y|⁷ max(1, e^{xy}) |x|⁷/7!, ⁶/6!."""
    size = tl.abs(x)
    most = reach * tl.exp(tl.minimum(size * reach, 600.0)) * moments[4]
    cube = size * size * size
    return most * (cube * cube * size * R7), most * (cube * cube * R6)


@triton.jit
def row_at(curve, x):
    """log-masses [G] at c + x, F, F' and F''."""
    value, first, second = exponential(curve.moments, x)
    tilt = first / value
    f = tl.where(curve.f > -INF, curve.f + x * curve.mean + tl.log(value), -INF)
    norm, share = shares_of(f)
    slope = curve.mean + tilt
    width = tl.maximum(second / value - tilt * tilt, 0.0)
    mean, square, _, _ = sums_of_4(share * slope, share * (slope * slope + width), share, share)
    # the groups' means may lie far from 0, whatever their spread
    away = slope - mean
    square = tl.sum(share * (away * away + width))
    return f, norm, mean, square


@triton.jit
def side_at(curve, x):
    """F and F' at x from the centre of a side, and the bound of what is left out of F."""
    c2, c3, c4 = curve.moments
    value = 1 + x * x * (c2 * R2 + x * (c3 * R3 + x * (c4 * R4)))
    first = x * (c2 + x * (c3 * R2 + x * (c4 * R3)))
    norm, share = shares_of(tl.where(curve.f > -INF, curve.f + x * curve.mean + tl.log(value), -INF))
    size = tl.abs(x)
    grown = tl.exp(tl.minimum(size * curve.reach, 600.0))
    off = (curve.reach * c4 * (size * size * size * size * size * R5) + curve.lost) * grown / value
    slope, off, _, _ = sums_of_4(share * (curve.mean + first / value), share * off, share, share)
    return norm, slope, off


@triton.jit
def guess_of(curve, at_one, at_zero, s):
    """α about where F' = s, by quartics for the groups' log-masses that also pass through those at α = 0 and 1 [G]."""
    c2, c3, _, _, _ = curve.moments
    there = curve.f > -INF
    rest_one = tl.where(there, 16 * (at_one - curve.f - 0.5 * curve.mean) - 2 * c2 - c3 * (1 / 3), 0.0)
    rest_zero = tl.where(there, 16 * (at_zero - curve.f + 0.5 * curve.mean) - 2 * c2 + c3 * (1 / 3), 0.0)
    low, high, x, go = s * 0 - 0.5, s * 0 + 0.5, s * 0, 1
    for _ in range(8):
        if go == 1:
            rest = tl.where(x > 0, rest_one, rest_zero)
            f = curve.f + x * curve.mean + x * x * (c2 * R2 + x * (c3 * R3 + x * rest))
            _, share = shares_of(tl.where(there, f, -INF))
            slope = curve.mean + x * (c2 + x * (c3 * R2 + x * (4 * rest)))
            width = tl.maximum(c2 + x * (c3 + x * (12 * rest)), 0.0)
            mean, square, _, _ = sums_of_4(share * slope, share * (slope * slope + width), share, share)
            gap = mean - s
            low, high = tl.where(gap < 0, x, low), tl.where(gap < 0, high, x)
            step = x - gap / tl.maximum(square - mean * mean, 1e-30)
            step = tl.where((step > low) & (step < high), step, (low + high) / 2)
            go = (tl.abs(step - x) > 1e-5).to(tl.int32)
            x = step
    return x


@triton.jit
def slope_of(moments, x):
    """K'(x) and K''(x) for K(x) = log E e^{xy}, by the row's moments."""
    value, first, second = exponential(moments, x)
    tilt = first / value
    return tilt, second / value - tilt * tilt


@triton.jit
def near_residual(moments, x, c, METHOD: tl.constexpr):
    """What vanishes at the root of the rule at c + x, and its derivative, by the row's moments: relative to F''."""
    rise = rise_of(moments, 1 - c, -c)
    if METHOD == scratch.ESS_BALANCE:
        high, low = 2 - 2 * c - x, -2 * c - x
        slope_high, _ = slope_of(moments, high)
        slope_low, _ = slope_of(moments, low)
        return 2 * rise - rise_of(moments, high, low), slope_high - slope_low
    else:
        slope, width = slope_of(moments, x)
        return slope - rise, width


@triton.jit
def near_bound(moments, reach, x, c, METHOD: tl.constexpr):
    """What the moments leave out of `near_residual`."""
    off_high, _ = left_out(moments, reach, 1 - c)
    off_low, _ = left_out(moments, reach, -c)
    if METHOD == scratch.ESS_BALANCE:
        far_high, _ = left_out(moments, reach, 2 - 2 * c - x)
        far_low, _ = left_out(moments, reach, -2 * c - x)
        return 1.1 * (2 * (off_high + off_low) + far_high + far_low)
    else:
        _, off = left_out(moments, reach, x)
        return 1.1 * (off + off_high + off_low)


@triton.jit
def near_root(moments, c, METHOD: tl.constexpr):
    """x where `near_residual` vanishes, between −c and 1 − c."""
    x = c * 0
    for _ in range(5):
        gap, steep = near_residual(moments, x, c, METHOD)
        x = tl.minimum(tl.maximum(x - gap / tl.maximum(steep, 1e-300), -c), 1 - c)
    return x


@triton.jit
def far_root(curve, x, s, c):
    """x where F' = s by the groups' Taylor polynomials, from x."""
    go = 1
    for _ in range(6):
        if go == 1:
            _, _, slope, width = row_at(curve, x)
            step = tl.minimum(tl.maximum(x - (slope - s) / tl.maximum(width, 1e-30), -c), 1 - c)
            go = (tl.abs(step - x) > 1e-9).to(tl.int32)
            x = step
    return x


@triton.jit
def ess_root(high, low, x, s, c):
    """x where both ESS are equal, from x."""
    go = 1
    for _ in range(10):
        if go == 1:
            f_high, slope_high, _ = side_at(high, -x)
            f_low, slope_low, _ = side_at(low, -x)
            step = x - (f_low - f_high + 2 * s) / tl.maximum(slope_high - slope_low, 1e-30)
            step = tl.minimum(tl.maximum(step, -c), 1 - c)
            go = (tl.abs(step - x) > 1e-9).to(tl.int32)
            x = step
    return x


@triton.jit
def entropy_of_row(partial, first: tl.constexpr, drop, o, groups, inv_temperature):
    """Entropy of one row from its groups; `drop` [G]: their maxima below the row's, over the temperature."""
    present = o < groups
    count = column(partial, scratch.ENTROPY + first, o, groups)
    others = column(partial, scratch.ENTROPY + first + 1, o, groups)
    tilted = column(partial, scratch.ENTROPY + first + 2, o, groups) * inv_temperature
    scale, mass = tl.where(present, tl.exp(drop), 0.0), count + others
    # the maxima of the row are those of the groups that reach it
    maxima, others, tilted, _ = sums_of_4(
        tl.where(present & (drop == 0), count, 0.0),
        scale * tl.where(drop == 0, others, mass),
        scale * tl.where(scale > 0, tilted + drop * mass, 0.0),
        scale,
    )
    return entropy_of(maxima, others, tilted)


@triton.jit
def bounds_at(curve, f, spread, x, slope):
    """What F and F' at c + x may be off by, by what Taylor's formula leaves out and by rounding; and each group's
    log-mass [G], both together. `f`: log-masses [G] at c + x, `spread`: the root of the mean square of d [G]."""
    value, first, second = exponential(curve.moments, x)
    _, share = shares_of(f)
    size = tl.abs(x)
    off, off_tilt = left_out(curve.moments, curve.reach, x)
    lost = curve.lost * tl.exp(tl.minimum(size * curve.reach, 600.0))
    off, off_tilt = (off + lost) / value, (off_tilt + lost * curve.reach) / value
    deep = tl.maximum(tl.log(curve.lost) - scratch.LOG_UNDERFLOW, 0.0)  # −log of the mass
    weight = (deep + scratch.DEEPEST) * scratch.OF_A_NAT + scratch.OF_AN_EXPONENTIAL
    tilt = first / value
    away = tl.abs(curve.mean + tilt - slope)
    width = tl.sqrt(tl.maximum(second / value - tilt * tilt, 0.0))
    # twice: F' and s are of the same weights, and a weight that is off moves each by no more than this
    rounding = (2 * weight + scratch.OF_A_SUM) * away + 2 * weight * width
    rounding += 2 * spread * scratch.OF_A_SUM * (1 + 4 * size * spread)
    of_f, of_slope, of_sums, of_f_sums = sums_of_4(
        share * off,
        share * (off * tl.abs(curve.mean - slope) + off_tilt),
        share * rounding,
        share * (weight + scratch.OF_A_SUM),
    )
    grown = 1 / tl.maximum(1 - of_f, 0.5)
    return of_f * grown, of_slope * grown, of_sums, of_f_sums, off + weight + scratch.OF_A_SUM


@triton.jit
def reverse_alpha(moments, reach, f_one, slope_one, f_zero, slope_zero, s, c):
    """α of `reverse_kl_symmetry` from F' − s at both ends, and what it may be off by.

    By the row's moments, or by log-mass and F' [G] of each group at α = 1 and 0.
    """
    near_high, _ = near_residual(moments, 1 - c, c, scratch.KL_SYMMETRY)
    near_low, _ = near_residual(moments, -c, c, scratch.KL_SYMMETRY)
    off = near_bound(moments, reach, 1 - c, c, scratch.KL_SYMMETRY)
    off += near_bound(moments, reach, -c, c, scratch.KL_SYMMETRY)
    _, share_one = shares_of(f_one)
    _, share_zero = shares_of(f_zero)
    far_high, far_low, size_high, size_low = sums_of_4(
        share_one * slope_one, share_zero * slope_zero, share_one * tl.abs(slope_one), share_zero * tl.abs(slope_zero)
    )
    near = off <= (near_high - near_low) * scratch.MOST_OF_ALPHA
    high, low = tl.where(near, near_high, far_high - s), tl.where(near, near_low, far_low - s)
    rounding = (1 + size_high + size_low) * (4 * (scratch.OF_A_SUM + scratch.OF_AN_EXPONENTIAL))
    rise = high - low
    some = rise > 1e-14
    alpha = tl.where(some, high / tl.where(some, rise, 1.0), 0.5)
    doubt = tl.where(near, off, rounding) / tl.where(some, rise, 1.0)
    return alpha, tl.where(near | (doubt <= scratch.ROUNDING_OF_ALPHA), doubt, INF)


class Norms(NamedTuple):
    """What the sums say of a row beside the curve: its maxima and their distance from the groups', and the norms."""

    drop_theta: tl.tensor  # [G], the groups' maxima less the row's, over the temperature
    drop_t: tl.tensor
    theta: tl.tensor
    t: tl.tensor
    theta_alone: tl.tensor  # whether it allows a token that π_t forbids
    t_alone: tl.tensor


@triton.jit
def norms_of(partial, row, present, o, groups, inv_temperature, TEMPERED: tl.constexpr):
    """Merge what does not depend on the centre, and write it down; the row's status too."""
    tops_theta = tl.load(partial + o * scratch.GROUP_COLUMNS + scratch.MAX_THETA, mask=present, other=scratch.NO_MAXIMUM)
    tops_t = tl.load(partial + o * scratch.GROUP_COLUMNS + scratch.MAX_T, mask=present, other=scratch.NO_MAXIMUM)
    top_theta, top_t = tl.max(tops_theta), tl.max(tops_t)
    flags = column(partial, scratch.FLAGS, o, groups).to(tl.int32)
    nan = tl.max(flags & scratch.HAS_NAN)
    theta_alone, t_alone = tl.max(flags & scratch.THETA_ALONE) > 0, tl.max(flags & scratch.T_ALONE) > 0
    status = tl.where((top_theta == scratch.NO_MAXIMUM) | (top_t == scratch.NO_MAXIMUM), scratch.STATUS_NO_SUPPORT, 0)
    infinite = (top_theta >= scratch.LARGEST) | (top_t >= scratch.LARGEST)
    status = tl.where(infinite, scratch.STATUS_POSITIVE_INFINITY, status)
    status = tl.where(nan > 0, scratch.STATUS_NAN, status)

    cold_theta = tl.maximum(tops_theta - top_theta, scratch.FLOOR).to(tl.float64)
    cold_t = tl.maximum(tops_t - top_t, scratch.FLOOR).to(tl.float64)
    drop_theta, drop_t = cold_theta * inv_temperature, cold_t * inv_temperature
    end_theta, end_t = column(partial, scratch.END_THETA, o, groups), column(partial, scratch.END_T, o, groups)
    sum_theta, sum_t, _, _ = sums_of_4(tl.exp(drop_theta) * end_theta, tl.exp(drop_t) * end_t, end_t, end_t)
    norm_theta, norm_t = tl.log(sum_theta), tl.log(sum_t)
    log_cold_theta, log_cold_t = norm_theta, norm_t
    if TEMPERED:
        end_theta, end_t = column(partial, scratch.COLD_THETA, o, groups), column(partial, scratch.COLD_T, o, groups)
        log_cold_theta, log_cold_t = tl.log(tl.sum(tl.exp(cold_theta) * end_theta)), tl.log(tl.sum(tl.exp(cold_t) * end_t))
    tl.store(row + scratch.STATUS, status.to(tl.float64))
    tl.store(row + scratch.TOP_THETA, top_theta.to(tl.float64))
    tl.store(row + scratch.TOP_T, top_t.to(tl.float64))
    tl.store(row + scratch.SECANT, norm_theta - norm_t)
    tl.store(row + scratch.LOG_COLD_THETA, log_cold_theta)
    tl.store(row + scratch.LOG_COLD_T, log_cold_t)
    tl.store(row + scratch.THETA_OUTSIDE, theta_alone.to(tl.float64))
    tl.store(row + scratch.T_OUTSIDE, t_alone.to(tl.float64))
    present = present & (tops_theta > scratch.NO_MAXIMUM) & (tops_t > scratch.NO_MAXIMUM)
    return Norms(drop_theta, drop_t, norm_theta, norm_t, theta_alone, t_alone), present, status


@triton.jit
def solve(
    partial, curve, high, low, norms, present, o, groups, c, inv_temperature, METHOD: tl.constexpr, SECOND: tl.constexpr
):
    """α before it is clamped, what is as good a centre if that is not good enough, by which way it was found (1: by
    the row's moments), and what it may be off by where the rule does not say."""
    s = norms.theta - norms.t
    _, share = shares_of(curve.f)
    near, alpha, guess, doubt = 0, c, c, c * 0
    if METHOD == scratch.BY_ENTROPY:
        entropy_theta = entropy_of_row(partial, 0, norms.drop_theta, o, groups, inv_temperature)
        entropy_t = entropy_of_row(partial, 3, norms.drop_t, o, groups, inv_temperature)
        total = entropy_theta + entropy_t
        alpha = tl.where(total > 0, entropy_theta / tl.where(total > 0, total, 1.0), 0.5)
        doubt += tl.where(total > scratch.SMALL_ENTROPY, scratch.ENTROPY_DOUBT, INF)
        guess = alpha
    else:
        mean, moments, reach = row_moments(curve, share)
        shift = norms.drop_theta - norms.drop_t
        end_theta = tl.maximum(column(partial, scratch.END_THETA, o, groups), scratch.UNDERFLOW)
        end_t = tl.maximum(column(partial, scratch.END_T, o, groups), scratch.UNDERFLOW)
        at_one = tl.where(present, norms.drop_theta + tl.log(end_theta), -INF)
        at_zero = tl.where(present, norms.drop_t + tl.log(end_t), -INF)
        if METHOD == scratch.REVERSE:
            tilt_one = inv_temperature * column(partial, scratch.TILTS, o, groups)
            tilt_zero = inv_temperature * column(partial, scratch.TILTS + 1, o, groups)
            alpha, doubt = reverse_alpha(
                moments,
                reach,
                at_one,
                shift + tilt_one / end_theta,
                at_zero,
                shift + tilt_zero / end_t,
                s,
                c,
            )
            doubt = tl.where(norms.theta_alone | norms.t_alone, INF, doubt)
            guess = alpha
        else:
            x = near_root(moments, c, METHOD)
            _, steep = near_residual(moments, x, c, METHOD)
            off = near_bound(moments, reach, x, c, METHOD)
            near = ((off <= steep * scratch.MOST_OF_ALPHA) & ((norms.theta_alone | norms.t_alone) == 0)).to(tl.int32)
            if near == 0:
                x = c * 0
                if SECOND == 0:
                    x = guess_of(curve, at_one, at_zero, s)
                    if METHOD == scratch.ESS_BALANCE:
                        # to leading order the root lies three times as far from 1/2 as that of the KL rule
                        x = tl.minimum(tl.maximum(3 * x, -0.48), 0.48)
                guess = c + x
                if METHOD == scratch.ESS_BALANCE:
                    x = ess_root(high, low, x, s, c)
                    guess = tl.where(tl.abs(x) < 0.48, c + x, guess)
                else:
                    x = far_root(curve, x, s, c)
            alpha = c + x
    return alpha, guess, near, doubt


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
    tol,
    METHOD: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Find α (that of `fixed` is given), and accept it or not."""
    shift, s = norms.drop_theta - norms.drop_t, norms.theta - norms.t
    curve, spread = center_of(partial, norms.drop_t + c * shift, shift, present, o, groups, inv_temperature)
    high = side_of(
        partial, scratch.SIDE_HIGH, norms.drop_t + (2 - c) * shift, shift, 1 - c, present, o, groups, inv_temperature
    )
    low = side_of(partial, scratch.SIDE_LOW, norms.drop_t - c * shift, shift, c, present, o, groups, inv_temperature)
    guess, near, doubt = alpha, 0, c * 0
    if METHOD != scratch.FIXED:
        alpha, guess, near, doubt = solve(
            partial, curve, high, low, norms, present, o, groups, c, inv_temperature, METHOD, SECOND
        )
    alpha = tl.minimum(tl.maximum(alpha, alpha_min), alpha_max)
    x = alpha - c
    f, norm, slope, width = row_at(curve, x)
    off_f, off_slope, rounding, rounding_f, slack = bounds_at(curve, f, spread, x, slope)
    rounding += 2 * (scratch.OF_A_SUM + 2 * scratch.OF_AN_EXPONENTIAL)
    f_high, slope_high, off_high = side_at(high, -x)
    f_low, slope_low, off_low = side_at(low, -x)
    _, _, size = kls_of(alpha, slope, norm, norms.theta, norms.t)

    # a comparison with NaN is false: sums that overflowed are not accepted
    fit = (off_f <= size * scratch.MOST_OF_F) & (off_slope <= tol * size) & (rounding <= size * scratch.ROUNDING)
    fit = fit & (off_high <= scratch.MOST_OF_ESS) & (off_low <= scratch.MOST_OF_ESS)
    fit = fit & is_sound(alpha, slope, norm, f_high, f_low, norms.theta, norms.t, alpha_min, alpha_max, 1e-5)
    # what a token's exponentials leave of the models' own norms
    reach = tl.max(tl.where(present, column(partial, scratch.REACH, o, groups), 0.0)) * inv_temperature
    fit = fit & (reach * tl.maximum(c, 1 - c) <= scratch.FARTHEST)
    if (METHOD == scratch.KL_SYMMETRY) | (METHOD == scratch.ESS_BALANCE):
        residual, steep, off = slope - s, width, off_slope
        if METHOD == scratch.ESS_BALANCE:
            residual, steep, off = f_low - f_high + 2 * s, slope_high - slope_low, off_high + off_low
            rounding = 4 * rounding_f + 2 * rounding
        if near == 1:
            _, share = shares_of(curve.f)
            _, moments, far = row_moments(curve, share)
            residual, steep = near_residual(moments, x, c, METHOD)
            off = near_bound(moments, far, x, c, METHOD)
            rounding = 16 * rounding_f * steep * (tl.abs(x) + tl.sqrt(width))
        stopped = ((alpha <= alpha_min) & (residual >= 0)) | ((alpha >= alpha_max) & (residual <= 0))
        if METHOD == scratch.ESS_BALANCE:
            stopped = stopped & ((norms.theta_alone | norms.t_alone) == 0)
        known = (off <= steep * scratch.MOST_OF_ALPHA) & (rounding <= steep * scratch.ROUNDING_OF_ALPHA)
        known = known | (width <= scratch.FLAT)
        fit = fit & (stopped | (known & (tl.abs(residual) + off <= tol * size)))
        doubt = tl.where(stopped & (tl.abs(residual) > off + rounding), 0.0, 1.0) * (tl.abs(residual) + off + rounding)
        doubt /= tl.maximum(steep, 1e-30)
    fit = fit & (doubt <= 1)
    tl.store(row + scratch.SETTLED, fit.to(tl.float64))
    tl.store(row + scratch.ALPHA, tl.where(fit, alpha, tl.minimum(tl.maximum(guess, alpha_min), alpha_max)))
    if fit:
        tl.store(masses + o, f, mask=o < groups)
        # where a group's mass may have underflowed nearly all of it is unknown
        slack = tl.where(slack < 0.3, 1.5 * slack, tl.log(1 + slack) + 50)
        tl.store(masses + groups + o, slack, mask=o < groups)
        tl.store(row + scratch.LOG_NORM, norm)
        tl.store(row + scratch.TOP_X, norm)
        tl.store(row + scratch.FLOOR_X, -INF)
        tl.store(row + scratch.FLOOR_T, -INF)
        tl.store(row + scratch.DOUBT, tl.minimum(doubt, 1.0))
        tl.store(row + scratch.SLOPE, slope)
        tl.store(row + scratch.DEVIATION, tl.sqrt(width))
        store_diagnostics(
            out, rows, alpha, slope, norm, f_high, f_low, norms.theta, norms.t, norms.theta_alone, norms.t_alone
        )


@triton.jit(do_not_specialize=["rows", "groups", "s_partial", "center"])
def settle_kernel(
    partial,
    row,
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
    row += i_row * scratch.ROW_COLUMNS
    c = as_double(center, 0.0)
    wanted = i_row >= 0
    if SECOND:
        wanted = (tl.load(row + scratch.STATUS) == 0) & (tl.load(row + scratch.SETTLED) == 0)
        c = tl.load(row + scratch.ALPHA).to(tl.float32).to(tl.float64)
    if wanted:
        partial += i_row * s_partial
        o = tl.arange(0, GROUPS)  # [G]
        norms, present, status = norms_of(partial, row, o < groups, o, groups, inv_temperature, TEMPERED)
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
                as_double(fixed_alpha, fixed_alpha_low),
                alpha_min,
                alpha_max,
                tol,
                METHOD,
                SECOND,
            )
