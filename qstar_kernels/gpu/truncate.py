"""Top-k, top-p and min-p on the device without sorting the vocabulary.

Both ask for the greatest value v such that the tokens that reach v number k, or those below it weigh at most 1 − p: all
that reach v are kept, ties of the last one included. float32 orders like its bits read as an integer (the negative ones
flipped), so v is found digit by digit in base 16: a sweep over the row counts the tokens that reach each of 15
candidates, or weighs those that do not, and eight sweeps fix all 32 bits. That costs the same for every k and p. Values
are relative to the greatest that is left, subtracted in float64, whatever mass q has there.
"""

# ruff: noqa: RUF005 - Triton knows no starred tuples

import triton
import triton.language as tl

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.scratch import (
    GROUP,
    INF,
    as_double,
    as_logits,
    exact_logits,
    exact_mix,
    relative_logit,
    value_of,
    zeros_of,
)

OF_T = tl.constexpr(0)  # the values are the logits of π_t less their maximum, over all tokens π_t allows
LEAST = tl.constexpr(-(2**31))
OF_Q = tl.constexpr(1)  # the values are log2 of q's mass, over the tokens that are left


@triton.jit
def values_of(theta, t, o, vocab_size, row, tops, top_x, floor_t, inv_temperature, WHICH: tl.constexpr):
    """Value and mass of the tokens [N], relative to the greatest, and whether they take part."""
    a = as_logits(tl.load(theta + o, mask=o < vocab_size, other=-INF))  # [N]
    b = as_logits(tl.load(t + o, mask=o < vocab_size, other=-INF))  # [N]
    if WHICH == OF_T:
        value, part = relative_logit(b, tops[1]), b > scratch.MASK  # [N]
        mass = tl.exp(value * inv_temperature.to(tl.float32))  # [N]
    else:
        x, part = left_of(a, b, row, tops, floor_t, inv_temperature)  # [N]
        value = value_of(x, top_x)  # [N]
        mass = tl.exp(value)  # [N]
    # −0 and 0 are one value: the sum has the sign of 0
    return value + 0.0, tl.where(part, mass, 0.0), part


@triton.jit
def left_of(a, b, row, tops, floor_t, inv_temperature):
    """`exact_mix` of raw logits [N], and whether both models and π_t's support allow the token."""
    low_a, low_b, allow_theta, allow_t = exact_logits(a, b, tops, inv_temperature)
    x = exact_mix(low_a, low_b, tl.load(row + scratch.ALPHA))
    return x, allow_theta & allow_t & (relative_logit(b, tops[1]) >= floor_t)


@triton.jit
def ordered(value):
    """float32 to integers of the same order, and back: int32."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def unordered(index):
    return tl.where(index < 0, index ^ 0x7FFFFFFF, index).to(tl.float32, bitcast=True)


@triton.jit
def pivot(
    theta,
    t,
    target,
    floor,
    vocab_size,
    row,
    tops,
    top_x,
    floor_t,
    inv_temperature,
    WHICH: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of the tokens not below `floor`: the greatest value that `target` of them reach (`COUNT`), or the greatest below
    which there is no more mass than `target`.

    The mass below, not above: the tail of a top-p near 1 is then a sum of small numbers, without loss of digits.
    """
    best = tl.full([], LEAST, tl.int32)
    unit = tl.full([], 2**28, tl.int32)
    for _ in range(8):
        sums = zeros_of(tl.full([], 0.0, tl.float64), 15)
        for start in range(0, vocab_size, BLOCK):
            o = start + tl.arange(0, BLOCK)  # [BLOCK]
            value, mass, part = values_of(
                theta, t, o, vocab_size, row, tops, top_x, floor_t, inv_temperature, WHICH
            )  # [BLOCK] each
            if COUNT:
                mass = tl.where(part, 1.0, 0.0)
            mass = tl.where(value >= floor, mass, 0.0)
            index = ordered(value)  # [BLOCK]
            more = ()
            for j in tl.static_range(15):
                reaches = index >= best + unit * (j + 1)  # [BLOCK]
                hit = tl.where(reaches == COUNT, mass, 0.0)  # [BLOCK]
                more = more + (sums[j] + tl.sum(hit).to(tl.float64),)
            sums = more
        digit = tl.full([], 0, tl.int32)
        for j in tl.static_range(15):
            holds = sums[j] >= target if COUNT else sums[j] <= target
            digit += holds.to(tl.int32)
        best += digit * unit
        unit = unit // 16
    # where not even all of them are enough nothing is cut; and never the greatest, whose value is 0: the last of all
    # bits are a NaN's
    found = unordered(best)
    return tl.where(best == LEAST, -INF, tl.where(found < 0, found, 0.0))


