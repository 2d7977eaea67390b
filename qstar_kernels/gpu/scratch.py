"""What the kernels share: the layout of their scratch memory, the meaning of a logit, and q's mass of a token."""

# ruff: noqa: RUF005 - Triton knows no starred tuples

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qstar_kernels import types
from qstar_kernels.noise import GROUP_SIZE, GROUP_STREAM, TOKEN_STREAM
from qstar_kernels.reference import TINY_ENTROPY as TINY_ENTROPY_OF_FLOAT64
from qstar_kernels.types import LARGEST_LOGIT, PER_ROW, Status, mask_of

GROUP = tl.constexpr(GROUP_SIZE)
STREAM_OF_GROUPS = tl.constexpr(GROUP_STREAM)
STREAM_OF_TOKENS = tl.constexpr(TOKEN_STREAM)
MASK = tl.constexpr(mask_of(torch.float32))  # a logit up to this means −inf
HALF_MASK = tl.constexpr(mask_of(torch.float16))
NO_MAXIMUM = tl.constexpr(2 * mask_of(torch.float32))  # the maximum of a row without a finite logit
LARGEST = tl.constexpr(LARGEST_LOGIT)
FLOOR = tl.constexpr(-LARGEST_LOGIT)  # logits less their maximum are raised to this: d² stays finite in float32
LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))

# What the sums of a sweep leave open (theory/computation.md, «The bound»). Relative: of an exponential, and of its
# exponent for each nat that lies below the maxima; of a sum of 1024 numbers, 19 of whose additions follow one another
OF_AN_EXPONENTIAL = tl.constexpr(2.4e-7)
OF_A_NAT = tl.constexpr(1.8e-7)
OF_A_SUM = tl.constexpr(19 * 2.0**-24)
DEEPEST = tl.constexpr(7.94)  # 1 + log 1024: how far down the tokens of a group lie, as a root of the mean square

# How much of it is accepted, beside the rule's own tolerance
MOST_OF_F = tl.constexpr(1e-6)  # in nats, left out by Taylor's formula
MOST_OF_ESS = tl.constexpr(4e-5)  # of its logarithm
MOST_OF_ALPHA = tl.constexpr(4e-6)
ROUNDING = tl.constexpr(3e-5)  # in nats, of a KL, at worst: what is seen is some 30 times less
ROUNDING_OUTSIDE = tl.constexpr(1e-4)  # the same at α outside [0, 1]
ROUNDING_OF_ALPHA = tl.constexpr(6e-4)
FLAT = tl.constexpr(5e-7)  # F'' below which α does not matter

# What float32 leaves open of a key of the draw, whose noise is known to 6e-7 and whose parts are below 90
NOISE_DOUBT = tl.constexpr(1e-5)
ENTROPY_DOUBT = tl.constexpr(2e-5)  # of the α that entropies give

FARTHEST = tl.constexpr(55.0)  # nats from a token's mass at the centre to that at an end, below underflow
UNDERFLOW = tl.constexpr(1024 * 2.0**-126)  # the mass of a group that float32 may have taken for 0
SMALL_ENTROPY = tl.constexpr(1e-30)  # below this float32's weights that make up a row's entropy may have underflowed
TINY_ENTROPY = tl.constexpr(TINY_ENTROPY_OF_FLOAT64)

MOST_SWEEPS = tl.constexpr(200)  # in float64, over a row

# What a sweep stores of a group: 32 columns of float32
MAX_THETA = tl.constexpr(0)
MAX_T = tl.constexpr(1)
MOMENTS = tl.constexpr(2)  # 7 columns: Σ w dʲ at the centre
END_THETA = tl.constexpr(9)  # Σ e^a, and Σ e^b
END_T = tl.constexpr(10)
SIDE_HIGH = tl.constexpr(11)  # 5 columns each: Σ w dʲ at 2 − c, and at −c
SIDE_LOW = tl.constexpr(16)
REACH = tl.constexpr(21)  # the greatest |d|
FLAGS = tl.constexpr(22)  # a sum of the three below
COLD_THETA = tl.constexpr(23)  # Σ e^a at temperature 1, and Σ e^b
COLD_T = tl.constexpr(24)
ENTROPY = tl.constexpr(25)  # 6 columns: count of maxima, Σ e^a of the others, Σ e^a a; the same for b
TILTS = tl.constexpr(25)  # 2 columns: Σ e^a d, Σ e^b d
DIFFERENCE = tl.constexpr(31)  # Σ e^a − e^b
GROUP_COLUMNS = tl.constexpr(32)

