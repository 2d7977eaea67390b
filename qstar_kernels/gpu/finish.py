"""After the sweeps: rows that are not settled solved in float64, the token drawn and looked up.

The float64 sweeps are made by one program a row. They are rare: what brings them about is a pair so far apart that
float32 is not enough, or two tokens so near one another, and never the ordinary row.
"""

import triton
import triton.language as tl

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.scratch import (
    GROUP,
    INF,
    as_double,
    as_logits,
    budget_of,
    budget_step,
    entropy_of,
    exact_logits,
    exact_mix,
    is_sound,
    kls_of,
    more_than_maxima,
    outside,
    own_settings,
    relative_logit,
    store_diagnostics,
    value_of,
)


@triton.jit
def exact_tile(theta, t, o, vocab_size, tops, inv_temperature):
    """`exact_logits` of the tokens o [N], −inf beyond the row."""
    a = as_logits(tl.load(theta + o, mask=o < vocab_size, other=-INF))  # [N]
    b = as_logits(tl.load(t + o, mask=o < vocab_size, other=-INF))  # [N]
    return exact_logits(a, b, tops, inv_temperature)


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
def exact_sweep(
    theta, t, masses, vocab_size, tops, inv_temperature, alpha, center, DRAW: tl.constexpr, TILE_GROUPS: tl.constexpr
):
    """The second sweep in float64 by one program, with maxima of its own; `masses` become logarithms.

    Returns log-mass, mean and variance of d − center at α, log-mass and mean at 2 − α and at −α, and the
    log-normalisers of π_θ and π_t.
    """
    nothing = tl.full([], 0.0, tl.float64)
    bottom = tl.full([], -INF, tl.float64)
    top, top_high, top_low = bottom, bottom, bottom
    sums, sums_high, sums_low = (nothing, nothing, nothing), (nothing, nothing, nothing), (nothing, nothing, nothing)
    norm_theta, norm_t = nothing, nothing
    o_group = tl.arange(0, TILE_GROUPS)  # [GROUPS]
    for start in range(0, vocab_size, TILE_GROUPS * GROUP):
        o = start + tl.arange(0, TILE_GROUPS * GROUP)  # [N]
        a, b, allow_theta, allow_t = exact_tile(theta, t, o, vocab_size, tops, inv_temperature)
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
            tl.store(masses + start // GROUP + o_group, log_mass, mask=start + o_group * GROUP < vocab_size)
    mean = sums[1] / sums[0]
    return (
        (top + tl.log(sums[0]), mean, tl.maximum(sums[2] / sums[0] - mean * mean, 0.0)),
        (top_high + tl.log(sums_high[0]), sums_high[1] / sums_high[0]),
        (top_low + tl.log(sums_low[0]), sums_low[1] / sums_low[0]),
        (tl.log(norm_theta), tl.log(norm_t)),
    )


@triton.jit
def exact_entropy_ratio(theta, t, vocab_size, tops, inv_temperature, TILE_GROUPS: tl.constexpr):
    """H(π_θ) / (H(π_θ) + H(π_t)) in float64 by one program."""
    zero = tl.full([], 0.0, tl.float64)
    theta_sums, t_sums = (zero, zero, zero), (zero, zero, zero)
    for start in range(0, vocab_size, TILE_GROUPS * GROUP):
        o = start + tl.arange(0, TILE_GROUPS * GROUP)  # [N]
        a, b, allow_theta, allow_t = exact_tile(theta, t, o, vocab_size, tops, inv_temperature)
        theta_sums = add_entropy(theta_sums, a, allow_theta)
        t_sums = add_entropy(t_sums, b, allow_t)
    entropy_theta = entropy_of(theta_sums[0], theta_sums[1], theta_sums[2])
    entropy_t = entropy_of(t_sums[0], t_sums[1], t_sums[2])
    total = entropy_theta + entropy_t
    return tl.where(total > scratch.TINY_ENTROPY, entropy_theta / tl.where(total > 0, total, 1.0), 0.5)


@triton.jit
def add_entropy(sums, a, allowed):
    """Add the count of a = 0, the other Σ e^a and Σ e^a a of a tile [N]."""
    w = tl.where(allowed, tl.exp(a), 0.0)  # [N]
    at_top = allowed & (a == 0)  # [N]
    maxima = sums[0] + tl.sum(at_top.to(tl.float64))
    return maxima, sums[1] + tl.sum(tl.where(at_top, 0.0, w)), sums[2] + tl.sum(w * a)


@triton.jit
def words(seed, position, ids, STREAM: tl.constexpr):
    """The two 32-bit words of each id [N] (`qstar_kernels.noise`)."""
    pair = (ids // 2).to(tl.uint32)  # [N]
    zero = tl.zeros_like(pair)  # [N]
    w0, w1, w2, w3 = tl.philox_impl(
        pair,
        zero + (position & 0xFFFFFFFF).to(tl.uint32),
        zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32),
        zero + STREAM,
        (seed & 0xFFFFFFFF).to(tl.uint32),
        ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32),
        10,
    )
    odd = (ids & 1) == 1  # [N]
    return tl.where(odd, w2, w0), tl.where(odd, w3, w1)


