"""From the sums of a sweep to α, its diagnostics and the groups' masses, or to the news that float32 is not enough.

One program a row, a thread a group, float64. The bounds that decide are those of theory/computation.md, «The bound».
"""

from typing import NamedTuple

import triton
import triton.language as tl

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.alpha import near_bound, near_residual, solve
from qstar_kernels.gpu.curve import (
    Sums,
    bounds_at,
    center_of,
    column,
    rounding_of,
    row_at,
    row_moments,
    side_of,
    sides_at,
)
from qstar_kernels.gpu.double import exp64, inverse, log1p64, log64, maxima_of_4, sums_of_8
from qstar_kernels.gpu.scratch import (
    budget_of,
    is_sound,
    kls_of,
    outside,
    rule_of,
    store_diagnostics,
    store_solved,
)


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
def norms_of(sums, known, TEMPERED: tl.constexpr):
    """Merge what does not depend on the centre, and write it down; which groups have mass, and the row's status."""
    at, present = sums.partial + sums.o * scratch.GROUP_COLUMNS, sums.o < sums.groups
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
    drop_theta, drop_t = cold_theta * sums.inv_temperature, cold_t * sums.inv_temperature
    scale_theta, scale_t = exp64(drop_theta), exp64(drop_t)
    end_theta = column(sums, scratch.END_THETA)
    mass_theta, mass_t = scale_theta * end_theta, scale_t * column(sums, scratch.END_T)
    # of the masses themselves close pairs, and those of one nearly certain token, would leave nothing
    difference = scale_t * column(sums, scratch.DIFFERENCE) + (scale_theta - scale_t) * end_theta
    cold_mass_theta, cold_mass_t = mass_theta, mass_t
    if TEMPERED:
        cold_mass_theta = exp64(cold_theta) * column(sums, scratch.COLD_THETA)
        cold_mass_t = exp64(cold_t) * column(sums, scratch.COLD_T)
    sum_theta, sum_t, cold_sum_theta, cold_sum_t, difference, _w, _w, _w = sums_of_8(
        mass_theta, mass_t, cold_mass_theta, cold_mass_t, difference, mass_t, mass_t, mass_t
    )
    s = tl.where(difference > 0, log1p64(difference / sum_t), -log1p64(-difference / sum_theta))
    norm_t = log64(sum_t)
    norms = Norms(drop_theta, drop_t, norm_t + s, norm_t, s, sum_theta + sum_t - 2, theta_alone, t_alone)
    tl.store(known + scratch.TOP_THETA, top_theta.to(tl.float64))
    tl.store(known + scratch.TOP_T, top_t.to(tl.float64))
    tl.store(known + scratch.SECANT, s)
    tl.store(known + scratch.LOG_COLD_THETA, log64(cold_sum_theta))
    tl.store(known + scratch.LOG_COLD_T, log64(cold_sum_t))
    tl.store(known + scratch.THETA_OUTSIDE, theta_alone.to(tl.float64))
    tl.store(known + scratch.T_OUTSIDE, t_alone.to(tl.float64))
    return norms, present & (tops_theta > scratch.NO_MAXIMUM) & (tops_t > scratch.NO_MAXIMUM), status


class Point(NamedTuple):
    """A row at α, in log-probabilities: their norms are 0, and F' is the difference of the two KLs."""

    alpha: tl.tensor
    x: tl.tensor  # α less the centre
    f: tl.tensor
    slope: tl.tensor
    width: tl.tensor  # F''
    high: tl.tuple  # F, F' and what is left out of F at 2 − α
    low: tl.tuple  # and at −α
    off_f: tl.tensor  # what is left out of F and of F'
    off_slope: tl.tensor
    of_f: tl.tensor  # what rounding leaves open of them
    of_slope: tl.tensor


@triton.jit
def point_at(curve, high, low, deep, norms, alpha, c, beyond, SECOND: tl.constexpr):
    """The `Point`, and the groups' log-masses [G] with what those may be off by; `deep`: see `center_of`; `beyond`: how
    far c is outside [0, 1]."""
    x = alpha - c
    f, mass, slope, width = row_at(curve, x)
    off_f, off_slope, of_slope, of_f, slack = bounds_at(curve, f, deep, x, slope, beyond)
    at_high, at_low = sides_at(high, low, x)
    norm = log64(mass)
    of_slope = rounding_of(of_slope, norms.others, alpha, slope, width, norm, at_high[0], at_low[0], SECOND)
    point = Point(alpha, x, norm, slope, width, at_high, at_low, off_f, off_slope, of_f, of_slope)
    return point, f, slack


