"""q* in plain PyTorch and float64: what every faster implementation is held against (theory/proof.md).

For one row with logits a of π_θ and b of π_t, d = a − b and C the tokens finite in both, everything is read off the
log-partition curve F(α) = logsumexp_C(b + α d):

    log q = b + α d − F(α)                     F'(α) = E_q[d]            F''(α) = Var_q[d]
    KL(q‖π_θ) = (α − 1) F' − F + N_θ           KL(q‖π_t) = α F' − F + N_t
    ESS_θ = exp(2 N_θ − F(α) − F(2 − α))       ESS_t = exp(2 N_t − F(α) − F(−α))

with N_θ, N_t the log-normalisers of the whole rows and s = N_θ − N_t. The default rule is F'(α) = s.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from qstar_kernels.noise import GROUP_SIZE, GROUP_STREAM, TOKEN_STREAM, gumbel
from qstar_kernels.types import BUDGETS, LARGEST_LOGIT, LEAST_BUDGET, PER_ROW, QStarStep, Settings, Status, mask_of

TINY_ENTROPY = 1e-300  # entropies below this have lost digits, or themselves, to underflow: then α is ½


@dataclass(frozen=True)
class Pair:
    """Both rows of a batch after temperature, their maxima subtracted: float64 [B, V] and what belongs to them [B]."""

    a: Tensor
    b: Tensor
    common: Tensor  # bool [B, V], tokens finite in both rows
    norm_theta: Tensor  # [B], N_θ
    norm_t: Tensor  # [B], N_t
    theta_inside: Tensor  # bool [B], π_θ allows no token outside the common support
    t_inside: Tensor  # bool [B], likewise π_t

    @property
    def secant(self) -> Tensor:
        return self.norm_theta - self.norm_t

    def curve(self, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """log q, F, F', F'' at α [B]: [B, V] and three [B]."""
        d = torch.where(self.common, self.a - self.b, 0.0)  # [B, V]
        x = torch.where(self.common, self.b + alpha[:, None] * d, -torch.inf)  # [B, V]
        top, mode = x.max(-1, keepdim=True)
        # weights that sum to 1 and moments about the mode's d, so that d of 1e9, as a mask may be written in one of
        # the models, costs the slope no digits
        log_q = x - top
        w = log_q.exp()
        mass = w.sum(-1, keepdim=True)
        q, center = w / mass, d.gather(-1, mode)
        slope = center[:, 0] + (q * (d - center)).sum(-1)
        f = (top + mass.log())[:, 0]  # [B]
        return log_q - mass.log(), f, slope, (q * (d - slope[:, None]).square()).sum(-1)

    def kls(self, alpha: Tensor, f: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """KL(q‖π_θ) and KL(q‖π_t) in nats, [B] each, from F and F' at α."""
        return (alpha - 1) * slope - f + self.norm_theta, alpha * slope - f + self.norm_t


def status_of(theta: Tensor, t: Tensor) -> Tensor:
    """int64 [B]: why a row cannot be sampled from, `Status.OK` where it can."""
    status = torch.full(theta.shape[:1], Status.OK, device=theta.device)
    for code, hit in (
        (Status.DISJOINT, ~(theta.isfinite() & t.isfinite()).any(-1)),
        (Status.NO_SUPPORT, theta.isneginf().all(-1) | t.isneginf().all(-1)),
        (Status.POSITIVE_INFINITY, ((theta >= LARGEST_LOGIT) | (t >= LARGEST_LOGIT)).any(-1)),
        (Status.NAN, (theta.isnan() | t.isnan()).any(-1)),
    ):
        status = torch.where(hit, int(code), status)
    return status


def make_pair(theta: Tensor, t: Tensor, temperature: float = 1.0) -> Pair:
    """Subtract the maxima of both rows, so that common offsets cost no precision, and find the supports."""
    a = (theta - theta.amax(-1, keepdim=True)) / temperature
    b = (t - t.amax(-1, keepdim=True)) / temperature
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


class RowSettings(NamedTuple):
    """What may differ from row to row: float64 [B]."""

    alpha: Tensor  # under `fixed`
    low: Tensor  # α lies between these; under `fixed` both are α
    high: Tensor
    budget: Tensor
    good: Tensor  # bool, all of them are in their range


def row_settings(settings: Settings, per_row: Mapping[str, Tensor], like: Tensor) -> RowSettings:
    """Of each row: its own settings, `per_row`, over those of all; rows whose own are bad have those of all."""
    good, own = torch.ones_like(like, dtype=torch.bool), {}
    for name, bounds in PER_ROW.items():
        own[name] = torch.full_like(like, getattr(settings, name))
        if name in per_row:
            own[name] = per_row[name].to(like)
            good &= (own[name] >= bounds.least) & (own[name] <= bounds.most)
    good &= own["alpha_min"] <= own["alpha_max"]
    own = {name: torch.where(good, x, getattr(settings, name)) for name, x in own.items()}
    alpha, low, high, budget = (own[name] for name in ("alpha", "alpha_min", "alpha_max", "kl_budget"))
    if settings.method == "fixed":  # a clamp at 0 or 1 does not bind
        alpha = torch.where((low > 0) & (alpha < low), low, alpha)
        alpha = torch.where((high < 1) & (alpha > high), high, alpha)
        low = high = alpha
    elif settings.method == "kl_budget":  # a budget that rounding would hide is the end itself
        low = torch.where(budget <= LEAST_BUDGET, high, low)
    elif settings.method == "kl_budget_t":
        high = torch.where(budget <= LEAST_BUDGET, low, high)
    return RowSettings(alpha, low, high, budget, good)


def solve_increasing(f: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], like: Tensor) -> Tensor:
    """Root in [0, 1] of an increasing function by safeguarded Newton from 0.5, each row for itself.

    `f` maps α [B] to the value, the derivative and what rounding leaves of a value of 0, [B] each. Rows without a sign
    change end at the nearer end.
    """
    alpha = torch.full_like(like, 0.5)
    low, high = torch.zeros_like(like), torch.ones_like(like)
    done = torch.zeros_like(like, dtype=torch.bool)
    last, before = torch.ones_like(like), torch.ones_like(like)  # the two steps made last
    for _ in range(200):
        value, derivative, rounding = f(alpha)
        # convergence first: at the root rounding can put the Newton step on the bracket's end, and a bisection there
        # would throw α half a bracket away
        done = done | (value.abs() <= rounding) | (high - low <= (2.3e-16 * high).clamp(min=1e-30))
        if done.all():
            break
        low = torch.where(value < 0, alpha, low)
        high = torch.where(value > 0, alpha, high)
        newton = alpha - value / derivative
        # steps that do not shrink are those of an exponential tail, hundreds of them
        taken = (newton > low) & (newton < high) & ((newton - alpha).abs() < before / 2)
        step = torch.where(taken, newton, (low + high) / 2)
        last, before = (step - alpha).abs(), last
        alpha = torch.where(done, alpha, step)
    return alpha


