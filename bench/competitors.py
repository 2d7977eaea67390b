"""What q* is timed beside: one step as research code does it, ordinary sampling, and other people's kernels."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor


def research_step(logits_theta: Tensor, logits_t: Tensor) -> dict[str, Tensor]:
    """q* as it is usually written: log-softmax of both rows [B, V], 20 bisections of α over the vocabulary, the
    diagnostics of the result, `torch.multinomial`. Numbers [B] in nats."""
    log_theta, log_t = logits_theta.float().log_softmax(-1), logits_t.float().log_softmax(-1)
    low = torch.zeros(len(log_theta), 1, device=log_theta.device)
    high = torch.ones_like(low)
    for _ in range(20):
        alpha = (low + high) / 2
        log_q = (alpha * log_theta + (1 - alpha) * log_t).log_softmax(-1)
        q = log_q.exp()
        kl_theta = (q * (log_q - log_theta)).sum(-1, keepdim=True)
        kl_t = (q * (log_q - log_t)).sum(-1, keepdim=True)
        too_far = kl_theta > kl_t
        low, high = torch.where(too_far, alpha, low), torch.where(too_far, high, alpha)
    alpha = (low + high) / 2
    log_q = (alpha * log_theta + (1 - alpha) * log_t).log_softmax(-1)
    q = log_q.exp()
    token = torch.multinomial(q, 1)
    return {
        "alpha": alpha[:, 0],
        "kl_theta": (q * (log_q - log_theta)).sum(-1),
        "kl_t": (q * (log_q - log_t)).sum(-1),
        "ess_theta": 1 / (2 * log_theta - log_q).exp().sum(-1),
        "ess_t": 1 / (2 * log_t - log_q).exp().sum(-1),
        "token": token[:, 0],
        "logq": log_q.gather(-1, token)[:, 0],
        "logp_theta": log_theta.gather(-1, token)[:, 0],
        "logp_t": log_t.gather(-1, token)[:, 0],
    }


def ordinary_sampling(logits: Tensor) -> Tensor:
    """A token [B] from one model's logits [B, V]."""
    return torch.multinomial(logits.float().softmax(-1), 1)[:, 0]


def two_log_softmax(logits_theta: Tensor, logits_t: Tensor) -> tuple[Tensor, Tensor]:
    """The least that anything with exact log-probabilities of both models does in PyTorch."""
    return logits_theta.float().log_softmax(-1), logits_t.float().log_softmax(-1)


def other_samplers(logits: Tensor) -> dict[str, Callable[[], object]]:
    """Samplers of one model's logits from packages that are installed and run on this device."""
    found: dict[str, Callable[[], object]] = {}
    if logits.is_cuda and importlib.util.find_spec("flashinfer"):
        import flashinfer

        found["FlashInfer, one model"] = lambda: flashinfer.sampling.sampling_from_logits(logits.float())
    if importlib.util.find_spec("vllm"):
        from vllm.v1.sample.ops.topk_topp_sampler import random_sample

        found["vLLM, one model"] = lambda: random_sample(logits.softmax(-1, dtype=torch.float32), {})
    return found


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes, the best of 5."""
    from bench.timing import timer

    source = torch.empty(64 << 20, dtype=torch.float32, device=device).fill_(1)
    target = torch.empty_like(source)
    once = timer(lambda: target.copy_(source), device)
    return 2 * source.nbytes / min(once() for _ in range(5))
