"""The draw (theory/computation.md, «The draw»): a token, and the probabilities of a token."""

import triton
import triton.language as tl

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.scratch import (
    GROUP,
    INF,
    as_logits,
    exact_logits,
    exact_mix,
    logits_of,
    most_of,
    relative_logit,
    value_of,
)


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
def exact_log_q(row, a, b):
    """log q of raw logits after truncation, −inf where cut, and d: float64."""
    low_a, low_b, allow_theta, allow_t = exact_logits(row, a, b)
    x = exact_mix(low_a, low_b, tl.load(row.known + scratch.ALPHA))
    kept = value_of(x, tl.load(row.known + scratch.TOP_X)) >= tl.load(row.known + scratch.FLOOR_X)
    kept = kept & allow_theta & allow_t & (relative_logit(row, b) >= tl.load(row.known + scratch.FLOOR_T))
    return tl.where(kept, x - tl.load(row.known + scratch.LOG_NORM), -INF), low_a - low_b


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
def draw_token(row, masses, groups, seed, position, exact, GROUPS: tl.constexpr):
    """The group with the greatest log-mass plus noise, and within it the token with the greatest log q plus noise.

    Also says whether float32 may have decided, which it has no part in where the row is `exact`: whether another key
    comes as near as rounding and the doubt about α allow. Logarithms are made small in float64 before they are
    rounded: −40000.003 is −40000.004 in float32.
    """
    doubt, slope = tl.load(row.known + scratch.DOUBT), tl.load(row.known + scratch.SLOPE)
    o_group = tl.arange(0, GROUPS)  # [GROUPS]
    mass = tl.load(masses + o_group, mask=o_group < groups, other=-INF)  # [GROUPS]
    slack = tl.load(masses + groups + o_group, mask=o_group < groups, other=0.0)  # [GROUPS]
    mass -= tl.max(mass)
    # of q's mass: a group's mean d is no further from F' than the deviation over the root of its share
    log_share = mass - tl.log(tl.sum(tl.exp(mass)))  # [GROUPS]
    far = tl.load(row.known + scratch.DEVIATION) * tl.exp(-0.5 * tl.maximum(log_share, -100.0))  # [GROUPS]
    slack += scratch.NOISE_DOUBT + doubt * far  # [GROUPS]
    group, close = chosen(mass, slack, seed, position, o_group, exact, scratch.STREAM_OF_GROUPS)

    o = group * GROUP + tl.arange(0, GROUP)  # [GROUP]
    a, b = logits_of(row, o)  # [GROUP] each
    log_q, d = exact_log_q(row, a, b)  # [GROUP] each
    log_q -= tl.max(log_q)
    slack = scratch.NOISE_DOUBT + doubt * tl.abs(d - slope)  # [GROUP]
    token, close_token = chosen(log_q, slack, seed, position, o, exact, scratch.STREAM_OF_TOKENS)
    return group * GROUP + token, close | close_token


@triton.jit
def greedy_token(row, partial, groups, GROUPS: tl.constexpr):
    """The token with the greatest log q, the first of equals; and whether the doubt about α leaves another a chance.

    Groups are read in the order of a bound, until none can have a greater one.
    """
    doubt, slope = tl.load(row.known + scratch.DOUBT), tl.load(row.known + scratch.SLOPE)
    norm, o_group = tl.load(row.known + scratch.LOG_NORM), tl.arange(0, GROUPS)
    most, _most_t, most_d = most_of(row, partial, o_group, groups)  # [GROUPS] each
    most += doubt * tl.abs(most_d - slope) - norm  # [GROUPS]
    token, best, kind = tl.full([], -1, tl.int32), norm * 0 - INF, norm * 0
    lead, rival = best, best  # the least that the best may be, the most that any other may be
    while (tl.max(most) > -INF) & (tl.max(most) >= lead):
        group = tl.argmax(most, axis=0).to(tl.int32)
        most = tl.where(o_group == group, -INF, most)
        o = group * GROUP + tl.arange(0, GROUP)  # [GROUP]
        a, b = logits_of(row, o)  # [GROUP] each
        value, d = exact_log_q(row, a, b)  # [GROUP] each
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


@triton.jit
def look_up(row, token):
    """log q of a token, and the models' own log-probabilities of it at temperature 1."""
    a, b = as_logits(tl.load(row.theta + token)), as_logits(tl.load(row.t + token))
    norm_theta, norm_t = tl.load(row.known + scratch.LOG_COLD_THETA), tl.load(row.known + scratch.LOG_COLD_T)
    log_p_theta = tl.where(a > scratch.MASK, a.to(tl.float64) - row.top_theta - norm_theta, -INF)
    log_p_t = tl.where(b > scratch.MASK, b.to(tl.float64) - row.top_t - norm_t, -INF)
    log_q, _d = exact_log_q(row, a, b)
    return log_q, log_p_theta, log_p_t
