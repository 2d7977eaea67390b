"""α of each rule from the curves of a row: by the moments of the whole row where these are enough, as for close pairs,
else by those of its groups (theory/computation.md, «One sweep», «Close pairs»).

For close pairs everything is relative to F'', however small that is.
"""

import triton
import triton.language as tl

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.curve import R2, R3, R4, R5, R6, column, exponential, left_out, row_at, sides_at
from qstar_kernels.gpu.double import exp64, inverse, log1p64, log64, sums_of_4
from qstar_kernels.gpu.scratch import INF, budget_of, budget_step, entropy_of


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
def near_residual(moments, x, c, budget, METHOD: tl.constexpr):
    """What vanishes at the root of the rule at c + x, its derivative and Newton's step, by the row's moments.

    Under a budget the model whose ball it is has no mass outside the common support.
    """
    central = moments.central
    if METHOD == "ess_balance":
        high, low = 2 - 2 * c - x, -2 * c - x
        tilt_high, _width = tilt_of(central, high)
        tilt_low, _width = tilt_of(central, low)
        gap, steep = 2 * rise_of(central, 1 - c, -c) - rise_of(central, high, low), tilt_high - tilt_low
        return gap, steep, -gap * inverse(tl.maximum(steep, 1e-30))
    elif (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):
        # K(end) − K(x) − (end − x) K'(x)
        end = 1 - c if METHOD == "kl_budget" else -c
        tilt, width = tilt_of(central, x)
        kl = rise_of(central, end, x) - (end - x) * tilt
        away = tl.abs(end - x)
        gap = budget - kl if METHOD == "kl_budget" else kl - budget
        return gap, away * width, budget_step(kl, away, tl.maximum(width, 0.0), budget, METHOD)
    else:
        tilt, width = tilt_of(central, x)
        gap = tilt - rise_of(central, 1 - c, -c)
        return gap, width, -gap * inverse(tl.maximum(width, 1e-30))


@triton.jit
def near_bound(moments, x, c, METHOD: tl.constexpr):
    """What the moments leave out of `near_residual`."""
    last, reach = moments.last, moments.reach
    if (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):
        end = 1 - c if METHOD == "kl_budget" else -c
        off_end, _off = left_out(last, reach, end)
        off, off_tilt = left_out(last, reach, x)
        return 1.1 * (off_end + off + tl.abs(end - x) * off_tilt)
    else:
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
def near_root(moments, c, budget, METHOD: tl.constexpr):
    """x where `near_residual` vanishes, between −c and 1 − c."""
    x = c * 0
    if (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):  # from where a parabola has it
        inward = tl.sqrt(2 * budget * inverse(tl.maximum(moments.central[0], 1e-30)))
        x = 1 - c - inward if METHOD == "kl_budget" else inward - c
        x = tl.minimum(tl.maximum(x, -c), 1 - c)
    for _ in range(5):
        _gap, _steep, step = near_residual(moments, x, c, budget, METHOD)
        x = tl.minimum(tl.maximum(x + step, -c), 1 - c)
    return x


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
                step = x + budget_step(kl, away, width, budget, METHOD)
            else:
                gap = slope
                step = x - gap * inverse(width)
            low, high = tl.where(gap < 0, x, low), tl.where(gap < 0, high, x)
            step = tl.where((step > low) & (step < high), step, (low + high) / 2)
            go = (tl.abs(step - x) > 1e-5).to(tl.int32)
            x = step
    return x


@triton.jit
def far_root(curve, high, low, x, c, budget, METHOD: tl.constexpr):
    """x at the root of the rule by the groups' Taylor polynomials, from x."""
    go = 1
    for _ in range(10):
        if go == 1:
            if METHOD == "ess_balance":
                at_high, at_low = sides_at(high, low, x)
                step = x - (at_low[0] - at_high[0]) * inverse(tl.maximum(at_high[1] - at_low[1], 1e-30))
            else:
                _f, mass, slope, width = row_at(curve, x)
                if METHOD == "kl_symmetry":
                    step = x - slope * inverse(tl.maximum(width, 1e-30))
                else:
                    _gap, _steep, kl, away = budget_of(c + x, slope, log64(mass), 0.0, 0.0, width, budget, METHOD)
                    step = x + budget_step(kl, away, width, budget, METHOD)
            step = tl.minimum(tl.maximum(step, -c), 1 - c)
            go = (tl.abs(step - x) > 1e-9).to(tl.int32)
            x = step
    return x