HAS_NAN = tl.constexpr(4)
THETA_ALONE = tl.constexpr(1)  # a token that π_θ alone allows
T_ALONE = tl.constexpr(2)

# What is known of a row after the solve, float64
ALPHA = tl.constexpr(0)
SECANT = tl.constexpr(1)
TOP_THETA = tl.constexpr(2)
TOP_T = tl.constexpr(3)
STATUS = tl.constexpr(4)
SETTLED = tl.constexpr(5)  # 1 if the sums of a sweep were enough
LOG_COLD_THETA = tl.constexpr(6)  # log-normaliser at temperature 1, of the logits less their maximum
LOG_COLD_T = tl.constexpr(7)
THETA_OUTSIDE = tl.constexpr(8)  # 1 where π_θ allows a token outside the common support
T_OUTSIDE = tl.constexpr(9)
LOG_NORM = tl.constexpr(10)  # log Σ e^x over the tokens that truncation keeps
FLOOR_X = tl.constexpr(11)  # truncation keeps tokens whose `value` is at least this
FLOOR_T = tl.constexpr(12)  # and whose logit of π_t less the maximum is at least this
TOP_X = tl.constexpr(13)  # what the `value` of a token is relative to: the greatest log of q's mass that is left
DOUBT = tl.constexpr(14)  # how far α may be off before a token is drawn
SLOPE = tl.constexpr(15)  # F' and √F''
DEVIATION = tl.constexpr(16)
ROW_COLUMNS = tl.constexpr(17)

OWN_COLUMNS = tl.constexpr(len(PER_ROW))  # as they were given for a row: α, its clamps, the budget
LEAST_ALPHA, GREATEST_ALPHA = (tl.constexpr(x) for x in PER_ROW["alpha"][:2])
LEAST_BUDGET, MOST_BUDGET = tl.constexpr(types.LEAST_BUDGET), tl.constexpr(PER_ROW["kl_budget"].most)

STATUS_NAN = tl.constexpr(int(Status.NAN))
STATUS_POSITIVE_INFINITY = tl.constexpr(int(Status.POSITIVE_INFINITY))
STATUS_NO_SUPPORT = tl.constexpr(int(Status.NO_SUPPORT))
STATUS_DISJOINT = tl.constexpr(int(Status.DISJOINT))
STATUS_EMPTY = tl.constexpr(int(Status.EMPTY))
STATUS_INEXACT = tl.constexpr(int(Status.INEXACT))
STATUS_BAD_SETTING = tl.constexpr(int(Status.BAD_SETTING))

NO_TOKEN = tl.constexpr(0)
SAMPLED = tl.constexpr(1)
GREEDY = tl.constexpr(2)
GIVEN = tl.constexpr(3)


@triton.jit
def as_logits(x):
    """Loaded logits in float32; float16's mask becomes −inf, those of the other types are below `MASK`."""
    y = x.to(tl.float32)
    if x.dtype == tl.float16:
        y = tl.where(y <= HALF_MASK, -INF, y)
    return y


@triton.jit
def zeros_of(like, COUNT: tl.constexpr):
    """A tuple of `COUNT` zero blocks."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros_like(like),)
    return out


class Row(NamedTuple):
    """A row's logits of both models, and what is known of it."""

    theta: tl.tensor  # pointers
    t: tl.tensor
    known: tl.tensor  # to the columns above
    vocab_size: tl.tensor
    inv_temperature: tl.tensor  # float64, and all below
    top_theta: tl.tensor  # the greatest logits, where they have been found
    top_t: tl.tensor


@triton.jit
def row_of(theta, t, known, i_row, s_theta, s_t, vocab_size, inv_temperature):
    known += i_row * ROW_COLUMNS
    inv_temperature = tl.full([], inv_temperature, tl.float64)
    tops = tl.load(known + TOP_THETA), tl.load(known + TOP_T)
    return Row(theta + i_row * s_theta, t + i_row * s_t, known, vocab_size, inv_temperature, tops[0], tops[1])


