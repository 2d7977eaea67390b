"""The Triton kernels in Triton's interpreter; `test_kernels.py` runs this file in a process of its own."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from rows import INF, NEAR_TIES, check_near_ties, check_step, equal_bits, stacked, table, unusable, zipf_pair
from triton.runtime import interpreter

from qstar_kernels import METHODS, QStarStep, Status, noise, qstar_logprobs, qstar_sample, qstar_stats
from qstar_kernels.dispatch import step_op
from qstar_kernels.gpu.double import exp64, inverse, log1p64, log64, maxima_of_4, sums_of_4, sums_of_8
from qstar_kernels.gpu.draw import gumbel, words
from qstar_kernels.types import FIELDS, Settings
from tests.interpreter import interpret_quickly, poisoned

interpret_quickly()


@pytest.fixture(autouse=True)
def prepared():
    with poisoned():
        yield


def draw(theta, t, impl: str = "triton", **kwargs) -> QStarStep:
    seeds = torch.arange(len(theta))
    return qstar_sample(theta, t, **{"seeds": seeds * 7 + 3, "positions": seeds, "impl": impl} | kwargs)


def check_against_reference(theta, t, names, **kwargs) -> None:
    want = draw(theta.double(), t.double(), impl="reference", **kwargs)
    check_step(draw(theta, t, **kwargs), want, theta, t, names, **kwargs)


@pytest.mark.parametrize("vocab_size", [1, 2, 999, 1024, 4097])
def test_hard_rows(vocab_size):
    pairs = table(vocab_size, seed=vocab_size)
    if vocab_size in (1, 1024):
        pairs = dict(itertools.islice(pairs.items(), 0, None, 4))
    check_against_reference(*stacked(pairs), names=list(pairs))


def test_a_number_like_a_mask_is_allowed():
    """ESS is 0 where a model allows a token, be it by −1e14, that the other forbids."""
    theta, t = zipf_pair(2, 50, 1.0)
    theta[0, 3], t[0, 3] = -INF, -1e14
    theta[1, 3], t[1, 3] = -1e14, -INF
    step = draw(theta, t)
    assert step.ess_t[0] == 0
    assert step.ess_theta[1] == 0
    assert (step.ess_theta[0] > 0) & (step.ess_t[1] > 0)


def test_each_model_allows_what_the_other_forbids():
    """In one group, by different threads: both ESS are 0."""
    theta, t = zipf_pair(1, 1024, 1.0)
    theta[0, 3], t[0, 900] = -INF, -INF
    step = draw(theta, t)
    assert step.ess_theta.item() == step.ess_t.item() == 0


@pytest.mark.parametrize("case", NEAR_TIES)
def test_two_tokens_nearly_tied(case):
    check_near_ties("triton", case)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "kl_symmetry"])
def test_methods(method):
    pairs = table(999, seed=5)
    if method == "entropy":
        # entropies of 1e-42: the reference's logsumexp loses what lies below 1e-16 of the mass
        pairs = {name: pair for name, pair in pairs.items() if "nats apart" not in name}
    check_against_reference(*stacked(pairs), names=list(pairs), method=method)


@pytest.mark.parametrize("method", ["kl_budget", "kl_budget_t"])
@pytest.mark.parametrize("budget", [0.0, 1e-6, 1.0])
def test_budgets(method, budget):
    pairs = dict(itertools.islice(table(999, seed=6).items(), 0, None, 2))
    check_against_reference(*stacked(pairs), names=list(pairs), method=method, kl_budget=budget)


@pytest.mark.parametrize("alpha", [-0.7, 1.5, 3.0])
def test_extrapolation(alpha):
    """Greedy, too: another token of a group may have more than its two maxima would."""
    pairs = dict(itertools.islice(table(1500, seed=6).items(), 0, None, 2))
    for temperature in (1.0, 0.0):
        kwargs = {"method": "fixed", "alpha": alpha, "temperature": temperature}
        check_against_reference(*stacked(pairs), names=list(pairs), **kwargs)


def test_settings_of_a_row():
    """Bit for bit those of one call a row with its numbers; a bad one refuses its row alone."""
    pairs = dict(itertools.islice(table(999, seed=4).items(), 0, 6))
    theta, t = stacked(pairs)
    budget = torch.tensor([0.0, 1e-3, 0.1, 2.0, torch.nan, 0.01], dtype=torch.float64)
    clamp = torch.tensor([0.0, 0.1, 0.97, 0.0, 0.0, 0.3])
    for own in (
        {"method": "kl_budget", "kl_budget": budget, "alpha_min": clamp},
        {"method": "fixed", "alpha": torch.tensor([0.1, 1.7, -0.3, 1.0, torch.nan, 0.0])},
        {"method": "kl_symmetry", "alpha_min": clamp},
    ):
        together = draw(theta, t, **own)
        bad = Status.OK if own["method"] == "kl_symmetry" else Status.BAD_SETTING
        assert together.status.tolist() == [0, 0, 0, 0, bad, 0]
        for i in (0, 1, 2, 3, 5):
            of_row = {k: v[i].item() if isinstance(v, torch.Tensor) else v for k, v in own.items()}
            index = {"seeds": torch.tensor([i * 7 + 3]), "positions": torch.tensor([i])}
            assert equal_bits(together, draw(theta[i : i + 1], t[i : i + 1], **index, **of_row), slice(i, i + 1)), i


def test_two_rules_in_one_batch():
    """Equal clamps make a row of a budget one of `fixed`."""
    theta, t = zipf_pair(4, 999, 1.0)
    alpha = torch.tensor([0.0, 0.3, 0.9, 1.0])
    step = draw(theta, t, method="kl_budget", alpha_min=alpha, alpha_max=alpha)
    assert equal_bits(step, draw(theta, t, method="fixed", alpha=alpha))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(32000, torch.float32), (50257, torch.bfloat16), (128256, torch.float16), (151936, torch.float32)],
)
def test_large_vocabularies(vocab_size, dtype):
    """Some kinds of row at each size."""
    pairs = {k: v for k, v in table(vocab_size, seed=vocab_size).items() if "finfo" not in k}
    pairs = dict(itertools.islice(pairs.items(), vocab_size % 5, None, 6 if vocab_size < 1e5 else 9))
    theta, t = stacked(pairs)
    check_against_reference(theta.to(dtype), t.to(dtype), names=list(pairs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    pairs = {k: v for k, v in table(1500, seed=2).items() if "finfo" not in k}
    pairs = dict(itertools.islice(pairs.items(), dtype == torch.float16, None, 2))
    theta, t = stacked(pairs)
    check_against_reference(theta.to(dtype), t.to(dtype), names=list(pairs))
    check_against_reference(theta[::5], t.to(dtype)[::5], names=list(pairs)[::5])


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.7])
def test_temperature(temperature):
    pairs = dict(itertools.islice(table(1500, seed=3).items(), 0, None, 2))
    check_against_reference(*stacked(pairs), names=list(pairs), temperature=temperature)
    if temperature == 0.3:
        check_against_reference(*zipf_pair(2, 300, 1.0), names="01", temperature=temperature, method="entropy")


@pytest.mark.parametrize("method", METHODS)
def test_alpha_range(method):
    theta, t = zipf_pair(2, 999, 3.0)
    kwargs = {"method": method, "alpha_min": 0.52, "alpha_max": 0.56}
    check_against_reference(theta, t, names="01", **kwargs)


@pytest.mark.parametrize("noise_of_pair", [1e-3, 3e-3, 0.03])
def test_near_pairs(noise_of_pair):
    """α hangs on the third cumulant of d there: 1e-9 of the normalisers, less than float32 can tell apart."""
    check_against_reference(*zipf_pair(2, 3000, noise_of_pair), names="01")
    check_against_reference(*zipf_pair(2, 3000, noise_of_pair), names="01", method="reverse_kl_symmetry")


TRUNCATIONS = (
    {"top_k": 50, "top_p": 0.9},
    {"min_p": 0.05},
    {"target_top_k": 40, "target_top_p": 0.8, "top_p": 0.95},
    {"top_k": 1, "temperature": 0.7},
    {"top_p": 0.7, "temperature": 0.0},
)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_truncation(truncation):
    """The same support as the reference's sort leaves, and the same log-probabilities on it."""
    pairs = table(1500, seed=3)
    chosen = ("zipf 1", "zipf 8", "one-hot, different", "-inf in both")
    theta, t = stacked({name: pairs[name] for name in chosen})
    theta, t = torch.cat((theta, theta[:2].round())), torch.cat((t, t[:2].round()))  # ties
    check_against_reference(theta, t, names=[*chosen, "ties", "ties"], **truncation)
    log_q, step = qstar_logprobs(theta, t, impl="triton", **truncation)
    want, _ = qstar_logprobs(theta.double(), t.double(), impl="reference", **truncation)
    assert step.token is None
    assert torch.equal(log_q.isneginf(), want.isneginf())
    kept = want.isfinite()
    assert ((log_q - want).abs()[kept] <= 1e-5 * want.abs().clamp(min=1)[kept]).all()


