"""Rows that float32 is not enough for: α and its numbers in float64, by sweeps of one program over the row.

They are rare: what brings them about is a pair so far apart that float32 is not enough, or two tokens so near one
another, and never the ordinary row.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.scratch import (
    GROUP,
    INF,
    budget_of,
    budget_step,
    entropy_of,
    exact_logits,
    exact_mix,
    is_sound,
    kls_of,
    logits_of,
    outside,
    store_diagnostics,
    store_solved,
)


class Point(NamedTuple):
    """A row at α. At 2 − α and −α the slopes are off by one number, which their difference is free of."""

    f: tl.tensor
    slope: tl.tensor  # F'
    gap: tl.tensor  # F' − s
    width: tl.tensor  # F''
    f_high: tl.tensor
    slope_high: tl.tensor
    f_low: tl.tensor
    slope_low: tl.tensor
    norm_theta: tl.tensor
    norm_t: tl.tensor


@triton.jit
def add_scaled(top, sums, x, usable, d):
    """Add Σ e^x, Σ e^x d, Σ e^x d² of a tile to sums that are relative to e^top."""
    new = tl.maximum(top, tl.max(tl.where(usable, x, -INF)))
    finite = tl.where(new == -INF, 0.0, new)
    scale = tl.exp(tl.where(top == -INF, -INF, top - finite))
    w = tl.exp(tl.where(usable, x - finite, -INF))  # [N]
    wd = w * d  # [N]
    sums = (sums[0] * scale + tl.sum(w), sums[1] * scale + tl.sum(wd), sums[2] * scale + tl.sum(wd * d))
    return new, sums, w, finite


@triton.jit
def exact_sweep(row, masses, alpha, center, DRAW: tl.constexpr, TILE_GROUPS: tl.constexpr):
    """The `Point` at α, with maxima of its own; `masses` become the groups' logarithms. Means are of d − center."""
    nothing = tl.full([], 0.0, tl.float64)
    bottom = tl.full([], -INF, tl.float64)
    top, top_high, top_low = bottom, bottom, bottom
    sums, sums_high, sums_low = (nothing, nothing, nothing), (nothing, nothing, nothing), (nothing, nothing, nothing)
    norm_theta, norm_t = nothing, nothing
    o_group = tl.arange(0, TILE_GROUPS)  # [GROUPS]
    for start in range(0, row.vocab_size, TILE_GROUPS * GROUP):
        a, b = logits_of(row, start + tl.arange(0, TILE_GROUPS * GROUP))  # [N] each
        a, b, allow_theta, allow_t = exact_logits(row, a, b)
        norm_theta += tl.sum(tl.where(allow_theta, tl.exp(a), 0.0))
        norm_t += tl.sum(tl.where(allow_t, tl.exp(b), 0.0))
        usable = allow_theta & allow_t  # [N]
        d = tl.where(usable, a - b - center, 0.0)  # [N]
        x = exact_mix(a, b, alpha)  # [N]
        top, sums, w, shift = add_scaled(top, sums, x, usable, d)
        top_high, sums_high, _w, _shift = add_scaled(top_high, sums_high, 2 * a - x, usable, d)
        top_low, sums_low, _w, _shift = add_scaled(top_low, sums_low, 2 * b - x, usable, d)
        if DRAW == scratch.SAMPLED:
            mass = tl.sum(tl.reshape(w, [TILE_GROUPS, GROUP]), axis=1)  # [GROUPS]
            log_mass = tl.where(mass > 0, tl.log(tl.where(mass > 0, mass, 1.0)) + shift, -INF)  # [GROUPS]
            tl.store(masses + start // GROUP + o_group, log_mass, mask=start + o_group * GROUP < row.vocab_size)
    mean, norm_theta, norm_t = sums[1] / sums[0], tl.log(norm_theta), tl.log(norm_t)
    return Point(
        top + tl.log(sums[0]),
        mean + center,
        mean + (center - (norm_theta - norm_t)),
        tl.maximum(sums[2] / sums[0] - mean * mean, 0.0),
        top_high + tl.log(sums_high[0]),
        sums_high[1] / sums_high[0],
        top_low + tl.log(sums_low[0]),
        sums_low[1] / sums_low[0],
        norm_theta,
        norm_t,
    )


@triton.jit
def add_entropy(sums, a, allowed):
    """Add the count of a = 0, the other Σ e^a and Σ e^a a of a tile [N]."""
    w = tl.where(allowed, tl.exp(a), 0.0)  # [N]
    at_top = allowed & (a == 0)  # [N]
    maxima = sums[0] + tl.sum(at_top.to(tl.float64))
    return maxima, sums[1] + tl.sum(tl.where(at_top, 0.0, w)), sums[2] + tl.sum(w * a)


@triton.jit
def exact_entropy_ratio(row, TILE_GROUPS: tl.constexpr):
    """H(π_θ) / (H(π_θ) + H(π_t))."""
    zero = tl.full([], 0.0, tl.float64)
    theta_sums, t_sums = (zero, zero, zero), (zero, zero, zero)
    for start in range(0, row.vocab_size, TILE_GROUPS * GROUP):
        a, b = logits_of(row, start + tl.arange(0, TILE_GROUPS * GROUP))  # [N] each
        a, b, allow_theta, allow_t = exact_logits(row, a, b)
        theta_sums = add_entropy(theta_sums, a, allow_theta)
        t_sums = add_entropy(t_sums, b, allow_t)
    entropy_theta = entropy_of(theta_sums[0], theta_sums[1], theta_sums[2])
    entropy_t = entropy_of(t_sums[0], t_sums[1], t_sums[2])
    total = entropy_theta + entropy_t
    return tl.where(total > scratch.TINY_ENTROPY, entropy_theta / tl.where(total > 0, total, 1.0), 0.5)


@triton.jit
def looked_at_ends(row, masses, alpha, center, uneven, METHOD: tl.constexpr, TILE_GROUPS: tl.constexpr):
    """F' − s at both ends, and the end with the smaller KL, which is α without a root, as different supports may be."""
    ends = 2
    if METHOD == "ess_balance":
        ends = tl.where(uneven, 2, 0)
    gap_low, gap_high, worst_low, better_end = alpha, alpha, alpha, alpha * 0
    for end in range(ends):
        at_end = tl.full([], 0.0, tl.float64) + end
        p = exact_sweep(row, masses, at_end, center, scratch.NO_TOKEN, TILE_GROUPS)
        kl_theta, kl_t, _size = kls_of(at_end, p.slope, p.f, p.norm_theta, p.norm_t)
        worst = tl.maximum(kl_theta, kl_t)
        better_end = tl.where((end == 1) & (worst < worst_low), 1.0, 0.0).to(tl.float64)
        gap_low, worst_low = tl.where(end == 0, p.gap, gap_low), tl.where(end == 0, worst, worst_low)
        gap_high = p.gap
    return gap_low, gap_high, better_end


@triton.jit
def exact_residual(p, alpha, budget, METHOD: tl.constexpr):
    """What vanishes at the root, its derivative, what rounding leaves of it, and Newton's next α."""
    if METHOD == "ess_balance":
        residual, steep = p.f_low - p.f_high + 2 * (p.norm_theta - p.norm_t), p.slope_high - p.slope_low
        rounding = tl.maximum(4e-16 * (tl.abs(p.f_low) + tl.abs(p.f_high)), 1e-14)
        newton = alpha - residual / tl.where(steep > 0, steep, 1e-300)
    elif (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):
        residual, steep, kl, away = budget_of(alpha, p.slope, p.f, p.norm_theta, p.norm_t, p.width, budget, METHOD)
        norm = p.norm_theta if METHOD == "kl_budget" else p.norm_t
        rounding = tl.maximum(4e-16 * (tl.abs(p.f) + tl.abs(norm) + tl.abs(away * p.slope)), 1e-15)
        newton = alpha + budget_step(kl, away, p.width, budget, METHOD)
    else:
        residual, steep = p.gap, p.width
        rounding = tl.maximum(4e-16 * (tl.abs(p.slope) + tl.sqrt(p.width)), 1e-14)
        newton = alpha - residual / tl.where(steep > 0, steep, 1e-300)
    return residual, steep, rounding, newton


class Bracket(NamedTuple):
    """Where the root is, whether α was at these ends, and the two steps made last."""

    low: tl.tensor
    high: tl.tensor
    low_known: tl.tensor
    high_known: tl.tensor
    last_step: tl.tensor
    step_before: tl.tensor


@triton.jit
def next_alpha(bracket, alpha, residual, newton):
    """α to try next, and the bracket with what is known at this one.

    An end of [0, 1] is tried once before the bracket is halved; so it is where steps do not shrink, as in an
    exponential tail, which takes hundreds of them.
    """
    below = residual < 0
    low, low_known = tl.where(below, alpha, bracket.low), tl.where(below, 1, bracket.low_known)
    high, high_known = tl.where(below, bracket.high, alpha), tl.where(below, bracket.high_known, 1)
    middle = (low + high) / 2
    step = tl.where(newton <= low, tl.where(low_known == 1, middle, low), newton)
    step = tl.where(newton >= high, tl.where(high_known == 1, middle, high), step)
    shrinks = (tl.abs(step - alpha) < bracket.step_before / 2) | (step <= low) | (step >= high)
    step = tl.where(shrinks, step, middle)
    return step, Bracket(low, high, low_known, high_known, tl.abs(step - alpha), bracket.last_step)


@triton.jit
def is_exact(p, alpha, rule, uneven, METHOD: tl.constexpr):
    """The last look: `holds` of reference.py."""
    lost = alpha * 0
    kl_theta, kl_t, size = kls_of(alpha, p.slope, p.f, p.norm_theta, p.norm_t)
    if METHOD == "fixed":  # beyond [0, 1] the KLs are differences of numbers of any size
        lost = 4e-16 * ((tl.abs(alpha) + 1) * tl.abs(p.slope) + tl.abs(p.f))
        lost = tl.where(outside(alpha) > 0, lost, 0.0)
    sound = is_sound(alpha, p.slope, p.f, p.f_high, p.f_low, p.norm_theta, p.norm_t, rule.low, rule.high, 1e-9 + lost)
    if METHOD == "fixed":
        sound = sound & (lost <= 1e-5 * tl.maximum(tl.minimum(kl_theta, kl_t), 1.0))
    elif (METHOD != "entropy") & (METHOD != "reverse_kl_symmetry"):
        residual, _steep, _rounding, _newton = exact_residual(p, alpha, rule.budget, METHOD)
        at_low, at_high = alpha <= rule.low, alpha >= rule.high
        stopped = (at_low & (residual > 0)) | (at_high & (residual < 0))
        if METHOD == "kl_budget":
            size = tl.maximum(kl_theta, 1.0)
        elif METHOD == "kl_budget_t":
            size = tl.maximum(kl_t, 1.0)
        else:
            stopped = stopped | (uneven & (at_low | at_high))
        sound = sound & ((tl.abs(residual) <= rule.tol * size) | stopped)
    return sound


@triton.jit
def refine(row, masses, out, rows, rule, METHOD: tl.constexpr, DRAW: tl.constexpr, TILE_GROUPS: tl.constexpr):
    """Find α in float64; write what is found. Returns 0 or the row's status."""
    alpha, s = tl.load(row.known + scratch.ALPHA), tl.load(row.known + scratch.SECANT)
    theta_alone = tl.load(row.known + scratch.THETA_OUTSIDE) > 0
    t_alone = tl.load(row.known + scratch.T_OUTSIDE) > 0
    uneven, better_end = theta_alone | t_alone, alpha * 0
    center = tl.where(tl.abs(s) < INF, s, 0.0)
    last, of_alpha = tl.full([], False, tl.int1), 1e-7
    if METHOD == "entropy":
        alpha = exact_entropy_ratio(row, TILE_GROUPS)
    elif (METHOD == "reverse_kl_symmetry") | (METHOD == "ess_balance"):
        gap_low, gap_high, better_end = looked_at_ends(row, masses, alpha, center, uneven, METHOD, TILE_GROUPS)
        if METHOD == "reverse_kl_symmetry":
            spread = gap_high - gap_low
            alpha = tl.where(spread > 1e-14, gap_high / tl.where(spread > 1e-14, spread, 1.0), 0.5)
            alpha = tl.where(uneven & ((gap_low > 0) | (gap_high < 0)), better_end, alpha)
    if METHOD != "fixed":
        alpha = tl.where((alpha >= 0) & (alpha <= 1), alpha, 0.5)
    if (METHOD == "fixed") | (METHOD == "entropy") | (METHOD == "reverse_kl_symmetry"):
        alpha, last = tl.minimum(tl.maximum(alpha, rule.low), rule.high), tl.full([], True, tl.int1)
    elif (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):
        last, of_alpha = rule.low == rule.high, 1e-12  # then it is given
        alpha = tl.where(last, rule.low, alpha)
    zero, one = alpha * 0, alpha * 0 + 1
    known_no = tl.full([], 0, tl.int32)
    bracket = Bracket(zero, one, known_no, known_no, one, one)
    p = Point(s, s, s, s, s, s, s, s, s, s)
    count, settled = 0, 0
    # the range is applied at the end, so that a root outside it is told from no root at all
    while settled == 0:
        p = exact_sweep(row, masses, alpha, center, DRAW, TILE_GROUPS)
        count += 1
        settled = (last | (p.f == -INF)).to(tl.int32)
        if settled == 0:
            s = p.norm_theta - p.norm_t
            center = tl.where(tl.abs(s) < INF, s, 0.0)
            residual, steep, rounding, newton = exact_residual(p, alpha, rule.budget, METHOD)
            size = tl.abs(residual)
            rootless = ((alpha <= 0) & (residual > 0)) | ((alpha >= 1) & (residual < 0))
            # convergence first: at the root rounding can put the Newton step on the bracket's end, and a bisection
            # there would throw α half a bracket away
            done = ((size <= 1e-3 * rule.tol) & (size <= of_alpha * steep)) | (size <= rounding) | rootless
            done = done | (bracket.high - bracket.low <= tl.maximum(2.3e-16 * bracket.high, 1e-30))
            done = done | (count >= scratch.MOST_SWEEPS)
            step, bracket = next_alpha(bracket, alpha, residual, newton)
            end = tl.where(rootless & uneven, better_end, alpha) if METHOD == "ess_balance" else alpha
            end = tl.minimum(tl.maximum(end, rule.low), rule.high)
            settled = (done & (end == alpha)).to(tl.int32)
            alpha, last = tl.where(done, end, step), done
    sound = is_exact(p, alpha, rule, uneven, METHOD)
    status = tl.where(p.f == -INF, scratch.STATUS_DISJOINT, tl.where(sound, 0, scratch.STATUS_INEXACT))
    tl.store(row.known + scratch.ALPHA, alpha)
    store_solved(row.known, p.f, 0.0, p.slope, tl.sqrt(p.width))
    if status == 0:
        store_diagnostics(
            out, rows, alpha, p.slope, p.f, p.f_high, p.f_low, p.norm_theta, p.norm_t, theta_alone, t_alone
        )
    return status
