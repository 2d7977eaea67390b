"""q* in two sweeps over the logits, in Triton (theory/computation.md, «Two sweeps» and «The draw»).

The same launches for one row and for thousands, without a host synchronisation or an allocation that changes with the
data, so that a step can be captured in a CUDA graph:

1. `curve_kernel`, a program a chunk of a row: Σw, Σwd, Σwd² at seven equally spaced α, two exponentials a token. A
   token's weights at the nodes are a geometric sequence; starting from the larger end its ratio is at most 1, so
   nothing overflows whatever the logits are.
2. `solve_kernel`, a program a row: merges the chunks in float64 and reads α off the polynomial that matches F' and F''
   at all nodes.
3. `evaluate_kernel`, a program a chunk: F, F', F'', F(2 − α) and F(−α) at that α, and the masses of the groups of ids.
   Its exponents are taken relative to bounds on F that convexity gives from the nodes, so it carries no maxima.
4. `correct_kernel` and `evaluate_kernel` again: a Newton step and a sweep for rows whose residual is too large, which
   are rare under the KL rule; all others pass.
5. `finish_kernel`, a program a row: sweeps in float64 until the residual is small where float32 is not enough, draws,
   and reads the winning group again. With truncation `truncate_kernel` comes between the two.

A row is always cut into the same chunks whatever the batch is, and chunks are merged in one fixed order: this is what
makes a row's bits independent of its neighbours.
"""

# ruff: noqa: RUF005 - Triton knows no starred tuples

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qstar_kernels.kernels_common import (
    ALPHA,
    BETTER_END,
    BOUND,
    BOUND_HIGH,
    BOUND_LOW,
    BY_ENTROPY,
    COLD_T,
    COLD_THETA,
    CURVE_COLUMNS,
    DIFFERENCE,
    ENTROPY,
    ESS_BALANCE,
    EVALUATED_COLUMNS,
    FIXED,
    FLOOR,
    GIVEN,
    GREEDY,
    GROUP,
    HIGH,
    INF,
    INTERVALS,
    IS_SMOOTH,
    LARGEST,
    LOG2E,
    LOG_COLD_T,
    LOG_COLD_THETA,
    LOW,
    MASK,
    MAX_T,
    MAX_THETA,
    NANS,
    NO_MAXIMUM,
    NO_TOKEN,
    NODES,
    NORM_T,
    NORM_THETA,
    OUTSIDE,
    OUTSIDE_T,
    OUTSIDE_THETA,
    REVERSE,
    ROW_COLUMNS,
    SAMPLED,
    SECANT,
    SETTLED,
    SMALL_ENTROPY,
    SMOOTH,
    STATUS,
    STATUS_NAN,
    STATUS_NO_SUPPORT,
    STATUS_POSITIVE_INFINITY,
    SUM_W,
    SUM_WD,
    SUM_WDD,
    T_OUTSIDE,
    THETA_OUTSIDE,
    TOP_T,
    TOP_THETA,
    as_double,
    as_logits,
    bounds_of_sides,
    entropy_of,
    mix,
    mixing,
    zeros_of,
)
from qstar_kernels.kernels_finish import correct_kernel, finish_kernel, log_q_kernel
from qstar_kernels.kernels_truncate import truncate_kernel
from qstar_kernels.noise import GROUP_SIZE
from qstar_kernels.types import METHODS, QStarStep, Settings

# Tokens of a program in the sweeps. Small enough for 16 programs on a row of 128k at batch 1, large enough that the
# reductions over the program's threads, some 20 instructions each, stay below a tenth of the work.
CHUNK = 8192

# Newton steps followed by a sweep of all programs before a row is left to one program. Rows that need none skip them at
# the price of a launch. The curve holds the root of the KL rule, but only a guess at that of the ESS rule.
CORRECTIONS = {"kl_symmetry": 1, "ess_balance": 3}

TILE_GROUPS = 4  # groups of ids in a tile of the second sweep: their four reductions over threads share a barrier


@triton.jit
def rescale(m0, m1, m2, drop_theta, drop_t, inv_temperature):
    """The node sums after the maxima rose by −`drop_theta` and −`drop_t` (both ≤ 0)."""
    shift = drop_theta - drop_t
    r0, r1, r2 = (), (), ()
    for k in tl.static_range(NODES):
        scale = tl.exp((drop_t * (1 - k / INTERVALS) + drop_theta * (k / INTERVALS)) * inv_temperature)
        r0 = r0 + (m0[k] * scale,)
        r1 = r1 + ((m1[k] + shift * m0[k]) * scale,)
        r2 = r2 + ((m2[k] + shift * (2 * m1[k] + shift * m0[k])) * scale,)
    return r0, r1, r2


