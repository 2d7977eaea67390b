"""Top-k, top-p and min-p on the device without sorting the vocabulary.

Both ask for the greatest value v such that the tokens below it are not too many, or weigh at most 1 − p: all that reach
v are kept, ties of the last one included. float32 orders like its bits read as an integer (the negative ones flipped),
so v is found in a bracket of such integers that is cut into 16 parts again and again: octaves first, where the values
of a row lie; equal parts then. A program weighs some groups of ids below each cut; the next launch adds the groups'
numbers in one order, and goes on in the part in which the target is crossed. Groups without a token there are not read
again, and those whose greatest logits say that nothing of them is left, not at all. That is exact whatever k, p and
the row are, ties and values of all sizes included. Values are relative to the greatest that is left, subtracted in
float64, whatever mass q has there.
"""

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
    row_of,
    value_of,
)

OF_T = tl.constexpr(0)  # the values are the logits of π_t less their maximum, over all tokens π_t allows
OF_Q = tl.constexpr(1)  # the values are the logarithms of q's mass, over the tokens that are left

LEAST = tl.constexpr(-(2**31))
PARTS = tl.constexpr(16)
OCTAVES = tl.constexpr(6)  # parts of the first pass: fewer, as all groups are read for it
AT_ONCE = tl.constexpr(5)  # cuts: 5 and 15 are multiples of it, and more would not leave the registers
# Octaves leave less than 2³⁰ numbers, each pass after them a sixteenth: one is left. Then the floor is written down.
PASSES = tl.constexpr(9)

# What is known of a row before a pass, float64
LOW = tl.constexpr(0)  # the value sought is at least this number
HIGH = tl.constexpr(1)  # and below this one
BELOW = tl.constexpr(2)  # what the tokens below LOW weigh
TARGET = tl.constexpr(3)  # what those below the value sought may weigh
BRACKET_COLUMNS = tl.constexpr(4)


@triton.jit
def values_of(row, group, top_x, floor_t, WHICH: tl.constexpr):
    """Value and mass of a group's tokens [GROUP], relative to the greatest, and whether they take part."""
    o = group * GROUP + tl.arange(0, GROUP)  # [GROUP]
    # a mask of a length that is no multiple of 16 makes all loads narrow
    if (group + 1) * GROUP <= row.vocab_size:
        a, b = as_logits(tl.load(row.theta + o)), as_logits(tl.load(row.t + o))  # [GROUP] each
    else:
        a, b = logits_of(row, o)
    if WHICH == OF_T:
        value, part = relative_logit(row, b), b > scratch.MASK  # [GROUP]
        mass = tl.exp(value * row.inv_temperature.to(tl.float32))  # [GROUP]
    else:
        x, part = left_of(row, a, b, floor_t)  # [GROUP]
        value = value_of(x, top_x)  # [GROUP]
        mass = tl.exp(value)  # [GROUP]
    # −0 and 0 are one value: the sum has the sign of 0
    return value + 0.0, tl.where(part, mass, 0.0), part


@triton.jit
def left_of(row, a, b, floor_t):
    """`exact_mix` of raw logits [N], and whether both models and π_t's support allow the token."""
    low_a, low_b, allow_theta, allow_t = exact_logits(row, a, b)
    x = exact_mix(low_a, low_b, tl.load(row.known + scratch.ALPHA))
    return x, allow_theta & allow_t & (relative_logit(row, b) >= floor_t)


@triton.jit
def reaches(row, partial, group, groups, floor, WHICH: tl.constexpr):
    """Whether a token of the group may be among those that are left, by the greatest logits of both models."""
    most, most_t, _d = most_of(row, partial, group, groups)
    relative = relative_logit(row, most_t)
    if WHICH == OF_T:
        return relative >= floor
    else:
        left = (most > -INF) & (relative >= tl.load(row.known + scratch.FLOOR_T).to(tl.float32))
        return left & (value_of(most, tl.load(row.known + scratch.TOP_X)) >= floor)


