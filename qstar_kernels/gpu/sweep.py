"""The kernels that go over the rows in chunks, and those between their sweeps; `launch.py` says how they follow."""

# ruff: noqa: RUF005 - Triton knows no starred tuples

import triton
import triton.language as tl

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.scratch import (
    GROUP,
    INF,
    as_double,
    as_logits,
    bounds_of_sides,
    entropy_of,
    mix,
    mixing,
    zeros_of,
)


@triton.jit
def rescale(m0, m1, m2, drop_theta, drop_t, inv_temperature):
    """The node sums after the maxima rose by −`drop_theta` and −`drop_t` (both ≤ 0)."""
    shift = drop_theta - drop_t
    r0, r1, r2 = (), (), ()
    for k in tl.static_range(scratch.NODES):
        scale = tl.exp((drop_t * (1 - k / scratch.INTERVALS) + drop_theta * (k / scratch.INTERVALS)) * inv_temperature)
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
        drop_theta = tl.maximum(top_theta - new_theta, scratch.FLOOR)
        drop_t = tl.maximum(top_t - new_t, scratch.FLOOR)
        scale_theta, scale_t = tl.exp(drop_theta * inv_temperature), tl.exp(drop_t * inv_temperature)
        difference = difference * scale_theta + m0[0] * (scale_theta - scale_t)
        outside_theta = tl.where(outside_theta > 0, tl.maximum(outside_theta * scale_theta, scratch.OUTSIDE), 0.0)
        outside_t = tl.where(outside_t > 0, tl.maximum(outside_t * scale_t, scratch.OUTSIDE), 0.0)
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

    one_sided = (a > scratch.MASK) != (b > scratch.MASK)  # [N, SUB]
    a = tl.maximum(a - top_theta, scratch.FLOOR)  # [N, SUB]
    b = tl.maximum(b - top_t, scratch.FLOOR)  # [N, SUB]
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
    to_log2 = inv_temperature * scratch.LOG2E
    d = a - b  # [N, SUB]
    falling = d < 0  # [N, SUB], the larger end is α = 0
    end = tl.exp2(tl.maximum(a, b) * to_log2)  # [N, SUB]
    ratio = tl.exp2(tl.abs(d) * (to_log2 * (-1.0 / scratch.INTERVALS)))  # [N, SUB]
    weights = (tl.where(one_sided, 0.0, end),)
    # not 0 however small the mass is: that a model allows a token at all decides about ESS
    outside = tl.where(one_sided, tl.maximum(end, scratch.OUTSIDE), 0.0)  # [N, SUB]
    outside_theta += tl.sum(tl.where(falling, 0.0, outside), axis=1)  # [N]
    outside_t += tl.sum(tl.where(falling, outside, 0.0), axis=1)  # [N]
    for k in tl.static_range(scratch.INTERVALS):
        weights = weights + (weights[k] * ratio,)  # [N, SUB]
    d2 = d * d  # [N, SUB]
    n0, n1, n2 = (), (), ()
    for k in tl.static_range(scratch.NODES):
        w = tl.where(falling, weights[k], weights[scratch.INTERVALS - k])  # [N, SUB]
        n0 = n0 + (m0[k] + tl.sum(w, axis=1),)  # [N]
        n1 = n1 + (m1[k] + tl.sum(w * d, axis=1),)
        n2 = n2 + (m2[k] + tl.sum(w * d2, axis=1),)
    step = weights[0] - weights[scratch.INTERVALS]  # [N, SUB]
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
    m0, m1, m2 = zeros_of(zero, scratch.NODES), zeros_of(zero, scratch.NODES), zeros_of(zero, scratch.NODES)
    rest, cold, extra = zeros_of(zero, 4), zeros_of(zero, 2), zeros_of(zero, 6)
    tops = (tl.full([], scratch.NO_MAXIMUM, tl.float32), tl.full([], scratch.NO_MAXIMUM, tl.float32))

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

    partial += i_row * s_partial + i_chunk * scratch.CURVE_COLUMNS
    for k in tl.static_range(scratch.NODES):
        tl.store(partial + scratch.SUM_W + k, tl.sum(m0[k]))
        tl.store(partial + scratch.SUM_WD + k, tl.sum(m1[k]))
        tl.store(partial + scratch.SUM_WDD + k, tl.sum(m2[k]))
    for k in tl.static_range(4):
        tl.store(partial + scratch.DIFFERENCE + k, tl.sum(rest[k]))
    tl.store(partial + scratch.MAX_THETA, tops[0])
    tl.store(partial + scratch.MAX_T, tops[1])
    if ENTROPIES:
        for k in tl.static_range(6):
            tl.store(partial + scratch.ENTROPY + k, tl.sum(extra[k]))
    if TEMPERED:
        tl.store(partial + scratch.COLD_THETA, tl.sum(cold[0]))
        tl.store(partial + scratch.COLD_T, tl.sum(cold[1]))