def entropy(a: Tensor) -> Tensor:
    """Entropy in nats [B] of the softmax of `a` [B, V], whose maximum is 0.

    A sum of terms that are not negative: log Σ e^a is 1e-40 on a nearly certain row, and so is its entropy.
    """
    top = a == 0
    weights = torch.where(top, 0.0, a.exp())  # [B, V], of the others
    others, maxima = weights.sum(-1), top.to(a.dtype).sum(-1)
    first = torch.where(weights > 0, weights * a, 0.0).sum(-1)
    return maxima.log() + (others / maxima).log1p() - first / (maxima + others)


def residual(pair: Pair, method: str, alpha: Tensor, budget: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What vanishes at the α of a rule that is solved for, its derivative (≥ 0) and its rounding: [B] each.

    For a budget the slope is that of Newton's step for the root of KL, which is all but straight in α.
    """
    if method in BUDGETS:
        _, f, slope, curvature = pair.curve(alpha)
        inner = method == "kl_budget"
        kl, norm = pair.kls(alpha, f, slope)[not inner], pair.norm_theta if inner else pair.norm_t
        value, away = (budget - kl, 1 - alpha) if inner else (kl - budget, alpha)
        root = kl.clamp(min=0).sqrt()
        steep = torch.where(root > 0, away * curvature / (2 * root), (curvature / 2).sqrt())
        size = f.abs() + norm.abs() + (away * slope).abs()
        return value, (budget.sqrt() + root) * steep, (4e-16 * size).clamp(min=1e-15)
    if method == "kl_symmetry":
        _, _, slope, curvature = pair.curve(alpha)
        value, derivative, size = slope - pair.secant, curvature, slope.abs() + curvature.sqrt()
    else:
        _, f_low, slope_low, _ = pair.curve(-alpha)
        _, f_high, slope_high, _ = pair.curve(2 - alpha)
        value, derivative = f_low - f_high + 2 * pair.secant, slope_high - slope_low
        size = f_low.abs() + f_high.abs()
    return value, derivative, (4e-16 * size).clamp(min=1e-14)


def solve_alpha(pair: Pair, settings: Settings, own: RowSettings) -> Tensor:
    """α [B] by the rule `settings.method`, clamped to the rows' own range (theory/proof.md, part 6)."""
    s = pair.secant
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    if settings.method == "fixed":
        alpha = own.alpha
    elif settings.method == "entropy":
        h_theta, h_t = entropy(pair.a), entropy(pair.b)
        total = h_theta + h_t
        alpha = torch.where(total > TINY_ENTROPY, h_theta / total, 0.5)
    elif settings.method in BUDGETS:

        def excess(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return residual(pair, settings.method, alpha, own.budget)

        # the end that is inside the ball, or the one that is nearest to it where none is
        inside, beyond = excess(zero)[0] >= 0, excess(one)[0] <= 0
        alpha = torch.where(inside, zero, torch.where(beyond, one, solve_increasing(excess, s)))
    else:
        alpha = solve_balance(pair, settings.method)
    return alpha.clamp(own.low, own.high)


def solve_balance(pair: Pair, method: str) -> Tensor:
    """α [B] of the rules that treat both models alike."""
    s = pair.secant
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    _, f0, slope0, _ = pair.curve(zero)
    _, f1, slope1, _ = pair.curve(one)
    if method == "reverse_kl_symmetry":
        spread = slope1 - slope0
        alpha = torch.where(spread > 1e-14, (slope1 - s) / spread, 0.5)
        at_zero, at_one = slope0 - s, slope1 - s
    else:

        def rule(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return residual(pair, method, alpha, zero)

        alpha = solve_increasing(rule, s)
        at_zero, at_one = rule(zero)[0], rule(one)[0]
    # without a root inside, which takes different supports, the better of the two ends
    rootless = (at_zero > 0) | (at_one < 0)
    kl_at_zero = torch.maximum(*pair.kls(zero, f0, slope0))
    kl_at_one = torch.maximum(*pair.kls(one, f1, slope1))
    flat = pair.theta_inside & pair.t_inside  # equal supports always have a root; a missing one is rounding
    return torch.where(rootless & ~flat, torch.where(kl_at_zero <= kl_at_one, zero, one), alpha)


def lost_outside(alpha: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """What rounding leaves of the KLs [B] at α outside [0, 1], where they are differences of numbers of any size."""
    outside = (alpha < 0) | (alpha > 1)
    return (4e-16 * ((alpha.abs() + 1) * slope.abs() + f.abs())).masked_fill(~outside, 0.0)


def holds(
    pair: Pair,
    settings: Settings,
    own: RowSettings,
    alpha: Tensor,
    lost: Tensor,
    kl_theta: Tensor,
    kl_t: Tensor,
    logq: Tensor | None,
) -> Tensor:
    """Whether the numbers of a row keep what the theory says of them: bool [B], NaN never does.

    α in its range and known to `tol`, or at the end of the range that its rule points to, or at an end for want of a
    root; no KL and no probability on the wrong side of its bound. The tolerances are what sums of 2e5 terms in
    float64 leave 1e-9 of rounding on the largest rows; `lost` is `lost_outside`.
    """
    size = torch.maximum(kl_theta, kl_t).clamp(min=1)
    good = (alpha >= own.low) & (alpha <= own.high) & (torch.minimum(kl_theta, kl_t) >= -1e-9 * size - lost)
    good &= size.isfinite() & (lost <= 1e-5 * torch.minimum(kl_theta, kl_t).clamp(min=1))
    if settings.method in (*BUDGETS, "kl_symmetry", "ess_balance"):
        value, _, _ = residual(pair, settings.method, alpha, own.budget)
        at_low, at_high = alpha <= own.low, alpha >= own.high
        stopped = (at_low & (value > 0)) | (at_high & (value < 0))
        if settings.method in BUDGETS:
            size = (kl_theta if settings.method == "kl_budget" else kl_t).clamp(min=1)
        else:
            stopped |= ~(pair.theta_inside & pair.t_inside) & (at_low | at_high)
        good &= (value.abs() <= settings.tol * size) | stopped
    if logq is not None:
        good &= (logq <= 1e-9) & logq.isfinite()
    return good


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
        floor = log_q.amax(-1, keepdim=True) + math.log(settings.min_p)
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
    per_row: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[QStarStep, Tensor | None]:
    """Solve, and then draw (with `seeds` and `positions`) or look up `tokens`; see `qstar_kernels.api` for the fields.

    Args:
        logits_theta, logits_t: [B, V], cut to the same vocabulary.
        settings: checked settings.
        seeds, positions: int64 [B], to draw a token a row.
        tokens: int64 [B], to look up given tokens instead; a token outside [0, V) gets NaN log-probabilities.
        want_log_q: return log q of the truncated distribution too.
        per_row: settings of each row, [B] each, by their names (`PER_ROW`).

    Returns:
        the fields in float64, and log q [B, V] in float64 or None.
    """
    masked = (x.masked_fill(x <= mask_of(x.dtype), -torch.inf) for x in (logits_theta, logits_t))
    theta, t = (x.double() for x in masked)
    own = row_settings(settings, per_row, theta[:, 0])
    status = torch.where(own.good, status_of(theta, t), int(Status.BAD_SETTING))
    bad = status != Status.OK
    theta, t = theta.masked_fill(bad[:, None], 0.0), t.masked_fill(bad[:, None], 0.0)
    pair = make_pair(theta, t, settings.temperature or 1.0)
    alpha = solve_alpha(pair, settings, own)
    log_q, f, slope, _ = pair.curve(alpha)
    kl_theta, kl_t = pair.kls(alpha, f, slope)
    ess_theta = torch.exp(2 * pair.norm_theta - f - pair.curve(2 - alpha)[1]).masked_fill(~pair.theta_inside, 0.0)
    ess_t = torch.exp(2 * pair.norm_t - f - pair.curve(-alpha)[1]).masked_fill(~pair.t_inside, 0.0)
    log_q = truncate(log_q, pair, settings)
    empty = log_q.isneginf().all(-1) & ~bad
    status = torch.where(empty, int(Status.EMPTY), status)
    token, drawn = tokens, None
    if seeds is not None:
        token = log_q.argmax(-1) if settings.temperature == 0 else draw(log_q, seeds, positions)
        drawn = log_q.gather(-1, token[:, None])[:, 0].masked_fill(status != Status.OK, 0.0)
    bad |= ~holds(pair, settings, own, alpha, lost_outside(alpha, f, slope), kl_theta, kl_t, drawn)
    status = torch.where(bad & ((status == Status.OK) | empty), int(Status.INEXACT), status)
    unusable = status != Status.OK

    def of_row(field: Tensor) -> Tensor:
        return field.masked_fill(bad, torch.nan)

    step = QStarStep(
        alpha=of_row(alpha),
        kl_theta=of_row(kl_theta.clamp(min=0)),
        kl_t=of_row(kl_t.clamp(min=0)),
        ess_theta=of_row(ess_theta.clamp(max=1)),
        ess_t=of_row(ess_t.clamp(max=1)),
        status=status,
    )
    if token is not None:
        step.token = token.masked_fill(unusable, -1) if seeds is not None else token
        known = (step.token >= 0) & (step.token < theta.shape[1]) & ~unusable
        index = step.token.clamp(0, theta.shape[1] - 1)[:, None]

        def at_token(log_p: Tensor) -> Tensor:
            return log_p.gather(-1, index).squeeze(-1).clamp(max=0).masked_fill(~known, torch.nan)

        step.logq = at_token(log_q)
        step.logp_theta, step.logp_t = at_token(theta.log_softmax(-1)), at_token(t.log_softmax(-1))
    return step, log_q.clamp(max=0).masked_fill(unusable[:, None], torch.nan) if want_log_q else None
