"""The rows that steps are timed on, and the check that stands before the timing."""

import torch
from torch import Tensor

from bench.competitors import research_step
from qstar_kernels import qstar_sample


def llm_like(batch: int, vocab_size: int, noise: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 logits [batch, vocab_size] of two models: −1.1 log(rank) in shuffled order, with normal noise of 0.5, and
    the same plus normal noise of `noise`."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(batch)]) + 1
    theta = -1.1 * ranks.float().log() + 0.5 * torch.randn(batch, vocab_size, generator=generator)
    t = theta + noise * torch.randn(batch, vocab_size, generator=generator)
    return theta.to(device), t.to(device)


def check_exact(theta: Tensor, t: Tensor, index: Tensor) -> None:
    """Ours and the research code against float64, on at most 8 rows."""
    few, index = slice(8), index[:8]
    step = qstar_sample(theta[few], t[few], seeds=index, positions=index)
    exact = qstar_sample(theta[few].double(), t[few].double(), seeds=index, positions=index, impl="reference")
    assert torch.equal(step.token, exact.token)
    research = research_step(theta[few], t[few])
    for name in ("alpha", "kl_theta", "kl_t", "ess_theta", "ess_t"):
        want = getattr(exact, name).float()
        torch.testing.assert_close(getattr(step, name), want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(research[name], want, rtol=2e-3, atol=1e-4)
    for name in ("logq", "logp_theta", "logp_t"):
        torch.testing.assert_close(getattr(step, name), getattr(exact, name).float(), rtol=1e-5, atol=1e-5)
