"""A minute of `tests/fuzz.py`, and what it found before; settings that no implementation may take."""

import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from numbers import Integral, Real

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows import chosen_seed

from qstar_kernels import METHODS, Status, qstar_sample
from tests import fuzz, fuzz_compare
from tests.fuzz_compare import disagreements

KEPT = [json.loads(line) for line in fuzz.EXAMPLES.read_text().splitlines()]


@pytest.mark.parametrize(
    ("impl", "found_by"),
    [("cpu", ("cpu", "triton")), ("triton", ("triton",)), pytest.param("triton", ("cpu",), marks=pytest.mark.slow)],
)
def test_what_was_found_before(impl, found_by):
    """Each in turn, in a process of its own: what is wrong is printed with its case."""
    kept = [x["case"] for x in KEPT if x["impl"] in found_by]
    cases = [case for case in kept if impl == "cpu" or "float64" not in case["types"]]
    cases = list({json.dumps(case): case for case in cases}.values())
    found = fuzz.replay(cases, impl)
    print(*found, sep="\n")
    assert not found


@pytest.mark.parametrize(("impl", "seconds"), [("cpu", 20), ("triton", 20)])
def test_fuzz(impl, seconds):
    report = fuzz.fuzz(impl, seconds, chosen_seed() >> 32)
    print(report)
    fuzz.keep(report.found)
    assert not report.kinds
    assert report.counts["cases"] > 0


CASE = {"vocab_size": 300, "types": ["float32", "float32"], "rows": [{"base": "zipf", "seed": 1, "noise": 1.0}]}
CASE |= {"what": "sample", "seed": 1, "position": 1, "settings": {"method": "kl_symmetry", "top_p": 0.9}}


FAULTS = {
    "kl_theta at its own alpha": lambda step, log_q: step.alpha.add_(3e-5),
    "kl_t at its own alpha": lambda step, log_q: step.kl_t.mul_(1 + 1e-5),
    "ess_t at its own alpha": lambda step, log_q: step.ess_t.mul_(1 - 1e-4),
    "alpha of kl_symmetry": lambda step, log_q: step.alpha.add_(1e-3),
    "kl_theta < 0": lambda step, log_q: step.kl_theta.neg_(),
    "logq": lambda step, log_q: step.logq.sub_(1e-4),
    "logq above 0": lambda step, log_q: step.logq.neg_(),
    "token": lambda step, log_q: step.token.sub_(1),
    "status EMPTY for OK": lambda step, log_q: step.status.fill_(Status.EMPTY),
    "whole log q": lambda step, log_q: log_q.sub_(1e-4),
    "support of the truncated q": lambda step, log_q: log_q.masked_fill_(log_q == log_q.amax(), -math.inf),
}


@pytest.mark.parametrize("seen", FAULTS)
def test_the_comparison_sees(monkeypatch, seen):
    """A right result, then the same with one fault put in."""
    assert not disagreements(CASE, "cpu")
    call = fuzz_compare.call

    def faulty(case, *args):
        step, log_q = call(case, *args)
        if (log_q is None) != (seen in ("whole log q", "support of the truncated q")):
            FAULTS[seen](step, log_q)
        return step, log_q

    monkeypatch.setattr(fuzz_compare, "call", faulty)
    assert seen in [x.kind for x in disagreements(CASE, "cpu")]


def test_a_call_that_never_returns_is_found(tmp_path):
    """The watch ends the process; what is left says which case it was."""
    script = (
        "import time; from functools import partial; from pathlib import Path; from tests import fuzz, fuzz_compare\n"
        f"fuzz.Watch.file, fuzz.Watch.seconds = Path({str(tmp_path / 'now.json')!r}), 0.5\n"
        "fuzz_compare.call = lambda *args: time.sleep(60)\n"
        f"fuzz_compare.disagreements({CASE!r}, 'cpu', watch=partial(fuzz.Watch.over, {CASE!r}))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=fuzz.ROOT, capture_output=True)
    assert fuzz.fate(run.returncode) == "never returns"
    assert json.loads((tmp_path / "now.json").read_text()) == CASE


def real(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def whole(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 0


ACCEPTED = {
    "method": lambda x: isinstance(x, str) and x in METHODS,
    "alpha": lambda x: real(x) and -100 <= x <= 100,
    "kl_budget": lambda x: real(x) and 0 <= x <= 1e6,
    "alpha_min": lambda x: real(x) and 0 <= x <= 1,
    "alpha_max": lambda x: real(x) and 0 <= x <= 1,
    "temperature": lambda x: real(x) and (x == 0 or 1e-6 <= x <= 1e6),
    "top_k": whole,
    "top_p": lambda x: real(x) and 0 < x <= 1,
    "min_p": lambda x: real(x) and 0 <= x <= 1,
    "target_top_k": whole,
    "target_top_p": lambda x: real(x) and 0 < x <= 1,
    "tol": lambda x: real(x) and 0 < x <= 1,
    "vocab_size": lambda x: x is None or (isinstance(x, Integral) and not isinstance(x, bool) and 1 <= x <= 7),
    "impl": lambda x: False,
}
ODD = [0, 1, 2, 0.5, -0.0, -1, 2.5, 3.0, True, False, None, "0.7", "1", "", b"1", [0.5], (1,), {}, 1j, object]
ODD += [
    math.nan,
    math.inf,
    -math.inf,
    5e-324,
    -5e-324,
    1 + 2**-52,
    1e-7,
    1e7,
    1e300,
    2**63,
    2**64 + 1,
    -(2**64),
    10**400,
]
ODD += [np.float32(0.5), np.int64(3), np.bool_(True), np.array(0.5), Fraction(1, 3), torch.tensor(0.5), torch.tensor(2)]


@settings(max_examples=300, database=None, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from(sorted(ACCEPTED)), st.sampled_from(ODD) | st.floats() | st.integers() | st.text(max_size=3))
def test_settings_are_refused_by_name_or_mean_the_same(name, value):
    theta, t = torch.randn(2, 2, 7, generator=torch.Generator().manual_seed(3)).unbind()
    index, steps = torch.arange(2), []
    for impl in ("reference", "cpu"):
        call = {"seeds": index, "positions": index, "impl": impl} | {name: value}
        if ACCEPTED[name](value):
            steps.append(qstar_sample(theta, t, **call))
        else:
            with pytest.raises(ValueError, match=f"^{name} is "):
                qstar_sample(theta, t, **call)
    if steps:
        assert torch.equal(steps[0].token, steps[1].token)


def test_another_default_device_changes_nothing():
    """In a process of its own, because the compiled code once wrote to addresses that this made up."""
    script = (
        "import torch; from qstar_kernels import qstar_logprobs, qstar_sample, qstar_stats\n"
        "theta, t = torch.randn(2, 3, 50).unbind(); i = torch.arange(3)\n"
        "torch.set_default_device('meta')\n"
        "for impl in ('cpu', 'reference', 'auto'):\n"
        "    print(qstar_sample(theta, t, seeds=i, positions=i, top_p=0.9, impl=impl).token.tolist())\n"
        "    print(qstar_stats(theta, t, tokens=i, impl=impl).logq.tolist()[0] < 0)\n"
        "    print(qstar_logprobs(theta, t, impl=impl)[0].sum().item() < 0)\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[:3] == lines[3:6] == lines[6:]
    assert lines[1:3] == ["True", "True"]