@triton.jit
def reverse_alpha(moments, f_one, slope_one, f_zero, slope_zero, c):
    """α of `reverse_kl_symmetry` from F' at both ends, and what it may be off by.

    By the row's moments, or by log-mass and F' [G] of each group at α = 1 and 0.
    """
    near_high, _width, _step = near_residual(moments, 1 - c, c, 0.0, "kl_symmetry")
    near_low, _width, _step = near_residual(moments, -c, c, 0.0, "kl_symmetry")
    off = near_bound(moments, 1 - c, c, "kl_symmetry") + near_bound(moments, -c, c, "kl_symmetry")
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
def entropy_of_row(sums, first: tl.constexpr, drop):
    """Entropy of one row from its groups; `drop` [G]: their maxima below the row's, over the temperature."""
    present = sums.o < sums.groups
    count = column(sums, scratch.ENTROPY + first)
    others = column(sums, scratch.ENTROPY + first + 1)
    tilted = column(sums, scratch.ENTROPY + first + 2) * sums.inv_temperature
    scale, mass = tl.where(present, exp64(drop), 0.0), count + others
    # the maxima of the row are those of the groups that reach it
    maxima, others, tilted, _w = sums_of_4(
        tl.where(present & (drop == 0), count, 0.0),
        scale * tl.where(drop == 0, others, mass),
        tl.where(scale > 0, scale * (tilted + drop * mass), 0.0),
        scale,
    )
    return entropy_of(maxima, others, tilted)


@triton.jit
def solve(sums, curve, moments, high, low, norms, present, c, budget, METHOD: tl.constexpr, SECOND: tl.constexpr):
    """α before it is clamped; the centre to try next should it not be accepted; 1 if it is from the row's moments; and
    what it may be off by under the rules that have no residual."""
    near, doubt = 0, c * 0
    if METHOD == "entropy":
        entropy_theta = entropy_of_row(sums, 0, norms.drop_theta)
        entropy_t = entropy_of_row(sums, 3, norms.drop_t)
        total = entropy_theta + entropy_t
        alpha = tl.where(total > 0, entropy_theta / tl.where(total > 0, total, 1.0), 0.5)
        return alpha, alpha, near, tl.where(total > scratch.SMALL_ENTROPY, doubt + scratch.ENTROPY_DOUBT, INF)
    else:
        uneven = norms.theta_alone | norms.t_alone
        end_theta = tl.maximum(column(sums, scratch.END_THETA), scratch.UNDERFLOW)
        end_t = tl.maximum(column(sums, scratch.END_T), scratch.UNDERFLOW)
        at_one = tl.where(present, norms.drop_theta - norms.theta + log64(end_theta), -INF)
        at_zero = tl.where(present, norms.drop_t - norms.t + log64(end_t), -INF)
        if METHOD == "reverse_kl_symmetry":
            shift = norms.drop_theta - norms.drop_t - norms.secant
            tilt_one = shift + column(sums, scratch.TILTS) * sums.inv_temperature / end_theta
            tilt_zero = shift + column(sums, scratch.TILTS + 1) * sums.inv_temperature / end_t
            alpha, doubt = reverse_alpha(moments, at_one, tilt_one, at_zero, tilt_zero, c)
            return alpha, alpha, near, tl.where(uneven, INF, doubt)
        else:
            if METHOD == "kl_budget":
                uneven = norms.theta_alone
            elif METHOD == "kl_budget_t":
                uneven = norms.t_alone
            x = near_root(moments, c, budget, METHOD)
            _gap, steep, _step = near_residual(moments, x, c, budget, METHOD)
            off = near_bound(moments, x, c, METHOD)
            near = ((off <= steep * scratch.MOST_OF_ALPHA) & (uneven == 0)).to(tl.int32)
            guess = c + x
            if near == 0:
                x = c * 0
                if SECOND == 0:
                    x = guess_of(curve, at_one, at_zero, budget, METHOD)
                    if METHOD == "ess_balance":
                        # to leading order the root lies three times as far from 1/2 as that of the KL rule
                        x = tl.minimum(tl.maximum(3 * x, -0.48), 0.48)
                guess = c + x
                x = far_root(curve, high, low, x, c, budget, METHOD)
                if METHOD == "ess_balance":
                    guess = tl.where(tl.abs(x) < 0.48, c + x, guess)
            return c + x, guess, near, doubt
