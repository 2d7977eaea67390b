"""The sweep over the logits: sums of every group of ids about one α (theory/computation.md, «One sweep»)."""

# ruff: noqa: RUF005 - Triton knows no starred tuples

import triton
import triton.language as tl

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.scratch import GROUP, INF, as_logits, rule_of, zeros_of

SUMS = tl.constexpr(19)  # in consecutive columns, and one more


@triton.jit
def total(x):
    """Σ over the tokens of a thread: [PIECES, GROUPS, THREADS, SUB] to [GROUPS, THREADS]."""
    return tl.sum(tl.sum(x, axis=3), axis=0)


@triton.jit
def greatest(x):
    return tl.max(tl.max(x, axis=3), axis=0)


@triton.jit
def load_logits(theta, t, o, vocab_size, MASKED: tl.constexpr):
    """Logits at the ids o; `MASKED`: −inf beyond the row, for what means −inf, and for NaN."""
    if MASKED:
        a = as_logits(tl.load(theta + o, mask=o < vocab_size, other=-INF))
        b = as_logits(tl.load(t + o, mask=o < vocab_size, other=-INF))
        # a comparison with NaN is false
        a, b = tl.where(a > scratch.MASK, a, -INF), tl.where(b > scratch.MASK, b, -INF)
    else:
        a, b = tl.load(theta + o).to(tl.float32), tl.load(t + o).to(tl.float32)
    return a, b