def test_nothing_left():
    """π_t's only kept token is one that π_θ forbids."""
    theta, t = zipf_pair(2, 300, 1.0)
    theta[1, t[1].argmax()] = -INF
    step = draw(theta, t, target_top_k=1)
    assert step.status.tolist() == [Status.OK, Status.EMPTY]
    assert step.token[1] == -1
    assert step.alpha[1].isfinite()
    assert step.logq[1].isnan()
    assert qstar_logprobs(theta, t, target_top_k=1, impl="triton")[0][1].isnan().all()


def test_given_tokens():
    theta, t = zipf_pair(4, 1500, 1.0)
    tokens = torch.tensor([3, -1, 1500, 1499])
    got = qstar_stats(theta, t, tokens=tokens, impl="triton")
    want = qstar_stats(theta.double(), t.double(), tokens=tokens, impl="reference")
    for name in ("logq", "logp_theta", "logp_t", "alpha", "ess_t"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(want, name), rtol=1e-5, atol=1e-5, equal_nan=True
        )
    assert qstar_stats(theta, t, impl="triton").token is None


@pytest.mark.parametrize("vocab_size", [2, 9000])
def test_unusable_rows_are_reported_and_harm_no_neighbour(vocab_size):
    bad, (theta, t) = unusable(vocab_size), zipf_pair(2, vocab_size, 1.0)
    clean = draw(theta, t)
    bad_theta, bad_t = stacked(bad)
    among = draw(torch.cat((theta, bad_theta)), torch.cat((t, bad_t)))
    assert equal_bits(among, clean, slice(0, 2))
    assert among.status[2:].tolist() == [Status[name] for name in bad]
    assert (among.token[2:] == -1).all()
    assert all(getattr(among, name)[2:].isnan().all() for name in FIELDS)


