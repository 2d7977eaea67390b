"""`python -m theory.verify`: every claim of theory/proof.md, checked on the library in float64.

A check compares what `qstar_kernels` returns with the definitions of theory/direct.py (sums over tokens, closed forms,
general-purpose optimisers of SciPy) on the families of theory/families.py and gives the worst violation that it found.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import logsumexp
from scipy.stats import binom

from qstar_kernels import METHODS, Status, qstar_logprobs, qstar_sample, qstar_stats, reference
from qstar_kernels.cpu import launch as cpu
from qstar_kernels.noise import GROUP_SIZE, GROUP_STREAM, TOKEN_STREAM, gumbel
from qstar_kernels.types import BUDGETS
from theory import direct
from theory.direct import kl, log_ess, log_softmax, mean
from theory.families import GAUSSIANS, REACH, STEP, Family, families, gaussians, grid, masked, small_pairs, zipf_pair
from theory.one_sweep import Sweep

FIXED = tuple({"method": "fixed", "alpha": alpha} for alpha in (0.0, 0.2, 0.5, 0.9, 1.0))
BALANCED = tuple({"method": method} for method in METHODS if method not in ("fixed", *BUDGETS))
BUDGETED = tuple({"method": method, "kl_budget": budget} for method in BUDGETS for budget in (1e-3, 0.05, 1.0))
SOLVED = BALANCED + BUDGETED[1::3]
GUIDED = tuple({"method": "fixed", "alpha": alpha} for alpha in (-1.0, -0.2, 1.3, 3.0))

# What the compiled CPU path promises (`tol` of `qstar_sample`): it takes its last step by Taylor's formula
ALLOWED_CPU = 1e-5


@dataclass(frozen=True)
class Rows:
    """A family as log-probabilities [B, V], and what the library says of it under one setting, [B] each."""

    log_theta: np.ndarray
    log_t: np.ndarray
    log_q: np.ndarray
    alpha: np.ndarray
    kl_theta: np.ndarray
    kl_t: np.ndarray
    ess_theta: np.ndarray
    ess_t: np.ndarray

    def kls(self) -> tuple[np.ndarray, np.ndarray]:
        """KL(q‖π_θ) and KL(q‖π_t) by their definition, at the library's α."""
        q = direct.log_q(self.log_theta, self.log_t, self.alpha)
        return kl(q, self.log_theta), kl(q, self.log_t)

    def log_esses(self) -> tuple[np.ndarray, np.ndarray]:
        """The logarithms of both ESS by their definition, at the library's α."""
        q = direct.log_q(self.log_theta, self.log_t, self.alpha)
        return log_ess(self.log_theta, q), log_ess(self.log_t, q)


def ask(impl: str, family: Family, **settings) -> Rows:
    """What the library says of a family."""
    log_q, step = qstar_logprobs(torch.from_numpy(family.theta), torch.from_numpy(family.t), impl=impl, **settings)
    if step.status.any():
        raise AssertionError(f"{family.name}: the library refuses rows: {step.status.tolist()}")
    fields = (getattr(step, name).numpy() for name in ("alpha", "kl_theta", "kl_t", "ess_theta", "ess_t"))
    return Rows(log_softmax(family.theta), log_softmax(family.t), log_q.numpy(), *fields)


def answers(impl: str, settings: Sequence[dict] = FIXED + SOLVED, masks: bool = True) -> Iterator[Rows]:
    """`ask` for all families and settings; `masks`: pairs with different supports too."""
    for family in (*families(), masked()) if masks else families():
        for setting in settings:
            yield ask(impl, family, **setting)


def curve(family: Family) -> reference.Pair:
    """The reference's log-partition curve of a family."""
    return reference.make_pair(torch.from_numpy(family.theta), torch.from_numpy(family.t))


def apart(got, want) -> float:
    """The greatest |got − want| in parts of max(1, |want|); equal infinities are equal, NaN is infinitely far."""
    got, want = np.broadcast_arrays(np.asarray(got, dtype=float), np.asarray(want, dtype=float))
    with np.errstate(invalid="ignore"):
        distance = np.where(got == want, 0.0, np.abs(got - want) / np.maximum(1, np.abs(want)))
    return float(np.nan_to_num(distance, nan=np.inf).max(initial=0.0))


def above(low, high) -> float:
    """By how much `low` ≤ `high` is violated, in parts of max(1, |high|)."""
    return apart(np.maximum(low, high), high)


def log(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(x)


def variance_by_enumeration(impl: str) -> float:
    """Mean and variance of the weighted mean of two draws, over all pairs of draws."""
    family, worst = small_pairs(6, 5), 0.0
    f = np.random.default_rng(0).normal(size=family.theta.shape)
    for setting in FIXED + SOLVED:
        rows = ask(impl, family, **setting)
        q = np.exp(rows.log_q)
        both = q[:, :, None] * q[:, None, :]
        for log_pi in (rows.log_theta, rows.log_t):
            value = np.exp(log_pi - rows.log_q) * f
            estimate = (value[:, :, None] + value[:, None, :]) / 2
            expected = np.sum(both * estimate, axis=(1, 2))
            variance = np.sum(both * estimate**2, axis=(1, 2)) - expected**2
            truth = mean(log_pi, f)
            claimed = (np.sum(np.exp(2 * log_pi - rows.log_q) * f**2, axis=1) - truth**2) / 2
            worst = max(worst, apart(expected, truth), apart(variance, claimed))
    return worst


def best_for_one_function(impl: str) -> float:
    """No q has a smaller second moment than q ∝ π|f|, which has (E|f|)²."""
    family, worst = small_pairs(20, 6), 0.0
    f = np.random.default_rng(0).normal(size=family.theta.shape)
    for setting in FIXED + SOLVED:
        rows = ask(impl, family, **setting)
        for log_pi in (rows.log_theta, rows.log_t):
            least = mean(log_pi, np.abs(f)) ** 2

            def second_moment(log_q: np.ndarray, log_pi=log_pi) -> np.ndarray:
                return np.exp(logsumexp(2 * log_pi + 2 * np.log(np.abs(f)) - log_q, axis=1))

            best = log_softmax(log_pi + np.log(np.abs(f)))
            worst = max(worst, above(least, second_moment(rows.log_q)), apart(second_moment(best), least))
    return worst


def chapman_robbins(impl: str) -> float:
    """(E_π f − E_q f)² ≤ (1/ESS − 1) Var_q f, with equality for f = π/q."""
    f, worst = np.random.default_rng(0), 0.0
    for rows in answers(impl, masks=False):
        for log_pi, ess in ((rows.log_theta, rows.ess_theta), (rows.log_t, rows.ess_t)):
            usual = ess > 1e-6  # below, the two sides differ by the rounding of 1/ESS²
            log_pi, q, chi = log_pi[usual], rows.log_q[usual], 1 / ess[usual] - 1
            for values in (f.normal(size=q.shape), np.exp(log_pi - q)):
                at_q = mean(q, values)
                bias, variance = mean(log_pi, values) - at_q, mean(q, (values - at_q[:, None]) ** 2)
                worst = max(worst, above(bias**2, chi * variance))
            worst = max(worst, apart(variance, chi), apart(bias, chi))
    return worst


def fisher_information(impl: str) -> float:
    """E_q[(∂ log q/∂α)²], by differences of the library's log q, is Var_q[d] and attained by the mean of d."""
    h, worst = 1e-4, 0.0
    for family in families():
        for alpha in (0.25, 0.5, 0.8):
            low, at, high = (ask(impl, family, method="fixed", alpha=a).log_q for a in (alpha - h, alpha, alpha + h))
            score = (high - low) / (2 * h)
            variance = direct.cumulants_of_d(family.theta, family.t, alpha)[1]
            worst = max(worst, apart(mean(at, score**2), variance), above(0, variance))
    return worst


def minimise(value: Callable, bounds: Sequence[Callable], start: np.ndarray) -> float:
    """The least `value(log_q)` over all distributions on a few tokens with `bound(log_q)` ≥ 0, by SLSQP.

    The last element of the vector that is minimised over is free, for bounds on a maximum; `value` and `bounds` get it
    as their second argument.
    """

    def split(x: np.ndarray) -> tuple[np.ndarray, float]:
        return log_softmax(x[:-1]), x[-1]

    found = minimize(
        lambda x: value(*split(x)),
        start,
        method="SLSQP",
        constraints=[{"type": "ineq", "fun": lambda x, bound=bound: bound(*split(x))} for bound in bounds],
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return float(found.fun)


def two_targets(impl: str) -> float:
    """The least worst second moment: found by SLSQP too, at most 2, not reached by q*; the mixture's is at most 2."""
    worst, reached = 0.0, True
    family = small_pairs(4, 4)
    of_rules, of_qstar = [ask(impl, family, **setting) for setting in FIXED + SOLVED], ask(impl, family)
    for i in range(len(family.theta)):
        log_theta, log_t = of_qstar.log_theta[i], of_qstar.log_t[i]
        least, log_best = direct.least_worst_second_moment(log_theta, log_t)
        both = [np.exp(-log_ess(x, log_best)) for x in (log_theta, log_t)]
        worst = max(worst, apart(both, least), above(least, 2))
        for rows in of_rules:
            worst = max(worst, above(least, 1 / min(rows.ess_theta[i], rows.ess_t[i])))
        reached &= 1 / min(of_qstar.ess_theta[i], of_qstar.ess_t[i]) < 1.001 * least
        start = np.append(log_theta, 1 / np.exp(log_ess(log_t, log_theta)))
        found = minimise(
            lambda q, top: top,
            [lambda q, top, x=x: top - np.exp(-log_ess(x, q)) for x in (log_theta, log_t)],
            start,
        )
        worst = max(worst, apart(found, least))
    for rows in answers(impl, SOLVED[:1], masks=False):
        mixture = np.logaddexp(rows.log_theta, rows.log_t) - np.log(2)
        for log_pi in (rows.log_theta, rows.log_t):
            worst = max(worst, above(0.5, np.exp(log_ess(log_pi, mixture))))
    return np.inf if reached else worst


def ess_is_chi_square(impl: str) -> float:
    """1/ESS = 1 + χ²(π‖q), log ESS = −D₂(π‖q), between 0 and 1."""
    worst = 0.0
    for rows in answers(impl, masks=False):
        for log_pi, ess in ((rows.log_theta, rows.ess_theta), (rows.log_t, rows.ess_t)):
            with np.errstate(divide="ignore", over="ignore"):
                ratio = np.log(np.abs(np.expm1(np.clip(log_pi - rows.log_q, -700, 700))))
            log_chi = logsumexp(rows.log_q + 2 * ratio, axis=1)
            renyi = logsumexp(2 * log_pi - rows.log_q, axis=1)  # D₂ = log Σ π² q^(1−2)
            worst = max(worst, apart(-log(ess), np.logaddexp(0, log_chi)), apart(log(ess), -renyi))
            worst = max(worst, above(ess, 1.0), above(0.0, ess))
    return worst


def worst_case_variance(impl: str) -> float:
    """1/ESS − 1 ≤ n sup Var ≤ 1/ESS over |f| ≤ 1: the supremum, at a corner of the cube, by trying all."""
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=8)))
    worst, family = 0.0, small_pairs(8, 8)
    for setting in FIXED + SOLVED:
        rows = ask(impl, family, **setting)
        for log_pi, ess in ((rows.log_theta, rows.ess_theta), (rows.log_t, rows.ess_t)):
            second = np.sum(np.exp(2 * log_pi - rows.log_q), axis=1)
            largest = second - ((signs @ np.exp(log_pi).T) ** 2).min(axis=0)
            worst = max(worst, above(1 / ess - 1, largest), above(largest, 1 / ess))
    return worst


