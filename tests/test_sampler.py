"""The CPU path against the float64 reference, and both against what the theory promises."""

import ctypes
import itertools
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
from rows import (
    INF,
    NEAR_TIES,
    VOCAB_SIZES,
    check_near_ties,
    check_step,
    chosen_seed,
    equal_bits,
    stacked,
    table,
    unusable,
    zipf_pair,
)
from scipy.stats import chi2

from qstar_kernels import METHODS, QStarStep, Status, dispatch, qstar_logprobs, qstar_sample, qstar_stats
from qstar_kernels.cpu import launch as cpu
from qstar_kernels.types import FIELDS, NAMES, OF_ROW, Settings


def draw(theta, t, first_seed: int = 0, **kwargs) -> QStarStep:
    """A token a row, with seeds from `first_seed` on."""
    seeds = torch.arange(len(theta)) + first_seed
    return qstar_sample(theta, t, **{"seeds": seeds, "positions": seeds * 3 + 1} | kwargs)


def check_against_reference(theta, t, names=None, **kwargs) -> None:
    """All fields of `cpu` within the accuracy it promises, on usable rows `theta`, `t` [B, V] of any type."""
    got = draw(theta, t, impl="cpu", **kwargs)
    want = draw(theta.double(), t.double(), impl="reference", **kwargs)
    assert got.alpha.isfinite().all()
    assert not any(getattr(got, name).isnan().any() for name in FIELDS)
    check_step(got, want, theta, t, names or range(len(theta)), **kwargs)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_cpu_matches_reference_on_hard_rows(vocab_size, method):
    pairs = table(vocab_size, seed=vocab_size)
    if vocab_size > 50000:  # the reference is slow: the pairs that differ in kind
        pairs = dict(itertools.islice(pairs.items(), 0, None, 6))
    check_against_reference(*stacked(pairs), names=list(pairs), method=method)


@pytest.mark.parametrize("case", NEAR_TIES)
def test_two_tokens_nearly_tied(case):
    check_near_ties("cpu", case)


@pytest.mark.parametrize("sets", [1, 2])
def test_other_instruction_sets(sets, tmp_path, monkeypatch):
    """What runs where there is no AVX-512, and no AVX2: the same passes in other vectors."""
    compiler = sysconfig.get_config_var("CC").split()[0]
    source, built = Path(cpu.__file__).with_name("rows.c"), tmp_path / f"{sets}.so"
    flags = [
        "-O3",
        "-fno-math-errno",
        "-fno-trapping-math",
        f"-DINSTRUCTION_SETS={sets}",
        "-Wall",
        "-Wextra",
        "-Werror",
    ]
    subprocess.run([compiler, *flags, "-shared", "-fPIC", source, "-o", built, "-lm"], check=True)
    monkeypatch.setattr(cpu, "library", lambda: ctypes.CDLL(built))
    pairs = table(4097, seed=5)
    for kwargs in ({}, {"method": "ess_balance"}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}):
        check_against_reference(*stacked(pairs), names=list(pairs), **kwargs)


def test_without_a_compiled_kernel(monkeypatch):
    """`auto` says so once and is the reference; `cpu` refuses."""
    theta, t = zipf_pair(2, 50, 1.0)
    monkeypatch.setattr(cpu, "library", lambda: None)
    dispatch.warn_of_slowness.cache_clear()
    with pytest.warns(UserWarning, match="install a C compiler"):
        step = draw(theta, t)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal_bits(draw(theta, t), step)
    assert equal_bits(step, draw(theta, t, impl="reference"))
    with pytest.raises(RuntimeError, match="without its CPU kernel"):
        draw(theta, t, impl="cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocab_size", [999, 4097])
def test_other_types(vocab_size, dtype):
    pairs = {k: v for k, v in table(vocab_size, seed=2).items() if "finfo" not in k}
    theta, t = stacked(pairs)
    check_against_reference(theta.to(dtype), t.to(dtype), names=list(pairs))


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.7])
def test_temperature(temperature):
    pairs = table(4097, seed=3)
    check_against_reference(*stacked(pairs), names=list(pairs), temperature=temperature)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [1.0, 0.1, 3e-3, 1e-6])
