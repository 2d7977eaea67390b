"""Top-k, top-p and min-p on the device without sorting the vocabulary.

Both ask for the greatest value v such that the tokens at or above v number k, or weigh p: all of them are kept, ties of
the last one included. float32 orders like its bits read as an integer (the negative ones flipped), so v is found digit
by digit in base 16: a sweep over the row counts, or weighs, the tokens at or above each of 15 candidates, and eight
sweeps fix all 32 bits. That is exact, whatever the logits are, and costs the same for every k and p.
"""

# ruff: noqa: RUF005 - Triton knows no starred tuples

import triton
import triton.language as tl

from qstar_kernels.kernels_common import (
    FLOOR_T,
    FLOOR_X,
    GREEDY,
    GROUP,
    INF,
    LN2,
    LOG_NORM,
    MASK,
    MASSES_ARE_LOGS,
    NORM_T,
    ROW_COLUMNS,
    SAMPLED,
    STATUS,
    STATUS_EMPTY,
    TOP_T,
    TOP_THETA,
    as_logits,
    mix,
    mixing,
    zeros_of,
)

OF_T = tl.constexpr(0)  # the values are the logits of π_t less their maximum, over all tokens π_t allows
OF_Q = tl.constexpr(1)  # the values are log2 of q's mass, over the tokens that are left


@triton.jit
def values_of(theta, t, o, vocab_size, mixed, log_norm_t, floor_t, inv_temperature, WHICH: tl.constexpr):
    """Value and probability (not normalised, for q) of the tokens [N], and whether they take part."""
    a = as_logits(tl.load(theta + o, mask=o < vocab_size, other=-INF))  # [N]
    b = as_logits(tl.load(t + o, mask=o < vocab_size, other=-INF))  # [N]
    allowed = b > MASK  # [N]
    _a, b, x, usable = mix(a, b, mixed)  # [N] each
    if WHICH == OF_T:
        value, part = b, allowed
        mass = tl.exp(b * inv_temperature - log_norm_t)  # [N]
    else:
        value, part = x, usable & (b >= floor_t)
        mass = tl.exp2(x)  # [N]
    # −0 and 0 are one value: the sum has the sign of 0
    return value + 0.0, tl.where(part, mass, 0.0), part


@triton.jit
def ordered(value):
    """float32 to integers of the same order: int64."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def unordered(index):
    bits = index.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def weight_above(
    theta, t, floor, vocab_size, mixed, log_norm_t, floor_t, inv_temperature, WHICH: tl.constexpr, BLOCK: tl.constexpr
):
    """Mass of the tokens whose value is at least `floor`."""
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, vocab_size, BLOCK):
        o = start + tl.arange(0, BLOCK)  # [BLOCK]
        value, mass, _part = values_of(
            theta, t, o, vocab_size, mixed, log_norm_t, floor_t, inv_temperature, WHICH
        )  # [BLOCK] each
        total += tl.sum(tl.where(value >= floor, mass, 0.0)).to(tl.float64)
    return total


@triton.jit
def pivot(
    theta,
    t,
    enough,
    floor,
    vocab_size,
    mixed,
    log_norm_t,
    floor_t,
    inv_temperature,
    WHICH: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The greatest value such that the tokens at or above it, of those above `floor`, number or weigh `enough`."""
    best = tl.full([], -(2**31), tl.int64)
    unit = tl.full([], 2**28, tl.int64)
    for _ in range(8):
        above = zeros_of(tl.full([], 0.0, tl.float64), 15)
        for start in range(0, vocab_size, BLOCK):
            o = start + tl.arange(0, BLOCK)  # [BLOCK]
            value, mass, part = values_of(
                theta, t, o, vocab_size, mixed, log_norm_t, floor_t, inv_temperature, WHICH
            )  # [BLOCK] each
            if COUNT:
                mass = tl.where(part, 1.0, 0.0)
            mass = tl.where(value >= floor, mass, 0.0)
            index = ordered(value)  # [BLOCK]
            more = ()
            for j in tl.static_range(15):
                hit = tl.where(index >= best + unit * (j + 1), mass, 0.0)  # [BLOCK]
                more = more + (above[j] + tl.sum(hit).to(tl.float64),)
            above = more
        digit = tl.full([], 0, tl.int64)
        for j in tl.static_range(15):
            digit += (above[j] >= enough).to(tl.int64)
        best += digit * unit
        unit = unit // 16
    # where not even all of them are enough, as rounding may have it, nothing is cut
    return tl.where(best == -(2**31), -INF, unordered(best))


