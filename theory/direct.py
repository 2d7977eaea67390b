"""The definitions themselves, in NumPy and float64: sums over tokens, and closed forms of Gaussians.

Nothing here knows the log-partition curve or imports `qstar_kernels`: it is what `theory.verify` holds the library
against. Rows are [B, V] logits or log-probabilities in nats; α is π_θ's weight, a number or [B].
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log π [B, V], −inf where the logit is."""
    logits = logits - logits.max(axis=-1, keepdims=True)  # a large offset would cost digits of the difference
    return logits - logsumexp(logits, axis=-1, keepdims=True)


def log_mixture(log_theta: np.ndarray, log_t: np.ndarray, alpha) -> np.ndarray:
    """log π_θ^α π_t^(1−α), not normalised, [B, V]: −inf where either is; any real α."""
    alpha = np.reshape(alpha, (-1, 1))
    common = np.isfinite(log_theta) & np.isfinite(log_t)
    theta, t = np.where(common, log_theta, 0.0), np.where(common, log_t, 0.0)
    return np.where(common, alpha * theta + (1 - alpha) * t, -np.inf)


def log_q(log_theta: np.ndarray, log_t: np.ndarray, alpha) -> np.ndarray:
    """log q_α [B, V]."""
    return log_softmax(log_mixture(log_theta, log_t, alpha))


def mean(log_p: np.ndarray, f: np.ndarray) -> np.ndarray:
    """E_p[f] [B]; f counts only where p > 0."""
    p = np.exp(log_p)
    return np.sum(p * np.where(p > 0, f, 0.0), axis=-1)


def kl(log_p: np.ndarray, log_r: np.ndarray) -> np.ndarray:
    """KL(p‖r) = Σ p log(p/r) [B], +inf where p has mass outside r's support."""
    with np.errstate(invalid="ignore"):
        return mean(log_p, log_p - log_r)


def entropy(log_p: np.ndarray) -> np.ndarray:
    """−Σ p log p [B]."""
    return -mean(log_p, log_p)


def log_ess(log_pi: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """log(1 / Σ π²/q) [B], −inf where π has mass outside q's support."""
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(log_pi), -np.inf, 2 * log_pi - log_q)
    return -logsumexp(terms, axis=-1)


def cumulants_of_d(theta: np.ndarray, t: np.ndarray, alpha) -> np.ndarray:
    """The first three cumulants of d = θ − t under q_α, [3, B]: mean, variance and third central moment."""
    q = log_q(log_softmax(theta), log_softmax(t), alpha)
    with np.errstate(invalid="ignore"):
        d = np.where(np.isfinite(q), theta - t, 0.0)
    first = mean(q, d)
    return np.stack((first, *(mean(q, (d - first[:, None]) ** k) for k in (2, 3))))


def least_worst_second_moment(log_theta: np.ndarray, log_t: np.ndarray) -> tuple[float, np.ndarray]:
    """min over q of max(Σ π_θ²/q, Σ π_t²/q) for one row, and log q [V] where it is reached (theory/proof.md, 1.5)."""

    def log_root(weight: float) -> np.ndarray:
        return 0.5 * np.logaddexp(np.log(weight) + 2 * log_theta, np.log1p(-weight) + 2 * log_t)

    found = minimize_scalar(
        lambda w: -logsumexp(log_root(w)), bounds=(1e-12, 1 - 1e-12), method="bounded", options={"xatol": 1e-12}
    )
    root = log_root(found.x)
    return float(np.exp(2 * logsumexp(root))), log_softmax(root)


@dataclass(frozen=True)
class Gaussian:
    """N(mean, cov) in any dimension."""

    mean: np.ndarray  # [k]
    cov: np.ndarray  # [k, k]

    @property
    def precision(self) -> np.ndarray:
        return np.linalg.inv(self.cov)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """log density at the points x [..., k]."""
        away = x - self.mean
        square = np.einsum("...i,ij,...j->...", away, self.precision, away)
        return -0.5 * (square + np.linalg.slogdet(2 * np.pi * self.cov)[1])

    def kl(self, other: "Gaussian") -> float:
        """KL(self‖other) in nats."""
        away = other.mean - self.mean
        trace = np.trace(other.precision @ self.cov) + away @ other.precision @ away
        return 0.5 * (trace - len(away) + np.linalg.slogdet(other.cov)[1] - np.linalg.slogdet(self.cov)[1])


def gaussian_log_integral(theta: Gaussian, t: Gaussian, alpha: float) -> float:
    """log ∫ π_θ^α π_t^(1−α) for any real α, +inf where it diverges."""
    precision = alpha * theta.precision + (1 - alpha) * t.precision
    if np.linalg.eigvalsh(precision).min() <= 0:
        return np.inf
    shift = alpha * theta.precision @ theta.mean + (1 - alpha) * t.precision @ t.mean

    def constant(g: Gaussian) -> float:
        return g.mean @ g.precision @ g.mean + np.linalg.slogdet(2 * np.pi * g.cov)[1]

    whole = shift @ np.linalg.solve(precision, shift) + np.linalg.slogdet(2 * np.pi * np.linalg.inv(precision))[1]
    return 0.5 * (whole - alpha * constant(theta) - (1 - alpha) * constant(t))


def gaussian_q(theta: Gaussian, t: Gaussian, alpha: float) -> Gaussian:
    """q_α where its integral is finite: precisions and precision-weighted means mix as the exponents do."""
    precision = alpha * theta.precision + (1 - alpha) * t.precision
    shift = alpha * theta.precision @ theta.mean + (1 - alpha) * t.precision @ t.mean
    return Gaussian(np.linalg.solve(precision, shift), np.linalg.inv(precision))


def gaussian_log_ess(theta: Gaussian, t: Gaussian, alpha: float) -> tuple[float, float]:
    """log ESS of both at q_α; −inf where the weights have no second moment."""
    at = gaussian_log_integral(theta, t, alpha)
    return tuple(-at - gaussian_log_integral(theta, t, other) for other in (2 - alpha, -alpha))
