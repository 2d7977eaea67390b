"""The last launches of a step: what is not settled solved, the token drawn and looked up, and log q of all tokens."""

import triton
import triton.language as tl

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.draw import draw_token, exact_log_q, greedy_token, look_up
from qstar_kernels.gpu.exact import refine
from qstar_kernels.gpu.scratch import INF, logits_of, row_of, rule_of
from qstar_kernels.gpu.settle import settle


@triton.jit
def renormalise(row, masses, groups, GROUPS: tl.constexpr):
    """Truncation has left the groups less mass."""
    o_group = tl.arange(0, GROUPS)  # [GROUPS]
    kept = tl.load(masses + o_group, mask=o_group < groups, other=-INF)  # [GROUPS]
    norm = tl.load(row.known + scratch.TOP_X) + tl.log(tl.sum(tl.exp(kept)))
    tl.store(row.known + scratch.LOG_NORM, norm)


@triton.jit
def write_status(out, rows, status, known):
    """Of a row without numbers: NaN in the fields that need no token."""
    tl.store(known + scratch.STATUS, status.to(tl.float64))
    if status != 0:
        for k in tl.static_range(5):
            tl.store(out + k * rows, float("nan"))


@triton.jit
def write_token(row, out, tokens, rows, token, status, DRAW: tl.constexpr):
    """The fields of a token, and the token if it was drawn; returns the row's status after this last look."""
    known = (status == 0) & (token >= 0) & (token < row.vocab_size)
    log_q, log_p_theta, log_p_t = look_up(row, tl.where(known, token, 0))
    if (DRAW == scratch.SAMPLED) | (DRAW == scratch.GREEDY):
        # a token that was drawn has a probability, and none is above 1 but for rounding
        sound = known & (log_q > -INF) & (log_q <= 1e-5)
        if (status == 0) & (sound == 0):
            status = scratch.STATUS_INEXACT
            write_status(out, rows, status, row.known)
        known = known & sound
        tl.store(tokens, tl.where(known, token, -1))
    nan = float("nan")
    tl.store(out + 5 * rows, tl.where(known, tl.minimum(log_q, 0.0), nan).to(tl.float32))
    tl.store(out + 6 * rows, tl.where(known, tl.minimum(log_p_theta, 0.0), nan).to(tl.float32))
    tl.store(out + 7 * rows, tl.where(known, tl.minimum(log_p_t, 0.0), nan).to(tl.float32))
    return status


@triton.jit(
    do_not_specialize=["rows", "groups", "s_partial"],
    do_not_specialize_on_alignment=["seeds", "positions", "tokens"],
)
def finish_kernel(
    theta,
    t,
    known,
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
    inv_temperature: tl.float64,
    alpha: tl.float64,
    alpha_min: tl.float64,
    alpha_max: tl.float64,
    kl_budget: tl.float64,
    tol: tl.float64,
    METHOD: tl.constexpr,
    DRAW: tl.constexpr,
    SOLVE: tl.constexpr,
    SECOND: tl.constexpr,
    TEMPERED: tl.constexpr,
    CHOOSE: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
):
    """Solve (`SOLVE`) after the last sweep, then draw and look up (`CHOOSE`); truncation comes between the two."""
    i_row = tl.program_id(0).to(tl.int64)
    partial += i_row * s_partial
    masses += i_row * 2 * groups
    out += i_row
    rule, good = rule_of(own, i_row, alpha, alpha_min, alpha_max, kl_budget, tol, METHOD)
    if SOLVE:
        mine = known + i_row * scratch.ROW_COLUMNS
        settle(partial, mine, masses, out, rows, groups, inv_temperature, rule, good, METHOD, TEMPERED, SECOND, GROUPS)
        # what it stored is loaded by other threads
        tl.debug_barrier()
    row = row_of(theta, t, known, i_row, s_theta, s_t, vocab_size, inv_temperature)
    status = tl.load(row.known + scratch.STATUS).to(tl.int32)
    token, again = tl.full([], -1, tl.int64), (status == 0).to(tl.int32)
    if SOLVE:
        exact = ((status == 0) & (tl.load(row.known + scratch.SETTLED) == 0)).to(tl.int32)
    else:
        exact = tl.full([], 0, tl.int32)
        if status == 0:
            renormalise(row, masses, groups, GROUPS)
            tl.debug_barrier()
    # once, and in float64 once more where float32 may have decided between two tokens
    while again == 1:
        again = tl.full([], 0, tl.int32)
        if SOLVE:  # noqa: SIM102 - with `and` both would be asked at run time
            if exact == 1:
                status = refine(row, masses, out, rows, rule, METHOD, DRAW, TILE_GROUPS)
                tl.debug_barrier()
        if CHOOSE and seeds is not None:  # noqa: SIM102
            if status == 0:
                if DRAW == scratch.GREEDY:
                    drawn, close = greedy_token(row, partial, groups, GROUPS)
                else:
                    seed, position = tl.load(seeds + i_row), tl.load(positions + i_row)
                    drawn, close = draw_token(row, masses, groups, seed, position, exact, GROUPS)
                token = drawn.to(tl.int64)
                if SOLVE:
                    again = tl.where(exact == 0, close, 0)
                    exact = tl.full([], 1, tl.int32)
    if SOLVE:
        write_status(out, rows, status, row.known)
    if CHOOSE:
        if DRAW == scratch.GIVEN:
            token = tl.load(tokens + i_row)
        if DRAW != scratch.NO_TOKEN:
            status = write_token(row, out, tokens + i_row, rows, token, status, DRAW)
        tl.store(statuses + i_row, status.to(tl.int64))


@triton.jit
def log_q_kernel(
    theta, t, known, log_q, vocab_size, s_theta, s_t, s_log_q, inv_temperature: tl.float64, BLOCK: tl.constexpr
):
    """The whole of log q, NaN on rows that cannot be sampled from."""
    i_row, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = row_of(theta, t, known, i_row, s_theta, s_t, vocab_size, inv_temperature)
    log_q += i_row * s_log_q
    o = i_block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    if tl.load(row.known + scratch.STATUS) == 0:
        a, b = logits_of(row, o)  # [BLOCK] each
        exact, _d = exact_log_q(row, a, b)  # [BLOCK] each
        tl.store(log_q + o, tl.minimum(exact, 0.0).to(tl.float32), mask=o < vocab_size)
    else:
        tl.store(log_q + o, tl.full([BLOCK], float("nan"), tl.float32), mask=o < vocab_size)
