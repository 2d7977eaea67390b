"""Cost of one q* step beside what else could be done with the same logits. What is not exact is not timed."""

import pytest
import torch

from bench.competitors import copy_bandwidth, ordinary_sampling, other_samplers, research_step, two_log_softmax
from bench.rows import check_exact, llm_like
from bench.timing import side_by_side
from qstar_kernels import qstar_sample

BATCHES = (1, 8, 64)
VOCAB_SIZES = (32000, 50257, 128256, 151936)
TARGET = (8, 131072, "float32")  # the shape that the README quotes
COMPILED = [TARGET, (8, 128256, "bfloat16")]  # torch.compile takes long, so not for every shape
SHAPES = [TARGET, *((b, v, t) for t in ("float32", "bfloat16") for v in VOCAB_SIZES for b in BATCHES)]


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
