"""q* in plain PyTorch and float64: what every faster implementation is held against (theory/proof.md).

For one row with logits a of π_θ and b of π_t, d = a − b and C the tokens finite in both, everything is read off the
log-partition curve F(α) = logsumexp_C(b + α d):

    log q = b + α d − F(α)                     F'(α) = E_q[d]            F''(α) = Var_q[d]
    KL(q‖π_θ) = (α − 1) F' − F + N_θ           KL(q‖π_t) = α F' − F + N_t
    ESS_θ = exp(2 N_θ − F(α) − F(2 − α))       ESS_t = exp(2 N_t − F(α) − F(−α))

with N_θ, N_t the log-normalisers of the whole rows and s = N_θ − N_t. The default rule is F'(α) = s.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qstar_kernels.noise import GROUP_SIZE, GROUP_STREAM, TOKEN_STREAM, gumbel
from qstar_kernels.types import QStarStep, Settings, Status

# A logit below this means −inf: masks are also written as finfo.min, and −3e38 as a number makes a curve with corners
LOWEST = -1e30


@dataclass(frozen=True)
class Pair:
    """Both rows of a batch after temperature, their maxima subtracted: float64 [B, V] and what belongs to them [B]."""

    a: Tensor
    b: Tensor
    common: Tensor  # bool [B, V], tokens finite in both rows
    norm_theta: Tensor  # [B], N_θ
    norm_t: Tensor  # [B], N_t
    theta_inside: Tensor  # bool [B], π_θ has no mass outside the common support
    t_inside: Tensor  # bool [B], likewise π_t

    @property
    def secant(self) -> Tensor:
        return self.norm_theta - self.norm_t

    def curve(self, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log q, F, F', F'' at α [B]: [B, V] and three [B]."""
        d = torch.where(self.common, self.a - self.b, 0.0)  # [B, V]
        x = torch.where(self.common, self.b + alpha[:, None] * d, -torch.inf)  # [B, V]
        f = x.logsumexp(-1)  # [B]
        log_q = x - f[:, None]
        q = log_q.exp()
        slope = (q * d).sum(-1)
        return log_q, f, slope, (q * (d - slope[:, None]).square()).sum(-1)

    def kls(self, alpha: Tensor, f: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """KL(q‖π_θ) and KL(q‖π_t) in nats, [B] each, from F and F' at α."""
        return (alpha - 1) * slope - f + self.norm_theta, alpha * slope - f + self.norm_t


def status_of(theta: Tensor, t: Tensor) -> Tensor:
    """int64 [B]: why a row cannot be sampled from, `Status.OK` where it can."""
    status = torch.full(theta.shape[:1], Status.OK, device=theta.device)
    for code, hit in (
        (Status.DISJOINT, ~(theta.isfinite() & t.isfinite()).any(-1)),
        (Status.NO_SUPPORT, theta.isneginf().all(-1) | t.isneginf().all(-1)),
        (Status.POSITIVE_INFINITY, (theta.isposinf() | t.isposinf()).any(-1)),
        (Status.NAN, (theta.isnan() | t.isnan()).any(-1)),
    ):
        status = torch.where(hit, int(code), status)
    return status


def make_pair(theta: Tensor, t: Tensor) -> Pair:
    """Subtract the maxima of both rows, so that common offsets cost no precision, and find the supports."""
    a = theta - theta.amax(-1, keepdim=True)
    b = t - t.amax(-1, keepdim=True)
    common = a.isfinite() & b.isfinite()
    return Pair(
        a=a,
        b=b,
        common=common,
        norm_theta=a.logsumexp(-1),
        norm_t=b.logsumexp(-1),
        theta_inside=(common | a.isneginf()).all(-1),
        t_inside=(common | b.isneginf()).all(-1),
    )


def solve_increasing(f: Callable[[Tensor], tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """Root in [0, 1] of an increasing function by safeguarded Newton from 0.5, each row for itself.

    `f` maps α [B] to the value and the derivative, [B] each. Rows without a sign change end at the nearer end.
    """
    alpha = torch.full_like(like, 0.5)
    low, high = torch.zeros_like(like), torch.ones_like(like)
    done = torch.zeros_like(like, dtype=torch.bool)
    for _ in range(80):
        value, derivative = f(alpha)
        # convergence first: at the root rounding can put the Newton step on the bracket's end, and a bisection there
        # would throw α half a bracket away
        done = done | (value.abs() <= 1e-14) | (high - low <= 1e-15)
        if done.all():
            break
        low = torch.where(value < 0, alpha, low)
        high = torch.where(value > 0, alpha, high)
        newton = alpha - value / derivative
        inside = (newton > low) & (newton < high)
        alpha = torch.where(done, alpha, torch.where(inside, newton, (low + high) / 2))
    return alpha


def entropy(logits: Tensor, norm: Tensor) -> Tensor:
    """Entropy in nats [B] of the softmax of `logits` [B, V]."""
    log_p = logits - norm[:, None]
    return -torch.where(log_p.isfinite(), log_p.exp() * log_p, 0.0).sum(-1)


def solve_alpha(pair: Pair, settings: Settings) -> Tensor:
    """α [B] by the rule `settings.method`, clamped to [alpha_min, alpha_max] (theory/proof.md, part 6)."""
    s = pair.secant
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    if settings.method == "fixed":
        alpha = one * settings.alpha
    elif settings.method == "entropy":
        h_theta, h_t = entropy(pair.a, pair.norm_theta), entropy(pair.b, pair.norm_t)
        total = h_theta + h_t
        alpha = torch.where(total > 0, h_theta / total, 0.5)
    else:
        _, f0, slope0, _ = pair.curve(zero)
        _, f1, slope1, _ = pair.curve(one)
        if settings.method == "kl_symmetry":

            def balance(alpha: Tensor) -> tuple[Tensor, Tensor]:
                _, _, slope, curvature = pair.curve(alpha)
                return slope - s, curvature

            alpha = solve_increasing(balance, s)
            at_zero, at_one = slope0 - s, slope1 - s
        elif settings.method == "ess_balance":

            def balance(alpha: Tensor) -> tuple[Tensor, Tensor]:
                _, f_low, slope_low, _ = pair.curve(-alpha)
                _, f_high, slope_high, _ = pair.curve(2 - alpha)
                return f_low - f_high + 2 * s, slope_high - slope_low

            alpha = solve_increasing(balance, s)
            at_zero, at_one = balance(zero)[0], balance(one)[0]
        else:  # reverse_kl_symmetry
            spread = slope1 - slope0
            alpha = torch.where(spread > 1e-14, (slope1 - s) / spread, 0.5)
            at_zero, at_one = slope0 - s, slope1 - s
        # without a root inside, which takes different supports, the better of the two ends
        rootless = (at_zero > 0) | (at_one < 0)
        kl_at_zero = torch.maximum(*pair.kls(zero, f0, slope0))
        kl_at_one = torch.maximum(*pair.kls(one, f1, slope1))
        flat = pair.theta_inside & pair.t_inside  # equal supports always have a root; a missing one is rounding
        alpha = torch.where(rootless & ~flat, torch.where(kl_at_zero <= kl_at_one, zero, one), alpha)
    return alpha.clamp(settings.alpha_min, settings.alpha_max)


def top_p_threshold(log_p: Tensor, top_p: float) -> Tensor:
    """The log-probability [B, 1] of the token that crosses mass `top_p`; that token and its ties are kept."""
    ordered = log_p.sort(-1, descending=True).values
    crossing = (ordered.exp().cumsum(-1) < top_p).sum(-1, keepdim=True)
    return ordered.gather(-1, crossing.clamp(max=log_p.shape[-1] - 1))


def cut(log_p: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keep the k most probable tokens, then of those the most probable with mass `top_p`; ties of the last are kept.

    Returns log-probabilities [B, V], renormalised, −inf where cut.
    """
    if 0 < top_k < log_p.shape[-1]:
        kth = log_p.topk(top_k, dim=-1).values[:, -1:]
        log_p = log_p.masked_fill(log_p < kth, -torch.inf).log_softmax(-1)
    if top_p < 1:
        log_p = log_p.masked_fill(log_p < top_p_threshold(log_p, top_p), -torch.inf).log_softmax(-1)
    return log_p


def truncate(log_q: Tensor, pair: Pair, settings: Settings) -> Tensor:
    """Restrict q* to π_t's top-k/top-p support, then by top-k, top-p and min-p of its own: log q [B, V].

    A row on which nothing is left is −inf throughout.
    """
    if settings.target_top_k > 0 or settings.target_top_p < 1:
        log_t = cut(pair.b - pair.norm_t[:, None], settings.target_top_k, settings.target_top_p)
        log_q = log_q.masked_fill(log_t.isneginf(), -torch.inf)
        log_q = log_q - log_q.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0)
    empty = log_q.isneginf().all(-1, keepdim=True)
    log_q = cut(torch.where(empty, 0.0, log_q), settings.top_k, settings.top_p)
    if settings.min_p > 0:
        floor = log_q.amax(-1, keepdim=True) + torch.tensor(settings.min_p, dtype=log_q.dtype).log()
        log_q = log_q.masked_fill(log_q < floor, -torch.inf).log_softmax(-1)
    return log_q.masked_fill(empty, -torch.inf)


def draw(log_q: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """One token a row from q by the two-level Gumbel-max draw: int64 [B] (theory/computation.md, «The draw»).

    The group of 1024 consecutive ids with the greatest log-mass plus noise wins, then within it the token with the
    greatest log-probability plus noise: distributed exactly as q, with V/1024 + 1024 variables a row instead of V.
    """
    rows, vocab_size = log_q.shape
    groups = -(-vocab_size // GROUP_SIZE)
    padded = torch.nn.functional.pad(log_q, (0, groups * GROUP_SIZE - vocab_size), value=-torch.inf)
    padded = padded.view(rows, groups, GROUP_SIZE)
    mass = padded.logsumexp(-1)  # [B, groups]
    group = (mass + gumbel(seeds, positions, torch.zeros_like(seeds), groups, GROUP_STREAM)).argmax(-1)  # [B]
    winners = padded[torch.arange(rows, device=log_q.device), group]  # [B, GROUP_SIZE]
    noise = gumbel(seeds, positions, group * GROUP_SIZE, GROUP_SIZE, TOKEN_STREAM)
    return group * GROUP_SIZE + (winners + noise).argmax(-1)


def qstar_reference(
    logits_theta: Tensor,
    logits_t: Tensor,
    settings: Settings,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    tokens: Tensor | None = None,
    want_log_q: bool = False,
) -> tuple[QStarStep, Tensor | None]:
    """Solve, and then draw (with `seeds` and `positions`) or look up `tokens`; see `qstar_kernels.api` for the fields.

    Args:
        logits_theta, logits_t: [B, V], cut to the same vocabulary.
        settings: checked settings.
        seeds, positions: int64 [B], to draw a token a row.
        tokens: int64 [B], to look up given tokens instead; a token outside [0, V) gets NaN log-probabilities.
        want_log_q: return log q of the truncated distribution too.

    Returns:
        the fields in float64, and log q [B, V] in float64 or None.
    """
    theta, t = logits_theta.double(), logits_t.double()
    theta, t = (x.masked_fill(x < LOWEST, -torch.inf) for x in (theta, t))
    status = status_of(theta, t)
    bad = status != Status.OK
    theta, t = theta.masked_fill(bad[:, None], 0.0), t.masked_fill(bad[:, None], 0.0)
    tempering = settings.temperature if settings.temperature > 0 else 1.0
    pair = make_pair(theta / tempering, t / tempering)
    alpha = solve_alpha(pair, settings)
    log_q, f, slope, _ = pair.curve(alpha)
    kl_theta, kl_t = pair.kls(alpha, f, slope)
    ess_theta = torch.exp(2 * pair.norm_theta - f - pair.curve(2 - alpha)[1]).masked_fill(~pair.theta_inside, 0.0)
    ess_t = torch.exp(2 * pair.norm_t - f - pair.curve(-alpha)[1]).masked_fill(~pair.t_inside, 0.0)
    log_q = truncate(log_q, pair, settings)
    empty = log_q.isneginf().all(-1) & ~bad
    status = torch.where(empty, int(Status.EMPTY), status)

    def masked(field: Tensor) -> Tensor:
        return field.masked_fill(bad, torch.nan)

    step = QStarStep(
        alpha=masked(alpha),
        kl_theta=masked(kl_theta.clamp(min=0)),
        kl_t=masked(kl_t.clamp(min=0)),
        ess_theta=masked(ess_theta.clamp(max=1)),
        ess_t=masked(ess_t.clamp(max=1)),
        status=status,
    )
    unusable = status != Status.OK
    if seeds is not None:
        chosen = log_q.argmax(-1) if settings.temperature == 0 else draw(log_q, seeds, positions)
        step.token = chosen.masked_fill(unusable, -1)
    elif tokens is not None:
        step.token = tokens
    if step.token is not None:
        known = (step.token >= 0) & (step.token < theta.shape[1]) & ~unusable
        index = step.token.clamp(0, theta.shape[1] - 1)[:, None]

        def at_token(log_p: Tensor) -> Tensor:
            return log_p.gather(-1, index).squeeze(-1).masked_fill(~known, torch.nan)

        step.logq = at_token(log_q)
        step.logp_theta, step.logp_t = at_token(theta.log_softmax(-1)), at_token(t.log_softmax(-1))
    return step, log_q.masked_fill(unusable[:, None], torch.nan) if want_log_q else None