@triton.jit
def top_p_floor(
    theta,
    t,
    share,
    share_low,
    floor,
    vocab_size,
    row,
    tops,
    top_x,
    floor_t,
    inv_temperature,
    WHICH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The value of the token at which the tokens not below `floor`, in order, have the share of their mass."""
    whole = tl.full([], 0.0, tl.float64)
    for start in range(0, vocab_size, BLOCK):
        o = start + tl.arange(0, BLOCK)  # [BLOCK]
        value, mass, _part = values_of(
            theta, t, o, vocab_size, row, tops, top_x, floor_t, inv_temperature, WHICH
        )  # [BLOCK] each
        whole += tl.sum(tl.where(value >= floor, mass, 0.0)).to(tl.float64)
    rest = whole * ((1 - as_double(share, 0.0)) - share_low)
    found = pivot(theta, t, rest, floor, vocab_size, row, tops, top_x, floor_t, inv_temperature, WHICH, False, BLOCK)
    return tl.maximum(floor, found)


@triton.jit(do_not_specialize=["groups"])
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
    inv_temperature_low,
    target_top_k,
    target_top_p,
    target_top_p_low,
    top_k,
    top_p,
    top_p_low,
    log_min_p,
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
    row += i_row * scratch.ROW_COLUMNS
    masses += i_row * 2 * groups
    inv_temperature = as_double(inv_temperature, inv_temperature_low)
    BLOCK: tl.constexpr = BLOCK_GROUPS * GROUP
    if tl.load(row + scratch.STATUS) == 0:
        tops = (tl.load(row + scratch.TOP_THETA), tl.load(row + scratch.TOP_T))
        nothing = tl.full([], -INF, tl.float32)
        none = tl.full([], 0.0, tl.float64)
        floor_t, floor_x = nothing, nothing
        if HAS_TARGET_TOP_K:
            floor_t = pivot(
                theta,
                t,
                target_top_k,
                nothing,
                vocab_size,
                row,
                tops,
                none,
                nothing,
                inv_temperature,
                OF_T,
                True,
                BLOCK,
            )
        if HAS_TARGET_TOP_P:
            floor_t = top_p_floor(
                theta,
                t,
                target_top_p,
                target_top_p_low,
                floor_t,
                vocab_size,
                row,
                tops,
                none,
                nothing,
                inv_temperature,
                OF_T,
                BLOCK,
            )

        # what is left may have no mass that float32 has: all values are relative to the greatest
        greatest = tl.full([], -INF, tl.float64)
        for start in range(0, vocab_size, BLOCK):
            o = start + tl.arange(0, BLOCK)  # [BLOCK]
            a = as_logits(tl.load(theta + o, mask=o < vocab_size, other=-INF))  # [BLOCK]
            b = as_logits(tl.load(t + o, mask=o < vocab_size, other=-INF))  # [BLOCK]
            x, part = left_of(a, b, row, tops, floor_t, inv_temperature)  # [BLOCK]
            greatest = tl.maximum(greatest, tl.max(tl.where(part, x, -INF)))
        if greatest == -INF:
            tl.store(row + scratch.STATUS, scratch.STATUS_EMPTY * 1.0)
        else:
            tl.store(row + scratch.TOP_X, greatest)
            if HAS_TOP_K:
                floor_x = pivot(
                    theta,
                    t,
                    top_k,
                    nothing,
                    vocab_size,
                    row,
                    tops,
                    greatest,
                    floor_t,
                    inv_temperature,
                    OF_Q,
                    True,
                    BLOCK,
                )
            if HAS_TOP_P:
                floor_x = top_p_floor(
                    theta,
                    t,
                    top_p,
                    top_p_low,
                    floor_x,
                    vocab_size,
                    row,
                    tops,
                    greatest,
                    floor_t,
                    inv_temperature,
                    OF_Q,
                    BLOCK,
                )
            if HAS_MIN_P:
                floor_x = tl.maximum(floor_x, log_min_p)

            o_group = tl.arange(0, BLOCK_GROUPS)  # [GROUPS]
            total = tl.full([], 0.0, tl.float64)
            for start in range(0, vocab_size, BLOCK):
                o = start + tl.arange(0, BLOCK)  # [BLOCK]
                value, mass, part = values_of(
                    theta, t, o, vocab_size, row, tops, greatest, floor_t, inv_temperature, OF_Q
                )  # [BLOCK] each
                kept = part & (value >= floor_x)  # [BLOCK]
                mass = tl.where(kept, mass, 0.0)
                total += tl.sum(mass).to(tl.float64)
                group = start // GROUP + o_group  # [GROUPS]
                if DRAW == scratch.SAMPLED:
                    by_group = tl.sum(tl.reshape(mass, [BLOCK_GROUPS, GROUP]), axis=1)  # [GROUPS]
                    some = by_group > 0  # [GROUPS]
                    log_mass = tl.where(some, tl.log(tl.where(some, by_group, 1.0).to(tl.float64)), -INF)  # [GROUPS]
                    tl.store(masses + group, log_mass, mask=group < groups)
            tl.store(row + scratch.FLOOR_X, floor_x.to(tl.float64))
            tl.store(row + scratch.FLOOR_T, floor_t.to(tl.float64))
            tl.store(row + scratch.LOG_NORM, greatest + tl.log(total))