@triton.jit
def is_near_enough(point, size, rule, reach, c, beyond, METHOD: tl.constexpr):
    """Whether F, F' and the ESS are known well enough; a comparison with NaN is false: sums that overflowed are not."""
    at_high, at_low = point.high, point.low
    fit = (point.off_f <= size * scratch.MOST_OF_F) & (point.off_slope <= rule.tol * size)
    fit = fit & (point.of_slope <= size * scratch.ROUNDING)
    fit = fit & (at_high[2] <= scratch.MOST_OF_ESS) & (at_low[2] <= scratch.MOST_OF_ESS)
    sound = is_sound(point.alpha, point.slope, point.f, at_high[0], at_low[0], 0.0, 0.0, rule.low, rule.high, 1e-5)
    # what a token's exponentials leave of the models' own norms
    fit = fit & sound & (reach * tl.maximum(c, 1 - c) <= scratch.FARTHEST)
    if METHOD == "fixed":
        # beyond [0, 1] the KLs have F' times as much, and the norms
        of_norms = scratch.OF_AN_EXPONENTIAL + scratch.OF_A_NAT * scratch.DEEPEST + scratch.OF_A_SUM
        of_kl = (1 + beyond) * (point.of_slope + 2 * of_norms) + point.of_f
        least = (of_kl <= size * scratch.ROUNDING_OUTSIDE) & ((1 + beyond) * point.off_slope <= rule.tol * size)
        fit = fit & ((beyond == 0) | least)
    return fit


@triton.jit
def is_root(point, size, rule, moments, near, c, norms, METHOD: tl.constexpr):
    """Whether α meets the condition of its rule to its tolerance, and is known; and what it may be off by."""
    alpha, at_high, at_low = point.alpha, point.high, point.low
    residual, steep, off, rounding = point.slope, point.width, point.off_slope, point.of_slope
    scale = tl.abs(point.x) + tl.sqrt(point.width)
    stoppable = size == size
    if METHOD == "ess_balance":
        residual, steep, off = at_low[0] - at_high[0], at_high[1] - at_low[1], at_high[2] + at_low[2]
        rounding = 4 * point.of_f + 2 * rounding
        stoppable = (norms.theta_alone | norms.t_alone) == 0
    elif METHOD != "kl_symmetry":
        residual, steep, kl, away = budget_of(alpha, point.slope, point.f, 0.0, 0.0, steep, rule.budget, METHOD)
        off, rounding = away * off + point.off_f, away * rounding + 4 * point.of_f
        scale, size = away * (1 + tl.sqrt(point.width)), tl.maximum(kl, 1.0)
    if near == 1:
        residual, steep, _step = near_residual(moments, point.x, c, rule.budget, METHOD)
        off = near_bound(moments, point.x, c, METHOD)
        rounding = 16 * point.of_f * steep * scale
    known = (off <= steep * scratch.MOST_OF_ALPHA) & (rounding <= steep * scratch.ROUNDING_OF_ALPHA)
    known = known | (point.width <= scratch.FLAT)
    met = tl.abs(residual) + off <= rule.tol * size
    open_still = tl.abs(residual) + off + rounding
    doubt = open_still / tl.maximum(steep, 1e-30)
    if (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):
        doubt = tl.minimum(doubt, tl.sqrt(2 * open_still * inverse(tl.maximum(point.width, 1e-30))))
    # at an end of its range for sure, not for what is left open of a residual that is 0 a little further in
    beyond = off + rounding
    stopped = ((alpha <= rule.low) & (residual > beyond)) | ((alpha >= rule.high) & (residual < -beyond))
    at_end = (rule.low == rule.high) | (stopped & stoppable)
    return at_end | (known & met), tl.where(at_end, 0.0, doubt)