@triton.jit
def add_tile(
    a,
    b,
    tops,
    weights,
    sums,
    cold,
    extra,
    reach,
    EXTRA: tl.constexpr,
    TEMPERED: tl.constexpr,
    SECOND: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add a tile of logits [PIECES, GROUPS, THREADS, SUB] to sums of [GROUPS, THREADS].

    Differences are exact or nearly so, and the exponent of w is off in parts of itself only: it is the sum of two
    numbers of one sign.
    """
    to_theta, to_t, up, down, to_log2, inv_temperature = weights
    a, b = a - tops[0][None, :, None, None], b - tops[1][None, :, None, None]
    if MASKED:
        usable = (a > -INF) & (b > -INF)
        d = tl.where(usable, a - b, 0.0)
        w = tl.where(usable, tl.exp2(a * to_theta + b * to_t), 0.0)
        # what one model alone allows counts towards its norm
        at_one, at_zero = tl.exp2(a * to_log2), tl.exp2(b * to_log2)
        half_one, half_zero = tl.exp2(d * up), tl.exp2(d * down)
        high, low = w * half_one * half_one, w * half_zero * half_zero
    else:
        d = a - b
        w = tl.exp2(tl.fma(a, to_theta, b * to_t))
        half_one, half_zero = tl.exp2(d * up), tl.exp2(d * down)
        at_one, at_zero = w * half_one, w * half_zero
        high, low = at_one * half_one, at_zero * half_zero
    powers = (d,)
    for k in tl.static_range(5):
        powers = powers + (powers[k] * d,)
    new = (sums[0] + total(w),)
    for k in tl.static_range(6):
        new = new + (sums[1 + k] + total(w * powers[k]),)
    new = new + (sums[7] + total(at_one), sums[8] + total(at_zero), sums[9] + total(high))
    for k in tl.static_range(4):
        new = new + (sums[10 + k] + total(high * powers[k]),)
    new = new + (sums[14] + total(low),)
    for k in tl.static_range(4):
        new = new + (sums[15 + k] + total(low * powers[k]),)
    # that of both maxima is 0: nothing is lost where one token has nearly all of the mass
    difference = at_one - at_zero
    if SECOND:
        # nor where all of the differences are small
        n = d * inv_temperature
        series = n * (1 + n * (1 / 2) * (1 + n * (1 / 3) * (1 + n * (1 / 4) * (1 + n * (1 / 5) * (1 + n * (1 / 6))))))
        small = tl.abs(n) < 0.25
        if MASKED:
            small = small & usable
        difference = tl.where(small, at_zero * series, difference)
    new = new + (sums[19] + total(difference),)
    reach = tl.maximum(reach, greatest(tl.abs(d)))
    if TEMPERED:
        cold = (cold[0] + total(tl.exp2(a * scratch.LOG2E)), cold[1] + total(tl.exp2(b * scratch.LOG2E)))
    if EXTRA == "entropy":
        extra = add_entropy(extra, a, at_one, 0) + add_entropy(extra, b, at_zero, 3)
    elif EXTRA == "reverse_kl_symmetry":
        extra = (extra[0] + total(at_one * d), extra[1] + total(at_zero * d))
    return new, cold, extra, reach


@triton.jit
def add_entropy(extra, a, mass, first: tl.constexpr):
    """Maxima are counted apart: Σ e^a is 1 + tiny on a nearly certain row, and its entropy is made of the tiny part."""
    return (
        extra[first] + total(tl.where(a == 0, 1.0, 0.0)),
        extra[first + 1] + total(tl.where(a == 0, 0.0, mass)),
        extra[first + 2] + total(tl.where(mass > 0, mass * a, 0.0)),
    )


@triton.jit
def flags_of(theta, t, o, vocab_size):
    """Whether a tile has a NaN, a token that π_θ alone allows, one that π_t alone allows: [GROUPS, THREADS] each."""
    a = as_logits(tl.load(theta + o, mask=o < vocab_size, other=-INF))
    b = as_logits(tl.load(t + o, mask=o < vocab_size, other=-INF))
    nan = greatest(((a != a) | (b != b)).to(tl.float32))
    theta_alone = greatest(((a > scratch.MASK) & (b <= scratch.MASK)).to(tl.float32))
    t_alone = greatest(((b > scratch.MASK) & (a <= scratch.MASK)).to(tl.float32))
    return nan, theta_alone, t_alone


@triton.jit
def ids_of(first, PIECES: tl.constexpr, GROUPS: tl.constexpr, THREADS: tl.constexpr, SUB: tl.constexpr):
    """The ids of a tile of `GROUPS` groups from the id `first` on: [PIECES, GROUPS, THREADS, SUB]."""
    o = tl.arange(0, PIECES)[:, None, None, None] * (THREADS * SUB) + tl.arange(0, GROUPS)[None, :, None, None] * GROUP
    return first + o + tl.arange(0, THREADS)[None, None, :, None] * SUB + tl.arange(0, SUB)[None, None, None, :]


@triton.jit
def maxima_of(
    theta,
    t,
    first,
    vocab_size,
    MASKED: tl.constexpr,
    GROUPS: tl.constexpr,
    AHEAD: tl.constexpr,
    THREADS: tl.constexpr,
    SUB: tl.constexpr,
):
    """The greatest logits of some groups, [GROUPS] each."""
    LINE: tl.constexpr = THREADS * SUB
    o = ids_of(first, AHEAD, GROUPS, THREADS, SUB)
    top_theta = tl.full([AHEAD, GROUPS, THREADS, SUB], scratch.NO_MAXIMUM, tl.float32)
    top_t = top_theta
    for i in range(0, GROUP // LINE, AHEAD):
        a, b = load_logits(theta, t, o + i * LINE, vocab_size, MASKED)
        top_theta, top_t = tl.maximum(top_theta, a), tl.maximum(top_t, b)
    return tl.max(greatest(top_theta), axis=1), tl.max(greatest(top_t), axis=1)


@triton.jit
def sweep_groups(
    theta,
    t,
    partial,
    first,
    vocab_size,
    weights,
    EXTRA: tl.constexpr,
    TEMPERED: tl.constexpr,
    SECOND: tl.constexpr,
    MASKED: tl.constexpr,
    GROUPS: tl.constexpr,
    AHEAD: tl.constexpr,
    PIECES: tl.constexpr,
    THREADS: tl.constexpr,
    SUB: tl.constexpr,
):
    """Store the sums of `GROUPS` groups from the id `first` on. Returns 0 where the logits need `MASKED`.

    Two passes, for the maxima and for the sums: the logits of the second come from the nearest cache.
    """
    LINE: tl.constexpr = THREADS * SUB
    tops = maxima_of(theta, t, first, vocab_size, MASKED, GROUPS, AHEAD, THREADS, SUB)
    o = ids_of(first, PIECES, GROUPS, THREADS, SUB)
    zero = tl.zeros([GROUPS, THREADS], tl.float32)
    sums, cold, extra, reach = zeros_of(zero, 20), zeros_of(zero, 2), zeros_of(zero, 6), zero
    if EXTRA == "reverse_kl_symmetry":
        extra = zeros_of(zero, 2)
    for i in range(0, GROUP // LINE, PIECES):
        a, b = load_logits(theta, t, o + i * LINE, vocab_size, MASKED)
        sums, cold, extra, reach = add_tile(
            a, b, tops, weights, sums, cold, extra, reach, EXTRA, TEMPERED, SECOND, MASKED
        )

    o_group = tl.arange(0, GROUPS)  # [GROUPS]
    partial += o_group * scratch.GROUP_COLUMNS  # [GROUPS]
    tl.store(partial + scratch.MAX_THETA, tops[0])
    tl.store(partial + scratch.MAX_T, tops[1])
    for k in tl.static_range(SUMS):
        tl.store(partial + scratch.MOMENTS + k, tl.sum(sums[k], axis=1))
    tl.store(partial + scratch.DIFFERENCE, tl.sum(sums[19], axis=1))
    tl.store(partial + scratch.REACH, tl.max(reach, axis=1))
    if TEMPERED:
        tl.store(partial + scratch.COLD_THETA, tl.sum(cold[0], axis=1))
        tl.store(partial + scratch.COLD_T, tl.sum(cold[1], axis=1))
    if EXTRA == "entropy":
        for k in tl.static_range(6):
            tl.store(partial + scratch.ENTROPY + k, tl.sum(extra[k], axis=1))
    elif EXTRA == "reverse_kl_symmetry":
        tl.store(partial + scratch.TILTS, tl.sum(extra[0], axis=1))
        tl.store(partial + scratch.TILTS + 1, tl.sum(extra[1], axis=1))
    nan, theta_alone, t_alone = zero, zero, zero
    if MASKED:
        for i in range(0, GROUP // LINE, PIECES):
            flags = flags_of(theta, t, o + i * LINE, vocab_size)
            nan = tl.maximum(nan, flags[0])
            theta_alone, t_alone = tl.maximum(theta_alone, flags[1]), tl.maximum(t_alone, flags[2])
    flag = tl.max(nan, axis=1) * scratch.HAS_NAN + tl.max(theta_alone, axis=1) * scratch.THETA_ALONE  # [GROUPS]
    tl.store(partial + scratch.FLAGS, flag + tl.max(t_alone, axis=1) * scratch.T_ALONE)
    # NaN, infinities and masks in one model make these sums NaN; a group of nothing but masks has one for its maximum
    whole = tl.sum(sums[6], axis=1) + tl.sum(sums[19], axis=1)  # [GROUPS], Σ w d⁶ and the difference
    plain = (whole == whole) & (tops[0] > scratch.HALF_MASK) & (tops[1] > scratch.HALF_MASK)
    return tl.min(plain.to(tl.int32))


@triton.jit(do_not_specialize=["s_partial"])
def sweep_kernel(
    theta,
    t,
    known,
    own,
    partial,
    vocab_size,
    s_theta,
    s_t,
    s_partial,
    inv_temperature,
    alpha: tl.float64,
    EXTRA: tl.constexpr,
    TEMPERED: tl.constexpr,
    SECOND: tl.constexpr,
    METHOD: tl.constexpr,
    TIMES: tl.constexpr,
    GROUPS: tl.constexpr,
    AHEAD: tl.constexpr,
    PIECES: tl.constexpr,
    THREADS: tl.constexpr,
    SUB: tl.constexpr,
):
    """Some groups of a row, about the α given, or (`SECOND`) about the row's α where that is not settled.

    `METHOD`: the rule, where a row may have its `own` α given.
    """
    # rows × vocabulary passes 2³¹ when whole prompts are scored
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rule, _good = rule_of(own, i_row, alpha, 0.0, 1.0, 0.0, 0.0, METHOD)
    center, wanted = rule.alpha, tl.full([], True, tl.int1)
    if SECOND:
        known += i_row * scratch.ROW_COLUMNS
        wanted = (tl.load(known + scratch.STATUS) == 0) & (tl.load(known + scratch.SETTLED) == 0)
        center = tl.load(known + scratch.ALPHA)
    center, inv_temperature = center.to(tl.float32), tl.full([], inv_temperature, tl.float32)
    if wanted:
        theta += i_row * s_theta
        t += i_row * s_t
        partial += i_row * s_partial
        to_log2 = inv_temperature * scratch.LOG2E
        up, down = (1 - center) * to_log2, -center * to_log2
        weights = (center * to_log2, (1 - center) * to_log2, up, down, to_log2, inv_temperature)
        # beyond [0, 1] the weights say little of each model's own, which have exponentials of theirs with `MASKED`
        within = (center >= 0) & (center <= 1)
        for i in range(TIMES):
            block = i_block * TIMES + i
            sums, first = partial + block * (GROUPS * scratch.GROUP_COLUMNS), block * (GROUPS * GROUP)
            plain = 0
            for masked in tl.static_range(2):
                if (plain == 0) & ((masked == 1) | within & (first + GROUPS * GROUP <= vocab_size)):
                    plain = sweep_groups(
                        theta,
                        t,
                        sums,
                        first,
                        vocab_size,
                        weights,
                        EXTRA,
                        TEMPERED,
                        SECOND,
                        masked == 1,
                        GROUPS,
                        AHEAD,
                        PIECES,
                        THREADS,
                        SUB,
                    )