@triton.jit
def logits_of(row, o):
    """Logits of the ids o [N] in float32, −inf beyond the row."""
    a = as_logits(tl.load(row.theta + o, mask=o < row.vocab_size, other=-INF))
    return a, as_logits(tl.load(row.t + o, mask=o < row.vocab_size, other=-INF))


class Rule(NamedTuple):
    """The settings that one row may have of its own, float64."""

    alpha: tl.tensor  # if it is given; ½ else, where the first sweep is about
    low: tl.tensor  # the range it lies in
    high: tl.tensor
    budget: tl.tensor
    tol: tl.tensor


@triton.jit
def rule_of(own, i_row, alpha, low, high, budget, tol, METHOD: tl.constexpr):
    """The rule of a row, by its settings of its `own` if there are any; and whether those are good (`row_settings` of
    reference.py).

    A range of one point has its α given under the budget rules, too.
    """
    rule = Rule(
        tl.full([], alpha, tl.float64),
        tl.full([], low, tl.float64),
        tl.full([], high, tl.float64),
        tl.full([], budget, tl.float64),
        tl.full([], tol, tl.float64),
    )
    good = tl.full([], True, tl.int1)
    if own is not None:
        own += i_row * OWN_COLUMNS
        alpha, low, high, budget = tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
        good = (alpha >= LEAST_ALPHA) & (alpha <= GREATEST_ALPHA) & (budget >= 0) & (budget <= MOST_BUDGET)
        good = good & (low >= 0) & (low <= high) & (high <= 1)
        alpha, budget = tl.where(good, alpha, 0.5), tl.where(good, budget, 0.0)
        low, high = tl.where(good, low, 0.0), tl.where(good, high, 1.0)
        if METHOD == "fixed":
            alpha = tl.where((low > 0) & (alpha < low), low, alpha)
            alpha = tl.where((high < 1) & (alpha > high), high, alpha)
            low, high = alpha, alpha
        elif METHOD == "kl_budget":
            low = tl.where(budget <= LEAST_BUDGET, high, low)
            alpha = tl.where(low == high, low, 0.5)
        elif METHOD == "kl_budget_t":
            high = tl.where(budget <= LEAST_BUDGET, low, high)
            alpha = tl.where(low == high, low, 0.5)
        else:
            alpha = rule.alpha
        rule = Rule(alpha, low, high, budget, rule.tol)
    return rule, good


@triton.jit
def outside(alpha):
    """How far α lies outside [0, 1]."""
    return tl.maximum(tl.maximum(alpha - 1, -alpha), 0.0)


@triton.jit
def budget_of(alpha, slope, f, norm_theta, norm_t, width, budget, METHOD: tl.constexpr):
    """Under a budget rule: what vanishes at its α, increasing, and its derivative; the KL; how far that end is."""
    kl_theta, kl_t, _size = kls_of(alpha, slope, f, norm_theta, norm_t)
    if METHOD == "kl_budget":
        return budget - kl_theta, (1 - alpha) * width, kl_theta, 1 - alpha
    else:
        return kl_t - budget, alpha * width, kl_t, alpha


@triton.jit
def budget_step(kl, away, width, budget, METHOD: tl.constexpr):
    """Newton's step of α for the root of KL, all but straight in it."""
    root = tl.sqrt(tl.maximum(kl, 0.0))
    steep = tl.where(root > 0, away * width / (2 * tl.where(root > 0, root, 1.0)), tl.sqrt(width / 2))
    longer = (tl.sqrt(budget) - root) / tl.maximum(steep, 1e-30)  # the way to the end that the KL is of
    return -longer if METHOD == "kl_budget" else longer


@triton.jit
def exact_logits(row, a, b):
    """Logits less their maxima, over the temperature, in float64, and whether both models allow the token: [N] each."""
    allow_theta, allow_t = a > MASK, b > MASK
    a = (tl.where(allow_theta, a, 0.0).to(tl.float64) - row.top_theta) * row.inv_temperature
    b = (tl.where(allow_t, b, 0.0).to(tl.float64) - row.top_t) * row.inv_temperature
    return a, b, allow_theta, allow_t


@triton.jit
def exact_mix(a, b, alpha):
    """log of q's mass, not normalised, from `exact_logits`.

    A convex combination, not b + α d: exact at both ends even where d is huge. The fma is written out so that all
    kernels round alike: truncation compares with a value found by another kernel.
    """
    return tl.fma(a, alpha, b * (1 - alpha))