@triton.jit
def gumbel(seed, position, ids, STREAM: tl.constexpr, DTYPE: tl.constexpr):
    """Standard Gumbel noise of the ids [N], float32 or float64."""
    high, low = words(seed, position, ids, STREAM)  # [N]
    upper = high >= 0x80000000  # [N]
    high, low = tl.where(upper, high ^ 0xFFFFFFFF, high), tl.where(upper, low ^ 0xFFFFFFFF, low)
    u = high.to(DTYPE) * 2.0**-32 + (low.to(DTYPE) + 0.5) * 2.0**-64  # [N], in (0, 0.5]
    rest = 1 - u  # [N]
    # log1p(−u) by Kahan: the error of 1 − u cancels in the ratio
    small = tl.where(rest == 1, u, -tl.log(rest) * (u / tl.where(rest == 1, 1.0, 1 - rest)))  # [N]
    return -tl.log(tl.where(upper, -tl.log(u), small))


@triton.jit
def refine(
    theta,
    t,
    row,
    masses,
    out,
    vocab_size,
    rows,
    tops,
    inv_temperature,
    alpha_min,
    alpha_max,
    budget,
    tol,
    METHOD: tl.constexpr,
    DRAW: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
):
    """Find α in float64; write the diagnostics. Returns 0 or the row's status."""
    alpha, s = tl.load(row + scratch.ALPHA), tl.load(row + scratch.SECANT)
    theta_alone, t_alone = tl.load(row + scratch.THETA_OUTSIDE) > 0, tl.load(row + scratch.T_OUTSIDE) > 0
    uneven = theta_alone | t_alone
    norm_theta, norm_t = s, s
    f, slope, f_high, f_low, variance, residual = s, s, s, s, s, s
    center = tl.where(tl.abs(s) < INF, s, 0.0)
    settled, status = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    low, high = tl.full([], 0.0, tl.float64), tl.full([], 1.0, tl.float64)
    last_step, step_before = tl.full([], 1.0, tl.float64), tl.full([], 1.0, tl.float64)
    low_known, high_known, last, count = 0, 0, 0, 0
    better_end = tl.full([], 0.0, tl.float64)
    if METHOD == "entropy":
        alpha = exact_entropy_ratio(theta, t, vocab_size, tops, inv_temperature, TILE_GROUPS)
        alpha = tl.minimum(tl.maximum(alpha, alpha_min), alpha_max)
    if (METHOD == "reverse_kl_symmetry") | (METHOD == "ess_balance"):
        # the slopes at both ends; and without a root, which takes different supports, the end with the smaller KL
        ends = 2
        if METHOD == "ess_balance":
            ends = tl.where(uneven, 2, 0)
        gap_low, gap_high, worst_low = alpha, alpha, alpha
        for end in range(ends):
            at_end = tl.full([], 0.0, tl.float64) + end
            at, _up, _down, norms = exact_sweep(
                theta, t, masses, vocab_size, tops, inv_temperature, at_end, center, scratch.NO_TOKEN, TILE_GROUPS
            )
            gap = at[1] + (center - (norms[0] - norms[1]))
            kl_theta, kl_t, _size = kls_of(at_end, at[1] + center, at[0], norms[0], norms[1])
            worst = tl.maximum(kl_theta, kl_t)
            better_end = tl.where((end == 1) & (worst < worst_low), 1.0, 0.0).to(tl.float64)
            gap_low, worst_low = tl.where(end == 0, gap, gap_low), tl.where(end == 0, worst, worst_low)
            gap_high = gap
        if METHOD == "reverse_kl_symmetry":
            spread = gap_high - gap_low
            alpha = tl.where(spread > 1e-14, gap_high / tl.where(spread > 1e-14, spread, 1.0), 0.5)
            alpha = tl.where(uneven & ((gap_low > 0) | (gap_high < 0)), better_end, alpha)
            alpha = tl.minimum(tl.maximum(alpha, alpha_min), alpha_max)
    if METHOD != "fixed":
        alpha = tl.where((alpha >= 0) & (alpha <= 1), alpha, 0.5)
    if (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):
        last = (alpha_min == alpha_max).to(tl.int32)  # then it is given
        alpha = tl.where(last == 1, alpha_min, alpha)
    # the range is applied at the end, so that a root outside it is told from no root at all
    while settled == 0:
        at, up, down, norms = exact_sweep(
            theta, t, masses, vocab_size, tops, inv_temperature, alpha, center, DRAW, TILE_GROUPS
        )
        f, mean, variance = at
        f_high, mean_high = up
        f_low, mean_low = down
        norm_theta, norm_t = norms
        s = norm_theta - norm_t
        slope = mean + center
        residual, steepness = mean + (center - s), variance
        rounding = 4e-16 * (tl.abs(slope) + tl.sqrt(variance))
        if METHOD == "ess_balance":
            residual, steepness = f_low - f_high + 2 * s, mean_high - mean_low
            rounding = 4e-16 * (tl.abs(f_low) + tl.abs(f_high))
        least, of_alpha = 1e-14, 1e-7
        if (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):
            residual, steepness, kl, away = budget_of(alpha, slope, f, norm_theta, norm_t, variance, budget, METHOD)
            norm = norm_theta if METHOD == "kl_budget" else norm_t
            rounding = 4e-16 * (tl.abs(f) + tl.abs(norm) + tl.abs(away * slope))
            least, of_alpha = 1e-15, 1e-12
        count += 1
        if f == -INF:
            status = scratch.STATUS_DISJOINT
            settled = 1
        elif last == 1 or (METHOD == "fixed") | (METHOD == "entropy") | (METHOD == "reverse_kl_symmetry"):
            settled = 1
        else:
            center = tl.where(tl.abs(s) < INF, s, 0.0)
            size = tl.abs(residual)
            rootless = ((alpha <= 0) & (residual > 0)) | ((alpha >= 1) & (residual < 0))
            # convergence first: at the root rounding can put the Newton step on the bracket's end, and a bisection
            # there would throw α half a bracket away
            done = (size <= 1e-3 * tol) & (size <= of_alpha * steepness)
            done = done | (size <= tl.maximum(rounding, least)) | rootless
            done = done | (high - low <= tl.maximum(2.3e-16 * high, 1e-30)) | (count >= scratch.MOST_SWEEPS)
            if residual < 0:
                low, low_known = alpha, 1
            else:
                high, high_known = alpha, 1
            newton = alpha - residual / tl.where(steepness > 0, steepness, 1e-300)
            if (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):
                change = budget_step(kl, away, variance, budget)
                newton = alpha - change if METHOD == "kl_budget" else alpha + change
            # an end of [0, 1] is tried once before the bracket is halved; so it is where steps do not shrink, as in
            # an exponential tail, which takes hundreds of them
            middle = (low + high) / 2
            step = tl.where(newton <= low, tl.where(low_known == 1, middle, low), newton)
            step = tl.where(newton >= high, tl.where(high_known == 1, middle, high), step)
            shrinks = (tl.abs(step - alpha) < step_before / 2) | (step <= low) | (step >= high)
            step = tl.where(shrinks, step, middle)
            step_before = last_step
            last_step = tl.abs(step - alpha)
            if done:
                step = tl.where(rootless & uneven, better_end, alpha) if METHOD == "ess_balance" else alpha
                step = tl.minimum(tl.maximum(step, alpha_min), alpha_max)
                last = 1
                if step == alpha:
                    settled = 1
            alpha = step
    tl.store(row + scratch.ALPHA, alpha)
    if status == 0:
        lost = alpha * 0
        if METHOD == "fixed":  # beyond [0, 1] the KLs are differences of numbers of any size
            lost = 4e-16 * ((tl.abs(alpha) + 1) * tl.abs(slope) + tl.abs(f))
            lost = tl.where(outside(alpha) > 0, lost, 0.0)
        sound = is_sound(alpha, slope, f, f_high, f_low, norm_theta, norm_t, alpha_min, alpha_max, 1e-9 + lost)
        if METHOD == "fixed":
            kl_theta, kl_t, _size = kls_of(alpha, slope, f, norm_theta, norm_t)
            sound = sound & (lost <= 1e-5 * tl.maximum(tl.minimum(kl_theta, kl_t), 1.0))
        if (METHOD == "kl_budget") | (METHOD == "kl_budget_t"):
            residual, _steep, kl, _away = budget_of(alpha, slope, f, norm_theta, norm_t, variance, budget, METHOD)
            stopped = ((alpha <= alpha_min) & (residual > 0)) | ((alpha >= alpha_max) & (residual < 0))
            sound = sound & ((tl.abs(residual) <= tol * tl.maximum(kl, 1.0)) | stopped)
        if (METHOD == "kl_symmetry") | (METHOD == "ess_balance"):
            _kl_theta, _kl_t, size = kls_of(alpha, slope, f, norm_theta, norm_t)
            at_low, at_high = alpha <= alpha_min, alpha >= alpha_max
            stopped = (at_low & (residual > 0)) | (at_high & (residual < 0)) | (uneven & (at_low | at_high))
            sound = sound & ((tl.abs(residual) <= tol * size) | stopped)
        status = tl.where(sound, 0, scratch.STATUS_INEXACT)
    tl.store(row + scratch.LOG_NORM, f)
    tl.store(row + scratch.TOP_X, f)
    tl.store(row + scratch.FLOOR_X, -INF)
    tl.store(row + scratch.FLOOR_T, -INF)
    tl.store(row + scratch.DOUBT, 0.0)
    tl.store(row + scratch.SLOPE, slope)
    tl.store(row + scratch.DEVIATION, tl.sqrt(variance))
    if status == 0:
        store_diagnostics(out, rows, alpha, slope, f, f_high, f_low, norm_theta, norm_t, theta_alone, t_alone)
    return status


