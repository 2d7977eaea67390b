"""What the kernels compile to on GPUs that are not here, and the sampler under torch's tracers."""

import pytest
import torch
from rows import zipf_pair

from qstar_kernels import qstar_logprobs, qstar_sample, qstar_stats
from qstar_kernels.inspect import ARCHITECTURES, estimate, report, reports, sampling_step
from qstar_kernels.ops import step_op

# Three programs of 128 threads, or one of 256, still find room on a multiprocessor with these.
MOST_REGISTERS = {
    "curve_kernel": 168,
    "evaluate_kernel": 168,
    "solve_kernel": 168,
    "correct_kernel": 128,
    "finish_kernel": 255,
    "truncate_kernel": 255,
    "log_q_kernel": 128,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture):
    """bfloat16, V = 50257 with padded rows: nothing spilled, whole 128-bit loads in both sweeps, registers bounded."""
    found = {r.kernel: r for r in reports(architecture)}
    assert found.keys() == MOST_REGISTERS.keys()
    ceiling = 256 if architecture == "gfx942" else 0  # its threads have twice the registers
    for name, r in found.items():
        assert r.spilled == 0, name
        assert r.registers <= max(MOST_REGISTERS[name], ceiling), name
    for name in ("curve_kernel", "evaluate_kernel"):
        r = found[name]
        # 8 tokens of two rows a thread are two loads of 128 bits, and there are no other loads of logits
        assert r.wide_loads() == r.loads() == 2 * r.tokens / 8, name
    assert found["curve_kernel"].special() / found["curve_kernel"].tokens <= 3.5
    assert found["evaluate_kernel"].special() / found["evaluate_kernel"].tokens <= 3.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types_load_wide(dtype):
    for launch in sampling_step(dtype)[::2][:2]:
        r = report(launch, "sm_90")
        assert r.spilled == 0
        assert r.wide_loads() == 2 * r.tokens * dtype.itemsize / 16


def test_options_compile_without_spills():
    """The launches that other options change, once."""
    ess, entropy, greedy = (
        sampling_step(torch.bfloat16, **settings)
        for settings in ({"method": "ess_balance"}, {"method": "entropy", "temperature": 0.7}, {"temperature": 0.0})
    )
    for launch in (ess[2], entropy[0], entropy[1], greedy[2]):
        assert report(launch, "sm_90").spilled == 0, launch.kernel


def test_estimate_is_no_less_than_the_memory_takes():
    for rows in (1, 64):
        sweeps, floor = estimate("sm_90", rows, 128256)
        assert floor < sweeps < 100 * floor


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_compiled_whole(impl):
    """One graph each for the three functions, the same numbers as eager calls."""
    theta, t = zipf_pair(3, 500, 1.0)
    index = torch.arange(3)

    def sample(theta, t, index):
        step = qstar_sample(theta, t, seeds=index, positions=index, top_p=0.9, impl=impl)
        return step.token, step.logq

    def log_q(theta, t, index):
        log_q, step = qstar_logprobs(theta, t, method="entropy", impl=impl)
        return log_q, step.alpha

    def look_up(theta, t, index):
        step = qstar_stats(theta, t, tokens=index, impl=impl)
        return step.token, step.logq, step.kl_t

    for function in (sample, log_q, look_up):
        eager = function(theta, t, index)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(theta, t, index)
        assert all(torch.equal(x, y) for x, y in zip(eager, compiled, strict=True))


def test_exported_for_any_batch():
    class Sampler(torch.nn.Module):
        def forward(self, theta, t, index):
            step = qstar_sample(theta, t, seeds=index, positions=index)
            return step.token, step.logq

    theta, t = zipf_pair(5, 500, 1.0)
    index, batch = torch.arange(5), torch.export.Dim("batch")
    exported = torch.export.export(Sampler(), (theta[:3], t[:3], index[:3]), dynamic_shapes=({0: batch},) * 3)
    got = exported.module()(theta, t, index)
    assert all(torch.equal(x, y) for x, y in zip(got, Sampler()(theta, t, index), strict=True))


@pytest.mark.parametrize("what", ["sample", "look up", "log q"])
def test_operator(what):
    """torch's own checks of the schema, the fake implementation and dynamic shapes."""
    theta, t = zipf_pair(3, 200, 1.0)
    index = torch.arange(3)
    sampled = (index, index, None) if what == "sample" else (None, None, index if what == "look up" else None)
    settings = ("kl_symmetry", 0.5, 0.0, 1.0, 1.0, 0, 1.0, 0.0, 0, 1.0, 1e-5)
    torch.library.opcheck(step_op, (theta, t, *sampled, what == "log q", "cpu", *settings))