def test_a_row_alone_or_among_64_twice():
    """The same bits, whatever stands beside it; the same again at the second call; the reference's tokens."""
    pairs = table(1300, seed=9) | unusable(1300)
    theta, t = stacked(pairs)
    repeat = torch.arange(64) % len(pairs)
    theta, t, seeds = theta[repeat], t[repeat], torch.arange(64)
    among = draw(theta, t, seeds=seeds, positions=seeds)
    reference = draw(theta.double(), t.double(), seeds=seeds, positions=seeds, impl="reference")
    assert torch.equal(among.token, reference.token)
    for i in range(0, 64, 21):
        row = slice(i, i + 1)
        alone = draw(theta[row], t[row], seeds=seeds[row], positions=seeds[row])
        assert equal_bits(among, alone, row), i
    first, again = (draw(theta[:9], t[:9], top_p=0.9) for _ in range(2))
    assert equal_bits(first, again)


def test_odd_strides():
    theta, t = zipf_pair(3, 1501, 1.0)
    want = draw(theta, t)
    wide = torch.full((3, 2 * 1501 + 3), torch.nan)
    wide[:, 3::2] = t
    padded = torch.full((3, 1700), torch.nan)
    padded[:, 5:1506] = theta
    assert equal_bits(want, draw(theta.T.contiguous().T, wide[:, 3::2]))
    assert equal_bits(want, draw(padded[:, 5:1506], wide[:, 3::2]))
    assert equal_bits(draw(theta[:1].repeat(3, 1), t), draw(theta[:1].expand(3, -1), t))


