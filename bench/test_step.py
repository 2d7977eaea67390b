"""Cost of one q* step beside ordinary sampling from one model; a case that is not exact is not timed."""

import pytest
import torch

from qstar_kernels import qstar_sample

SHAPES = [(8, 131072), (16, 2048)]


def rows(batch: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """LLM-like logits [B, V]: Zipf over a random order, the pair differing by noise of standard deviation 1."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(batch)]) + 1
    theta = -1.1 * ranks.float().log() + 0.5 * torch.randn(batch, vocab_size, generator=generator)
    return theta, theta + torch.randn(batch, vocab_size, generator=generator)


@pytest.mark.parametrize(("batch", "vocab_size"), SHAPES)
def test_qstar_sample(benchmark, batch, vocab_size):
    torch.set_num_threads(1)
    theta, t = rows(batch, vocab_size)
    index = torch.arange(batch)
    exact = qstar_sample(theta, t, seeds=index, positions=index, impl="reference")
    step = qstar_sample(theta, t, seeds=index, positions=index)
    assert torch.equal(step.token, exact.token)
    torch.testing.assert_close(step.alpha, exact.alpha, rtol=0, atol=1e-5)
    benchmark(qstar_sample, theta, t, seeds=index, positions=index)


@pytest.mark.parametrize(("batch", "vocab_size"), SHAPES)
def test_softmax_and_multinomial(benchmark, batch, vocab_size):
    torch.set_num_threads(1)
    theta, _ = rows(batch, vocab_size)
    benchmark(lambda: torch.multinomial(theta.softmax(-1), 1))