@triton.jit
def merged(partial, column, scale, o_chunk, chunks):
    """Σ over the chunks of one column of the first sweep's sums times `scale` [C]: float64."""
    x = tl.load(partial + o_chunk * scratch.CURVE_COLUMNS + column, mask=o_chunk < chunks, other=0.0)  # [C]
    return tl.sum(x.to(tl.float64) * scale)


@triton.jit
def merged_nodes(partial, column, o_chunk, o_node, chunks):
    """One moment of all chunks at all nodes: float64 [C, 8]."""
    mask = (o_chunk[:, None] < chunks) & (o_node[None, :] < scratch.NODES)  # [C, 8]
    return tl.load(
        partial + o_chunk[:, None] * scratch.CURVE_COLUMNS + column + o_node[None, :], mask=mask, other=0.0
    ).to(tl.float64)


@triton.jit
def at_node(x, o_node, k):
    """Element `k` of the block x [8]; a node without a value must not spoil it."""
    return tl.sum(tl.where(o_node == k, x, 0.0))


@triton.jit
def hermite(x, slope, curvature, o_node):
    """The polynomial with the given values and derivatives [8] at the nodes, at x."""
    node = o_node.to(tl.float64) / scratch.INTERVALS  # [8]
    basis = tl.where(o_node < scratch.NODES, 1.0, 0.0).to(tl.float64)  # [8], Lagrange's polynomials at x
    tilt = tl.zeros([8], tl.float64)  # [8], their derivatives at their own nodes
    for j in tl.static_range(scratch.NODES):
        other = (o_node != j) & (o_node < scratch.NODES)  # [8]
        gap = tl.where(other, node - j / scratch.INTERVALS, 1.0)  # [8]
        basis = basis * tl.where(other, (x - j / scratch.INTERVALS) / gap, 1.0)
        tilt += tl.where(other, 1.0 / gap, 0.0)
    away = x - node  # [8]
    return tl.sum(basis * basis * (slope * (1 - 2 * tilt * away) + curvature * away))


@triton.jit
def row_entropy(partial, side: tl.constexpr, drop, scale, inv_temperature, o_chunk, chunks):
    """Entropy of one row from its chunks; `drop` and `scale` = e^drop are [C]."""
    count = tl.load(
        partial + o_chunk * scratch.CURVE_COLUMNS + scratch.ENTROPY + side, mask=o_chunk < chunks, other=0.0
    )  # [C]
    others = tl.load(
        partial + o_chunk * scratch.CURVE_COLUMNS + scratch.ENTROPY + side + 1, mask=o_chunk < chunks, other=0.0
    )  # [C]
    first = tl.load(
        partial + o_chunk * scratch.CURVE_COLUMNS + scratch.ENTROPY + side + 2, mask=o_chunk < chunks, other=0.0
    )  # [C]
    mass = count.to(tl.float64) + others.to(tl.float64)  # [C]
    # the maxima of the row are those of the chunks that reach it
    maxima = tl.sum(tl.where(drop == 0, count.to(tl.float64), 0.0))
    others = tl.sum(scale * tl.where(drop == 0, others.to(tl.float64), mass))
    return entropy_of(maxima, others, tl.sum(scale * (first.to(tl.float64) * inv_temperature + drop * mass)))


