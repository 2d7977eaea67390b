"""Cost of one q* step beside what else could be done with the same logits. What is not exact is not timed."""

import pytest
import torch
from torch import Tensor

from bench.competitors import copy_bandwidth, ordinary_sampling, other_samplers, research_step, two_log_softmax
from bench.timing import side_by_side
from qstar_kernels import qstar_sample

BATCHES = (1, 8, 64)
VOCAB_SIZES = (32000, 50257, 128256, 151936)
TARGET = (8, 131072, "float32")  # the shape that the README quotes
COMPILED = [TARGET, (8, 128256, "bfloat16")]  # torch.compile takes long, so not for every shape
SHAPES = [TARGET, *((b, v, t) for t in ("float32", "bfloat16") for v in VOCAB_SIZES for b in BATCHES)]


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


@pytest.fixture(scope="module")
def bandwidth(device) -> float:
    return copy_bandwidth(device)


@pytest.mark.parametrize(("batch", "vocab_size", "dtype"), SHAPES)
def test_step(benchmark, device, bandwidth, batch, vocab_size, dtype):
    theta, t = (x.to(getattr(torch, dtype)) for x in llm_like(batch, vocab_size, 1.0, device))
    index = torch.arange(batch, device=device)
    check_exact(theta, t, index)
    functions = {
        "qstar_sample": lambda: qstar_sample(theta, t, seeds=index, positions=index),
        "ordinary sampling, one model": lambda: ordinary_sampling(theta),
        "two log_softmax": lambda: two_log_softmax(theta, t),
        "research code": lambda: research_step(theta, t),
        **other_samplers(theta),
    }
    if (batch, vocab_size, dtype) in COMPILED:
        compiled = torch.compile(research_step, dynamic=False)
        torch.testing.assert_close(compiled(theta, t)["alpha"], research_step(theta, t)["alpha"], atol=1e-4, rtol=0)
        functions["research code, compiled"] = lambda: compiled(theta, t)
    floor = (theta.nbytes + t.nbytes) / bandwidth
    side_by_side(
        benchmark, functions, device, kind="step", batch=batch, vocab_size=vocab_size, dtype=dtype, floor=floor
    )
