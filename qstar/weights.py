"""What the numbers of tokens say together: their bands, and importance weights of samples (theory/proof.md, «ESS»).

A mean under a model π is the mean under q* weighted by π/q*. The weight of a sample is a product over its tokens, so
its logarithm is a sum, and its variance grows with the length: truncate, or weigh tokens, where sequences are long.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

LEVELS = ("sequence", "token", "geometric")
WEIGHT = {"theta": "π_θ/q*", "t": "π_t/q*"}  # whose weight, as it is shown
FAR_APART_KL = 0.5  # nats a token: above it q* lies where both models find little
# Where a quantity of tokens, a field or one of `derived`, is as it should be: its name, low and high
BANDS = {"ESS ratio": ("ess_ratio", 0.9, 1.1), "|ΔKL|": ("kl_gap", 0.0, 0.05), "α": ("alpha", 0.2, 0.8)}


def derived(fields: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What follows from the fields of tokens (`qstar_kernels.QStarStep`), [T] each and of their type.

    Returns:
        `kl`, the larger of the two KLs, and `kl_gap`, their distance, in nats; `ess_ratio`, ESS_θ/ESS_t, NaN where
        ESS_t is 0, as π_t has mass outside q*'s support; `log_weight_theta` and `log_weight_t`, log π − log q*.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = fields["ess_theta"] / fields["ess_t"]
        return {
            "kl": np.maximum(fields["kl_theta"], fields["kl_t"]),
            "kl_gap": np.abs(fields["kl_theta"] - fields["kl_t"]),
            "ess_ratio": np.where(np.isfinite(ratio), ratio, np.nan).astype(ratio.dtype),
            **{f"log_weight_{side}": fields[f"logp_{side}"] - fields["logq"] for side in WEIGHT},
        }


def log_weights(logp: Tensor, logq: Tensor, mask: Tensor | None = None, level: str = "sequence") -> Tensor:
    """Logarithms of importance weights.

    Args:
        logp: log π [B, T] of each token in nats, of the model that is trained, as it is now or as it was when the
            samples were drawn (`logp_theta` of the diagnostics).
        logq: log q* [B, T] of the same tokens (`logq` of the diagnostics).
        mask: bool [B, T], False on padding.
        level: `sequence`: the sum over the tokens, the exact weight of the sample; `geometric`: their mean, a weight
            per token of the sample, as GSPO takes it; `token`: each token's own.

    Returns:
        [B], or [B, T] for `token` with 0 on padding; the type of `logp`.

    Raises:
        ValueError: an unknown level, or shapes that differ.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; it must be one of {', '.join(LEVELS)}")
    if logp.shape != logq.shape or (mask is not None and mask.shape != logp.shape):
        shapes = [list(x.shape) for x in (logp, logq, mask) if x is not None]
        raise ValueError(f"logp, logq and mask have the shapes {shapes}; they must be equal")
    ratio = logp - logq
    mask = torch.ones_like(ratio, dtype=torch.bool) if mask is None else mask.bool()
    ratio = torch.where(mask, ratio, 0.0)
    if level == "token":
        return ratio
    total = ratio.sum(-1)
    return total if level == "sequence" else total / mask.sum(-1).clamp(min=1)


def weights(log_w: Tensor, *, low: float = 0.0, high: float = float("inf"), normalise: bool = False) -> Tensor:
    """Importance weights from their logarithms, truncated or self-normalised or both.

    Args:
        log_w: logarithms in nats, any shape.
        low, high: what the weights are clipped to: `high` alone is truncated importance sampling, `1 − ε, 1 + ε` the
            clip of PPO.
        normalise: divide by the mean, before the clip, so that an average weight is 1: biased, but free of the
            normaliser's error, and finite whatever `log_w` is.

    Raises:
        ValueError: `low` is negative or above `high`.
    """
    if not 0 <= low <= high:
        raise ValueError(f"low is {low} and high {high}; it must be 0 ≤ low ≤ high")
    if normalise and log_w.numel():
        log_w = log_w - log_w.flatten().logsumexp(0) + torch.tensor(float(log_w.numel())).log()
    return log_w.exp().clamp(low, high)


def effective_sample_size(log_w: Tensor) -> float:
    """(Σw)² / Σw² of weights given by their logarithms [N]: as many equally weighted samples are worth as much."""
    log_w = log_w.double()
    return torch.exp(2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).item()


def top_share(log_w: Tensor, share: float) -> float:
    """The part of all weight that the heaviest `share` of the samples [N] carries, at least one of them."""
    normal = log_w.double().softmax(0)
    return normal.topk(max(1, round(share * len(normal)))).values.sum().item()