@triton.jit
def curve_tile(
    a, b, tops, m0, m1, m2, rest, cold, extra, inv_temperature, TEMPERED: tl.constexpr, ENTROPIES: tl.constexpr
):
    """Add one tile of logits [N, SUB] to the sums of the first sweep; blocks [N] hold a sum a thread.

    d is in the logits' units; `solve_kernel` divides its moments by the temperature.
    """
    top_theta, top_t = tops
    difference, outside_theta, outside_t, nans = rest
    nans += tl.sum(((a != a) | (b != b)).to(tl.float32), axis=1)  # [N]

    # The maxima are of all tokens so far and the same in all threads, so the token at both maxima has d = 0 exactly:
    # the tiny variance of a row whose mass is nearly all on one token is then a sum without cancellation.
    new_theta, new_t = tl.maximum(top_theta, tl.max(a)), tl.maximum(top_t, tl.max(b))
    if (new_theta > top_theta) | (new_t > top_t):
        drop_theta = tl.maximum(top_theta - new_theta, FLOOR)
        drop_t = tl.maximum(top_t - new_t, FLOOR)
        scale_theta, scale_t = tl.exp(drop_theta * inv_temperature), tl.exp(drop_t * inv_temperature)
        difference = difference * scale_theta + m0[0] * (scale_theta - scale_t)
        outside_theta = tl.where(outside_theta > 0, tl.maximum(outside_theta * scale_theta, OUTSIDE), 0.0)
        outside_t = tl.where(outside_t > 0, tl.maximum(outside_t * scale_t, OUTSIDE), 0.0)
        m0, m1, m2 = rescale(m0, m1, m2, drop_theta, drop_t, inv_temperature)
        if ENTROPIES:
            count_theta, others_theta, first_theta, count_t, others_t, first_t = extra
            mass = (count_theta + others_theta) * scale_theta
            first_theta = first_theta * scale_theta + drop_theta * mass
            others_theta = tl.where(drop_theta < 0, mass, others_theta)
            count_theta = tl.where(drop_theta < 0, 0.0, count_theta)
            mass = (count_t + others_t) * scale_t
            first_t = first_t * scale_t + drop_t * mass
            others_t = tl.where(drop_t < 0, mass, others_t)
            count_t = tl.where(drop_t < 0, 0.0, count_t)
            extra = (count_theta, others_theta, first_theta, count_t, others_t, first_t)
        if TEMPERED:
            cold = (cold[0] * tl.exp(drop_theta), cold[1] * tl.exp(drop_t))
        top_theta, top_t = new_theta, new_t

    one_sided = (a > MASK) != (b > MASK)  # [N, SUB]
    a = tl.maximum(a - top_theta, FLOOR)  # [N, SUB]
    b = tl.maximum(b - top_t, FLOOR)  # [N, SUB]
    if TEMPERED:
        cold = (cold[0] + tl.sum(tl.exp(a), axis=1), cold[1] + tl.sum(tl.exp(b), axis=1))  # [N]
    if ENTROPIES:
        # maxima are counted apart: Σ e^a is 1 + tiny on a nearly certain row, and its entropy is made of the tiny part
        count_theta, others_theta, first_theta, count_t, others_t, first_t = extra
        mass_theta, mass_t = tl.exp(a * inv_temperature), tl.exp(b * inv_temperature)  # [N, SUB]
        count_theta += tl.sum((a == 0).to(tl.float32), axis=1)  # [N]
        others_theta += tl.sum(tl.where(a == 0, 0.0, mass_theta), axis=1)  # [N]
        first_theta += tl.sum(mass_theta * a, axis=1)  # [N]
        count_t += tl.sum((b == 0).to(tl.float32), axis=1)  # [N]
        others_t += tl.sum(tl.where(b == 0, 0.0, mass_t), axis=1)  # [N]
        first_t += tl.sum(mass_t * b, axis=1)  # [N]
        extra = (count_theta, others_theta, first_theta, count_t, others_t, first_t)

    # Weights at the nodes: e^max(a, b) at the larger end, times e^(−|d| / INTERVALS) a node on the way to the other.
    to_log2 = inv_temperature * LOG2E
    d = a - b  # [N, SUB]
    falling = d < 0  # [N, SUB], the larger end is α = 0
    end = tl.exp2(tl.maximum(a, b) * to_log2)  # [N, SUB]
    ratio = tl.exp2(tl.abs(d) * (to_log2 * (-1.0 / INTERVALS)))  # [N, SUB]
    weights = (tl.where(one_sided, 0.0, end),)
    # not 0 however small the mass is: that a model allows a token at all decides about ESS
    outside = tl.where(one_sided, tl.maximum(end, OUTSIDE), 0.0)  # [N, SUB]
    outside_theta += tl.sum(tl.where(falling, 0.0, outside), axis=1)  # [N]
    outside_t += tl.sum(tl.where(falling, outside, 0.0), axis=1)  # [N]
    for k in tl.static_range(INTERVALS):
        weights = weights + (weights[k] * ratio,)  # [N, SUB]
    d2 = d * d  # [N, SUB]
    n0, n1, n2 = (), (), ()
    for k in tl.static_range(NODES):
        w = tl.where(falling, weights[k], weights[INTERVALS - k])  # [N, SUB]
        n0 = n0 + (m0[k] + tl.sum(w, axis=1),)  # [N]
        n1 = n1 + (m1[k] + tl.sum(w * d, axis=1),)
        n2 = n2 + (m2[k] + tl.sum(w * d2, axis=1),)
    step = weights[0] - weights[INTERVALS]  # [N, SUB]
    difference += tl.sum(tl.where(falling, -step, step), axis=1)  # [N]
    return (top_theta, top_t), n0, n1, n2, (difference, outside_theta, outside_t, nans), cold, extra