@triton.jit
def is_close(key, slack, greatest):
    """1 if one of the keys [N] that are not the `greatest` may be greater, each off by its `slack` [N].

    But for a key of −inf, which has no chance.
    """
    lead = tl.max(tl.where(greatest, key - slack, -INF))
    rival = tl.max(tl.where(greatest | (key == -INF), -INF, key + slack))
    return (rival >= lead).to(tl.int32)


@triton.jit
def draw_token(
    theta,
    t,
    row,
    masses,
    seed,
    position,
    vocab_size,
    groups,
    tops,
    inv_temperature,
    exact,
    GROUPS: tl.constexpr,
):
    """The group with the greatest log-mass plus noise, and within it the token with the greatest log q plus noise.

    Also says whether float32 may have decided, which it has no part in where the row is `exact`: whether another key
    comes as near as rounding and the doubt about α allow. Logarithms are made small in float64 before they are
    rounded: −40000.003 is −40000.004 in float32.
    """
    doubt, slope = tl.load(row + scratch.DOUBT), tl.load(row + scratch.SLOPE)
    o_group = tl.arange(0, GROUPS)  # [GROUPS]
    mass = tl.load(masses + o_group, mask=o_group < groups, other=-INF)  # [GROUPS]
    slack = tl.load(masses + groups + o_group, mask=o_group < groups, other=0.0)  # [GROUPS]
    mass -= tl.max(mass)
    # of q's mass: a group's mean d is no further from F' than the deviation over the root of its share
    log_share = mass - tl.log(tl.sum(tl.exp(mass)))  # [GROUPS]
    far = tl.load(row + scratch.DEVIATION) * tl.exp(-0.5 * tl.maximum(log_share, -100.0))  # [GROUPS]
    slack += scratch.NOISE_DOUBT + doubt * far  # [GROUPS]
    group, close = chosen(mass, slack, seed, position, o_group, exact, scratch.STREAM_OF_GROUPS)

    o = group * GROUP + tl.arange(0, GROUP)  # [GROUP]
    a = as_logits(tl.load(theta + o, mask=o < vocab_size, other=-INF))  # [GROUP]
    b = as_logits(tl.load(t + o, mask=o < vocab_size, other=-INF))  # [GROUP]
    log_q, d = exact_log_q(a, b, row, tops, inv_temperature)  # [GROUP] each
    log_q -= tl.max(log_q)
    slack = scratch.NOISE_DOUBT + doubt * tl.abs(d - slope)  # [GROUP]
    token, close_token = chosen(log_q, slack, seed, position, o, exact, scratch.STREAM_OF_TOKENS)
    return group * GROUP + token, close | close_token