@triton.jit
def value_of(x, top):
    """What truncation compares, from `exact_mix`: made small in float64, then float32."""
    return (x - top).to(tl.float32)


@triton.jit
def relative_logit(row, b):
    """What truncation by π_t compares: a logit less the maximum, float32."""
    return tl.maximum(b - row.top_t.to(tl.float32), FLOOR)


@triton.jit
def most_of(row, partial, o, groups):
    """Of the groups o: a bound of log q's mass, not normalised, of a token; the greatest logit of π_t; the d of both
    greatest.

    The bound is the two maxima mixed, and at α outside [0, 1] what |d| of the group adds.
    """
    at = partial + o * GROUP_COLUMNS
    most_theta = tl.load(at + MAX_THETA, mask=o < groups, other=-INF)
    most_t = tl.load(at + MAX_T, mask=o < groups, other=-INF)
    a, b, allow_theta, allow_t = exact_logits(row, most_theta, most_t)
    alpha = tl.load(row.known + ALPHA)
    beyond, reach = outside(alpha), tl.load(at + REACH, mask=o < groups, other=0.0).to(tl.float64)
    most = exact_mix(a, b, alpha) + tl.where(beyond > 0, beyond * reach * row.inv_temperature * (1 + 1e-6), 0.0)
    return tl.where(allow_theta & allow_t, most, -INF), most_t, a - b


@triton.jit
def entropy_of(maxima, others, first):
    """log Σ e^a − Σ e^a a / Σ e^a from the count of a = 0, the other Σ e^a and Σ e^a a: accurate on a certain row."""
    share = others / maxima
    log_share = tl.where(share < 1e-6, share - share * share / 2, tl.log(1 + share))
    return tl.log(maxima) + log_share - first / (maxima + others)


@triton.jit
def kls_of(alpha, slope, f, norm_theta, norm_t):
    """KL(q‖π_θ), KL(q‖π_t), and the larger of them and 1."""
    kl_theta, kl_t = (alpha - 1) * slope - f + norm_theta, alpha * slope - f + norm_t
    return kl_theta, kl_t, tl.maximum(tl.maximum(kl_theta, kl_t), 1.0)


@triton.jit
def is_sound(alpha, slope, f, f_high, f_low, norm_theta, norm_t, alpha_min, alpha_max, rounding):
    """The last look (`holds` of reference.py) but for the rule's residual; false where a number is NaN."""
    kl_theta, kl_t, size = kls_of(alpha, slope, f, norm_theta, norm_t)
    sound = (alpha >= alpha_min) & (alpha <= alpha_max) & (tl.minimum(kl_theta, kl_t) >= -rounding * size)
    return sound & (size < INF) & (tl.abs(f) < INF) & (tl.abs(f_high) < INF) & (tl.abs(f_low) < INF)


@triton.jit
def store_solved(known, norm, doubt, slope, deviation):
    """What the draw needs of a row that is solved; nothing is cut yet."""
    tl.store(known + LOG_NORM, norm)
    tl.store(known + TOP_X, norm)
    tl.store(known + FLOOR_X, -INF)
    tl.store(known + FLOOR_T, -INF)
    tl.store(known + DOUBT, doubt)
    tl.store(known + SLOPE, slope)
    tl.store(known + DEVIATION, deviation)


@triton.jit
def store_diagnostics(out, rows, alpha, slope, f, f_high, f_low, norm_theta, norm_t, theta_alone, t_alone):
    """The fields of a row: α, both KLs, both ESS."""
    kl_theta, kl_t, _size = kls_of(alpha, slope, f, norm_theta, norm_t)
    ess_theta = tl.exp(tl.minimum(2 * norm_theta - f - f_high, 0.0))
    ess_t = tl.exp(tl.minimum(2 * norm_t - f - f_low, 0.0))
    tl.store(out, alpha.to(tl.float32))
    tl.store(out + rows, tl.maximum(kl_theta, 0.0).to(tl.float32))
    tl.store(out + 2 * rows, tl.maximum(kl_t, 0.0).to(tl.float32))
    tl.store(out + 3 * rows, tl.where(theta_alone, 0.0, ess_theta).to(tl.float32))
    tl.store(out + 4 * rows, tl.where(t_alone, 0.0, ess_t).to(tl.float32))