@triton.jit
def root_between(low, high, gap, curvature, o_node):
    """Root of the interpolated F' − s between the nodes `low` and `high`, by secant steps that stay between them."""
    node = o_node.to(tl.float64) / scratch.INTERVALS  # [8]
    gap_low = tl.sum(tl.where((node == low) & (o_node < scratch.NODES), gap, 0.0))
    gap_high = tl.sum(tl.where((node == high) & (o_node < scratch.NODES), gap, 0.0))
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
    partial += i_row * chunks * scratch.CURVE_COLUMNS
    row += i_row * scratch.ROW_COLUMNS
    o_chunk, o_node = tl.arange(0, CHUNKS), tl.arange(0, 8)
    present = o_chunk < chunks  # [C]
    tops_theta = tl.load(
        partial + o_chunk * scratch.CURVE_COLUMNS + scratch.MAX_THETA, mask=present, other=scratch.NO_MAXIMUM
    )  # [C]
    tops_t = tl.load(
        partial + o_chunk * scratch.CURVE_COLUMNS + scratch.MAX_T, mask=present, other=scratch.NO_MAXIMUM
    )  # [C]
    top_theta, top_t = tl.max(tops_theta), tl.max(tops_t)
    one = tl.full([CHUNKS], 1.0, tl.float64)  # [C]
    nans = merged(partial, scratch.NANS, one, o_chunk, chunks)

    status = tl.where((top_theta == scratch.NO_MAXIMUM) | (top_t == scratch.NO_MAXIMUM), scratch.STATUS_NO_SUPPORT, 0)
    status = tl.where(
        (top_theta >= scratch.LARGEST) | (top_t >= scratch.LARGEST), scratch.STATUS_POSITIVE_INFINITY, status
    )
    status = tl.where(nans > 0, scratch.STATUS_NAN, status)
    tl.store(row + scratch.STATUS, status.to(tl.float64))
    if status == 0:
        cold_drop_theta = tl.maximum(tops_theta - top_theta, scratch.FLOOR).to(tl.float64)  # [C]
        cold_drop_t = tl.maximum(tops_t - top_t, scratch.FLOOR).to(tl.float64)  # [C]
        drop_theta, drop_t = cold_drop_theta * inv_temperature, cold_drop_t * inv_temperature  # [C]
        scale_theta, scale_t = tl.exp(drop_theta), tl.exp(drop_t)  # [C]

        node = tl.minimum(o_node.to(tl.float64) / scratch.INTERVALS, 1.0)  # [8]
        scale = tl.exp(drop_t[:, None] * (1 - node)[None, :] + drop_theta[:, None] * node[None, :])  # [C, 8]
        shift = (drop_theta - drop_t)[:, None]  # [C, 1], from a chunk's d to the row's
        w = merged_nodes(partial, scratch.SUM_W, o_chunk, o_node, chunks)  # [C, 8]
        wd = merged_nodes(partial, scratch.SUM_WD, o_chunk, o_node, chunks) * inv_temperature  # [C, 8]
        wdd = (
            merged_nodes(partial, scratch.SUM_WDD, o_chunk, o_node, chunks) * inv_temperature * inv_temperature
        )  # [C, 8]
        m0 = tl.sum(scale * w, axis=0)  # [8]
        m1 = tl.sum(scale * (wd + shift * w), axis=0)  # [8]
        m2 = tl.sum(scale * (wdd + shift * (2 * wd + shift * w)), axis=0)  # [8]
        known = m0 > 0  # [8], false where the common support lies far below both maxima
        m0 = tl.where(known, m0, 1.0)
        f = tl.log(m0)  # [8]
        slope = m1 / m0  # [8]
        curvature = tl.where(known, tl.maximum(m2 / m0 - slope * slope, 0.0), 0.0)  # [8]

        # s = log(A + …) − log(B + …) through the sum of differences: A − B itself would cancel on close pairs
        outside_theta = merged(partial, scratch.OUTSIDE_THETA, scale_theta, o_chunk, chunks)
        outside_t = merged(partial, scratch.OUTSIDE_T, scale_t, o_chunk, chunks)
        allows_theta = merged(partial, scratch.OUTSIDE_THETA, one, o_chunk, chunks) > 0
        allows_t = merged(partial, scratch.OUTSIDE_T, one, o_chunk, chunks) > 0
        mass_theta = at_node(tl.where(known, m0, 0.0), o_node, scratch.INTERVALS)
        mass_t = at_node(tl.where(known, m0, 0.0), o_node, 0)
        low_mass = tl.sum(tl.where(o_node[None, :] == 0, w, 0.0), axis=1)  # [C]
        difference = merged(partial, scratch.DIFFERENCE, scale_theta, o_chunk, chunks)
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
        all_known = tl.min((known | (o_node >= scratch.NODES)).to(tl.int32)) == 1
        inside = (allows_theta | allows_t) == 0
        least = tl.min(tl.where(o_node < scratch.NODES, curvature, INF))
        smooth = all_known & inside & (tl.max(tl.abs(fine - coarse)) <= least * scratch.SMOOTH)
        gap = tl.where(smooth, fine, slope - s)  # [8]

        known = known & (o_node < scratch.NODES)
        gap_low, gap_high = at_node(gap, o_node, 0), at_node(gap, o_node, scratch.INTERVALS)
        f_low, f_high = at_node(f, o_node, 0), at_node(f, o_node, scratch.INTERVALS)
        slope_low, slope_high = at_node(slope, o_node, 0), at_node(slope, o_node, scratch.INTERVALS)
        worst_low = tl.maximum(norm_theta - slope_low, norm_t) - f_low
        worst_high = tl.maximum(norm_theta, norm_t + slope_high) - f_high
        better_end = tl.where(worst_low <= worst_high, 0.0, 1.0).to(tl.float64)

        if METHOD == scratch.FIXED:
            alpha = as_double(fixed_alpha, fixed_alpha_low)
        elif METHOD == scratch.BY_ENTROPY:
            entropy_theta = row_entropy(partial, 0, drop_theta, scale_theta, inv_temperature, o_chunk, chunks)
            entropy_t = row_entropy(partial, 3, drop_t, scale_t, inv_temperature, o_chunk, chunks)
            total = entropy_theta + entropy_t
            alpha = tl.where(total > 0, entropy_theta / tl.where(total > 0, total, 1.0), 0.5)
            smooth = total > scratch.SMALL_ENTROPY
        elif METHOD == scratch.REVERSE:
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
            if METHOD == scratch.ESS_BALANCE:
                # to leading order the root lies three times as far from 1/2 as that of the KL rule
                alpha = tl.minimum(tl.maximum(0.5 + 3 * (alpha - 0.5), 0.02), 0.98)
                low, high = tl.zeros_like(low), tl.zeros_like(high) + 1
            tl.store(row + scratch.LOW, low)
            tl.store(row + scratch.HIGH, high)
        alpha = tl.minimum(tl.maximum(alpha, alpha_min), alpha_max)

        # Bounds by convexity: the chord between the neighbouring nodes, the tangents at the ends.
        left = tl.max(tl.where(known & (node <= alpha), node, 0.0))
        right = tl.min(tl.where(known & (node >= alpha), node, 1.0))
        f_left = tl.sum(tl.where((node == left) & known, f, 0.0))
        f_right = tl.sum(tl.where((node == right) & known, f, 0.0))
        share = tl.where(right > left, (alpha - left) / tl.where(right > left, right - left, 1.0), 0.0)
        tl.store(row + scratch.BOUND, f_left + share * (f_right - f_left))
        tl.store(row + scratch.BOUND_HIGH, f_high + (1 - alpha) * slope_high)
        tl.store(row + scratch.BOUND_LOW, f_low - alpha * slope_low)
        tl.store(row + scratch.SETTLED, 0.0)
        tl.store(row + scratch.ALPHA, alpha)
        tl.store(row + scratch.SECANT, s)
        tl.store(row + scratch.NORM_THETA, norm_theta)
        tl.store(row + scratch.NORM_T, norm_t)
        tl.store(row + scratch.TOP_THETA, top_theta.to(tl.float64))
        tl.store(row + scratch.TOP_T, top_t.to(tl.float64))
        tl.store(row + scratch.IS_SMOOTH, smooth.to(tl.float64))
        tl.store(row + scratch.THETA_OUTSIDE, tl.where(allows_theta, 1.0, 0.0))
        tl.store(row + scratch.T_OUTSIDE, tl.where(allows_t, 1.0, 0.0))
        tl.store(row + scratch.BETTER_END, better_end)
        if TEMPERED:
            tl.store(
                row + scratch.LOG_COLD_THETA,
                tl.log(merged(partial, scratch.COLD_THETA, tl.exp(cold_drop_theta), o_chunk, chunks)),
            )
            tl.store(
                row + scratch.LOG_COLD_T, tl.log(merged(partial, scratch.COLD_T, tl.exp(cold_drop_t), o_chunk, chunks))
            )
        else:
            tl.store(row + scratch.LOG_COLD_THETA, norm_theta)
            tl.store(row + scratch.LOG_COLD_T, norm_t)


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
    twice = inv_temperature * (2 * scratch.LOG2E)
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
    row += i_row * scratch.ROW_COLUMNS
    masses += i_row * groups
    if (tl.load(row + scratch.STATUS) == 0) & (tl.load(row + scratch.SETTLED) == 0):
        exact_inv = as_double(inv_temperature, inv_temperature_low)
        mixed = mixing(row, (tl.load(row + scratch.TOP_THETA), tl.load(row + scratch.TOP_T)), exact_inv)
        sides = bounds_of_sides(row, mixed[4])
        center = (tl.load(row + scratch.SECANT) / exact_inv).to(tl.float32)
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
            if DRAW == scratch.SAMPLED:
                tl.store(masses + first // GROUP + o_group, tl.sum(mass, axis=1))
            elif DRAW == scratch.GREEDY:
                tl.store(masses + first // GROUP + o_group, tl.max(highest, axis=1))
        if whole < stop:
            a = as_logits(tl.load(theta + whole + o, mask=whole + o < stop, other=-INF))  # [GROUPS, LANES, SUB]
            b = as_logits(tl.load(t + whole + o, mask=whole + o < stop, other=-INF))  # [GROUPS, LANES, SUB]
            sums, mass, highest = evaluate_tile(a, b, sums, mixed, sides, center, inv_temperature, SLOPES)
            group = whole // GROUP + o_group  # [GROUPS]
            if DRAW == scratch.SAMPLED:
                tl.store(masses + group, tl.sum(mass, axis=1), mask=group < groups)
            elif DRAW == scratch.GREEDY:
                tl.store(masses + group, tl.max(highest, axis=1), mask=group < groups)

        partial += (i_row * chunks + i_chunk) * scratch.EVALUATED_COLUMNS
        for k in tl.static_range(7):
            tl.store(partial + k, tl.sum(sums[k]))


@triton.jit
def point_of(row, partial, tops, chunks, inv_temperature, CHUNKS: tl.constexpr):
    """What a float32 sweep found at α: log-mass, mean and variance of d − s, log-mass and mean at 2 − α and at −α."""
    o_chunk = tl.arange(0, CHUNKS)  # [C]
    sums = ()
    for k in tl.static_range(7):
        x = tl.load(partial + o_chunk * scratch.EVALUATED_COLUMNS + k, mask=o_chunk < chunks, other=0.0)  # [C]
        sums = sums + (tl.sum(x.to(tl.float64)),)
    bound = mixing(row, tops, inv_temperature)[4]
    sides = bounds_of_sides(row, bound)
    bound = bound.to(tl.float64)
    mean = sums[1] / sums[0] * inv_temperature
    square = sums[2] / sums[0] * inv_temperature * inv_temperature
    return (
        bound * scratch.LN2 + tl.log(sums[0]),
        mean,
        tl.maximum(square - mean * mean, 0.0),
        (sides[0].to(tl.float64) - bound) * scratch.LN2 + tl.log(sums[3]),
        sums[5] / sums[3] * inv_temperature,
        (sides[1].to(tl.float64) - bound) * scratch.LN2 + tl.log(sums[4]),
        sums[6] / sums[4] * inv_temperature,
    )


@triton.jit
def center_of(row, inv_temperature):
    """s as the sweep subtracted it from d."""
    return (tl.load(row + scratch.SECANT) / inv_temperature).to(tl.float32).to(tl.float64) * inv_temperature


@triton.jit
def judge(row, point, center, alpha_min, alpha_max, tol, METHOD: tl.constexpr):
    """1 if α is accepted, 2 if float32 cannot tell, else 0; what vanishes at the root, and its derivative."""
    alpha, s = tl.load(row + scratch.ALPHA), tl.load(row + scratch.SECANT)
    smooth = tl.load(row + scratch.IS_SMOOTH) > 0
    f, mean, variance, f_high, mean_high, f_low, mean_low = point
    # a comparison with NaN is false: sums that under- or overflowed are not accepted
    fit = (variance <= scratch.WIDEST) & (tl.abs(f) <= scratch.DEEPEST) & (tl.abs(f_high) < INF) & (tl.abs(f_low) < INF)
    residual, steepness = mean + center - s, variance
    if METHOD == scratch.KL_SYMMETRY:
        # what one model alone allows is in s and not in F'': float32 leaves of F' − s too much for a close pair's α
        uneven = (tl.load(row + scratch.THETA_OUTSIDE) > 0) | (tl.load(row + scratch.T_OUTSIDE) > 0)
        fit = fit & ((variance >= scratch.CLOSE) | (variance <= scratch.FLAT) | (uneven == 0))
        # on a smooth row α is better known from the first sweep than float32 could tell here
        near = smooth | (tl.abs(residual) <= variance * scratch.ALPHA_TOL) | (variance <= scratch.FLAT)
        stopped = ((alpha <= alpha_min) & (residual >= 0)) | ((alpha >= alpha_max) & (residual <= 0))
        accepted = stopped | (near & (tl.abs(residual) <= tol))
    elif METHOD == scratch.ESS_BALANCE:
        residual, steepness = f_low - f_high + 2 * s, mean_high - mean_low
        fit = fit & (steepness >= scratch.STEEP)
        accepted = (tl.abs(residual) <= tl.minimum(steepness * (scratch.ALPHA_TOL / 2), tol)) & (alpha > alpha_min)
        accepted = accepted & (alpha < alpha_max)
    else:
        if METHOD != scratch.FIXED:
            fit = fit & smooth
        accepted = fit
    return tl.where(fit, tl.where(accepted, 1, 0), 2), residual, steepness


@triton.jit(do_not_specialize=["chunks"])
def correct_kernel(
    row,
    partial,
    chunks,
    inv_temperature,
    inv_temperature_low,
    alpha_min,
    alpha_min_low,
    alpha_max,
    alpha_max_low,
    tol,
    METHOD: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A guarded Newton step for a row whose residual is too large, before its next float32 sweep by all programs."""
    i_row = tl.program_id(0).to(tl.int64)
    inv_temperature = as_double(inv_temperature, inv_temperature_low)
    alpha_min, alpha_max = as_double(alpha_min, alpha_min_low), as_double(alpha_max, alpha_max_low)
    row += i_row * scratch.ROW_COLUMNS
    partial += i_row * chunks * scratch.EVALUATED_COLUMNS
    if (tl.load(row + scratch.STATUS) == 0) & (tl.load(row + scratch.SETTLED) == 0):
        tops = (tl.load(row + scratch.TOP_THETA), tl.load(row + scratch.TOP_T))
        center = center_of(row, inv_temperature)
        point = point_of(row, partial, tops, chunks, inv_temperature, CHUNKS)
        verdict, residual, steepness = judge(row, point, center, alpha_min, alpha_max, tol, METHOD)
        tl.store(row + scratch.SETTLED, verdict.to(tl.float64))
        if verdict == 0:
            alpha = tl.load(row + scratch.ALPHA)
            low = tl.where(residual < 0, alpha, tl.load(row + scratch.LOW))
            high = tl.where(residual < 0, tl.load(row + scratch.HIGH), alpha)
            newton = alpha - residual / tl.where(steepness > 0, steepness, 1e-300)
            step = tl.where((newton > low) & (newton < high), newton, (low + high) / 2)
            step = tl.minimum(tl.maximum(step, alpha_min), alpha_max)
            move = step - alpha
            f, mean, variance, f_high, mean_high, f_low, mean_low = point
            tl.store(row + scratch.ALPHA, step)
            tl.store(row + scratch.LOW, low)
            tl.store(row + scratch.HIGH, high)
            # close enough to F at the new place to keep the exponents in range
            tl.store(row + scratch.BOUND, f + move * (mean + center + move * variance / 2))
            if METHOD == scratch.ESS_BALANCE:
                f_high -= move * (mean_high + center)
                f_low -= move * (mean_low + center)
            tl.store(row + scratch.BOUND_HIGH, f_high)
            tl.store(row + scratch.BOUND_LOW, f_low)