@triton.jit
def chosen(value, slack, seed, position, ids, exact, STREAM: tl.constexpr):
    """The index of the greatest value plus noise [N], and whether another may be greater, each being known to within
    its `slack` [N]; but for a value of −inf, which has no chance."""
    if exact == 1:
        best = tl.argmax(value + gumbel(seed, position, ids, STREAM, tl.float64), axis=0).to(tl.int32)
        close = 0
    else:
        key = value.to(tl.float32) + gumbel(seed, position, ids, STREAM, tl.float32)  # [N]
        best = tl.argmax(key, axis=0).to(tl.int32)
        greatest = tl.arange(0, value.shape[0]) == best  # [N]
        lead = tl.max(tl.where(greatest, key - slack, -INF))
        rival = tl.max(tl.where(greatest | (key == -INF), -INF, key + slack))
        close = (rival >= lead).to(tl.int32)
    return best, close


@triton.jit
def greedy_token(theta, t, row, partial, vocab_size, groups, tops, inv_temperature, GROUPS: tl.constexpr):
    """The token with the greatest log q, the first of equals; and whether the doubt about α leaves another a chance.

    Groups are read in the order of a bound, their two maxima mixed, until none can have a greater one.
    """
    doubt, slope = tl.load(row + scratch.DOUBT), tl.load(row + scratch.SLOPE)
    norm = tl.load(row + scratch.LOG_NORM)
    o_group = tl.arange(0, GROUPS)  # [GROUPS]
    maxima = partial + o_group * scratch.GROUP_COLUMNS  # [GROUPS]
    most_theta = tl.load(maxima + scratch.MAX_THETA, mask=o_group < groups, other=-INF)  # [GROUPS]
    most_t = tl.load(maxima + scratch.MAX_T, mask=o_group < groups, other=-INF)  # [GROUPS]
    most_theta, most_t, allow_theta, allow_t = exact_logits(most_theta, most_t, tops, inv_temperature)
    most = exact_mix(most_theta, most_t, tl.load(row + scratch.ALPHA)) - norm  # [GROUPS]
    most += doubt * tl.abs(most_theta - most_t - slope)  # [GROUPS]
    most += more_than_maxima(partial, tl.load(row + scratch.ALPHA), inv_temperature, groups, GROUPS)
    most = tl.where(allow_theta & allow_t, most, -INF)
    token, best, kind = tl.full([], -1, tl.int32), norm * 0 - INF, norm * 0
    lead, rival = best, best  # the least that the best may be, the most that any other may be
    while (tl.max(most) > -INF) & (tl.max(most) >= lead):
        group = tl.argmax(most, axis=0).to(tl.int32)
        most = tl.where(o_group == group, -INF, most)
        o = group * GROUP + tl.arange(0, GROUP)  # [GROUP]
        a = as_logits(tl.load(theta + o, mask=o < vocab_size, other=-INF))  # [GROUP]
        b = as_logits(tl.load(t + o, mask=o < vocab_size, other=-INF))  # [GROUP]
        value, d = exact_log_q(a, b, row, tops, inv_temperature)  # [GROUP] each
        slack = doubt * tl.abs(d - slope)  # [GROUP]
        here, first = tl.max(value), group * GROUP + tl.argmax(value, axis=0).to(tl.int32)
        better = (here > best) | ((here == best) & (first < token) & (here > -INF))
        if better:
            rival = tl.maximum(rival, tl.where(best > -INF, best + doubt * tl.abs(kind - slope), -INF))
            token, best, kind = first, here, tl.sum(tl.where(o == first, d, 0.0))
            lead = best - doubt * tl.abs(kind - slope)
        # equal logits of both models are equal whatever α is
        other = (value > -INF) & ((value != best) | (d != kind))  # [GROUP]
        rival = tl.maximum(rival, tl.max(tl.where(other, value + slack, -INF)))
    return token, (rival >= lead).to(tl.int32)