@triton.jit
def settle_row(sums, known, masses, out, rows, norms, present, c, rule, METHOD: tl.constexpr, SECOND: tl.constexpr):
    """Find α (that of `fixed` is given), and accept it or not."""
    lean = norms.drop_t - norms.t
    shift = norms.drop_theta - norms.drop_t - norms.secant
    curve, deep = center_of(sums, lean + c * shift, shift, present)
    high = side_of(sums, scratch.SIDE_HIGH, lean + (2 - c) * shift, shift, 1 - c, present)
    low = side_of(sums, scratch.SIDE_LOW, lean - c * shift, shift, c, present)
    alpha, guess, doubt, beyond = rule.alpha, rule.alpha, c * 0, c * 0
    if METHOD == "fixed":
        beyond = outside(c)
    else:
        moments = row_moments(curve)
        alpha, guess, near, doubt = solve(
            sums, curve, moments, high, low, norms, present, c, rule.budget, METHOD, SECOND
        )
    alpha = tl.minimum(tl.maximum(alpha, rule.low), rule.high)
    point, f, slack = point_at(curve, high, low, deep, norms, alpha, c, beyond, SECOND)
    _kl_theta, _kl_t, size = kls_of(alpha, point.slope, point.f, 0.0, 0.0)
    reach = tl.max(tl.where(present, column(sums, scratch.REACH), 0.0)) * sums.inv_temperature
    fit = is_near_enough(point, size, rule, reach, c, beyond, METHOD)
    if (METHOD != "fixed") & (METHOD != "entropy") & (METHOD != "reverse_kl_symmetry"):
        meets, doubt = is_root(point, size, rule, moments, near, c, norms, METHOD)
        fit = fit & meets
    fit = fit & (doubt <= 1)
    tl.store(known + scratch.SETTLED, fit.to(tl.float64))
    tl.store(known + scratch.ALPHA, tl.where(fit, alpha, tl.minimum(tl.maximum(guess, rule.low), rule.high)))
    if fit:
        mine = sums.o < sums.groups
        tl.store(masses + sums.o, f, mask=mine)
        # where a group's mass may have underflowed nearly all of it is unknown
        slack = tl.where(slack < 0.3, 1.5 * slack, log64(1 + slack) + 50)
        tl.store(masses + sums.groups + sums.o, slack, mask=mine)
        norm = point.f + alpha * norms.theta + (1 - alpha) * norms.t
        store_solved(known, norm, doubt, point.slope + norms.secant, tl.sqrt(point.width))
        store_diagnostics(
            out,
            rows,
            alpha,
            point.slope,
            point.f,
            point.high[0],
            point.low[0],
            0.0,
            0.0,
            norms.theta_alone,
            norms.t_alone,
        )


@triton.jit
def settle(
    partial,
    known,
    masses,
    out,
    rows,
    groups,
    inv_temperature,
    rule,
    good,
    METHOD: tl.constexpr,
    TEMPERED: tl.constexpr,
    SECOND: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """After a sweep over this row; one that is settled or unusable is left as it is. `good`: its own settings."""
    c, wanted = rule.alpha, tl.full([], True, tl.int1)
    if SECOND:
        wanted = (tl.load(known + scratch.STATUS) == 0) & (tl.load(known + scratch.SETTLED) == 0)
        c = tl.load(known + scratch.ALPHA)
    c = c.to(tl.float32).to(tl.float64)  # the centre of the sweep
    if wanted:
        sums = Sums(partial, tl.arange(0, GROUPS), groups, tl.full([], inv_temperature, tl.float64))
        norms, present, status = norms_of(sums, known, TEMPERED)
        status = tl.where(good, status, scratch.STATUS_BAD_SETTING)
        tl.store(known + scratch.STATUS, status.to(tl.float64))
        if status == 0:
            settle_row(sums, known, masses, out, rows, norms, present, c, rule, METHOD, SECOND)


@triton.jit(do_not_specialize=["rows", "groups", "s_partial"])
def settle_kernel(
    partial,
    known,
    own,
    masses,
    out,
    rows,
    groups,
    s_partial,
    inv_temperature: tl.float64,
    alpha: tl.float64,
    alpha_min: tl.float64,
    alpha_max: tl.float64,
    kl_budget: tl.float64,
    tol: tl.float64,
    METHOD: tl.constexpr,
    TEMPERED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """After the first of two sweeps."""
    i_row = tl.program_id(0).to(tl.int64)
    rule, good = rule_of(own, i_row, alpha, alpha_min, alpha_max, kl_budget, tol, METHOD)
    partial, known = partial + i_row * s_partial, known + i_row * scratch.ROW_COLUMNS
    masses += i_row * 2 * groups
    settle(
        partial, known, masses, out + i_row, rows, groups, inv_temperature, rule, good, METHOD, TEMPERED, False, GROUPS
    )