def weights_of_draws(impl: str) -> float:
    """Mean and mean square of the weights of 1,500 draws a row, in standard errors from 1 and 1/ESS."""
    family, draws, worst = small_pairs(4, 30, seed=5), 1500, 0.0
    seeds = torch.arange(draws)
    for i in range(len(family.theta)):
        theta, t = (torch.from_numpy(x[i]).expand(draws, -1) for x in (family.theta, family.t))
        step = qstar_sample(theta, t, seeds=seeds, positions=seeds % 7, impl=impl)
        q = direct.log_q(log_softmax(family.theta[i : i + 1]), log_softmax(family.t[i : i + 1]), step.alpha[0].item())
        for side, log_p, ess in (("theta", step.logp_theta, step.ess_theta), ("t", step.logp_t, step.ess_t)):
            weight = (log_p - step.logq).exp().numpy()
            log_weight = log_softmax(getattr(family, side)[i : i + 1]) - q
            for power, expected in ((1, 1.0), (2, 1 / ess[0].item())):
                spread = np.sqrt(mean(q, np.exp(2 * power * log_weight)) - mean(q, np.exp(power * log_weight)) ** 2)
                worst = max(worst, abs(np.mean(weight**power) - expected) / spread[0] * np.sqrt(draws))
    return worst


def ess_and_kl(impl: str) -> float:
    """−log ESS_π ≥ KL(π‖q); and of KL(q‖π) neither bounds the other: both orders occur."""
    worst, less, more = 0.0, False, False
    for rows in answers(impl, masks=False):
        sides = ((rows.log_theta, rows.ess_theta, rows.kl_theta), (rows.log_t, rows.ess_t, rows.kl_t))
        for log_pi, ess, reverse in sides:
            worst = max(worst, above(kl(log_pi, rows.log_q), -log(ess)))
            less |= bool((-log(ess) < 0.9 * reverse - 1e-3).any())
            more |= bool((-log(ess) > 1.1 * reverse + 1e-3).any())
    return worst if less and more else np.inf


def integral(f: Callable[[float], np.ndarray], low: float, high: float, points: int) -> np.ndarray:
    """∫f from `low` to `high` by Gauss's rule."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    half = (high - low) / 2
    return half * sum(w * f(low + half * (1 + x)) for x, w in zip(nodes, weights, strict=True))


def derivatives_of_the_curve(impl: str) -> float:
    """F, F′ = E_q[d], F″ = Var_q[d] by sums; F′ and F″ as the derivatives that they are called."""
    worst, h = 0.0, 0.01
    for family in (*families(), masked()):
        pair = curve(family)
        top_theta, top_t = np.max(family.theta, axis=1), np.max(family.t, axis=1)
        theta, t = family.theta - top_theta[:, None], family.t - top_t[:, None]

        def at(alpha: float, pair=pair) -> list[np.ndarray]:
            return [x.numpy() for x in pair.curve(torch.full_like(pair.norm_t, alpha))[1:]]

        for alpha in (-0.5, 0.0, 0.3, 1.0, 1.7):
            whole = logsumexp(direct.log_mixture(theta, t, alpha), axis=1)
            worst = max(worst, apart(at(alpha), (whole, *direct.cumulants_of_d(theta, t, alpha)[:2])))
            low, high = at(alpha - h), at(alpha + h)
            for order in (0, 1):
                rise = integral(lambda x, at=at, order=order: at(x)[order + 1], alpha - h, alpha + h, 6)
                worst = max(worst, apart(rise, high[order] - low[order]))
    return worst


def log_probabilities(impl: str) -> float:
    """log q over the whole row, and of given tokens with both models' own."""
    worst = 0.0
    for family in (*families(), masked()):
        token = np.arange(len(family.theta)) % family.theta.shape[1]
        for setting in FIXED + SOLVED:
            rows = ask(impl, family, **setting)
            worst = max(worst, apart(rows.log_q, direct.log_q(rows.log_theta, rows.log_t, rows.alpha)))
            logits = torch.from_numpy(family.theta), torch.from_numpy(family.t)
            step = qstar_stats(*logits, tokens=torch.from_numpy(token), impl=impl, **setting)
            at = np.arange(len(token)), token
            for got, want in ((step.logq, rows.log_q), (step.logp_theta, rows.log_theta), (step.logp_t, rows.log_t)):
                worst = max(worst, apart(got.numpy(), want[at]))
    return worst


def divergences(impl: str) -> float:
    """Both KLs by their definition; their difference against F′ − s."""
    worst = 0.0
    for rows in answers(impl):
        at_theta, at_t = rows.kls()
        worst = max(worst, apart(rows.kl_theta, at_theta), apart(rows.kl_t, at_t))
        size = np.maximum(1, np.maximum(at_theta, at_t))
        # E_q[log π_θ − log π_t] = F′ − s, once more without the divergences
        q = direct.log_q(rows.log_theta, rows.log_t, rows.alpha)
        common = np.isfinite(q)
        ratio = np.where(common, rows.log_theta, 0) - np.where(common, rows.log_t, 0)
        worst = max(worst, apart((rows.kl_t - rows.kl_theta) / size, mean(q, ratio) / size))
    return worst


def effective_sample_sizes(impl: str) -> float:
    """Both ESS by their definition, in logarithms; 0 where π has mass outside q's support."""
    worst = 0.0
    for rows in answers(impl):
        for got, want in zip((rows.ess_theta, rows.ess_t), rows.log_esses(), strict=True):
            worst = max(worst, apart(log(got), want))
    return worst