@triton.jit(
    do_not_specialize=["rows", "groups", "s_partial"],
    do_not_specialize_on_alignment=["seeds", "positions", "tokens"],
)
def finish_kernel(
    theta,
    t,
    row,
    own,
    partial,
    masses,
    seeds,
    positions,
    tokens,
    out,
    statuses,
    rows,
    vocab_size,
    groups,
    s_theta,
    s_t,
    s_partial,
    inv_temperature,
    inv_temperature_low,
    alpha_min,
    alpha_min_low,
    alpha_max,
    alpha_max_low,
    kl_budget,
    kl_budget_low,
    tol,
    METHOD: tl.constexpr,
    DRAW: tl.constexpr,
    REFINE: tl.constexpr,
    CHOOSE: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
):
    """Solve what is not settled (`REFINE`), then draw and look up (`CHOOSE`); truncation comes between the two."""
    i_row = tl.program_id(0).to(tl.int64)
    inv_temperature = as_double(inv_temperature, inv_temperature_low)
    alpha_min, alpha_max = as_double(alpha_min, alpha_min_low), as_double(alpha_max, alpha_max_low)
    theta += i_row * s_theta
    t += i_row * s_t
    budget = as_double(kl_budget, kl_budget_low)
    row += i_row * scratch.ROW_COLUMNS
    partial += i_row * s_partial
    masses += i_row * 2 * groups
    out += i_row
    if own is not None:
        _alpha, alpha_min, alpha_max, budget, _good = own_settings(own + i_row * scratch.OWN_COLUMNS, METHOD)
    tops = (tl.load(row + scratch.TOP_THETA), tl.load(row + scratch.TOP_T))
    status = tl.load(row + scratch.STATUS).to(tl.int32)
    token = tl.full([], -1, tl.int64)
    exact, again = tl.full([], 0, tl.int32), (status == 0).to(tl.int32)
    if not REFINE:  # noqa: SIM102 - with `and` both would be asked at run time
        if status == 0:
            o_group = tl.arange(0, GROUPS)  # [GROUPS]
            kept = tl.load(masses + o_group, mask=o_group < groups, other=-INF)  # [GROUPS]
            norm = tl.load(row + scratch.TOP_X) + tl.log(tl.sum(tl.exp(kept)))
            tl.store(row + scratch.LOG_NORM, norm)
            # which is loaded by other threads
            tl.debug_barrier()
    if REFINE:
        exact = ((status == 0) & (tl.load(row + scratch.SETTLED) == 0)).to(tl.int32)
    # once, and in float64 once more where float32 may have decided between two tokens
    while again == 1:
        again = tl.full([], 0, tl.int32)
        if REFINE:  # noqa: SIM102 - with `and` both would be asked at run time
            if exact == 1:
                status = refine(
                    theta,
                    t,
                    row,
                    masses,
                    out,
                    vocab_size,
                    rows,
                    tops,
                    inv_temperature,
                    alpha_min,
                    alpha_max,
                    budget,
                    tol,
                    METHOD,
                    DRAW,
                    TILE_GROUPS,
                )
                # what it stored is loaded by other threads
                tl.debug_barrier()
        if CHOOSE and seeds is not None:  # noqa: SIM102 - with `and` all would be asked at run time
            if status == 0:
                if DRAW == scratch.GREEDY:
                    chosen_token, close = greedy_token(
                        theta, t, row, partial, vocab_size, groups, tops, inv_temperature, GROUPS
                    )
                else:
                    chosen_token, close = draw_token(
                        theta,
                        t,
                        row,
                        masses,
                        tl.load(seeds + i_row),
                        tl.load(positions + i_row),
                        vocab_size,
                        groups,
                        tops,
                        inv_temperature,
                        exact,
                        GROUPS,
                    )
                token = chosen_token.to(tl.int64)
                if REFINE:
                    again = tl.where(exact == 0, close, 0)
                    exact = tl.full([], 1, tl.int32)
    if REFINE:
        tl.store(row + scratch.STATUS, status.to(tl.float64))
        if status != 0:
            for k in tl.static_range(5):
                tl.store(out + k * rows, float("nan"))
    if CHOOSE:
        if DRAW == scratch.GIVEN:
            token = tl.load(tokens + i_row)
        if DRAW != scratch.NO_TOKEN:
            nan = float("nan")
            known = (status == 0) & (token >= 0) & (token < vocab_size)
            index = tl.where(known, token, 0)
            log_q, log_p_theta, log_p_t = look_up(theta, t, row, index, tops, inv_temperature)
            if (DRAW == scratch.SAMPLED) | (DRAW == scratch.GREEDY):
                # a token that was drawn has a probability, and none is above 1 but for rounding
                sound = known & (log_q > -INF) & (log_q <= 1e-5)
                if (status == 0) & (sound == 0):
                    status = scratch.STATUS_INEXACT
                    for k in tl.static_range(5):
                        tl.store(out + k * rows, nan)
                known = known & sound
                tl.store(tokens + i_row, tl.where(known, token, -1))
            tl.store(out + 5 * rows, tl.where(known, tl.minimum(log_q, 0.0), nan).to(tl.float32))
            tl.store(out + 6 * rows, tl.where(known, tl.minimum(log_p_theta, 0.0), nan).to(tl.float32))
            tl.store(out + 7 * rows, tl.where(known, tl.minimum(log_p_t, 0.0), nan).to(tl.float32))
        tl.store(statuses + i_row, status.to(tl.int64))