def test_modes_far_apart(method, temperature):
    """Each model sure of another token, in bfloat16: the variance of d under q vanishes but near the root."""
    theta, t = torch.randn(2, 16, 37, generator=torch.Generator().manual_seed(0)).unbind()
    theta[:, 0] += 60
    t[:, -1] += 60
    theta[0], t[0] = torch.full((37,), -30.0), torch.full((37,), -30.0)
    theta[0, :3], t[0, :3] = torch.tensor([0.0, -12, -4]), torch.tensor([-12.0, 0, -4.8])
    check_against_reference(theta.bfloat16(), t.bfloat16(), method=method, temperature=temperature)
    step = draw(theta.bfloat16(), t.bfloat16(), method=method, temperature=temperature, impl="cpu")
    assert (step.logq <= 0).all()
    if method == "kl_symmetry":
        assert ((step.kl_theta - step.kl_t).abs() <= 1e-5 * step.kl_t.clamp(min=1)).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_masks_by_the_type(dtype, impl):
    """−inf, the least number of the type and, in the wider ones, −1e18 are one; −6e4 is a logit."""
    theta, t = (x.to(dtype) for x in zipf_pair(3, 50, 1.0))
    masks = [-INF, torch.finfo(dtype).min] + ([-1e18] if dtype != torch.float16 else [])
    steps = []
    for mask in masks:
        masked_theta, masked_t = theta.clone(), t.clone()
        masked_theta[:, ::3] = mask
        masked_t[:, ::7] = mask
        steps.append(draw(masked_theta, masked_t, impl=impl))
    assert all(equal_bits(step, steps[0]) for step in steps)
    assert (steps[0].ess_theta == 0).all()
    theta[:, ::3] = -6e4
    assert (draw(theta, t, impl=impl).ess_theta > 0).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.1}, {"min_p": 1.0}, {"top_k": 1}])
def test_what_is_left_may_have_no_mass(cut, impl):
    """π_t's support keeps tokens that q gives e^−18000."""
    theta = torch.tensor([[-60000.0, 1.8, -60000.0, -60000.0, 0.2, -60000.0, 0.03]]).half()
    t = torch.tensor([[1.1, -0.3, 0.4, -0.1, -1.4, -0.7, -0.7]]).half()
    step = draw(theta, t, alpha_min=0.3, target_top_p=0.1, impl=impl, **cut)
    assert (step.status.item(), step.token.item(), step.logq.item()) == (Status.OK, 0, 0.0)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("cut", [{"target_top_k": 1}, {"target_top_k": 5}, {"target_top_p": 0.3}, {"min_p": 1.0}])
def test_greedy_stays_in_the_support(cut, impl):
    theta, t = torch.randn(2, 64, 100, generator=torch.Generator().manual_seed(0)).unbind()
    step = draw(theta, t, temperature=0, impl=impl, **cut)
    log_q, _ = qstar_logprobs(theta, t, temperature=0, impl=impl, **cut)
    assert torch.equal(step.token, log_q.argmax(-1))
    assert torch.equal(step.logq, log_q.amax(-1))
    assert torch.equal(step.token, draw(theta, t, temperature=0, impl="reference", **cut).token)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_row_that_fails_the_last_look_is_refused(impl):
    """Hardly an α of float64 has a residual of 1e-300, but for rows that are one row."""
    theta, t = zipf_pair(16, 50, 1.0)
    theta[1] = t[1]
    step, usual = draw(theta, t, tol=1e-300, impl=impl), draw(theta, t, impl=impl)
    refused = step.status == Status.INEXACT
    assert refused.any()
    assert not refused[1]
    assert torch.equal(step.token, usual.token.masked_fill(refused, -1))
    assert all(getattr(step, f)[refused].isnan().all() for f in FIELDS)
    assert all(torch.equal(getattr(step, f)[~refused], getattr(usual, f)[~refused]) for f in FIELDS)
    log_q, described = qstar_logprobs(theta, t, tol=1e-300, impl=impl)
    assert torch.equal(log_q.isnan().all(-1), described.status == Status.INEXACT)


@pytest.mark.parametrize("method", METHODS)
def test_alpha_range(method):
    check_against_reference(*zipf_pair(8, 999, 3.0), method=method, alpha_min=0.52, alpha_max=0.56)
    step = draw(*zipf_pair(8, 999, 3.0), method=method, alpha_min=0.52, alpha_max=0.56)
    assert ((step.alpha >= 0.52) & (step.alpha <= 0.56)).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_odd_strides(impl):
    theta, t = zipf_pair(4, 4097, 1.0)
    want = draw(theta, t, impl=impl)
    wide = torch.full((4, 3 * 4097 + 1), torch.nan)
    wide[:, 1::3] = t
    assert equal_bits(want, draw(theta.T.contiguous().T, wide[:, 1::3], impl=impl))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("vocab_size", [999, 2048, 40000])