def log_normaliser(impl: str) -> float:
    """α N_θ + (1 − α) N_t − F(α) against −log Σ π_θ^α π_t^(1−α)."""
    worst = 0.0
    for family in (*families(), masked()):
        pair = curve(family)
        for alpha in (0.0, 0.3, 0.5, 1.0):
            like = torch.full_like(pair.norm_t, alpha)
            got = alpha * pair.norm_theta + (1 - alpha) * pair.norm_t - pair.curve(like)[1]
            want = -logsumexp(direct.log_mixture(log_softmax(family.theta), log_softmax(family.t), alpha), axis=1)
            worst = max(worst, apart(got.numpy(), want))
    return worst


def divergences_of_the_models(impl: str) -> float:
    """KL(π_θ‖π_t) and KL(π_t‖π_θ) at the ends; their sum as ∫F″ where 24 points are enough for that."""
    worst = 0.0
    for family in families():
        at_one, at_zero = (ask(impl, family, method="fixed", alpha=alpha) for alpha in (1.0, 0.0))
        forward, backward = kl(at_one.log_theta, at_one.log_t), kl(at_one.log_t, at_one.log_theta)
        worst = max(worst, apart(at_one.kl_t, forward), apart(at_zero.kl_theta, backward))
        worst = max(worst, apart(at_one.kl_theta, 0.0), apart(at_zero.kl_t, 0.0))
        near = forward + backward < 10
        pair = family.theta[near], family.t[near]
        whole = integral(lambda x, pair=pair: direct.cumulants_of_d(*pair, x)[1], 0, 1, 24)
        worst = max(worst, apart(whole, (at_one.kl_t + at_zero.kl_theta)[near]))
    return worst


def entropies(impl: str) -> float:
    """H(q) = F − E_q[b] − αF′, and the entropies of both rows."""
    worst = 0.0
    for family in (*families(), masked()):
        pair = curve(family)
        log_theta, log_t = log_softmax(family.theta), log_softmax(family.t)
        for got, want in (
            (reference.entropy(pair.a), log_theta),
            (reference.entropy(pair.b), log_t),
        ):
            worst = max(worst, apart(got.numpy(), direct.entropy(want)))
        for alpha in (0.0, 0.4, 1.0):
            like = torch.full_like(pair.norm_t, alpha)
            _, f, slope, _ = pair.curve(like)
            q = direct.log_q(log_theta, log_t, alpha)
            got = f.numpy() - mean(q, pair.b.numpy()) - alpha * slope.numpy()
            worst = max(worst, apart(got, direct.entropy(q)))
    return worst