class Loads:
    """Logits loaded, told from other loads by their type: nothing else here is bfloat16."""

    def __init__(self, monkeypatch):
        self.count = 0
        load = interpreter.InterpreterBuilder.create_masked_load

        def counting(builder, ptrs, mask, *args):
            if ptrs.dtype.element_ty == tl.bfloat16:
                self.count += int(mask.data.sum())
            return load(builder, ptrs, mask, *args)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counting)

    def sweeps(self, theta, t) -> float:
        """How many sweeps a row [V] takes: each loads a logit twice, the second time what is at hand still."""
        self.count = 0
        draw(theta[None].bfloat16(), t[None].bfloat16())
        return (self.count / 2 - 1024) / (2 * len(theta))


def test_one_sweep(monkeypatch):
    """Rows as language models have them take one sweep for sampling with all diagnostics, some that differ more two."""
    loads, most = Loads(monkeypatch), {0.1: 1.05, 0.5: 1.05, 1.0: 1.05, 2.0: 2.05, 4.0: 2.05}
    found = {noise: [] for noise in most}
    for noise_of_pair in most:
        pairs = zip(*zipf_pair(2, 50257, noise_of_pair, seed=int(10 * noise_of_pair)), strict=True)
        found[noise_of_pair] = [loads.sweeps(theta, t) for theta, t in pairs]
    print("\nsweeps by noise at V = 50257:", {k: [round(x, 2) for x in v] for k, v in found.items()})
    assert all(max(found[noise]) <= limit for noise, limit in most.items())


def test_sweeps_over_row_kinds(monkeypatch):
    """Prints how often each kind of row is read; none may need more than a handful of sweeps."""
    loads = Loads(monkeypatch)
    kinds = {name: pair for name, pair in table(4096, seed=4).items() if "finfo" not in name}
    counts = {name: loads.sweeps(*pair) for name, pair in kinds.items()}
    print("\nsweeps by kind of row:", {name: round(x, 2) for name, x in counts.items()})
    assert max(counts.values()) <= 12


@triton.jit
def double_kernel(x, out, N: tl.constexpr):
    o = tl.arange(0, N)  # [N]
    a = tl.load(x + o)
    b = tl.exp(a)
    tl.store(out + o, exp64(a))
    tl.store(out + N + o, log64(b))
    tl.store(out + 2 * N + o, inverse(b) * b)
    tl.store(out + 3 * N + o, log1p64(tl.exp(-tl.abs(a))))
    sums = sums_of_8(a, 2 * a, 3 * a, 4 * a, 5 * a, 6 * a, 7 * a, 8 * a) + sums_of_4(a, 2 * a, 3 * a, 4 * a)
    sums = sums + maxima_of_4(a, a + 1, a + 2, a + 3)
    for k in tl.static_range(16):
        tl.store(out + 4 * N + k, sums[k])