@triton.jit(do_not_specialize=["s_partial"])
def curve_kernel(
    theta,
    t,
    partial,
    vocab_size,
    s_theta,
    s_t,
    s_partial,
    inv_temperature,
    TEMPERED: tl.constexpr,
    ENTROPIES: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
    SUB: tl.constexpr,
):
    """First sweep. `SUB` consecutive tokens, one 128-bit load, are summed in a thread before they meet its sums."""
    # rows × vocabulary passes 2³¹ when whole prompts are scored
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    theta += i_row * s_theta
    t += i_row * s_t
    TILE: tl.constexpr = LANES * SUB
    o = tl.arange(0, LANES)[:, None] * SUB + tl.arange(0, SUB)[None, :]  # [LANES, SUB]
    zero = tl.zeros([LANES], tl.float32)  # [LANES]
    m0, m1, m2 = zeros_of(zero, NODES), zeros_of(zero, NODES), zeros_of(zero, NODES)
    rest, cold, extra = zeros_of(zero, 4), zeros_of(zero, 2), zeros_of(zero, 6)
    tops = (tl.full([], NO_MAXIMUM, tl.float32), tl.full([], NO_MAXIMUM, tl.float32))

    start = i_chunk * CHUNK
    stop = tl.minimum(start + CHUNK, vocab_size)
    whole = start + (stop - start) // TILE * TILE
    # whole tiles need no mask: with one, loads are as narrow as the vocabulary's divisibility by 16 allows
    for first in range(start, whole, TILE):
        a = as_logits(tl.load(theta + first + o))  # [LANES, SUB]
        b = as_logits(tl.load(t + first + o))  # [LANES, SUB]
        tops, m0, m1, m2, rest, cold, extra = curve_tile(
            a, b, tops, m0, m1, m2, rest, cold, extra, inv_temperature, TEMPERED, ENTROPIES
        )
    if whole < stop:
        a = as_logits(tl.load(theta + whole + o, mask=whole + o < stop, other=-INF))  # [LANES, SUB]
        b = as_logits(tl.load(t + whole + o, mask=whole + o < stop, other=-INF))  # [LANES, SUB]
        tops, m0, m1, m2, rest, cold, extra = curve_tile(
            a, b, tops, m0, m1, m2, rest, cold, extra, inv_temperature, TEMPERED, ENTROPIES
        )

    partial += i_row * s_partial + i_chunk * CURVE_COLUMNS
    for k in tl.static_range(NODES):
        tl.store(partial + SUM_W + k, tl.sum(m0[k]))
        tl.store(partial + SUM_WD + k, tl.sum(m1[k]))
        tl.store(partial + SUM_WDD + k, tl.sum(m2[k]))
    for k in tl.static_range(4):
        tl.store(partial + DIFFERENCE + k, tl.sum(rest[k]))
    tl.store(partial + MAX_THETA, tops[0])
    tl.store(partial + MAX_T, tops[1])
    if ENTROPIES:
        for k in tl.static_range(6):
            tl.store(partial + ENTROPY + k, tl.sum(extra[k]))
    if TEMPERED:
        tl.store(partial + COLD_THETA, tl.sum(cold[0]))
        tl.store(partial + COLD_T, tl.sum(cold[1]))


@triton.jit
def merged(partial, column, scale, o_chunk, chunks):
    """Σ over the chunks of one column of the first sweep's sums times `scale` [C]: float64."""
    x = tl.load(partial + o_chunk * CURVE_COLUMNS + column, mask=o_chunk < chunks, other=0.0)  # [C]
    return tl.sum(x.to(tl.float64) * scale)


@triton.jit
def merged_nodes(partial, column, o_chunk, o_node, chunks):
    """One moment of all chunks at all nodes: float64 [C, 8]."""
    mask = (o_chunk[:, None] < chunks) & (o_node[None, :] < NODES)  # [C, 8]
    return tl.load(partial + o_chunk[:, None] * CURVE_COLUMNS + column + o_node[None, :], mask=mask, other=0.0).to(
        tl.float64
    )


@triton.jit
def at_node(x, o_node, k):
    """Element `k` of the block x [8]; a node without a value must not spoil it."""
    return tl.sum(tl.where(o_node == k, x, 0.0))


@triton.jit
def hermite(x, slope, curvature, o_node):
    """The polynomial with the given values and derivatives [8] at the nodes, at x."""
    node = o_node.to(tl.float64) / INTERVALS  # [8]
    basis = tl.where(o_node < NODES, 1.0, 0.0).to(tl.float64)  # [8], Lagrange's polynomials at x
    tilt = tl.zeros([8], tl.float64)  # [8], their derivatives at their own nodes
    for j in tl.static_range(NODES):
        other = (o_node != j) & (o_node < NODES)  # [8]
        gap = tl.where(other, node - j / INTERVALS, 1.0)  # [8]
        basis = basis * tl.where(other, (x - j / INTERVALS) / gap, 1.0)
        tilt += tl.where(other, 1.0 / gap, 0.0)
    away = x - node  # [8]
    return tl.sum(basis * basis * (slope * (1 - 2 * tilt * away) + curvature * away))


@triton.jit
def row_entropy(partial, side: tl.constexpr, drop, scale, inv_temperature, o_chunk, chunks):
    """Entropy of one row from its chunks; `drop` and `scale` = e^drop are [C]."""
    count = tl.load(partial + o_chunk * CURVE_COLUMNS + ENTROPY + side, mask=o_chunk < chunks, other=0.0)  # [C]
    others = tl.load(partial + o_chunk * CURVE_COLUMNS + ENTROPY + side + 1, mask=o_chunk < chunks, other=0.0)  # [C]
    first = tl.load(partial + o_chunk * CURVE_COLUMNS + ENTROPY + side + 2, mask=o_chunk < chunks, other=0.0)  # [C]
    mass = count.to(tl.float64) + others.to(tl.float64)  # [C]
    # the maxima of the row are those of the chunks that reach it
    maxima = tl.sum(tl.where(drop == 0, count.to(tl.float64), 0.0))
    others = tl.sum(scale * tl.where(drop == 0, others.to(tl.float64), mass))
    return entropy_of(maxima, others, tl.sum(scale * (first.to(tl.float64) * inv_temperature + drop * mass)))


