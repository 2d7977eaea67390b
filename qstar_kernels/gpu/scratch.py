"""What the kernels share: the layout of their scratch memory, the meaning of a logit, and q's mass of a token."""

# ruff: noqa: RUF005 - Triton knows no starred tuples

import torch
import triton
import triton.language as tl

from qstar_kernels.noise import GROUP_SIZE, GROUP_STREAM, TOKEN_STREAM
from qstar_kernels.reference import TINY_ENTROPY as TINY_ENTROPY_OF_FLOAT64
from qstar_kernels.types import LARGEST_LOGIT, METHODS, Status, mask_of

# Between the nodes α = 0, 1/6, …, 1. On pairs of Zipf rows that differ by normal noise of 2 nats, the polynomial
# through all nodes leaves a residual of at most 1e-4 with four intervals, 3e-8 with six and 3e-9 with eight.
INTERVALS = tl.constexpr(6)
NODES = tl.constexpr(7)
GROUP = tl.constexpr(GROUP_SIZE)
STREAM_OF_GROUPS = tl.constexpr(GROUP_STREAM)
STREAM_OF_TOKENS = tl.constexpr(TOKEN_STREAM)
MASK = tl.constexpr(mask_of(torch.float32))  # a logit up to this means −inf
HALF_MASK = tl.constexpr(mask_of(torch.float16))
NO_MAXIMUM = tl.constexpr(2 * mask_of(torch.float32))  # the maximum of a row without a finite logit
LARGEST = tl.constexpr(LARGEST_LOGIT)
FLOOR = tl.constexpr(-LARGEST_LOGIT)  # logits less their maximum are raised to this: d² stays finite in float32
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))

# float32 sums leave F' accurate enough while Var_q[d] is below the first, and F while it is no deeper than the second
# below the maxima: exponents are rounded to 1e-7 of what they are made of. Else the row is swept in float64
WIDEST = tl.constexpr(100.0)
DEEPEST = tl.constexpr(24.0)
ALPHA_TOL = tl.constexpr(5e-6)  # largest Newton step still to be made at an accepted α
CLOSE = tl.constexpr(1e-2)  # Var_q[d] below which float32's F' − s may be off by more than `ALPHA_TOL` of it
FLAT = tl.constexpr(5e-7)  # Var_q[d] below which α does not matter
SMOOTH = tl.constexpr(2e-5)  # the quadratures over 7 and 4 nodes agree to this part of F'': see `solve_kernel`

# What float32 leaves open before a token is drawn, as bounds: of the logarithm of a weight, and so of a sum of weights,
# whose exponents are made of numbers up to 44 each where a row is not too deep; of d where it matters; of a key of the
# draw, whose noise is known to 6e-7 and whose parts are below 90; and of α where the first sweep alone gives it
WEIGHT_DOUBT = tl.constexpr(2e-5)
D_DOUBT = tl.constexpr(3e-6)
NOISE_DOUBT = tl.constexpr(1e-5)
ALPHA_DOUBT = tl.constexpr(2e-5)

STEEP = tl.constexpr(0.1)  # derivative of the ESS rule above which the 1e-7 of float32's F does not move α by 5e-6
SMALL_ENTROPY = tl.constexpr(1e-30)  # below this float32's weights that make up a row's entropy may have underflowed
TINY_ENTROPY = tl.constexpr(TINY_ENTROPY_OF_FLOAT64)
OUTSIDE = tl.constexpr(1e-30)  # stands for the mass of a token that one model alone allows, however small it is

MOST_SWEEPS = tl.constexpr(200)  # in float64, over a row

# Partial sums of a chunk in the first sweep
SUM_W = tl.constexpr(0)  # 8 columns each, a node a column
SUM_WD = tl.constexpr(8)
SUM_WDD = tl.constexpr(16)
DIFFERENCE = tl.constexpr(24)  # Σ e^a − e^b over the common support
OUTSIDE_THETA = tl.constexpr(25)  # Σ e^a where b is −inf
OUTSIDE_T = tl.constexpr(26)
NANS = tl.constexpr(27)
MAX_THETA = tl.constexpr(28)
MAX_T = tl.constexpr(29)
COLD_THETA = tl.constexpr(30)  # Σ e^a at temperature 1
COLD_T = tl.constexpr(31)
ENTROPY = tl.constexpr(32)  # 6 columns: count of maxima, Σ e^a of the others, Σ e^a a; the same for b
CURVE_COLUMNS = tl.constexpr(40)

# Partial sums of a chunk in the second sweep
EVALUATED_COLUMNS = tl.constexpr(8)  # Σw, Σw(d − s), Σw(d − s)², Σw at 2 − α and −α, and their Σw(d − s)