def test_float64_without_branches():
    """To 1e-14; the ends, and what is no number."""
    n = 1024
    x, out = torch.linspace(-79.0, 80.0, n, dtype=torch.float64), torch.zeros(5 * n, dtype=torch.float64)
    x[:6] = torch.tensor([-701.0, 701.0, -torch.inf, torch.inf, torch.nan, 1e-9])
    double_kernel[(1,)](x, out, N=n)
    exponential, logarithm, one, log1p, sums = out.view(5, n)
    assert exponential[:4].tolist() == [0.0, torch.inf, 0.0, torch.inf]
    assert exponential[4].isnan() & logarithm[4].isnan()
    assert logarithm[2:4].tolist() == [-torch.inf, torch.inf]
    torch.testing.assert_close(exponential[5:], x[5:].exp(), rtol=1e-14, atol=0)
    torch.testing.assert_close(logarithm[5:], x[5:].exp().log(), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(log1p[5:], (-x[5:].abs()).exp().log1p(), rtol=1e-11, atol=0)
    assert ((one[5:] - 1).abs() < 1e-15).all()
    x[:6] = 0.0
    double_kernel[(1,)](x, out, N=n)
    total, top = x.sum(), x.max()
    want = torch.stack([*(total * k for k in (*range(1, 9), *range(1, 5))), *(top + k for k in range(4))])
    torch.testing.assert_close(sums[:16], want, rtol=1e-12, atol=0)


@triton.jit
def noise_kernel(seed, position, high, low, g, first, BLOCK: tl.constexpr, STREAM: tl.constexpr):
    o = tl.arange(0, BLOCK)  # [BLOCK]
    word_high, word_low = words(tl.load(seed), tl.load(position), first + o, STREAM)  # [BLOCK] each
    tl.store(high + o, word_high.to(tl.int64))
    tl.store(low + o, word_low.to(tl.int64))
    tl.store(g + o, gumbel(tl.load(seed), tl.load(position), first + o, STREAM, tl.float32))


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (-(2**63) + 12345, 2**40 + 17), (2**62 + 99, 3)])
def test_noise_has_the_bits_of_the_definition(seed, position):
    count, first = 1 << 16, 6 * 1024
    seeds, positions = torch.tensor([seed]), torch.tensor([position])
    high, low, g = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64), torch.zeros(count)
    for stream in (noise.GROUP_STREAM, noise.TOKEN_STREAM):
        noise_kernel[(1,)](seeds, positions, high, low, g, first, BLOCK=count, STREAM=stream)
        mask = 0xFFFFFFFF
        pairs = first // 2 + torch.arange(count // 2)[None]
        position_words = [torch.tensor([[x]]) for x in (position & mask, position >> 32 & mask, stream)]
        key = torch.tensor([[seed & mask]]), torch.tensor([[seed >> 32 & mask]])
        firsts, seconds = noise.philox((pairs, *position_words), key)
        assert torch.equal(high, firsts[:, 0].T.flatten())
        assert torch.equal(low, seconds[:, 0].T.flatten())
        want = noise.gumbel(seeds, positions, torch.tensor([first]), count, stream)[0]
        assert (g - want).abs().max() < 2e-6


def test_tails_of_the_noise(monkeypatch):
    """Both tails for words that chance does not bring: u from 2⁻⁶⁵ to its complement."""
    high = torch.tensor([0, 0, 0, 1, 2**20, 2**31 - 1, 2**31, 2**32 - 2**12, 2**32 - 1, 2**32 - 1])
    low = torch.tensor([0, 1, 2**31, 0, 0, 2**32 - 1, 0, 0, 2**32 - 2, 2**32 - 1])
    got = torch.zeros(16)

    @triton.jit
    def kernel(high, low, g):
        o = tl.arange(0, 16)
        tl.store(g + o, gumbel(high, low, o, 0, tl.float32))

    def given(high, low, ids, STREAM):
        mask = ids < 10
        x, y = tl.load(high + ids, mask=mask, other=5), tl.load(low + ids, mask=mask, other=5)
        return x.to(tl.uint32), y.to(tl.uint32)

    monkeypatch.setitem(gumbel.rewrite().__globals__, "words", given)
    kernel[(1,)](high, low, got)
    upper = high >= 2**31
    u = torch.where(upper, 2**32 - 1 - high, high).double() * 2.0**-32
    u += (torch.where(upper, 2**32 - 1 - low, low).double() + 0.5) * 2.0**-64
    want = -torch.where(upper, -u.log(), -torch.log1p(-u)).log()
    torch.testing.assert_close(got[:10].double(), want, rtol=1e-6, atol=1e-6)


def test_float64_is_refused():
    theta, t = zipf_pair(1, 10, 1.0)
    with pytest.raises(ValueError, match=r"logits_theta is torch\.float64"):
        draw(theta.double(), t)


def test_no_rows():
    step = draw(torch.zeros(0, 10), torch.zeros(0, 10))
    assert step.token.shape == step.alpha.shape == (0,)


def test_traced():
    """The kernels behind the operator: checked by torch, compiled without a graph break, exported."""
    theta, t = zipf_pair(2, 300, 1.0)
    index = torch.arange(2)
    eager = draw(theta, t, seeds=index, positions=index)

    def sample(theta, t, index):
        step = qstar_sample(theta, t, seeds=index, positions=index, impl="triton")
        return step.token, step.logq

    token, logq = torch.compile(sample, fullgraph=True, backend="aot_eager")(theta, t, index)
    assert torch.equal(token, eager.token)
    assert torch.equal(logq, eager.logq)
    own = None, None, None, torch.full((2,), 0.1)
    chosen = Settings(method="kl_budget").values()
    torch.library.opcheck(step_op, (theta, t, index, index, None, True, "triton", *own, *chosen))