def test_a_row_ignores_its_neighbours(vocab_size, impl):
    """Equal bits alone, among 64 rows of every kind (unusable ones too), at either place."""
    pairs = table(vocab_size) | unusable(vocab_size)
    theta, t = stacked(pairs)
    repeat = torch.arange(64) % len(pairs)
    theta, t, seeds = theta[repeat], t[repeat], torch.arange(64)
    if vocab_size > 5000 and impl == "reference":
        theta, t, seeds = theta[::4], t[::4], seeds[::4]
    for kwargs in ({}, {"temperature": 0.7, "top_p": 0.9}, {"method": "ess_balance"}, {"temperature": 0.0}):
        if kwargs and vocab_size > 5000:
            continue
        among = draw(theta, t, seeds=seeds, positions=seeds, impl=impl, **kwargs)
        for i in range(0, len(seeds), 5):
            row = slice(i, i + 1)
            alone = draw(theta[row], t[row], seeds=seeds[row], positions=seeds[row], impl=impl, **kwargs)
            if impl == "cpu":
                assert equal_bits(among, alone, row), (i, kwargs)
            else:
                assert torch.equal(among.token[row], alone.token)
        back = draw(theta.flip(0), t.flip(0), seeds=seeds.flip(0), positions=seeds.flip(0), impl=impl, **kwargs)
        assert torch.equal(back.token.flip(0), among.token)


def test_threads_do_not_matter():
    """Equal bits with one thread, two and three."""
    theta, t = (torch.cat(x) for x in zip(zipf_pair(3, 140_000, 1.0), zipf_pair(1, 140_000, 0.01), strict=True))
    threads = torch.get_num_threads()
    steps = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            steps.append(draw(theta, t, impl="cpu"))
        finally:
            torch.set_num_threads(threads)
    assert equal_bits(steps[0], steps[1])
    assert equal_bits(steps[0], steps[2])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("vocab_size", [2, 999, 4097])
def test_unusable_rows_are_reported(vocab_size, impl):
    bad, (theta, t) = unusable(vocab_size), zipf_pair(3, vocab_size, 1.0)
    clean = draw(theta, t, impl=impl)
    for name, (bad_theta, bad_t) in bad.items():
        step = draw(torch.stack((theta[0], bad_theta, theta[2])), torch.stack((t[0], bad_t, t[2])), impl=impl)
        assert step.status.tolist() == [0, Status[name], 0]
        assert step.token[1] == -1
        assert all(getattr(step, f)[1].isnan() for f in FIELDS)
        assert all(torch.equal(getattr(step, f)[::2], getattr(clean, f)[::2]) for f in NAMES)
    log_q, step = qstar_logprobs(*stacked(bad), impl=impl)
    assert log_q.isnan().all()
    assert (step.status > 0).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_greedy_takes_the_lowest_of_ties(impl):
    theta, t = zipf_pair(6, 4097, 1.0)
    log_q, _ = qstar_logprobs(theta.double(), t.double(), impl="reference")
    assert torch.equal(draw(theta, t, temperature=0.0, impl=impl).token, log_q.argmax(-1))
    theta, t = (x.index_fill(1, torch.tensor([77, 1500, 4000]), 30.0) for x in (theta, t))
    assert (draw(theta, t, temperature=0.0, impl=impl).token == 77).all()


def naive_truncation(log_q: list, log_t: list, settings: Settings) -> list:
    """The kept ids, by loops over sorted ids."""

    def cut(log_p: dict, k: int, p: float) -> dict:
        order = sorted(log_p, key=lambda i: -log_p[i])
        if 0 < k < len(order):
            order = [i for i in order if log_p[i] >= log_p[order[k - 1]]]
        mass = [torch.tensor(log_p[i], dtype=torch.float64).exp().item() for i in order]
        if p < 1:
            total, kept = 0.0, None
            for i, m in zip(order, mass, strict=True):
                total += m / sum(mass)
                if kept is None and total >= p:
                    kept = log_p[i]
            order = [i for i in order if kept is None or log_p[i] >= kept]
        return {i: log_p[i] for i in order}

    finite_t = {i: x for i, x in enumerate(log_t) if x > -INF}
    allowed = cut(finite_t, settings.target_top_k, settings.target_top_p)
    kept = cut({i: x for i, x in enumerate(log_q) if x > -INF and i in allowed}, settings.top_k, settings.top_p)
    floor = settings.min_p * max(torch.tensor(x).exp().item() for x in kept.values()) if kept else 0
    return sorted(i for i, x in kept.items() if torch.tensor(x).exp().item() >= floor * (1 - 1e-7))