@triton.jit
def ordered(value):
    """float32 to integers of the same order, and back: int32."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def unordered(index):
    return tl.where(index < 0, index ^ 0x7FFFFFFF, index).to(tl.float32, bitcast=True)


@triton.jit
def bound(low, high, first, i):
    """The lower end of part `i` of a bracket, int64: −32, −16 … −2 of the `first`, then at equal distances."""
    octave = tl.where(i < OCTAVES, LEAST + ((122 + i) << 23) + 0x7FFFFF, high)
    octave = tl.where(i == 0, low, octave)
    return tl.where(first, octave, tl.minimum(low + (high - low + PARTS - 1) // PARTS * i, high))


@triton.jit
def narrowed(bracket, sums, groups, first, amount, COUNT: tl.constexpr):
    """The bracket after a pass over it that left `sums` [groups, PARTS], and which part of the old one it is.

    Every program of the next pass asks, and all add in one order.
    """
    low, high = tl.load(bracket + LOW).to(tl.int64), tl.load(bracket + HIGH).to(tl.int64)
    below, target = tl.load(bracket + BELOW), tl.load(bracket + TARGET)
    part = tl.full([], 0, tl.int64)
    if high - low > 1:
        i_part = tl.arange(0, PARTS)  # [PARTS]
        weights = tl.zeros([PARTS], tl.float64)
        for start in range(0, groups, 32):
            o_group = start + tl.arange(0, 32)[:, None]  # [32, 1]
            some = tl.load(sums + o_group * PARTS + i_part[None, :], mask=o_group < groups, other=0.0)  # [32, PARTS]
            weights += tl.sum(some.to(tl.float64), axis=0)
        if first:
            whole = tl.sum(tl.where(i_part == PARTS - 1, weights, 0.0))
            target = whole - amount if COUNT else whole * amount
        passed = (below + weights <= target) & (i_part < tl.where(first, OCTAVES, PARTS) - 1)  # [PARTS]
        part = tl.sum(passed.to(tl.int64))
        below += tl.sum(tl.where(i_part == part - 1, weights, 0.0))
        low, high = bound(low, high, first, part), bound(low, high, first, part + 1)
    return low, high, below, target, part


@triton.jit(do_not_specialize=["rows", "groups", "s_partial", "times", "i_pass"])
def divide_kernel(
    theta,
    t,
    known,
    partial,
    brackets,
    sums,
    rows,
    vocab_size,
    groups,
    times,
    i_pass,
    s_theta,
    s_t,
    s_partial,
    inv_temperature: tl.float64,
    amount: tl.float64,
    WHICH: tl.constexpr,
    COUNT: tl.constexpr,
):
    """A pass: what the tokens of `times` groups weigh below each cut of the bracket that the last pass leaves.

    `amount` tokens are kept (`COUNT`), or what is cut has this share of the mass. The mass below, not above: the tail
    of a top-p near 1 is then a sum of small numbers, without loss of digits.
    """
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = row_of(theta, t, known, i_row, s_theta, s_t, vocab_size, inv_temperature)
    if tl.load(row.known + scratch.STATUS) == 0:
        floor = tl.load(row.known + (scratch.FLOOR_T if WHICH == OF_T else scratch.FLOOR_X)).to(tl.float32)
        # what the last pass wrote is read while this one writes
        before, now = ((i_pass + 1) % 2) * rows + i_row, (i_pass % 2) * rows + i_row
        sums_before, sums = sums + before * groups * PARTS, sums + now * groups * PARTS
        bracket_before, bracket = brackets + before * BRACKET_COLUMNS, brackets + now * BRACKET_COLUMNS
        low, high = tl.full([], LEAST, tl.int64), tl.full([], 1, tl.int64)
        below, target = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
        part = tl.full([], 0, tl.int64)
        if i_pass > 0:
            low, high, below, target, part = narrowed(bracket_before, sums_before, groups, i_pass == 1, amount, COUNT)
        if i_pass == PASSES:
            # where not even all of them are enough nothing is cut; and never the greatest, whose value is 0
            found = tl.minimum(unordered(low.to(tl.int32)), 0.0)
            found = tl.maximum(floor, tl.where(low == LEAST, -INF, found)).to(tl.float64)
            tl.store(row.known + (scratch.FLOOR_T if WHICH == OF_T else scratch.FLOOR_X), found)
        else:
            if i_block == 0:
                tl.store(bracket + LOW, low.to(tl.float64))
                tl.store(bracket + HIGH, high.to(tl.float64))
                tl.store(bracket + BELOW, below)
                tl.store(bracket + TARGET, target)
            if high - low > 1:
                for group in range(i_block * times, tl.minimum(i_block * times + times, groups)):
                    if i_pass == 0:
                        wanted = reaches(row, partial + i_row * s_partial, group, groups, floor, WHICH)
                    else:
                        here = sums_before + group * PARTS + part
                        wanted = tl.load(here) > tl.load(here - 1, mask=part > 0, other=0.0)
                    add_up(row, group, floor, sums + group * PARTS, low, high, wanted, i_pass == 0, WHICH, COUNT)


@triton.jit
def add_up(row, group, floor, sums, low, high, wanted, first, WHICH: tl.constexpr, COUNT: tl.constexpr):
    """Store what a group's tokens from `low` on weigh below each cut, and in the last column below `high`.

    There are none where it is not `wanted`.
    """
    if wanted:
        top_x, floor_t = tl.load(row.known + scratch.TOP_X), tl.load(row.known + scratch.FLOOR_T).to(tl.float32)
        value, mass, takes_part = values_of(row, group, top_x, floor_t, WHICH)  # [GROUP] each
        if COUNT:
            mass = tl.where(takes_part, 1.0, 0.0)
        index = ordered(value)  # [GROUP]
        inside = (value >= floor) & (index >= low.to(tl.int32)) & (index < high.to(tl.int32))  # [GROUP]
        mass = tl.where(inside, mass, 0.0)
        tl.store(sums + (PARTS - 1), tl.sum(mass))
        for some in range(1, tl.where(first, OCTAVES, PARTS), AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                cut = bound(low, high, first, some + i).to(tl.int32)
                tl.store(sums + (some + i - 1), tl.sum(tl.where(index < cut, mass, 0.0)))
        if first:
            tl.store(sums + (OCTAVES - 1), tl.sum(mass))
    else:
        tl.store(sums + tl.arange(0, PARTS), tl.zeros([PARTS], tl.float32))


@triton.jit(do_not_specialize=["groups", "s_partial"])
def top_kernel(
    theta,
    t,
    known,
    partial,
    vocab_size,
    groups,
    s_theta,
    s_t,
    s_partial,
    inv_temperature: tl.float64,
    GROUPS: tl.constexpr,
):
    """The greatest mass of the tokens that π_t's truncation leaves: what is left may have no mass that float32 has.

    Groups are read in the order of a bound, until none can have a greater one.
    """
    i_row = tl.program_id(0).to(tl.int64)
    row = row_of(theta, t, known, i_row, s_theta, s_t, vocab_size, inv_temperature)
    if tl.load(row.known + scratch.STATUS) == 0:
        floor_t = tl.load(row.known + scratch.FLOOR_T).to(tl.float32)
        o_group = tl.arange(0, GROUPS)  # [GROUPS]
        most, most_t, _d = most_of(row, partial + i_row * s_partial, o_group, groups)  # [GROUPS] each
        most = tl.where(relative_logit(row, most_t) >= floor_t, most, -INF)
        greatest = tl.full([], -INF, tl.float64)
        while tl.max(most) > greatest:
            group = tl.argmax(most, axis=0).to(tl.int32)
            most = tl.where(o_group == group, -INF, most)
            a, b = logits_of(row, group * GROUP + tl.arange(0, GROUP))  # [GROUP] each
            x, part = left_of(row, a, b, floor_t)  # [GROUP]
            greatest = tl.maximum(greatest, tl.max(tl.where(part, x, -INF)))
        if greatest == -INF:
            tl.store(row.known + scratch.STATUS, scratch.STATUS_EMPTY * 1.0)
        else:
            tl.store(row.known + scratch.TOP_X, greatest)


@triton.jit(do_not_specialize=["groups", "s_partial", "times"])
def masses_kernel(
    theta,
    t,
    known,
    partial,
    masses,
    vocab_size,
    groups,
    times,
    s_theta,
    s_t,
    s_partial,
    inv_temperature: tl.float64,
    log_min_p,
    HAS_MIN_P: tl.constexpr,
):
    """The logarithms of what is kept of the mass of each group."""
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = row_of(theta, t, known, i_row, s_theta, s_t, vocab_size, inv_temperature)
    if tl.load(row.known + scratch.STATUS) == 0:
        masses += i_row * 2 * groups
        top_x, floor_t = tl.load(row.known + scratch.TOP_X), tl.load(row.known + scratch.FLOOR_T).to(tl.float32)
        floor_x = tl.load(row.known + scratch.FLOOR_X).to(tl.float32)
        if HAS_MIN_P:
            # other programs of the row may read it before or after: the greater of the two is the same
            floor_x = tl.maximum(floor_x, log_min_p)
            if i_block == 0:
                tl.store(row.known + scratch.FLOOR_X, floor_x.to(tl.float64))
        for group in range(i_block * times, tl.minimum(i_block * times + times, groups)):
            kept = tl.full([], 0.0, tl.float32)
            if reaches(row, partial + i_row * s_partial, group, groups, floor_x, OF_Q):
                value, mass, part = values_of(row, group, top_x, floor_t, OF_Q)  # [GROUP] each
                kept = tl.sum(tl.where(part & (value >= floor_x), mass, 0.0))
            log_mass = tl.where(kept > 0, tl.log(tl.where(kept > 0, kept, 1.0).to(tl.float64)), -INF)
            tl.store(masses + group, log_mass)