@triton.jit
def exact_log_q(a, b, row, tops, inv_temperature):
    """log q of raw logits after truncation, −inf where cut, and d: float64."""
    low_a, low_b, allow_theta, allow_t = exact_logits(a, b, tops, inv_temperature)
    x = exact_mix(low_a, low_b, tl.load(row + scratch.ALPHA))
    kept = allow_theta & allow_t & (value_of(x, tl.load(row + scratch.TOP_X)) >= tl.load(row + scratch.FLOOR_X))
    kept = kept & (relative_logit(b, tops[1]) >= tl.load(row + scratch.FLOOR_T))
    return tl.where(kept, x - tl.load(row + scratch.LOG_NORM), -INF), low_a - low_b


@triton.jit
def look_up(theta, t, row, token, tops, inv_temperature):
    """log q of a token, and the models' own log-probabilities of it at temperature 1."""
    a, b = as_logits(tl.load(theta + token)), as_logits(tl.load(t + token))
    log_p_theta = tl.where(a > scratch.MASK, a.to(tl.float64) - tops[0] - tl.load(row + scratch.LOG_COLD_THETA), -INF)
    log_p_t = tl.where(b > scratch.MASK, b.to(tl.float64) - tops[1] - tl.load(row + scratch.LOG_COLD_T), -INF)
    log_q, _d = exact_log_q(a, b, row, tops, inv_temperature)
    return log_q, log_p_theta, log_p_t