TRUNCATIONS = [
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"target_top_k": 3},
    {"target_top_p": 0.5},
    {"top_k": 7, "top_p": 0.8, "min_p": 0.05, "target_top_k": 20, "target_top_p": 0.95},
    {"top_k": 10**6, "top_p": 0.999999},
]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_truncation_by_the_rule(truncation, ties, impl):
    """Against loops; with ties, integer logits make many equal probabilities, the last kept one's among them."""
    theta, t = zipf_pair(4, 60, 1.0, seed=3)
    if ties:
        theta, t = theta.round(), t.round()
    t[3, ::3] = -INF
    # α fixed at ½: equal logits then are equal probabilities to the last bit in every implementation
    kwargs = {"method": "fixed", "impl": impl}
    full = qstar_logprobs(theta.double(), t.double(), method="fixed", impl="reference")[0]
    log_t = t.double().log_softmax(-1)
    log_q, step = qstar_logprobs(theta, t, **kwargs, **truncation)
    for row in range(4):
        kept = naive_truncation(full[row].tolist(), log_t[row].tolist(), Settings(**truncation))
        assert log_q[row].isfinite().nonzero()[:, 0].tolist() == kept
        torch.testing.assert_close(log_q[row, kept].double(), full[row, kept].log_softmax(-1), atol=2e-6, rtol=0)
    assert (step.status == 0).all()
    many = [draw(theta, t, first, **kwargs, **truncation).token for first in range(0, 400, 4)]
    assert log_q.gather(1, torch.stack(many, 1)).isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_truncation_that_leaves_nothing(impl):
    theta, t = zipf_pair(3, 2000, 0.5)
    theta[1, t[1].topk(2).indices] = -INF
    step = draw(theta, t, target_top_k=2, impl=impl)
    assert step.status.tolist() == [0, Status.EMPTY, 0]
    assert step.token[1] == -1
    assert step.logq[1].isnan()
    assert step.alpha.isfinite().all()  # the diagnostics are those of q* before truncation


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.8}, *({"temperature": 1.2} | x for x in TRUNCATIONS[:6])])
def test_the_three_functions_agree(kwargs, impl):
    theta, t = zipf_pair(5, 3000, 1.5)
    kwargs = kwargs | {"impl": impl}
    log_q, described = qstar_logprobs(theta, t, **kwargs)
    step = draw(theta, t, **kwargs)
    stats = qstar_stats(theta, t, tokens=step.token, **kwargs)
    assert equal_bits(step, stats)
    assert all(torch.equal(getattr(step, f), getattr(described, f)) for f in OF_ROW)
    assert described.token is None
    torch.testing.assert_close(log_q.logsumexp(-1), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(log_q.gather(1, step.token[:, None])[:, 0], step.logq, atol=1e-5, rtol=0)
    for name, logits in (("logp_theta", theta), ("logp_t", t)):
        want = logits.log_softmax(-1).gather(1, step.token[:, None])[:, 0]
        torch.testing.assert_close(getattr(step, name), want, atol=1e-5, rtol=0)
    outside = qstar_stats(theta, t, tokens=torch.tensor([-1, 3000, 0, 1, 2]), **kwargs)
    assert outside.logq.isnan().tolist()[:2] == [True, True]
    assert outside.logp_t.isnan().tolist() == [True, True, False, False, False]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_vocabularies_padded_differently(impl):
    theta, t = zipf_pair(3, 2000, 1.0)
    padded = torch.cat((theta, torch.full((3, 50), torch.nan)), 1)
    assert equal_bits(draw(theta, t, impl=impl), draw(padded, t, vocab_size=2000, impl=impl))
    with pytest.raises(ValueError, match=r"2050 columns and logits_t 2000.*vocab_size="):
        draw(padded, t, impl=impl)


GOOD = torch.zeros(2, 5)
IDS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.zeros(5), GOOD), {}, r"logits_theta is torch.float32 \[5\]"),
        ((GOOD, GOOD.long()), {}, "logits_t is torch.int64"),
        ((GOOD, torch.zeros(3, 5)), {}, "both need the same rows"),
        ((GOOD, GOOD), {"vocab_size": 6}, "vocab_size is 6"),
        ((GOOD, GOOD), {"seeds": IDS.int()}, "seeds is torch.int32"),
        ((GOOD, GOOD), {"positions": IDS[:1]}, r"positions is torch.int64 \[1\]"),
        ((GOOD, GOOD), {"method": "newton"}, "method is 'newton'; it must be one of kl_symmetry"),
        ((GOOD, GOOD), {"impl": "numpy"}, "impl is 'numpy'"),
        ((GOOD.to("meta"), GOOD.to("meta")), {"seeds": IDS.to("meta"), "positions": IDS.to("meta"), "impl": "cpu"},
         "torch.float32 on meta"),
        *(
            ((GOOD, GOOD), {name: value}, f"{name} is {value}")
            for name, value in {
                "alpha": 101.0, "alpha_max": -0.1, "kl_budget": -0.1, "temperature": -1.0, "top_k": -1,
                "top_p": 0.0, "min_p": 2.0, "target_top_k": -2, "target_top_p": 1.1, "tol": 0.0,
            }.items()
        ),
    ],
)  # fmt: skip
def test_argument_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        qstar_sample(*args, **{"seeds": IDS, "positions": IDS} | kwargs)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("method", METHODS)
def test_identical_models(method, impl):
    theta, _ = zipf_pair(4, 3000, 1.0)
    step = draw(theta, theta.clone(), method=method, impl=impl)
    alpha = {"kl_budget": 0.0, "kl_budget_t": 1.0}.get(method, 0.5)  # inside the ball, whose other end is the model
    torch.testing.assert_close(step.alpha, torch.full((4,), alpha), atol=1e-6, rtol=0)
    torch.testing.assert_close(step.kl_theta + step.kl_t, torch.zeros(4), atol=2e-6, rtol=0)
    torch.testing.assert_close(step.ess_theta + step.ess_t, torch.full((4,), 2.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(step.logq, step.logp_t, atol=1e-6, rtol=0)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("noise", [0.1, 1.0, 4.0])
def test_what_the_rules_promise(noise, impl):
    """Minimax and Chernoff point for KL symmetry, equal ESS for ESS balance, on a grid of α."""
    theta, t = zipf_pair(4, 2000, noise)
    step = qstar_stats(theta, t, impl=impl)
    slack = 1e-5 * (1 + step.kl_t)
    assert ((step.kl_theta - step.kl_t).abs() <= slack).all()
    log_theta, log_t = theta.double().log_softmax(-1), t.double().log_softmax(-1)
    for alpha in torch.linspace(0, 1, 21).tolist():
        at = qstar_stats(theta, t, method="fixed", alpha=alpha, impl=impl)
        assert (torch.maximum(at.kl_theta, at.kl_t) >= step.kl_t - slack).all()
        bhattacharyya = -(alpha * log_theta + (1 - alpha) * log_t).logsumexp(-1)
        assert (step.kl_t >= bhattacharyya - slack).all()
    balanced = qstar_stats(theta, t, method="ess_balance", impl=impl)
    assert ((balanced.ess_theta.log() - balanced.ess_t.log()).abs() < 1e-4).all()
    # the ESS by its definition
    log_q, step = qstar_logprobs(theta, t, method="ess_balance", impl=impl)
    ess = (2 * log_theta - log_q).logsumexp(-1).neg()
    torch.testing.assert_close(step.ess_theta.log().double(), ess, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("vocab_size", [2, 999, 4097])
@pytest.mark.parametrize(("method", "which"), [("kl_budget", "kl_theta"), ("kl_budget_t", "kl_t")])
def test_budgets(method, which, vocab_size, impl):
    """The KL is the budget, or α at the end that is inside the ball or nearest to it; hard rows."""
    pairs = table(vocab_size, seed=7)
    theta, t = stacked(pairs)
    inside, other = (0.0, 1.0) if method == "kl_budget" else (1.0, 0.0)
    ends = [getattr(qstar_stats(theta, t, method="fixed", alpha=x, impl=impl), which) for x in (inside, other)]
    for budget in (0.0, 1e-9, 1e-4, 0.01, 1.0, 50.0):
        step = draw(theta, t, method=method, kl_budget=budget, impl=impl)
        assert (step.status == Status.OK).all()
        got = getattr(step, which)
        met = (got - budget).abs() <= 1e-5 * max(1, budget)
        assert (
            met | ((step.alpha == inside) & (ends[0] <= budget)) | ((step.alpha == other) & (ends[1] >= budget))
        ).all()
        if impl == "cpu":
            check_against_reference(theta, t, list(pairs), method=method, kl_budget=budget)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("method", ["kl_budget", "kl_budget_t"])
def test_a_ball_without_a_point_is_met_at_its_nearest_end(method, impl):
    """Most of what the model it is around has is where the other has none; masks that are numbers beside it (found by
    the fuzzer)."""
    around = [-9.030389, -0.75014865, -1e4, -0.66097337, 1.4602556, 7.6072307, -14.105294, 8.085854]
    around += [5.995907, -1e4, -1e4, -1e4, 3.5989227, 12.425163, -1e4, 11.795532]
    other = [-INF, -2.986007, -INF, -INF, -INF, -10.204375, -4.9857965, -6.931533]
    other += [-10.365017, -INF, -INF, 16.141808, 9.085938, -9.815051, -INF, -INF]
    sides = (around, other) if method == "kl_budget" else (other, around)
    step = qstar_stats(*(torch.tensor([x]) for x in sides), method=method, kl_budget=0.01, impl=impl)
    assert step.status.tolist() == [Status.OK]
    assert step.alpha.tolist() == [1.0 if method == "kl_budget" else 0.0]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("alpha", [-2.0, -0.5, 1.5, 3.0, 20.0])
def test_extrapolation(alpha, impl):
    """Hard rows against the formula of classifier-free guidance; what a model forbids has no part in it."""
    pairs = {k: v for k, v in table(999, seed=8).items() if "finfo" not in k}
    theta, t = stacked(pairs)
    kwargs = {"method": "fixed", "alpha": alpha}
    log_q, step = qstar_logprobs(theta.double(), t.double(), impl=impl, **kwargs)
    a, b = (x.double().log_softmax(-1) for x in (theta, t))
    guided = torch.where(a.isfinite() & b.isfinite(), b + alpha * (a - b), -INF).log_softmax(-1)
    assert (step.status == Status.OK).all()
    torch.testing.assert_close(log_q, guided, rtol=1e-9, atol=1e-9)
    for x, kl, ess in ((a, step.kl_theta, step.ess_theta), (b, step.kl_t, step.ess_t)):
        want = torch.where(guided.exp() > 0, guided.exp() * (guided - x), 0.0).sum(-1)
        torch.testing.assert_close(kl, want, rtol=1e-7, atol=1e-9)
        outside = (x.isfinite() & ~guided.isfinite()).any(-1)
        assert torch.equal(ess == 0, outside | (ess == 0))
        second = torch.where(guided.isfinite(), 2 * x - guided, -INF).logsumexp(-1)
        some = ~outside & (second < 500)
        torch.testing.assert_close(ess[some].log(), -second[some], rtol=1e-7, atol=1e-7)
    if impl == "cpu":
        check_against_reference(theta, t, list(pairs), **kwargs)
        check_against_reference(theta, t, list(pairs), temperature=0.0, **kwargs)


def test_a_number_that_rounding_makes_of_nothing_is_refused():
    """−1e14 beyond [0, 1] is no mask: its token has all the mass, and KLs of 1e14 less 1e14 have no digits."""
    theta, t = zipf_pair(2, 50, 1.0)
    t[1, 3] = -1e14
    for impl in ("reference", "cpu"):
        assert draw(theta, t, method="fixed", alpha=1.5, impl=impl).status.tolist() == [Status.OK, Status.INEXACT]


OWN = {
    "kl_budget": ({"kl_budget": [0.0, 1e-3, 0.1, 2.0]}, {"kl_budget": [1e-6, 0.05], "alpha_min": [0.0, 0.9, 1.0]}),
    "kl_budget_t": ({"kl_budget": [0.0, 1e-3, 0.1, 2.0]}, {"alpha_max": [0.0, 0.2, 1.0]}),
    "fixed": ({"alpha": [0.0, 0.3, 1.0, 1.7, -0.5]}, {"alpha": [0.3, 2.0], "alpha_max": [0.6, 0.7, 1.0]}),
    "kl_symmetry": ({"alpha_min": [0.0, 0.52, 0.6]},),
    "ess_balance": ({"alpha_max": [0.4, 1.0]},),
}


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", OWN)
def test_settings_of_a_row(method, dtype, impl):
    """Bit for bit those of one call a row with its numbers."""
    theta, t = stacked(dict(itertools.islice(table(999, seed=4).items(), 0, None, 2)))
    rows = len(theta)
    for own in OWN[method]:
        own = {k: torch.tensor([v[i % len(v)] for i in range(rows)], dtype=dtype) for k, v in own.items()}
        together = draw(theta, t, method=method, impl=impl, **own)
        assert (together.status == Status.OK).all()
        for i in range(rows):
            row = slice(i, i + 1)
            of_row = {k: v[i].item() for k, v in own.items()}
            alone = draw(theta[row], t[row], i, method=method, impl=impl, **of_row)
            assert equal_bits(together, alone, row), (i, of_row)
        expanded = draw(theta[:1].expand(rows, -1), t[:1].expand(rows, -1), method=method, impl=impl, **own)
        assert equal_bits(
            expanded, draw(theta[:1].repeat(rows, 1), t[:1].repeat(rows, 1), method=method, impl=impl, **own)
        )


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_two_rules_in_one_batch(impl):
    """Equal clamps make a row of a budget one of `fixed`, to the last bit."""
    theta, t = zipf_pair(6, 999, 1.0)
    alpha, own = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0, 0.0]), torch.arange(6) < 5
    clamps = {"alpha_min": torch.where(own, alpha, 0.0), "alpha_max": torch.where(own, alpha, 1.0)}
    step = draw(theta, t, method="kl_budget", kl_budget=0.02, impl=impl, **clamps)
    assert equal_bits(step, draw(theta[:5], t[:5], method="fixed", alpha=alpha[:5], impl=impl), slice(0, 5))
    assert equal_bits(step, draw(theta[5:], t[5:], 5, method="kl_budget", kl_budget=0.02, impl=impl), slice(5, 6))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_bad_number_refuses_its_row(impl):
    theta, t = zipf_pair(4, 300, 1.0)
    clean = draw(theta, t, method="kl_budget", kl_budget=0.1, impl=impl)
    for name, bad in (("kl_budget", -1.0), ("kl_budget", torch.nan), ("alpha", INF), ("alpha_min", 1.5)):
        usual = {"kl_budget": 0.1, "alpha": 0.5, "alpha_min": 0.0}[name]
        own = torch.tensor([usual, bad, usual, usual], dtype=torch.float64)
        step = draw(theta, t, **{"method": "kl_budget", "kl_budget": 0.1, name: own}, impl=impl)
        assert step.status.tolist() == [0, Status.BAD_SETTING, 0, 0]
        assert step.token[1] == -1
        assert all(getattr(step, f)[1].isnan() for f in FIELDS)
        assert all(torch.equal(getattr(step, f)[2:], getattr(clean, f)[2:]) for f in NAMES)
    step = draw(theta, t, alpha_min=torch.full((4,), 0.6), alpha_max=torch.tensor([0.7, 0.5, 0.6, 1.0]), impl=impl)
    assert step.status.tolist() == [0, Status.BAD_SETTING, 0, 0]
    for own in (torch.ones(3), torch.ones(4, dtype=torch.int64), torch.tensor(0.5), torch.ones(4).bfloat16()):
        with pytest.raises(ValueError, match=r"^alpha is torch\..* it must be float32 or float64 \[4\]"):
            draw(theta, t, alpha=own, impl=impl)
    with pytest.raises(ValueError, match=r"^top_p is "):
        draw(theta, t, top_p=torch.ones(4), impl=impl)


def many_tokens(theta, t, seed: int, draws: int) -> torch.Tensor:
    """Tokens of one pair [V] at α = 0.4 for seeds from `seed` on: int64 [draws]; an expanded row is solved once."""
    seeds = torch.arange(seed, seed + draws)
    rows, fixed = theta.expand(draws, -1), {"method": "fixed", "alpha": 0.4, "impl": "cpu"}
    tokens = qstar_sample(rows, t.expand(draws, -1), seeds=seeds, positions=seeds % 100, **fixed).token
    # rows that are memory of their own are solved one by one, and draw the same
    few = seeds[:16]
    copies = theta.repeat(len(few), 1), t.repeat(len(few), 1)
    step = qstar_sample(*copies, seeds=few, positions=few % 100, **fixed)
    assert torch.equal(step.token, tokens[:16])
    return tokens


def p_value(tokens: torch.Tensor, q: torch.Tensor) -> float:
    """χ² test of the tokens against q [V]; the rarest tokens are merged until each bin expects at least 5."""
    order = q.argsort(descending=True)
    observed = torch.bincount(tokens, minlength=len(q))[order].double()
    expected = q[order] * len(tokens)
    bins, current, filled = [], 0, 0.0
    for x in expected.flip(0).tolist():  # rarest first; the most probable token always fills its own bin
        bins.append(current)
        filled += x
        if filled >= 5:
            current, filled = current + 1, 0.0
    index = torch.tensor(bins).clamp(max=current - 1)  # [V]
    expected = torch.zeros(current, dtype=torch.float64).index_add_(0, index, expected.flip(0))
    observed = torch.zeros(current, dtype=torch.float64).index_add_(0, index, observed.flip(0))
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    return chi2.sf(statistic, current - 1) if current > 1 else 1.0


@pytest.mark.parametrize("kind", ["one token", "999", "4097", "heavy tail"])
def test_tokens_follow_q(kind):
    """χ² of the tokens against float64 q, p > 0.001: each of the three cases that can fail is a false alarm for one in
    1,000 choices of the seed. In the heavy tail one token stands 18 nats above 200,000 others."""
    seed = chosen_seed()
    vocab_size = {"one token": 1, "999": 999, "4097": 4097, "heavy tail": 200_000}[kind]
    theta, t = (x[0] for x in zipf_pair(1, vocab_size, 1.0))
    if kind == "heavy tail":
        theta, t = torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(0)) * 0.3
        theta[150_001] += 18
        t[150_001] += 18
    q = (0.4 * theta.double().log_softmax(-1) + 0.6 * t.double().log_softmax(-1)).softmax(-1)
    draws = {"one token": 2000, "999": 20_000, "4097": 100_000, "heavy tail": 500_000}[kind]
    tokens = many_tokens(theta, t, seed, draws)
    assert p_value(tokens, q) > 0.001