@triton.jit
def truncate_kernel(
    theta,
    t,
    row,
    masses,
    vocab_size,
    groups,
    s_theta,
    s_t,
    inv_temperature,
    target_top_k,
    target_top_p,
    top_k,
    top_p,
    log2_min_p,
    HAS_TARGET_TOP_K: tl.constexpr,
    HAS_TARGET_TOP_P: tl.constexpr,
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    HAS_MIN_P: tl.constexpr,
    DRAW: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    """The floors that say which tokens of a row are kept, their normaliser, and the groups' masses among them."""
    i_row = tl.program_id(0).to(tl.int64)
    theta += i_row * s_theta
    t += i_row * s_t
    row += i_row * ROW_COLUMNS
    masses += i_row * groups
    BLOCK: tl.constexpr = BLOCK_GROUPS * GROUP
    if tl.load(row + STATUS) == 0:
        mixed = mixing(row, (tl.load(row + TOP_THETA), tl.load(row + TOP_T)), inv_temperature)
        log_norm_t = tl.load(row + NORM_T).to(tl.float32)
        nothing = tl.full([], -INF, tl.float32)
        floor_t, floor_x = nothing, nothing
        if HAS_TARGET_TOP_K:
            floor_t = pivot(
                theta,
                t,
                target_top_k,
                nothing,
                vocab_size,
                mixed,
                log_norm_t,
                nothing,
                inv_temperature,
                OF_T,
                True,
                BLOCK,
            )
        if HAS_TARGET_TOP_P:
            whole = weight_above(
                theta, t, floor_t, vocab_size, mixed, log_norm_t, nothing, inv_temperature, OF_T, BLOCK
            )
            enough = whole * target_top_p
            found = pivot(
                theta, t, enough, floor_t, vocab_size, mixed, log_norm_t, nothing, inv_temperature, OF_T, False, BLOCK
            )
            floor_t = tl.maximum(floor_t, found)
        if HAS_TOP_K:
            floor_x = pivot(
                theta, t, top_k, nothing, vocab_size, mixed, log_norm_t, floor_t, inv_temperature, OF_Q, True, BLOCK
            )
        if HAS_TOP_P:
            whole = weight_above(
                theta, t, floor_x, vocab_size, mixed, log_norm_t, floor_t, inv_temperature, OF_Q, BLOCK
            )
            enough = whole * top_p
            found = pivot(
                theta, t, enough, floor_x, vocab_size, mixed, log_norm_t, floor_t, inv_temperature, OF_Q, False, BLOCK
            )
            floor_x = tl.maximum(floor_x, found)
        if HAS_MIN_P:
            highest = nothing
            for start in range(0, vocab_size, BLOCK):
                o = start + tl.arange(0, BLOCK)  # [BLOCK]
                value, _mass, part = values_of(
                    theta, t, o, vocab_size, mixed, log_norm_t, floor_t, inv_temperature, OF_Q
                )  # [BLOCK] each
                highest = tl.maximum(highest, tl.max(tl.where(part, value, -INF)))
            floor_x = tl.maximum(floor_x, highest + log2_min_p)

        o_group = tl.arange(0, BLOCK_GROUPS)  # [GROUPS]
        total = tl.full([], 0.0, tl.float64)
        for start in range(0, vocab_size, BLOCK):
            o = start + tl.arange(0, BLOCK)  # [BLOCK]
            value, mass, part = values_of(
                theta, t, o, vocab_size, mixed, log_norm_t, floor_t, inv_temperature, OF_Q
            )  # [BLOCK] each
            kept = part & (value >= floor_x)  # [BLOCK]
            mass = tl.where(kept, mass, 0.0)
            total += tl.sum(mass).to(tl.float64)
            group = start // GROUP + o_group  # [GROUPS]
            if DRAW == SAMPLED:
                by_group = tl.sum(tl.reshape(mass, [BLOCK_GROUPS, GROUP]), axis=1)  # [GROUPS]
                tl.store(masses + group, by_group, mask=group < groups)
            elif DRAW == GREEDY:
                value = tl.where(kept, value, -INF)
                by_group = tl.max(tl.reshape(value, [BLOCK_GROUPS, GROUP]), axis=1)  # [GROUPS]
                tl.store(masses + group, by_group, mask=group < groups)
        tl.store(row + MASSES_ARE_LOGS, 0.0)
        if total > 0:
            tl.store(row + FLOOR_X, floor_x.to(tl.float64))
            tl.store(row + FLOOR_T, floor_t.to(tl.float64))
            tl.store(row + LOG_NORM, mixed[4].to(tl.float64) * LN2 + tl.log(total))
        else:
            tl.store(row + STATUS, STATUS_EMPTY * 1.0)
