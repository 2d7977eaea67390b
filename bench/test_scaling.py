"""How the cost of a step grows with the vocabulary, the batch and the distance of the pair, and its memory."""

import subprocess
import sys

import pytest
import torch

from bench.rows import check_exact, llm_like
from bench.timing import side_by_side
from qstar_kernels import qstar_sample

VOCAB_SIZES = (2048, 8192, 32000, 65536, 131072, 262144)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
NOISES = (0.1, 0.3, 1.0, 2.0, 4.0, 8.0)


def steps(cases: dict, device: torch.device) -> dict:
    """A checked call of `qstar_sample` for each (batch, vocab_size, noise)."""
    functions = {}
    for name, shape in cases.items():
        theta, t = llm_like(*shape, device)
        index = torch.arange(len(theta), device=device)
        check_exact(theta, t, index)
        functions[str(name)] = lambda a=theta, b=t, i=index: qstar_sample(a, b, seeds=i, positions=i)
    return functions


@pytest.mark.parametrize(
    ("against", "cases"),
    [
        ("vocab_size", {v: (8, v, 1.0) for v in VOCAB_SIZES}),
        ("batch", {b: (b, 32000, 1.0) for b in BATCHES}),
        ("noise", {n: (8, 131072, n) for n in NOISES}),
    ],
)
def test_scaling(benchmark, device, against, cases):
    side_by_side(benchmark, steps(cases, device), device, kind="scaling", against=against)


def test_memory(benchmark, device):
    """Peak memory of one step at [8, 131072] beyond its inputs, in bytes."""
    batch, vocab_size = 8, 131072
    if device.type == "cuda":
        theta, t = llm_like(batch, vocab_size, 1.0, device)
        index = torch.arange(batch, device=device)
        qstar_sample(theta, t, seeds=index, positions=index)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        qstar_sample(theta, t, seeds=index, positions=index)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        code = f"""
import resource, torch
from qstar_kernels import qstar_sample
theta, t, index = torch.randn({batch}, {vocab_size}), torch.randn({batch}, {vocab_size}), torch.arange({batch})
qstar_sample(theta[:, :999], t[:, :999], seeds=index, positions=index)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
qstar_sample(theta, t, seeds=index, positions=index)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
        peak = 1024 * int(
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        )
    buffer = 4 * batch * vocab_size
    assert peak < buffer
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(kind="memory", peak=peak, buffer=buffer)