@triton.jit
def log_q_kernel(
    theta,
    t,
    row,
    log_q,
    vocab_size,
    s_theta,
    s_t,
    s_log_q,
    inv_temperature,
    inv_temperature_low,
    BLOCK: tl.constexpr,
):
    """The whole of log q, NaN on rows that cannot be sampled from."""
    inv_temperature = as_double(inv_temperature, inv_temperature_low)
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    theta += i_row * s_theta
    t += i_row * s_t
    log_q += i_row * s_log_q
    row += i_row * scratch.ROW_COLUMNS
    o = i_block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = o < vocab_size  # [BLOCK]
    if tl.load(row + scratch.STATUS) == 0:
        a = as_logits(tl.load(theta + o, mask=mask, other=-INF))  # [BLOCK]
        b = as_logits(tl.load(t + o, mask=mask, other=-INF))  # [BLOCK]
        tops = (tl.load(row + scratch.TOP_THETA), tl.load(row + scratch.TOP_T))
        exact, _d = exact_log_q(a, b, row, tops, inv_temperature)  # [BLOCK] each
        tl.store(log_q + o, tl.minimum(exact, 0.0).to(tl.float32), mask=mask)
    else:
        tl.store(log_q + o, tl.full([BLOCK], float("nan"), tl.float32), mask=mask)