@triton.jit
def root_between(low, high, gap, curvature, o_node):
    """Root of the interpolated F' − s between the nodes `low` and `high`, by secant steps that stay between them."""
    node = o_node.to(tl.float64) / INTERVALS  # [8]
    gap_low = tl.sum(tl.where((node == low) & (o_node < NODES), gap, 0.0))
    gap_high = tl.sum(tl.where((node == high) & (o_node < NODES), gap, 0.0))
    rise = gap_high - gap_low
    old_x, old = low, gap_low
    x = tl.where(rise > 0, low - gap_low * (high - low) / tl.where(rise > 0, rise, 1.0), (low + high) / 2)
    x = tl.minimum(tl.maximum(x, low), high)
    for _ in range(8):
        value = hermite(x, gap, curvature, o_node)
        run = value - old
        step = tl.where(run != 0, value * (x - old_x) / tl.where(run != 0, run, 1.0), 0.0)
        old_x, old = x, value
        x = tl.minimum(tl.maximum(x - step, low), high)
    return x


@triton.jit(do_not_specialize=["chunks"])
def solve_kernel(
    partial,
    row,
    quadrature,
    chunks,
    inv_temperature,
    inv_temperature_low,
    fixed_alpha,
    fixed_alpha_low,
    alpha_min,
    alpha_min_low,
    alpha_max,
    alpha_max_low,
    TEMPERED: tl.constexpr,
    METHOD: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Merge the chunks of a row and find α: float64 throughout, a few hundred operations."""
    inv_temperature = as_double(inv_temperature, inv_temperature_low)
    alpha_min, alpha_max = as_double(alpha_min, alpha_min_low), as_double(alpha_max, alpha_max_low)
    i_row = tl.program_id(0).to(tl.int64)
    partial += i_row * chunks * CURVE_COLUMNS
    row += i_row * ROW_COLUMNS
    o_chunk, o_node = tl.arange(0, CHUNKS), tl.arange(0, 8)
    present = o_chunk < chunks  # [C]
    tops_theta = tl.load(partial + o_chunk * CURVE_COLUMNS + MAX_THETA, mask=present, other=NO_MAXIMUM)  # [C]
    tops_t = tl.load(partial + o_chunk * CURVE_COLUMNS + MAX_T, mask=present, other=NO_MAXIMUM)  # [C]
    top_theta, top_t = tl.max(tops_theta), tl.max(tops_t)
    one = tl.full([CHUNKS], 1.0, tl.float64)  # [C]
    nans = merged(partial, NANS, one, o_chunk, chunks)

    status = tl.where((top_theta == NO_MAXIMUM) | (top_t == NO_MAXIMUM), STATUS_NO_SUPPORT, 0)
    status = tl.where((top_theta >= LARGEST) | (top_t >= LARGEST), STATUS_POSITIVE_INFINITY, status)
    status = tl.where(nans > 0, STATUS_NAN, status)
    tl.store(row + STATUS, status.to(tl.float64))
    if status == 0:
        cold_drop_theta = tl.maximum(tops_theta - top_theta, FLOOR).to(tl.float64)  # [C]
        cold_drop_t = tl.maximum(tops_t - top_t, FLOOR).to(tl.float64)  # [C]
        drop_theta, drop_t = cold_drop_theta * inv_temperature, cold_drop_t * inv_temperature  # [C]
        scale_theta, scale_t = tl.exp(drop_theta), tl.exp(drop_t)  # [C]

        node = tl.minimum(o_node.to(tl.float64) / INTERVALS, 1.0)  # [8]
        scale = tl.exp(drop_t[:, None] * (1 - node)[None, :] + drop_theta[:, None] * node[None, :])  # [C, 8]
        shift = (drop_theta - drop_t)[:, None]  # [C, 1], from a chunk's d to the row's
        w = merged_nodes(partial, SUM_W, o_chunk, o_node, chunks)  # [C, 8]
        wd = merged_nodes(partial, SUM_WD, o_chunk, o_node, chunks) * inv_temperature  # [C, 8]
        wdd = merged_nodes(partial, SUM_WDD, o_chunk, o_node, chunks) * inv_temperature * inv_temperature  # [C, 8]
        m0 = tl.sum(scale * w, axis=0)  # [8]
        m1 = tl.sum(scale * (wd + shift * w), axis=0)  # [8]
        m2 = tl.sum(scale * (wdd + shift * (2 * wd + shift * w)), axis=0)  # [8]
        known = m0 > 0  # [8], false where the common support lies far below both maxima
        m0 = tl.where(known, m0, 1.0)
        f = tl.log(m0)  # [8]
        slope = m1 / m0  # [8]
        curvature = tl.where(known, tl.maximum(m2 / m0 - slope * slope, 0.0), 0.0)  # [8]

        # s = log(A + …) − log(B + …) through the sum of differences: A − B itself would cancel on close pairs
        outside_theta = merged(partial, OUTSIDE_THETA, scale_theta, o_chunk, chunks)
        outside_t = merged(partial, OUTSIDE_T, scale_t, o_chunk, chunks)
        allows_theta = merged(partial, OUTSIDE_THETA, one, o_chunk, chunks) > 0
        allows_t = merged(partial, OUTSIDE_T, one, o_chunk, chunks) > 0
        mass_theta = at_node(tl.where(known, m0, 0.0), o_node, INTERVALS)
        mass_t = at_node(tl.where(known, m0, 0.0), o_node, 0)
        low_mass = tl.sum(tl.where(o_node[None, :] == 0, w, 0.0), axis=1)  # [C]
        difference = merged(partial, DIFFERENCE, scale_theta, o_chunk, chunks)
        difference += tl.sum((scale_theta - scale_t) * low_mass)
        difference += outside_theta - outside_t
        whole_theta, whole_t = mass_theta + outside_theta, mass_t + outside_t
        s = tl.where(difference > 0, tl.log(1 + difference / whole_t), -tl.log(1 - difference / whole_theta))
        norm_t = tl.log(whole_t)
        norm_theta = norm_t + s

        # F' − s at the nodes, in two ways. From F'' alone, by ∫ of the polynomial through its values, which keeps its
        # accuracy relative to F'' however close the pair is; taken where F'' is smooth enough for that, which two
        # quadratures of different order tell. Else from the sums, which float32 leaves accurate to 1e-7 of E|d|.
        o_pair = o_node[:, None] * 8 + o_node[None, :]  # [8, 8]
        fine = tl.sum(tl.load(quadrature + o_pair) * curvature[None, :], axis=1)  # [8]
        coarse = tl.sum(tl.load(quadrature + 64 + o_pair) * curvature[None, :], axis=1)  # [8]
        all_known = tl.min((known | (o_node >= NODES)).to(tl.int32)) == 1
        inside = (allows_theta | allows_t) == 0
        least = tl.min(tl.where(o_node < NODES, curvature, INF))
        smooth = all_known & inside & (tl.max(tl.abs(fine - coarse)) <= least * SMOOTH)
        gap = tl.where(smooth, fine, slope - s)  # [8]

        known = known & (o_node < NODES)
        gap_low, gap_high = at_node(gap, o_node, 0), at_node(gap, o_node, INTERVALS)
        f_low, f_high = at_node(f, o_node, 0), at_node(f, o_node, INTERVALS)
        slope_low, slope_high = at_node(slope, o_node, 0), at_node(slope, o_node, INTERVALS)
        worst_low = tl.maximum(norm_theta - slope_low, norm_t) - f_low
        worst_high = tl.maximum(norm_theta, norm_t + slope_high) - f_high
        better_end = tl.where(worst_low <= worst_high, 0.0, 1.0).to(tl.float64)

        if METHOD == FIXED:
            alpha = as_double(fixed_alpha, fixed_alpha_low)
        elif METHOD == BY_ENTROPY:
            entropy_theta = row_entropy(partial, 0, drop_theta, scale_theta, inv_temperature, o_chunk, chunks)
            entropy_t = row_entropy(partial, 3, drop_t, scale_t, inv_temperature, o_chunk, chunks)
            total = entropy_theta + entropy_t
            alpha = tl.where(total > 0, entropy_theta / tl.where(total > 0, total, 1.0), 0.5)
            smooth = total > SMALL_ENTROPY
        elif METHOD == REVERSE:
            spread = gap_high - gap_low
            alpha = tl.where(spread > 1e-14, gap_high / spread, 0.5)
            # the difference of two float32 slopes, where F'' alone did not give it
            smooth = smooth | (spread >= 0.07 * (1 + tl.abs(slope_low) + tl.abs(slope_high)))
            # different supports can leave the rule without a root; the better end is then the one that F' − s points to
            alpha = tl.where(inside, alpha, tl.where(gap_low > 0, 0.0, tl.where(gap_high < 0, 1.0, alpha)))
        else:
            low = tl.max(tl.where(known & (gap < 0), node, 0.0))
            high = tl.min(tl.where(known & (gap >= 0), node, 1.0))
            alpha = root_between(low, high, gap, curvature, o_node)
            if all_known == 0:
                # modes so far apart that the nodes between them underflow: F has a corner where the tangents meet
                at_low, at_high = node == low, node == high  # [8]
                tangent_low = tl.sum(tl.where(at_low, f - slope * node, 0.0))
                tangent_high = tl.sum(tl.where(at_high, f - slope * node, 0.0))
                turn = tl.sum(tl.where(at_high, slope, 0.0)) - tl.sum(tl.where(at_low, slope, 0.0))
                corner = (tangent_low - tangent_high) / tl.where(turn > 0, turn, 1.0)
                alpha = tl.where(turn > 0, tl.minimum(tl.maximum(corner, low), high), (low + high) / 2)
            alpha = tl.where(least <= 1e-12, tl.where(smooth, 0.5, alpha), alpha)
            if METHOD == ESS_BALANCE:
                # to leading order the root lies three times as far from 1/2 as that of the KL rule
                alpha = tl.minimum(tl.maximum(0.5 + 3 * (alpha - 0.5), 0.02), 0.98)
                low, high = tl.zeros_like(low), tl.zeros_like(high) + 1
            tl.store(row + LOW, low)
            tl.store(row + HIGH, high)
        alpha = tl.minimum(tl.maximum(alpha, alpha_min), alpha_max)

        # Bounds by convexity: the chord between the neighbouring nodes, the tangents at the ends.
        left = tl.max(tl.where(known & (node <= alpha), node, 0.0))
        right = tl.min(tl.where(known & (node >= alpha), node, 1.0))
        f_left = tl.sum(tl.where((node == left) & known, f, 0.0))
        f_right = tl.sum(tl.where((node == right) & known, f, 0.0))
        share = tl.where(right > left, (alpha - left) / tl.where(right > left, right - left, 1.0), 0.0)
        tl.store(row + BOUND, f_left + share * (f_right - f_left))
        tl.store(row + BOUND_HIGH, f_high + (1 - alpha) * slope_high)
        tl.store(row + BOUND_LOW, f_low - alpha * slope_low)
        tl.store(row + SETTLED, 0.0)
        tl.store(row + ALPHA, alpha)
        tl.store(row + SECANT, s)
        tl.store(row + NORM_THETA, norm_theta)
        tl.store(row + NORM_T, norm_t)
        tl.store(row + TOP_THETA, top_theta.to(tl.float64))
        tl.store(row + TOP_T, top_t.to(tl.float64))
        tl.store(row + IS_SMOOTH, smooth.to(tl.float64))
        tl.store(row + THETA_OUTSIDE, tl.where(allows_theta, 1.0, 0.0))
        tl.store(row + T_OUTSIDE, tl.where(allows_t, 1.0, 0.0))
        tl.store(row + BETTER_END, better_end)
        if TEMPERED:
            tl.store(
                row + LOG_COLD_THETA, tl.log(merged(partial, COLD_THETA, tl.exp(cold_drop_theta), o_chunk, chunks))
            )
            tl.store(row + LOG_COLD_T, tl.log(merged(partial, COLD_T, tl.exp(cold_drop_t), o_chunk, chunks)))
        else:
            tl.store(row + LOG_COLD_THETA, norm_theta)
            tl.store(row + LOG_COLD_T, norm_t)


@triton.jit
def evaluate_tile(a, b, sums, mixed, sides, center, inv_temperature, SLOPES: tl.constexpr):
    """Add a tile of logits [GROUPS, LANES, SUB] to the sums of the second sweep, [GROUPS, LANES] each.

    Also returns the mass and the greatest x of each lane.
    """
    mass, first, second, mass_high, mass_low, first_high, first_low = sums
    # [GROUPS, LANES, SUB] each
    a, b, x, usable = mix(a, b, mixed)
    d = a - b - center  # [GROUPS, LANES, SUB]
    w = tl.exp2(x)  # [GROUPS, LANES, SUB]
    wd = w * d  # [GROUPS, LANES, SUB]
    twice = inv_temperature * (2 * LOG2E)
    w_high = tl.exp2(tl.where(usable, tl.fma(a, twice, -x - sides[0]), -INF))  # [GROUPS, LANES, SUB]
    w_low = tl.exp2(tl.where(usable, tl.fma(b, twice, -x - sides[1]), -INF))  # [GROUPS, LANES, SUB]
    lane_mass = tl.sum(w, axis=2)  # [GROUPS, LANES]
    mass += lane_mass
    first += tl.sum(wd, axis=2)
    second += tl.sum(wd * d, axis=2)
    mass_high += tl.sum(w_high, axis=2)
    mass_low += tl.sum(w_low, axis=2)
    if SLOPES:
        first_high += tl.sum(w_high * d, axis=2)
        first_low += tl.sum(w_low * d, axis=2)
    return (mass, first, second, mass_high, mass_low, first_high, first_low), lane_mass, tl.max(x, axis=2)


@triton.jit(do_not_specialize=["chunks", "groups"])
def evaluate_kernel(
    theta,
    t,
    row,
    partial,
    masses,
    vocab_size,
    chunks,
    groups,
    s_theta,
    s_t,
    inv_temperature,
    inv_temperature_low,
    SLOPES: tl.constexpr,
    DRAW: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    SUB: tl.constexpr,
):
    """Second sweep. A tile is some whole groups of ids, each reduced to the mass (the maximum, if greedy) of its x."""
    i_row, i_chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    theta += i_row * s_theta
    t += i_row * s_t
    row += i_row * ROW_COLUMNS
    masses += i_row * groups
    if (tl.load(row + STATUS) == 0) & (tl.load(row + SETTLED) == 0):
        exact_inv = as_double(inv_temperature, inv_temperature_low)
        mixed = mixing(row, (tl.load(row + TOP_THETA), tl.load(row + TOP_T)), exact_inv)
        sides = bounds_of_sides(row, mixed[4])
        center = (tl.load(row + SECANT) / exact_inv).to(tl.float32)
        TILE: tl.constexpr = TILE_GROUPS * GROUP
        LANES: tl.constexpr = GROUP // SUB
        o_group = tl.arange(0, TILE_GROUPS)  # [GROUPS]
        o_token = tl.arange(0, LANES)[:, None] * SUB + tl.arange(0, SUB)[None, :]  # [LANES, SUB]
        o = o_group[:, None, None] * GROUP + o_token[None, :, :]  # [GROUPS, LANES, SUB]
        sums = zeros_of(tl.zeros([TILE_GROUPS, LANES], tl.float32), 7)

        start = i_chunk * CHUNK
        stop = tl.minimum(start + CHUNK, vocab_size)
        whole = start + (stop - start) // TILE * TILE
        for first in range(start, whole, TILE):
            a = as_logits(tl.load(theta + first + o))  # [GROUPS, LANES, SUB]
            b = as_logits(tl.load(t + first + o))  # [GROUPS, LANES, SUB]
            sums, mass, highest = evaluate_tile(a, b, sums, mixed, sides, center, inv_temperature, SLOPES)
            if DRAW == SAMPLED:
                tl.store(masses + first // GROUP + o_group, tl.sum(mass, axis=1))
            elif DRAW == GREEDY:
                tl.store(masses + first // GROUP + o_group, tl.max(highest, axis=1))
        if whole < stop:
            a = as_logits(tl.load(theta + whole + o, mask=whole + o < stop, other=-INF))  # [GROUPS, LANES, SUB]
            b = as_logits(tl.load(t + whole + o, mask=whole + o < stop, other=-INF))  # [GROUPS, LANES, SUB]
            sums, mass, highest = evaluate_tile(a, b, sums, mixed, sides, center, inv_temperature, SLOPES)
            group = whole // GROUP + o_group  # [GROUPS]
            if DRAW == SAMPLED:
                tl.store(masses + group, tl.sum(mass, axis=1), mask=group < groups)
            elif DRAW == GREEDY:
                tl.store(masses + group, tl.max(highest, axis=1), mask=group < groups)

        partial += (i_row * chunks + i_chunk) * EVALUATED_COLUMNS
        for k in tl.static_range(7):
            tl.store(partial + k, tl.sum(sums[k]))


@lru_cache(maxsize=8)
def quadrature(device: torch.device) -> Tensor:
    """Weights that give F' − s at the nodes from F'' there: float64 [2, 8, 8], through all nodes and every second one.

    s is the mean of F' over [0, 1], so F'(x) − s = ∫ F''(y) (y − [y > x]) dy.
    """
    nodes = torch.arange(7, dtype=torch.float64) / 6
    weights = torch.zeros(2, 8, 8, dtype=torch.float64)
    for which, used in enumerate((range(7), range(0, 7, 2))):
        used = list(used)
        powers = torch.arange(len(used))
        # column j: coefficients of the polynomial that is 1 at node j and 0 at the others
        lagrange = torch.linalg.inv(nodes[used][:, None] ** powers)
        for k, x in enumerate(nodes):
            # ∫₀¹ y^(p+1) dy − ∫ₓ¹ y^p dy
            moments = 1 / (powers + 2.0) - (1 - x ** (powers + 1)) / (powers + 1.0)
            weights[which, k, used] = moments.double() @ lagrange
    return weights.to(device)


def lanes() -> int:
    """Sums a node that a program keeps: one a thread. The interpreter's time goes by operations, not by elements."""
    return 1024 if triton.knobs.runtime.interpret else 128


def groups_of_a_row_program() -> int:
    """Groups of ids in a tile where one program sweeps a row: in float64, 8 tokens a thread still fit the registers."""
    return 16 if triton.knobs.runtime.interpret else 2


@dataclass(frozen=True)
class Launch:
    """One kernel with its arguments by name, `tl.constexpr` ones included."""

    kernel: triton.runtime.KernelInterface
    grid: tuple[int, ...]
    threads: int
    arguments: dict

    def __call__(self) -> None:
        warp = 64 if torch.version.hip else 32
        self.kernel[self.grid](**self.arguments, num_warps=max(1, self.threads // warp))


def halves(name: str, value: float) -> dict[str, float]:
    """A setting as two arguments of a kernel, where Python's numbers become float32 (`as_double`)."""
    high = ctypes.c_float(value).value
    return {name: high, f"{name}_low": value - high}


def aligned(logits: Tensor) -> Tensor:
    """The same rows [B, V] where the kernels can read them 128 bits at a time: a copy where they do not lie so.

    Triton lays out a program's threads by what it knows of the addresses, and with it the order of all sums. A row's
    bits would depend on where it lies in memory, and the sweeps on unaligned rows hold eight times the sums a thread.
    """
    rows, vocab_size = logits.shape
    if rows == 1:
        logits = logits.as_strided((1, vocab_size), (0, logits.stride(1)))
    lie_so = (logits.stride(1) == 1 or vocab_size == 1) and logits.stride(0) % 16 == 0 and logits.data_ptr() % 16 == 0
    return logits if lie_so else logits.new_empty(rows, triton.cdiv(vocab_size, 16) * 16)[:, :vocab_size].copy_(logits)


def plan(
    theta: Tensor,
    t: Tensor,
    settings: Settings,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    tokens: Tensor | None = None,
    want_log_q: bool = False,
) -> tuple[list[Launch], tuple[QStarStep, Tensor | None]]:
    """The launches for at least one row, and what they fill; all sizes depend on B, V and the settings only.

    The logits are `aligned`.
    """
    rows, vocab_size = theta.shape
    method = METHODS.index(settings.method)
    tempering = settings.temperature if settings.temperature > 0 else 1.0
    chunks, groups = triton.cdiv(vocab_size, CHUNK), triton.cdiv(vocab_size, GROUP_SIZE)
    padded_chunks = triton.next_power_of_2(chunks)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=theta.device)

    def count(k: int) -> float:
        """Exact; as an integer it would be compiled apart when it is 1, and when it is a multiple of 16."""
        return float(min(k, vocab_size))

    out = empty(8, rows)  # [8, B]
    status = empty(rows, dtype=torch.int64)  # [B]
    log_q = empty(rows, vocab_size) if want_log_q else None  # [B, V]
    step = QStarStep(*out[:5], status=status)
    draw = NO_TOKEN
    if seeds is not None:
        draw = SAMPLED if settings.temperature > 0 else GREEDY
        seeds, positions, tokens = seeds.contiguous(), positions.contiguous(), torch.empty_like(status)  # [B] each
    elif tokens is not None:
        draw, tokens = GIVEN, tokens.contiguous()
    if draw != NO_TOKEN:
        step.token, step.logq, step.logp_theta, step.logp_t = tokens, *out[5:]
    # what asks only for the groups' masses need not be compiled twice
    drawing = draw if draw in (SAMPLED, GREEDY) else NO_TOKEN

    partial = empty(rows, chunks, CURVE_COLUMNS.value)  # [B, C, 40]
    evaluated = empty(rows, chunks, EVALUATED_COLUMNS.value)  # [B, C, 8]
    masses = empty(rows, groups, dtype=torch.float64)  # [B, groups]
    row = empty(rows, ROW_COLUMNS.value, dtype=torch.float64)  # [B, 27]
    logits = {
        "theta": theta,
        "t": t,
        "vocab_size": vocab_size,
        "s_theta": theta.stride(0),
        "s_t": t.stride(0),
    } | halves("inv_temperature", 1 / tempering)
    # a load of 128 bits brings a thread its tokens of one row
    sub = 16 // max(theta.element_size(), t.element_size())
    alpha_range = halves("alpha_min", settings.alpha_min) | halves("alpha_max", settings.alpha_max)
    curve = {k: v for k, v in logits.items() if k != "inv_temperature_low"} | {
        "partial": partial,
        "s_partial": partial.stride(0),
        "TEMPERED": tempering != 1,
        "ENTROPIES": method == BY_ENTROPY.value,
        "CHUNK": CHUNK,
        "LANES": lanes(),
        "SUB": sub,
    }
    solve = alpha_range | halves("inv_temperature", 1 / tempering) | halves("fixed_alpha", settings.alpha)
    solve |= {
        "partial": partial,
        "row": row,
        "quadrature": quadrature(theta.device),
        "chunks": chunks,
        "TEMPERED": tempering != 1,
        "METHOD": method,
        "CHUNKS": padded_chunks,
    }
    evaluate = logits | {
        "row": row,
        "partial": evaluated,
        "masses": masses,
        "chunks": chunks,
        "groups": groups,
        "SLOPES": method == ESS_BALANCE.value,
        "DRAW": drawing.value,
        "CHUNK": CHUNK,
        "TILE_GROUPS": TILE_GROUPS,
        "SUB": sub,
    }
    correct = (
        alpha_range
        | {
            "row": row,
            "partial": evaluated,
            "chunks": chunks,
            "tol": settings.tol,
            "METHOD": method,
            "CHUNKS": padded_chunks,
        }
        | halves("inv_temperature", 1 / tempering)
    )
    finish = (
        logits
        | alpha_range
        | {
            "row": row,
            "partial": evaluated,
            "masses": masses,
            "seeds": seeds,
            "positions": positions,
            "tokens": tokens,
            "out": out,
            "statuses": status,
            "rows": rows,
            "chunks": chunks,
            "groups": groups,
            "tol": settings.tol,
            "METHOD": method,
            "DRAW": draw.value,
            "REFINE": True,
            "CHOOSE": True,
            "CHUNKS": padded_chunks,
            "GROUPS": triton.next_power_of_2(groups),
            "TILE_GROUPS": groups_of_a_row_program(),
        }
    )
    # 128 threads: a tile of the first sweep is then one 128-bit load a thread and row. A program that has a row to
    # itself has as many threads as leave it the registers for a float64 sweep.
    launches = [
        Launch(curve_kernel, (rows, chunks), 128, curve),
        Launch(solve_kernel, (rows,), 32, solve),
        Launch(evaluate_kernel, (rows, chunks), 128, evaluate),
    ]
    for _ in range(CORRECTIONS.get(settings.method, 0)):
        launches += [
            Launch(correct_kernel, (rows,), 32, correct),
            Launch(evaluate_kernel, (rows, chunks), 128, evaluate),
        ]
    if settings.truncates:
        truncate = (
            logits
            | halves("top_p", settings.top_p)
            | halves("target_top_p", settings.target_top_p)
            | {
                "row": row,
                "masses": masses,
                "groups": groups,
                "target_top_k": count(settings.target_top_k),
                "top_k": count(settings.top_k),
                "log_min_p": math.log(settings.min_p) if settings.min_p > 0 else 0.0,
                "HAS_TARGET_TOP_K": 0 < settings.target_top_k < vocab_size,
                "HAS_TARGET_TOP_P": settings.target_top_p < 1,
                "HAS_TOP_K": 0 < settings.top_k < vocab_size,
                "HAS_TOP_P": settings.top_p < 1,
                "HAS_MIN_P": settings.min_p > 0,
                "DRAW": drawing.value,
                "BLOCK_GROUPS": groups_of_a_row_program(),
            }
        )
        # each half is told of the other's choices nothing that would have it compiled once more
        refine = {"CHOOSE": False, "DRAW": drawing.value, "GROUPS": 1, "seeds": None, "positions": None, "tokens": None}
        choose = {"REFINE": False, "METHOD": FIXED.value, "CHUNKS": 1}
        launches += [
            Launch(finish_kernel, (rows,), 256, finish | refine),
            Launch(truncate_kernel, (rows,), 512, truncate),
            Launch(finish_kernel, (rows,), 256, finish | choose),
        ]
    else:
        launches.append(Launch(finish_kernel, (rows,), 256, finish))
    if log_q is not None:
        whole = logits | {"row": row, "log_q": log_q, "s_log_q": vocab_size, "BLOCK": GROUP_SIZE}
        launches.append(Launch(log_q_kernel, (rows, groups), 128, whole))
    return launches, (step, log_q)


def qstar_triton(
    theta: Tensor,
    t: Tensor,
    settings: Settings,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    tokens: Tensor | None = None,
    want_log_q: bool = False,
) -> tuple[QStarStep, Tensor | None]:
    """`qstar_reference` by the kernels; float32 fields. Logits are float32, bfloat16 or float16.

    Raises:
        ValueError: float64 logits.
    """
    for name, logits in (("logits_theta", theta), ("logits_t", t)):
        if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {logits.dtype}; the kernels take float32, bfloat16 or float16")
    launches, filled = plan(aligned(theta), aligned(t), settings, seeds, positions, tokens, want_log_q)
    if len(theta):
        with torch.cuda.device_of(theta):
            for launch in launches:
                launch()
    return filled