# What is known of a row after the solve, float64
ALPHA = tl.constexpr(0)
SECANT = tl.constexpr(1)
NORM_THETA = tl.constexpr(2)
NORM_T = tl.constexpr(3)
TOP_THETA = tl.constexpr(4)
TOP_T = tl.constexpr(5)
BOUND = tl.constexpr(6)  # at least F(α)
BOUND_HIGH = tl.constexpr(7)  # at most F(2 − α)
BOUND_LOW = tl.constexpr(8)  # at most F(−α)
STATUS = tl.constexpr(9)
IS_SMOOTH = tl.constexpr(10)  # the first sweep's α is good to the last digit of float32
LOG_COLD_THETA = tl.constexpr(11)  # log-normaliser at temperature 1, of the logits less their maximum
LOG_COLD_T = tl.constexpr(12)
THETA_OUTSIDE = tl.constexpr(13)  # 1 where π_θ allows a token outside the common support
T_OUTSIDE = tl.constexpr(14)
BETTER_END = tl.constexpr(15)  # 0 or 1, whichever has the smaller greater KL
LOG_NORM = tl.constexpr(16)  # log Σ e^x over the tokens that truncation keeps
FLOOR_X = tl.constexpr(17)  # truncation keeps tokens whose `value` is at least this
FLOOR_T = tl.constexpr(18)  # and whose logit of π_t less the maximum is at least this
MASSES_ARE_LOGS = tl.constexpr(19)
SETTLED = tl.constexpr(20)  # 0 unknown, 1 α is accepted, 2 float32 cannot tell
LOW = tl.constexpr(21)  # the root lies between these
HIGH = tl.constexpr(22)
TOP_X = tl.constexpr(23)  # what the `value` of a token is relative to: the greatest log of q's mass that is left
DOUBT = tl.constexpr(24)  # how far α may be off before a token is drawn
SLOPE = tl.constexpr(25)  # F' and √F'' as far as float32 knows them
DEVIATION = tl.constexpr(26)
ROW_COLUMNS = tl.constexpr(27)

STATUS_NAN = tl.constexpr(int(Status.NAN))
STATUS_POSITIVE_INFINITY = tl.constexpr(int(Status.POSITIVE_INFINITY))
STATUS_NO_SUPPORT = tl.constexpr(int(Status.NO_SUPPORT))
STATUS_DISJOINT = tl.constexpr(int(Status.DISJOINT))
STATUS_EMPTY = tl.constexpr(int(Status.EMPTY))
STATUS_INEXACT = tl.constexpr(int(Status.INEXACT))

KL_SYMMETRY = tl.constexpr(METHODS.index("kl_symmetry"))
ESS_BALANCE = tl.constexpr(METHODS.index("ess_balance"))
REVERSE = tl.constexpr(METHODS.index("reverse_kl_symmetry"))
BY_ENTROPY = tl.constexpr(METHODS.index("entropy"))
FIXED = tl.constexpr(METHODS.index("fixed"))

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


@triton.jit
def as_double(high, low):
    """A number of the settings, which comes as the sum of two float32: float64."""
    return tl.full([], 0.0, tl.float64) + high + low


@triton.jit
def exact_logits(a, b, tops, inv_temperature):
    """Logits less their maxima, over the temperature, in float64, and whether both models allow the token: [N] each."""
    allow_theta, allow_t = a > MASK, b > MASK
    a = (tl.where(allow_theta, a, 0.0).to(tl.float64) - tops[0]) * inv_temperature
    b = (tl.where(allow_t, b, 0.0).to(tl.float64) - tops[1]) * inv_temperature
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
def relative_logit(b, top):
    """What truncation by π_t compares: a logit less the maximum, float32."""
    return tl.maximum(b - top.to(tl.float32), FLOOR)


@triton.jit
def mixing(row, tops, inv_temperature):
    """What `mix` needs to know of a row, float32: maxima, weights of both rows in log2 units, the bound on F."""
    alpha, to_log2 = tl.load(row + ALPHA), inv_temperature * LOG2E
    return (
        tops[0].to(tl.float32),
        tops[1].to(tl.float32),
        (alpha * to_log2).to(tl.float32),
        ((1 - alpha) * to_log2).to(tl.float32),
        (tl.load(row + BOUND) * LOG2E).to(tl.float32),
    )


@triton.jit
def mix(a, b, mixed):
    """From raw logits: those less their maxima, and log2 of q's mass relative to the bound, −inf where forbidden."""
    top_theta, top_t, weight_theta, weight_t, bound = mixed
    usable = (a > MASK) & (b > MASK)
    a = tl.maximum(a - top_theta, FLOOR)
    b = tl.maximum(b - top_t, FLOOR)
    return a, b, tl.where(usable, tl.fma(a, weight_theta, tl.fma(b, weight_t, -bound)), -INF), usable


@triton.jit
def bounds_of_sides(row, bound):
    """The constants that make exponents at 2 − α and −α relative to their bounds, given those at α are."""
    high = tl.load(row + BOUND_HIGH) * LOG2E + bound
    low = tl.load(row + BOUND_LOW) * LOG2E + bound
    return high.to(tl.float32), low.to(tl.float32)


@triton.jit
def entropy_of(maxima, others, first):
    """log Σ e^a − Σ e^a a / Σ e^a from the count of a = 0, the other Σ e^a and Σ e^a a: accurate on a certain row."""
    share = others / maxima
    log_share = tl.where(share < 1e-6, share - share * share / 2, tl.log(1 + share))
    return tl.log(maxima) + log_share - first / (maxima + others)