def naive_cut(log_p: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Which tokens top-k and then top-p keep, [V]; the probabilities must differ."""
    order = np.argsort(-log_p)
    order = order[np.isfinite(log_p[order])]
    order = order[: top_k or None]
    p = np.exp(log_softmax(log_p[order]))
    order = order[: 1 + np.sum(np.cumsum(p) < top_p)]
    kept = np.zeros(len(log_p), dtype=bool)
    kept[order] = True
    return kept


def temperature_and_truncation(impl: str) -> float:
    """Both rows divided by the temperature, and q* conditioned on what is kept."""
    worst = 0.0
    family = Family("LLM-like", *zipf_pair(6, 1500, 1.0, seed=7))
    for temperature in (0.5, 1.7):
        rows = ask(impl, family, temperature=temperature)
        log_theta, log_t = log_softmax(family.theta / temperature), log_softmax(family.t / temperature)
        q = direct.log_q(log_theta, log_t, rows.alpha)
        worst = max(worst, apart(rows.log_q, q), apart(rows.kl_theta, kl(q, log_theta)))
    for cut in (
        {"top_k": 40},
        {"top_p": 0.8},
        {"min_p": 0.003},
        {"target_top_k": 30},
        {"target_top_p": 0.7},
        {"top_k": 60, "top_p": 0.9, "min_p": 0.01, "target_top_k": 100, "target_top_p": 0.95},
    ):
        plain, rows = ask(impl, family), ask(impl, family, **cut)
        for i in range(len(family.theta)):
            target = naive_cut(plain.log_t[i], cut.get("target_top_k", 0), cut.get("target_top_p", 1.0))
            log_q = np.where(target, plain.log_q[i], -np.inf)
            kept = naive_cut(log_q, cut.get("top_k", 0), cut.get("top_p", 1.0))
            log_q = np.where(kept, log_q, -np.inf)
            log_q = np.where(log_q >= log_q.max() + log(np.array(cut.get("min_p", 0.0))), log_q, -np.inf)
            worst = max(worst, apart(rows.log_q[i], log_softmax(log_q)))
            # of all distributions on what is kept it is the nearest to q*, at −log of its mass
            worst = max(worst, apart(kl(rows.log_q[i], plain.log_q[i]), -logsumexp(log_q)))
        worst = max(worst, apart(rows.alpha, plain.alpha), apart(rows.kl_t, plain.kl_t))
    return worst


def the_draw(impl: str) -> float:
    """The share of 1,000 tokens that are not the two-level draw's by its definition."""
    draws, vocab_size = 1000, 2 * GROUP_SIZE + 20
    theta, t = (torch.from_numpy(x[0]) for x in zipf_pair(1, vocab_size, 1.0, seed=9))
    seeds = torch.arange(draws) - 5
    kwargs = {"method": "fixed", "alpha": 0.4, "seeds": seeds, "positions": seeds % 11}
    token = qstar_sample(theta.expand(draws, -1), t.expand(draws, -1), impl=impl, **kwargs).token.numpy()
    q = direct.log_q(*(log_softmax(x.numpy()[None]) for x in (theta, t)), 0.4)[0]
    starts = np.arange(0, vocab_size, GROUP_SIZE)
    mass = np.array([logsumexp(q[start : start + GROUP_SIZE]) for start in starts])
    zero = torch.zeros_like(seeds)
    group = (mass + gumbel(seeds, seeds % 11, zero, len(mass), GROUP_STREAM).numpy()).argmax(1)
    noise = gumbel(seeds, seeds % 11, torch.from_numpy(starts[group]), GROUP_SIZE, TOKEN_STREAM).numpy()
    padded = np.append(q, np.full(GROUP_SIZE, -np.inf))
    within = (padded[starts[group][:, None] + np.arange(GROUP_SIZE)] + noise).argmax(1)
    return float(np.mean(token != starts[group] + within))


def gaussian_closed_forms(impl: str) -> float:
    """q_α, both KLs and, where the grid reaches far enough, both ESS of Gaussians; ¼Δ² and ⅛Δ² for equal shapes."""
    family, points, worst = gaussians(), grid(), 0.0
    for setting in (*FIXED, {"method": "kl_symmetry"}):
        rows = ask(impl, family, **setting)
        for i, (theta, t) in enumerate(GAUSSIANS.values()):
            alpha = rows.alpha[i]
            q = direct.gaussian_q(theta, t, alpha)
            near = q.log_density(points) > -40
            log_q = q.log_density(points) + 2 * np.log(STEP)
            worst = max(worst, apart(rows.log_q[i][near], log_q[near]))
            worst = max(worst, apart(rows.kl_theta[i], q.kl(theta)), apart(rows.kl_t[i], q.kl(t)))
            want = direct.gaussian_log_ess(theta, t, alpha)
            for got, log_want, other in ((rows.ess_theta[i], want[0], 2 - alpha), (rows.ess_t[i], want[1], -alpha)):
                if np.isfinite(log_want):
                    tilted = direct.gaussian_q(theta, t, other)
                    room = REACH - np.abs(tilted.mean).max()
                    if room > 9 * np.sqrt(np.linalg.eigvalsh(tilted.cov).max()):  # else the grid cuts mass off
                        worst = max(worst, apart(np.log(got), log_want))
    i = list(GAUSSIANS).index("shifted")
    theta, t = GAUSSIANS["shifted"]
    square = (theta.mean - t.mean) @ (theta.mean - t.mean)
    got = rows.alpha[i], rows.kl_theta[i], -np.log(rows.ess_theta[i]), -np.log(rows.ess_t[i])
    return max(worst, apart(got, (0.5, square / 8, square / 4, square / 4)))


def weighted_sum_identity(impl: str) -> float:
    """(1−α) KL(q‖π_t) + α KL(q‖π_θ) = KL(q‖q_α) − log Z_α for any q, with the library's q_α and −log Z_α."""
    g, worst = np.random.default_rng(0), 0.0
    for rows in answers(impl, FIXED + SOLVED[:1], masks=False):
        alpha = rows.alpha
        log_z = alpha * rows.kl_theta + (1 - alpha) * rows.kl_t  # the identity for q = q_α
        for scale in (0.1, 3.0):
            r = log_softmax(rows.log_q + scale * g.normal(size=rows.log_q.shape))
            left = (1 - alpha) * kl(r, rows.log_t) + alpha * kl(r, rows.log_theta)
            worst = max(worst, apart(left, kl(r, rows.log_q) + log_z))
        whole = logsumexp(direct.log_mixture(rows.log_theta, rows.log_t, alpha), axis=1)
        worst = max(worst, apart(log_z, -whole))
    return worst


def frontier(impl: str) -> float:
    """The least KL(q‖π_t) for a given KL(q‖π_θ): SLSQP finds the library's, and random q are dominated."""
    g, worst, family = np.random.default_rng(0), 0.0, small_pairs(4, 4)
    for alpha in (0.2, 0.5, 0.7):
        rows = ask(impl, family, method="fixed", alpha=alpha)
        for i in range(len(family.theta)):
            log_theta, log_t = rows.log_theta[i], rows.log_t[i]
            found = minimise(
                lambda q, _, log_t=log_t: kl(q, log_t),
                [lambda q, _, log_theta=log_theta, most=rows.kl_theta[i]: most - kl(q, log_theta)],
                np.append(log_t, 0.0),
            )
            worst = max(worst, apart(found, rows.kl_t[i]))
    # a random q against the point of the family that has its KL(·‖π_θ), or against π_t where none has
    some = Family("small", family.theta[[0, 1, 2, 3] * 5], family.t[[0, 1, 2, 3] * 5])
    log_theta, log_t = log_softmax(some.theta), log_softmax(some.t)
    for i in range(len(some.theta)):
        q = log_softmax(log_t[i] + 2 * g.normal(size=4))
        x, y = kl(q, log_theta[i]), kl(q, log_t[i])
        one = Family("one", some.theta[i : i + 1], some.t[i : i + 1])

        def gap(alpha: float, one=one, x=x) -> float:
            return float(ask(impl, one, method="fixed", alpha=alpha).kl_theta[0]) - x

        alpha = 0.0 if gap(0.0) <= 0 else brentq(gap, 0.0, 1.0, xtol=1e-13)
        at = ask(impl, one, method="fixed", alpha=alpha)
        worst = max(worst, above(at.kl_theta[0], x), 0.0 if at.kl_t[0] < y else np.inf)
    return worst


def shape_of_the_frontier(impl: str) -> float:
    """dk_θ/dα = (α−1)F″ and dk_t/dα = αF″, by differences; so the slope is −α/(1−α), and the curve is convex."""
    h, worst = 2e-5, 0.0
    for family in families():
        slopes = []
        for alpha in (0.2, 0.5, 0.7):
            low, high = (ask(impl, family, method="fixed", alpha=alpha + step) for step in (-h, h))
            curvature = direct.cumulants_of_d(family.theta, family.t, alpha)[1]
            rise_theta, rise_t = (high.kl_theta - low.kl_theta) / (2 * h), (high.kl_t - low.kl_t) / (2 * h)
            worst = max(worst, apart(rise_theta, (alpha - 1) * curvature), apart(rise_t, alpha * curvature))
            slopes.append(-alpha / (1 - alpha))
        worst = max(worst, above(np.diff(slopes), 0))
    return worst


def minimax(impl: str) -> float:
    """No q has a smaller max{KL(q‖π_θ), KL(q‖π_t)}: by SLSQP on small rows, by the bound at α* on all."""
    g, worst, family = np.random.default_rng(0), 0.0, small_pairs(5, 4)
    rows = ask(impl, family)
    for i in range(len(family.theta)):
        pair = (rows.log_theta[i], rows.log_t[i])
        found = minimise(
            lambda q, top: top,
            [lambda q, top, x=x: top - kl(q, x) for x in pair],
            np.append(pair[0], kl(*pair)),
        )
        worst = max(worst, apart((rows.kl_theta[i], rows.kl_t[i]), found))
    for rows in answers(impl, SOLVED[:1], masks=False):
        for scale in (0.01, 1.0):
            q = log_softmax(rows.log_q + scale * g.normal(size=rows.log_q.shape))
            larger = np.maximum(kl(q, rows.log_theta), kl(q, rows.log_t))
            worst = max(worst, above(np.maximum(rows.kl_theta, rows.kl_t), larger))
    return worst


def chernoff_information(impl: str) -> float:
    """The common KL is max over α of −log Σ π_θ^α π_t^(1−α), found by SciPy's scalar maximisation."""
    worst = 0.0
    for rows in answers(impl, SOLVED[:1], masks=False):
        for i in range(len(rows.alpha)):
            log_theta, log_t = rows.log_theta[i : i + 1], rows.log_t[i : i + 1]
            found = minimize_scalar(
                lambda x, pair=(log_theta, log_t): logsumexp(direct.log_mixture(*pair, x)),
                bounds=(0, 1),
                method="bounded",
                options={"xatol": 1e-9},
            )
            worst = max(worst, apart((rows.kl_theta[i], rows.kl_t[i]), -found.fun))
    return worst


def error_exponent(impl: str) -> float:
    """Bernoulli: the probability of error of the best test after n draws is at most ½e^(−nc), and of that order."""
    worst = 0.0
    for p, r in ((0.9, 0.5), (0.3, 0.31), (0.99, 0.02)):
        logits = np.log([[1 - p, p]]), np.log([[1 - r, r]])
        c = ask(impl, Family("Bernoulli", *logits)).kl_theta[0]
        for n in (10, 1000, 30_000):
            k = np.arange(n + 1)
            log_error = logsumexp(np.minimum(binom.logpmf(k, n, p), binom.logpmf(k, n, r))) - np.log(2)
            worst = max(worst, above(log_error, -np.log(2) - n * c), above(-log_error / n - c, 6 * np.log(n + 1) / n))
    return worst


def sequences(impl: str) -> float:
    """Rows solved one by one give sequences with equal KLs, never below the minimax of whole sequences."""
    g, worst, strict = np.random.default_rng(0), 0.0, False
    for _ in range(5):
        theta, t = 1.5 * g.normal(size=(2, 1 + 4, 4))  # the first position, and the second after each of 4 tokens
        rows = ask(impl, Family("rows", theta, t))
        whole = [(x[0][:, None] + x[1:]).reshape(1, 16) for x in (rows.log_theta, rows.log_t, rows.log_q)]
        found = kl(whole[2], whole[0])[0], kl(whole[2], whole[1])[0]
        by_rows = rows.kl_theta[0] + mean(rows.log_q[0], rows.kl_theta[1:])
        worst = max(worst, apart(*found), apart(found, by_rows))
        least = ask(impl, Family("sequences", whole[0], whole[1])).kl_theta[0]
        worst = max(worst, above(least, max(found)))
        strict |= least < 0.999 * max(found)
    return worst if strict else np.inf


def check_root(impl: str, method: str, gap: Callable) -> float:
    """α of `method` is the one root of `gap(log_theta, log_t, α)`, which falls or rises through [0, 1]."""
    worst = 0.0
    for rows in answers(impl, ({"method": method},), masks=False):
        usual = direct.cumulants_of_d(rows.log_theta, rows.log_t, 0.5)[1] > 1e-10
        for i in np.flatnonzero(usual):
            pair = rows.log_theta[i : i + 1], rows.log_t[i : i + 1]
            size = max(1.0, abs(gap(*pair, 0.0)), abs(gap(*pair, 1.0)))
            root = brentq(lambda x, pair=pair: gap(*pair, x), 0, 1, xtol=1e-15, rtol=1e-14)
            steep = abs(gap(*pair, min(1, root + 1e-4)) - gap(*pair, max(0, root - 1e-4))) / 2e-4
            values = [gap(*pair, x) for x in np.linspace(0, 1, 6)]
            one_way = np.sign(values[-1] - values[0]) * np.diff(values)
            worst = max(worst, abs(gap(*pair, rows.alpha[i])) / size, abs(rows.alpha[i] - root) * min(1, steep))
            worst = max(worst, above(0, one_way.min() / size))
    return worst


def kl_symmetry(impl: str) -> float:
    """The root of KL(q‖π_t) − KL(q‖π_θ) by SciPy, alone in [0, 1]; its closed form for V = 2."""

    def gap(log_theta: np.ndarray, log_t: np.ndarray, alpha: float) -> float:
        q = direct.log_q(log_theta, log_t, alpha)
        return float(kl(q, log_t)[0] - kl(q, log_theta)[0])

    worst = check_root(impl, "kl_symmetry", gap)
    (bernoulli,) = (family for family in families() if family.name == "Bernoulli")
    rows = ask(impl, bernoulli)
    u, v = (rows.log_theta - rows.log_t).T[::-1]
    odds = log(-v / u)
    logit_theta, logit_t = (np.diff(x, axis=1)[:, 0] for x in (rows.log_theta, rows.log_t))
    scale = np.abs(logit_theta - logit_t)
    alpha = (odds - logit_t) / (logit_theta - logit_t)
    return max(worst, apart(rows.alpha * scale, alpha * scale), apart(np.diff(rows.log_q, axis=1)[:, 0], odds))


def ess_balance(impl: str) -> float:
    """The root of log ESS_θ − log ESS_t by SciPy, alone in [0, 1]."""

    def gap(log_theta: np.ndarray, log_t: np.ndarray, alpha: float) -> float:
        q = direct.log_q(log_theta, log_t, alpha)
        return float(log_ess(log_theta, q)[0] - log_ess(log_t, q)[0])

    return check_root(impl, "ess_balance", gap)


def reverse_kl_symmetry(impl: str) -> float:
    """KL(π_θ‖q) = KL(π_t‖q) by the definition."""
    worst = 0.0
    for rows in answers(impl, ({"method": "reverse_kl_symmetry"},), masks=False):
        q = direct.log_q(rows.log_theta, rows.log_t, rows.alpha)
        at_theta, at_t = kl(rows.log_theta, q), kl(rows.log_t, q)
        size = np.maximum(1, at_theta)
        worst = max(worst, apart(at_theta / size, at_t / size), above(rows.alpha, 1), above(0, rows.alpha))
    return worst


def other_rules(impl: str) -> float:
    """The entropy rule, a given α, and the clamp."""
    worst = 0.0
    for rows in answers(impl, ({"method": "entropy"},)):
        h_theta, h_t = direct.entropy(rows.log_theta), direct.entropy(rows.log_t)
        some = h_theta + h_t > 1e-10  # below, the definition's own sum is rounding
        worst = max(worst, apart(rows.alpha[some], (h_theta / np.where(some, h_theta + h_t, 1))[some]))
    for rows in answers(impl, ({"method": "fixed", "alpha": 0.37},)):
        worst = max(worst, apart(rows.alpha, 0.37))
    for method in METHODS:
        for family in families()[:2]:
            free = ask(impl, family, method=method).alpha
            clamped = ask(impl, family, method=method, alpha_min=0.48, alpha_max=0.52).alpha
            worst = max(worst, apart(clamped, np.clip(free, 0.48, 0.52)))
    return worst


def one_distribution(impl: str) -> float:
    """Equal rows up to a constant: α = ½ by every rule but the budgets', which are at an end; KL 0, ESS 1."""
    row = np.random.default_rng(0).normal(size=(4, 50))
    family = Family("one distribution", row + np.array([[0.0], [5], [-300], [1e4]]), row)
    worst = 0.0
    alphas = {"kl_budget": 0.0, "kl_budget_t": 1.0}
    for f, setting in itertools.product((family, families()[-1]), SOLVED):
        rows = ask(impl, f, **setting)
        alpha = alphas.get(setting["method"], 0.5)
        worst = max(worst, apart(rows.alpha, alpha), apart((rows.kl_theta, rows.kl_t), 0.0))
        worst = max(worst, apart((rows.ess_theta, rows.ess_t), 1.0))
    return worst


def different_supports(impl: str) -> float:
    """A root where there is one, else the end with the smaller max{KL, KL}, which is then the minimax end."""
    family, worst = masked(), 0.0
    rows = ask(impl, family)
    at_theta, at_t = rows.kls()
    ends = [ask(impl, family, method="fixed", alpha=alpha) for alpha in (0.0, 1.0)]
    gaps = [np.subtract(*end.kls()[::-1]) for end in ends]
    rooted = (gaps[0] <= 0) & (gaps[1] >= 0)
    if rooted.all() or not rooted.any():
        return np.inf  # the family is to have both kinds
    worst = apart(at_theta[rooted], at_t[rooted])
    larger = [np.maximum(*end.kls()) for end in ends]
    worst = max(worst, apart(rows.alpha[~rooted], np.where(larger[0] <= larger[1], 0.0, 1.0)[~rooted]))
    for alpha in np.linspace(0, 1, 11):
        q = direct.log_q(rows.log_theta, rows.log_t, alpha)
        other = np.maximum(kl(q, rows.log_theta), kl(q, rows.log_t))
        worst = max(worst, above(np.maximum(at_theta, at_t), other))
    inside = [np.isfinite(x) for x in (rows.log_theta, rows.log_t)]
    for ess, mine, others in ((rows.ess_theta, *inside), (rows.ess_t, *inside[::-1])):
        worst = max(worst, apart(ess[(mine & ~others).any(axis=1)], 0.0))
    nothing = np.full((1, 3), -np.inf)
    refused = {
        Status.NAN: ([[np.nan, 0, 0]], [[0, 0, 0]]),
        Status.POSITIVE_INFINITY: ([[np.inf, 0, 0]], [[0, 0, 0]]),
        Status.NO_SUPPORT: (nothing, [[0, 0, 0]]),
        Status.DISJOINT: ([[-np.inf, 0, 0]], [[0, -np.inf, -np.inf]]),
    }
    for status, pair in refused.items():
        step = qstar_stats(*(torch.tensor(np.array(x, dtype=float)) for x in pair), impl=impl)
        worst = max(worst, 0.0 if step.status.item() == status and step.alpha.isnan().all() else np.inf)
    return worst


def ball_of(rows: Rows, setting: dict) -> tuple[np.ndarray, np.ndarray]:
    """The models of a budget rule: the one that the ball is around, then the other."""
    pair = rows.log_theta, rows.log_t
    return pair if setting["method"] == "kl_budget" else pair[::-1]


def budgets(impl: str) -> float:
    """Of all distributions in the ball the one nearest to the other model: SLSQP finds the library's, and SciPy its α;
    KL falls all the way; where the other model is inside, it is the one."""
    worst, ends = 0.0, 0
    for family, setting in itertools.product(families(), BUDGETED):
        rows, budget = ask(impl, family, **setting), setting["kl_budget"]
        inside = 1.0 if setting["method"] == "kl_budget_t" else 0.0
        for i in range(len(family.theta)):
            center, other = (x[i : i + 1] for x in ball_of(rows, setting))

            def excess(way: float, center=center, other=other, budget=budget) -> float:
                return float(kl(direct.log_q(center, other, 1 - way), center)[0]) - budget

            falls = np.diff([excess(x) for x in np.linspace(1, 0, 6)])
            worst = max(worst, float(falls.max()) / max(1.0, excess(1.0)))
            if excess(1.0) <= -1e-9:
                worst, ends = max(worst, abs(rows.alpha[i] - inside)), ends + 1
            elif excess(1.0) >= 1e-9:
                found = abs(excess(abs(rows.alpha[i] - (1 - inside)))) / max(1.0, budget)
                root = brentq(excess, 0, 1, xtol=1e-15, rtol=1e-14)
                steep = (excess(min(1, root + 1e-4)) - excess(max(0, root - 1e-4))) / 2e-4
                away = abs(abs(rows.alpha[i] - (1 - inside)) - root)
                worst = max(worst, found, away * min(1.0, steep))
    family = small_pairs(4, 4)
    for setting in BUDGETED:
        rows = ask(impl, family, **setting)
        for i in range(len(family.theta)):
            center, other = (x[i] for x in ball_of(rows, setting))
            least = minimise(
                lambda q, _, other=other: kl(q, other),
                [lambda q, _, center=center, most=setting["kl_budget"]: most - kl(q, center)],
                np.append(other, 0.0),
            )
            worst = max(worst, apart(kl(rows.log_q[i], other), least))
    return worst if ends else np.inf


def ends_of_budgets(impl: str) -> float:
    """Different supports: the other model on the common support where that is inside, the end nearest to the ball where
    none reaches it; a budget of 0 is the model itself."""
    worst, kinds = 0.0, set()
    family = masked()
    for setting in BUDGETED:
        rows, budget = ask(impl, family, **setting), setting["kl_budget"]
        inside = 1.0 if setting["method"] == "kl_budget_t" else 0.0
        for i in range(len(family.theta)):
            center, other = (x[i : i + 1] for x in ball_of(rows, setting))
            near, far = (float(kl(direct.log_q(center, other, x), center)[0]) for x in (1.0, 0.0))
            kind = "inside" if far <= budget else "unreachable" if near >= budget else "root"
            kinds.add(kind)
            if kind == "root":
                own = kl(rows.log_q[i : i + 1], center)[0]
                worst = max(worst, apart(own, budget))
            else:
                worst = max(worst, abs(rows.alpha[i] - (inside if kind == "inside" else 1 - inside)))
    for f, (method, end) in itertools.product((*families(), family), (("kl_budget", 1.0), ("kl_budget_t", 0.0))):
        worst = max(worst, apart(ask(impl, f, method=method, kl_budget=0.0).alpha, end))
    return worst if len(kinds) == 3 else np.inf


def closing(impl: str, epsilon: float, **setting) -> tuple[Rows, np.ndarray]:
    """Pairs ε apart about one middle, with a skewed difference; and the cumulants of d at α = ½."""
    g = np.random.default_rng(0)
    middle, difference = g.normal(size=(8, 200)), g.exponential(size=(8, 200))
    theta, t = middle + epsilon / 2 * difference, middle - epsilon / 2 * difference
    return ask(impl, Family("closing", theta, t), **setting), direct.cumulants_of_d(theta, t, 0.5)


def beyond_second_order(ratio_at: Callable[[float], np.ndarray]) -> float:
    """The greatest |ratio − 1| / ε² for ε that closes in: bounded if the ratio is 1 + O(ε²)."""
    return max(float(np.max(np.abs(ratio_at(epsilon) - 1))) / epsilon**2 for epsilon in (0.2, 0.1, 0.05, 0.025))


def leading_terms(impl: str) -> float:
    """α − ½ over F‴/F″ of KL symmetry, the reverse rule and ESS balance tends to 1/24, 2/24, 3/24."""
    worst = 0.0
    for method, part in (("kl_symmetry", 1), ("reverse_kl_symmetry", 2), ("ess_balance", 3)):

        def ratio(epsilon: float, method=method, part=part) -> np.ndarray:
            rows, cumulants = closing(impl, epsilon, method=method)
            return (rows.alpha - 0.5) / (part / 24 * cumulants[2] / cumulants[1])

        worst = max(worst, beyond_second_order(ratio))
    return worst


def difference_of_the_rules(impl: str) -> float:
    """α_ESS − α_KL over F‴/(12 F″), and log(ESS_θ/ESS_t) at α_KL over −F‴/6, tend to 1."""

    def of_alpha(epsilon: float) -> np.ndarray:
        rows, cumulants = closing(impl, epsilon)
        return 12 * (closing(impl, epsilon, method="ess_balance")[0].alpha - rows.alpha) / cumulants[2] * cumulants[1]

    def of_ess(epsilon: float) -> np.ndarray:
        rows, cumulants = closing(impl, epsilon)
        return -6 * np.log(rows.ess_theta / rows.ess_t) / cumulants[2]

    return max(beyond_second_order(of_alpha), beyond_second_order(of_ess))


def when_they_agree(impl: str) -> float:
    """A pair that a permutation of the tokens exchanges has α = ½ by every rule but the budgets'; V = 2 with 0.9 and
    0.5 has not."""
    row = 2 * np.random.default_rng(0).normal(size=(6, 31))
    symmetric = Family("exchanged", row, row[:, ::-1].copy())
    worst = max(apart(ask(impl, symmetric, **setting).alpha, 0.5) for setting in BALANCED)
    rows, by_ess = (
        ask(impl, Family("Bernoulli", np.log([[0.1, 0.9]]), np.log([[0.5, 0.5]])), method=method)
        for method in ("kl_symmetry", "ess_balance")
    )
    worst = max(worst, apart(rows.alpha, np.log(np.log(5) / np.log(1.8)) / np.log(9)))
    return worst if abs(by_ess.alpha[0] - rows.alpha[0]) > 0.01 else np.inf


def chernoff_and_overlap(impl: str) -> float:
    """1 − TV ≤ e^(−c) ≤ √(1 − TV²)."""
    worst = 0.0
    for rows in answers(impl, SOLVED[:1], masks=False):
        overlap = np.exp(logsumexp(np.minimum(rows.log_theta, rows.log_t), axis=1))  # 1 − TV
        for c in (rows.kl_theta, rows.kl_t):
            worst = max(worst, above(-0.5 * np.log(overlap * (2 - overlap)), c), above(c, -np.log(overlap)))
    return worst


def cost_of_the_text(impl: str) -> float:
    """Under both models q*'s tokens have the mean log-probability −H(q*) − c."""
    worst = 0.0
    for rows in answers(impl, SOLVED[:1], masks=False):
        for log_pi, c in ((rows.log_theta, rows.kl_theta), (rows.log_t, rows.kl_t)):
            worst = max(worst, apart(mean(rows.log_q, log_pi), -direct.entropy(rows.log_q) - c))
    return worst


def three_tokens(impl: str) -> float:
    """The closed forms of the example of Claim 7.6."""
    worst = 0.0
    for small, shared in ((1e-8, 1e-2), (1e-4, 1e-3), (0.1, 0.2)):
        large = 1 - small - shared
        rows = ask(impl, Family("three", np.log([[large, small, shared]]), np.log([[small, large, shared]])))
        z = shared + 2 * np.sqrt(small * large)
        ess = 1 / (z * ((large**2 + small**2) / np.sqrt(small * large) + shared))
        got = rows.alpha[0], rows.kl_theta[0], rows.kl_t[0], np.exp(rows.log_q[0, 2])
        worst = max(worst, apart(got, (0.5, -np.log(z), -np.log(z), shared / z)))
        worst = max(worst, apart(np.log([rows.ess_theta[0], rows.ess_t[0]]), np.log(ess)))
    return worst


def nested_gaussians(impl: str) -> float:
    """Where a narrow Gaussian is π_θ: at α* the KLs are equal, and ESS_t tends to 0 as the grid grows."""
    theta, t = GAUSSIANS["nested"]
    esses = []
    for reach in (9.0, 18.0, 27.0):
        axis = np.arange(-reach, reach + STEP / 2, STEP)
        points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(1, -1, 2)
        rows = ask(impl, Family("nested", theta.log_density(points), t.log_density(points)))
        esses.append(rows.ess_t[0])
    worst = apart(rows.kl_theta, rows.kl_t)
    diverges = direct.gaussian_log_integral(theta, t, -rows.alpha[0]) == np.inf
    falls = esses[1] < esses[0] / 10 and esses[2] < esses[1] / 10
    return worst if diverges and falls else np.inf


def sweeps(dtype: type = np.float64) -> Iterator[tuple[np.ndarray, np.ndarray, Sweep]]:
    """Log-probabilities [V] of a pair and a sweep over it, about two centres.

    Some rows of all families, and skewed ones of few tokens, which nearly reach a bound by the greatest distance.
    """
    g = np.random.default_rng(8)
    rare = g.normal(size=(2, 20, 3)) + np.array([0.0, -6.0, -9.0])
    spread = [zipf_pair(2, 3000, noise, seed) for seed, noise in enumerate((0.01, 0.3, 1.0, 3.0))]
    for family in (*families(), Family("rare", *rare), *(Family("Zipf", *pair) for pair in spread)):
        rounded = [x.astype(dtype).astype(float) for x in (family.theta, family.t)]
        log_theta, log_t = (log_softmax(x) for x in rounded)
        for i in range(min(len(log_theta), 8)):
            for center in (0.5, 0.2):
                with np.errstate(all="ignore"):  # overflows make a bound infinite or NaN: the row is refused
                    sweep = Sweep(*(x[i] for x in rounded), center, dtype, center != 0.5)
                yield log_theta[i], log_t[i], sweep


@dataclass(frozen=True)
class Beside:
    """A place beside the centre of a sweep, and what is true there by the definition, in log-probabilities."""

    log_theta: np.ndarray
    log_t: np.ndarray
    sweep: Sweep
    alpha: float

    def f(self, alpha: float) -> float:
        return float(logsumexp(alpha * self.log_theta + (1 - alpha) * self.log_t))

    @property
    def slope(self) -> float:
        q = direct.log_q(self.log_theta[None], self.log_t[None], np.array([self.alpha]))[0]
        return float(np.exp(q) @ (self.log_theta - self.log_t))


def beside(steps: Sequence[float], dtype: type = np.float64) -> Iterator[Beside]:
    """All sweeps at some steps from their centres."""
    for log_theta, log_t, sweep in sweeps(dtype):
        for x in steps:
            yield Beside(log_theta, log_t, sweep, sweep.center + x)


STEPS = (-0.45, -0.2, -0.05, 0.02, 0.1, 0.3)


def beyond(error: float, bound: float) -> float:
    """By how much an error is above its bound and float64's rounding; a bound that is no number refuses the row."""
    return max(0.0, error - bound - 1e-12) if np.isfinite(bound) and bound < 1 else 0.0


def about_a_centre(impl: str) -> float:
    """F and F′ beside the centre, F(2 − α) and F(−α): no farther from the definition than their bounds."""
    worst, bounded = 0.0, 0
    for at in beside(STEPS):
        alpha, sweep = at.alpha, at.sweep
        with np.errstate(all="ignore"):
            (norm, slope, _), (of_f, of_slope), sides = sweep.at(alpha), sweep.left_out(alpha), sweep.sides(alpha)
        size = 1 + np.abs(at.log_theta).max() + np.abs(at.log_t).max()
        worst = max(worst, beyond(abs(slope - at.slope) / size, of_slope / size))
        for (got, off), place in zip(((norm, of_f), *sides), (alpha, 2 - alpha, -alpha), strict=True):
            worst = max(worst, beyond(abs(got - at.f(place)) / size, off / size))
        bounded += 1e-9 < of_f < 1e-3
    return worst if bounded > 20 else np.inf


def by_the_rows_moments(impl: str) -> float:
    """F′ of close pairs from the row's moments alone: no farther from the definition than its bound."""
    worst, bounded = 0.0, 0
    for at in beside(STEPS):
        with np.errstate(all="ignore"):
            gap, off = at.sweep.near(at.alpha)
        worst, bounded = max(worst, beyond(abs(gap - at.slope), off)), bounded + (1e-9 < off < 1e-3)
    return worst if bounded > 20 else np.inf


def distance_of_the_models(impl: str) -> float:
    """(Σ |π_θ − π_t|)² ≤ e^F(α) (e^F(2−α) + e^F(−α) − 2 e^(F + (1−2α) F′)), in log-probabilities."""
    worst = 0.0
    for log_theta, log_t, sweep in sweeps():
        apart_by_sum = np.abs(np.exp(log_theta) - np.exp(log_t)).sum()
        with np.errstate(all="ignore"):
            bound = sweep.apart(sweep.center)
        worst = max(worst, beyond(apart_by_sum, bound + 1e-7) if np.isfinite(bound) else 0.0)
    return worst


def depth_of_the_tokens(impl: str) -> float:
    """E_q (log q)² ≤ (1 + log V)²."""
    worst = 0.0
    for log_theta, log_t, _ in sweeps():
        for log_q in (log_theta, log_t):
            some = log_q > -700
            worst = max(worst, above(np.exp(log_q[some]) @ log_q[some] ** 2, (1 + np.log(len(log_q))) ** 2))
    return worst


def rounding_of_a_sweep(impl: str) -> float:
    """F′ of a float32 sweep is no farther from the definition than its bounds, and α of an accepted row no farther from
    equal KLs than the tolerance and the rounding."""
    worst, accepted = 0.0, 0
    for at in beside((0.0, 0.02, -0.05), np.float32):
        with np.errstate(all="ignore"):
            slope = at.sweep.at(at.alpha)[1]
            bound = at.sweep.left_out(at.alpha)[1] + at.sweep.rounding(at.alpha)
        worst = max(worst, beyond(abs(slope - at.slope), bound))
    for log_theta, log_t, sweep in sweeps(np.float32):
        with np.errstate(all="ignore"):
            alpha, fit = sweep.solve()
        if fit:
            accepted += 1
            q = direct.log_q(log_theta[None], log_t[None], np.array([alpha]))
            kls = kl(q, log_theta[None])[0], kl(q, log_t[None])[0]
            with np.errstate(all="ignore"):
                allowed = 1e-5 * max(1, *kls) + sweep.rounding(alpha)
            worst = max(worst, beyond(abs(kls[0] - kls[1]), allowed))
    return worst if accepted > 20 else np.inf


def kl_beside_a_centre(impl: str) -> float:
    """Both KLs by the groups' and by the row's moments: no farther from the definition than their bounds."""
    worst, bounded = 0.0, [0, 0]
    for at in beside(STEPS):
        if not 0 <= at.alpha <= 1:
            continue
        q = direct.log_q(at.log_theta[None], at.log_t[None], np.array([at.alpha]))
        size = 1 + np.abs(at.log_theta).max() + np.abs(at.log_t).max()
        for of_t, log_p in enumerate((at.log_theta, at.log_t)):
            with np.errstate(all="ignore"):
                far, near = at.sweep.kl(at.alpha, bool(of_t))[:2], at.sweep.near_kl(at.alpha, bool(of_t))
            for i, (got, off) in enumerate((far, near)):
                worst = max(worst, beyond(abs(got - kl(q, log_p[None])[0]) / size, off / size))
                bounded[i] += 1e-9 < off < 1e-3
    return worst if min(bounded) > 20 else np.inf


def rounding_of_a_budget(impl: str) -> float:
    """KLs of a float32 sweep are no farther from the definition than their bounds, and an accepted α leaves no more
    than the tolerance and the rounding between the KL and its budget."""
    worst, accepted = 0.0, 0
    for log_theta, log_t, sweep in sweeps(np.float32):
        for of_t, budget in itertools.product((False, True), (1e-3, 0.05, 0.5)):
            with np.errstate(all="ignore"):
                alpha, fit = sweep.solve_budget(budget, of_t)
            if not fit:
                continue
            q = direct.log_q(log_theta[None], log_t[None], np.array([alpha]))
            exact = kl(q, (log_t if of_t else log_theta)[None])[0]
            with np.errstate(all="ignore"):
                got, off, rounding = sweep.kl(alpha, of_t)
            worst = max(worst, beyond(abs(got - exact), off + rounding))
            if 0 < alpha < 1:
                accepted += 1
                worst = max(worst, beyond(abs(exact - budget), 1e-5 * max(1, budget) + rounding))
    return worst if accepted > 20 else np.inf


def guidance(impl: str) -> float:
    """Any real α: log q, both KLs and both ESS by their definitions, and what q_α is the least of."""
    g, worst = np.random.default_rng(0), 0.0
    for family, setting in itertools.product(families(), GUIDED):
        rows, alpha = ask(impl, family, **setting), setting["alpha"]
        worst = max(worst, apart(rows.alpha, alpha))
        worst = max(worst, apart(rows.log_q, direct.log_q(rows.log_theta, rows.log_t, alpha)))
        for got, want in zip((rows.kl_theta, rows.kl_t), rows.kls(), strict=True):
            worst = max(worst, apart(got, want))
        log_z = -logsumexp(direct.log_mixture(rows.log_theta, rows.log_t, alpha), axis=1)
        for q in (rows.log_q, log_softmax(rows.log_q + g.normal(size=rows.log_q.shape))):
            least = alpha * kl(q, rows.log_theta) + (1 - alpha) * kl(q, rows.log_t)
            worst = max(worst, apart(least, kl(q, rows.log_q) + log_z))
        for got, want in zip((rows.ess_theta, rows.ess_t), rows.log_esses(), strict=True):
            some = want > -600
            worst = max(worst, apart(log(got[some]), want[some]))
    return worst


def forbidden_tokens(impl: str) -> float:
    """At any α a token that a model forbids has no probability, and a model that allows it an ESS of 0."""
    family, worst = masked(), 0.0
    for setting in GUIDED:
        rows = ask(impl, family, **setting)
        theta, t = np.isfinite(rows.log_theta), np.isfinite(rows.log_t)
        worst = max(worst, np.inf if np.isfinite(rows.log_q[~(theta & t)]).any() else 0.0)
        worst = max(worst, apart(rows.log_q, direct.log_q(rows.log_theta, rows.log_t, setting["alpha"])))
        for got, want in zip((rows.kl_theta, rows.kl_t), rows.kls(), strict=True):
            worst = max(worst, apart(got, want))
        for ess, mine, others in ((rows.ess_theta, theta, t), (rows.ess_t, t, theta)):
            worst = max(worst, apart(ess[(mine & ~others).any(axis=1)], 0.0))
    return worst


def outside_in_float32(impl: str) -> float:
    """About a centre outside [0, 1] F and the KLs of an accepted row are within the bounds of rounding."""
    worst, accepted = 0.0, 0
    for log_theta, log_t, _ in sweeps(np.float32):
        for alpha in (-0.5, 1.2, 1.5, 3.0):
            with np.errstate(all="ignore"):
                sweep = Sweep(log_theta.astype(np.float32).astype(float), log_t.astype(np.float32).astype(float),
                              np.float32(alpha), np.float32)  # fmt: skip
                if not sweep.fits_outside():
                    continue
                (norm, slope, _), bound = sweep.at(sweep.center), sweep.of_kl_outside()
            accepted += 1
            theta, t = (log_softmax(x.astype(np.float32).astype(float)) for x in (log_theta, log_t))
            q = direct.log_q(theta[None], t[None], np.array([sweep.center]))
            for weight, log_p in ((sweep.center - 1, theta), (sweep.center, t)):
                worst = max(worst, beyond(abs(weight * slope - norm - kl(q, log_p[None])[0]), bound))
    return worst if accepted > 20 else np.inf


@dataclass(frozen=True)
class Claim:
    """A claim of theory/proof.md: its number there, its statement in a line, and how far a check may be off."""

    number: str
    statement: str
    check: Callable[[str], float]  # of an `impl`, gives the worst violation
    allowed: float = 1e-9
    of_reference_only: bool = False  # it is about the curve, which the other implementations do not show


CLAIMS = (
    Claim("1.1", "the weighted mean is unbiased, its variance is (Σ π²f²/q − μ²)/n", variance_by_enumeration),
    Claim("1.2", "for one f the best q is π|f|, normalised", best_for_one_function),
    Claim("1.3", "(E_π f − E_q f)² ≤ (1/ESS − 1) Var_q f, equality at π/q", chapman_robbins),
    Claim("1.4", "F″ is the Fisher information of α, the mean of d attains the bound", fisher_information, 1e-5),
    Claim("1.5", "two targets: the least worst second moment, which q* does not reach", two_targets, 1e-7),
    Claim("2.1", "1/ESS = 1 + χ²(π‖q), log ESS = −D₂(π‖q), in (0, 1]", ess_is_chi_square),
    Claim("2.2", "1/ESS − 1 ≤ n sup Var ≤ 1/ESS over |f| ≤ 1", worst_case_variance),
    Claim("2.3", "weights of draws: mean 1, mean square 1/ESS (standard errors)", weights_of_draws, 5.0),
    Claim("2.4", "−log ESS_π ≥ KL(π‖q), unordered with KL(q‖π)", ess_and_kl),
    Claim("3.1", "F′ = E_q[d], F″ = Var_q[d]", derivatives_of_the_curve, of_reference_only=True),
    Claim("3.2", "log q, and the three log-probabilities of a token", log_probabilities),
    Claim("3.3", "KL(q‖π_θ), KL(q‖π_t), difference F′ − s", divergences),
    Claim("3.4", "ESS_θ, ESS_t", effective_sample_sizes),
    Claim("3.5", "−log Z_α = α N_θ + (1−α) N_t − F", log_normaliser, of_reference_only=True),
    Claim("3.6", "KL(π_θ‖π_t) and KL(π_t‖π_θ) at the ends, their sum ∫F″", divergences_of_the_models),
    Claim("3.7", "H(q) = F − E_q[b] − αF′", entropies, of_reference_only=True),
    Claim("3.8", "temperature; truncation conditions q* on what is kept", temperature_and_truncation),
    Claim("3.9", "the two-level draw (share of tokens that differ)", the_draw, 0.0),
    Claim("3.10", "Gaussians: q_α, KL and ESS in closed form", gaussian_closed_forms),
    Claim("4.1", "(1−α) KL(q‖π_t) + α KL(q‖π_θ) = KL(q‖q_α) − log Z_α", weighted_sum_identity),
    Claim("4.2", "the family is exactly the Pareto frontier", frontier),
    Claim("4.3", "the frontier is convex with slope −α/(1−α)", shape_of_the_frontier, 1e-5),
    Claim("5.1", "q* alone has the least max{KL, KL}", minimax),
    Claim("5.2", "the common KL is the Chernoff information", chernoff_information),
    Claim("5.3", "it is the exponent of the best test's error", error_exponent),
    Claim("5.4", "sequences: equal KLs, but not the minimax of sequences", sequences),
    Claim("6.1", "KL symmetry: one root, in closed form for V = 2", kl_symmetry),
    Claim("6.2", "ESS balance: one root", ess_balance),
    Claim("6.3", "reverse KL symmetry in closed form", reverse_kl_symmetry),
    Claim("6.4", "entropy rule, fixed α, clamp", other_rules),
    Claim("6.5", "one distribution: α = ½, of a budget an end", one_distribution),
    Claim("6.6", "different supports: the root or the better end", different_supports),
    Claim("6.7", "a budget: of all in the ball the nearest to the other model", budgets),
    Claim("6.8", "a budget's ends: inside, out of reach, 0", ends_of_budgets),
    Claim("7.1", "α − ½ = k/24 · F‴/F″ + O(ε³), k = 1, 2, 3 (error / ε²)", leading_terms, 1.0),
    Claim("7.2", "α_ESS − α_KL = F‴/(12F″) + O(ε³) (error / ε²)", difference_of_the_rules, 1.0),
    Claim("7.3", "the rules agree on exchanged pairs, not in general", when_they_agree),
    Claim("7.4", "1 − TV ≤ e^(−c) ≤ √(1 − TV²)", chernoff_and_overlap),
    Claim("7.5", "q*'s text costs both models H(q*) + c", cost_of_the_text),
    Claim("7.6", "three tokens: q* on the one that neither likes", three_tokens),
    Claim("7.7", "nested Gaussians: equal KLs and an ESS of 0", nested_gaussians),
    Claim("8.1", "F, F′, F(2−α), F(−α) about a centre: within the bounds", about_a_centre, of_reference_only=True),
    Claim("8.2", "F′ by the row's moments: within the bound", by_the_rows_moments, of_reference_only=True),
    Claim("8.3", "how far apart the models are at most", distance_of_the_models, of_reference_only=True),
    Claim("8.4", "E_q (log q)² ≤ (1 + log V)²", depth_of_the_tokens, of_reference_only=True),
    Claim("8.5", "float32: within the bounds of rounding", rounding_of_a_sweep, of_reference_only=True),
    Claim("8.6", "KLs about a centre: within the bounds", kl_beside_a_centre, of_reference_only=True),
    Claim("8.7", "float32, a budget: within the bounds of rounding", rounding_of_a_budget, of_reference_only=True),
    Claim("9.1", "any real α: what q_α is the least of, its KLs and ESS", guidance),
    Claim("9.2", "any real α: no probability for what a model forbids", forbidden_tokens),
    Claim("9.3", "float32, α outside [0, 1]: within the bounds", outside_in_float32, of_reference_only=True),
)


@dataclass(frozen=True)
class Verdict:
    """What came of one claim under one implementation."""

    claim: Claim
    impl: str
    violation: float

    @property
    def allowed(self) -> float:
        return self.claim.allowed if self.impl == "reference" else max(self.claim.allowed, ALLOWED_CPU)

    @property
    def green(self) -> bool:
        return self.violation <= self.allowed


def verify(impl: str, numbers: Sequence[str] | None = None) -> Iterator[Verdict]:
    """Check the claims (those of `numbers`) on `impl`, `reference` or `cpu`, one after the other."""
    for claim in CLAIMS:
        if (numbers is None or claim.number in numbers) and (impl == "reference" or not claim.of_reference_only):
            yield Verdict(claim, impl, claim.check(impl))


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0 if all claims hold, else 1."""
    parser = argparse.ArgumentParser(prog="python -m theory.verify", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--impl",
        nargs="+",
        choices=("reference", "cpu"),
        default=["reference", "cpu"] if cpu.library() else ["reference"],
        help="implementations to check (default: the reference, and the compiled CPU path where it is installed)",
    )
    impls = parser.parse_args(argv).impl
    rows: dict[Claim, list[Verdict]] = {claim: [] for claim in CLAIMS}
    for impl in impls:
        for verdict in verify(impl):
            rows[verdict.claim].append(verdict)
    table = Table(title="worst violation of each claim, and what is allowed")
    table.add_column("claim")
    table.add_column("statement", ratio=1)
    for name in (*(column for impl in impls for column in (impl, "allowed")), "verdict"):
        table.add_column(name, no_wrap=True)
    for claim, verdicts in rows.items():
        of_impl = {v.impl: (f"{v.violation:.1e}", f"{v.allowed:g}") for v in verdicts}
        verdict = "[green]holds[/]" if all(v.green for v in verdicts) else "[red]VIOLATED[/]"
        numbers = [number for impl in impls for number in of_impl.get(impl, ("", ""))]
        table.add_row(claim.number, escape(claim.statement), *numbers, verdict)
    Console().print(table)
    return 0 if all(v.green for verdicts in rows.values() for v in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