@pytest.mark.parametrize("truncation", [{"top_k": 20}, {"top_p": 0.7, "target_top_k": 50}])
def test_truncated_tokens_follow_log_q(truncation):
    """The same of 6,000 tokens through the public functions, against the log q they report."""
    seed = chosen_seed()
    theta, t = zipf_pair(1, 300, 1.0)
    q = qstar_logprobs(theta.double(), t.double(), **truncation)[0][0].exp()
    tokens = draw(theta.expand(6000, -1), t.expand(6000, -1), seed, **truncation).token
    assert (q[tokens] > 0).all()
    assert p_value(tokens, q) > 0.001


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_masks_bind(impl):
    """A token of zero mass is never drawn, and the only one that both models allow always is."""
    theta, t = torch.zeros(200, 3000), torch.zeros(200, 3000)
    theta[:, ::2] = -INF
    t[:, ::3] = torch.finfo(torch.float32).min
    tokens = draw(theta, t, impl=impl).token
    assert ((tokens % 2 == 1) & (tokens % 3 != 0)).all()
    theta[:, :2500] = theta[:, 2502:] = -INF
    step = draw(theta, t, impl=impl)
    assert (step.token == 2501).all()
    torch.testing.assert_close(step.logq, torch.zeros(200), atol=1e-6, rtol=0)


def test_no_temporary_of_the_size_of_the_logits():
    """Sampling [4, 1M] without truncation needs far less beyond its inputs than one float32 [4, 1M] of 16 MiB."""
    code = """
import resource, torch
from qstar_kernels import qstar_sample
theta, t = torch.randn(4, 1 << 20), torch.randn(4, 1 << 20)
index = torch.arange(4)
qstar_sample(theta[:, :5000], t[:, :5000], seeds=index, positions=index)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
qstar_sample(theta, t, seeds=index, positions=index)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(out.stdout) < 6 * 1024, f"{int(out.stdout) / 1024:.1f} MiB"
