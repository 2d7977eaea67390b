"""Drafts change nothing but the time: the same tokens as plain decoding, and acceptance as the theory predicts."""

import copy
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from rows import chosen_seed, zipf_pair
from test_decode import CONFIGS, MIXED, QUESTIONS, random_model
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from qstar import Pair, PromptFormat
from qstar.demo import THETA
from qstar.generate import main
from qstar.speculate import MAX_DRAFT, PLAIN_ROUNDS, DraftLength, Tally, overlap
from qstar_kernels import qstar_logprobs, qstar_sample
from qstar_kernels.noise import GROUP_SIZE
from qstar_kernels.types import FIELDS


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(THETA)


@pytest.fixture(scope="module")
def unequal(tokenizer):
    """Two random models of different size."""
    small = random_model(copy.deepcopy(CONFIGS["llama"]), seed=5)
    config = LlamaConfig(vocab_size=2048, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=96)  # fmt: skip
    return Pair(small, random_model(config, seed=6), tokenizer, tokenizer)


def with_draft(pair: Pair, draft) -> Pair:
    """The same pair, drafted for by `draft`."""
    other = None if isinstance(draft, str) else pair.tokenizer_theta
    return Pair(pair.theta, pair.t, pair.tokenizer_theta, pair.tokenizer_t, draft, other)


def check_same(pair: Pair, prompts, speculate=(1, 2, 4, 8), drafts=("theta", "t"), **options) -> None:
    """Token for token the same for every number of drafts, and all numbers up to rounding."""
    plain = pair.generate(prompts, **options)
    for draft in drafts:
        for k in speculate:
            out = with_draft(pair, draft).generate(prompts, speculate=k, **options)
            assert out.token_ids == plain.token_ids, (draft, k)
            assert out.texts == plain.texts
            assert out.finish_reasons == plain.finish_reasons
            for a, b in zip(out.samples, plain.samples, strict=True):
                for name in FIELDS:
                    np.testing.assert_allclose(a.fields[name], b.fields[name], atol=1e-3, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (20, ["--samples-per-prompt", "2"]),
        pytest.param(200, ["--samples-per-prompt", "2"], marks=pytest.mark.slow),
        (20, ["--samples-per-prompt", "1", "--temperature", "0"]),
    ],
)
def test_output_files_are_those_of_plain_decoding(count, options, tmp_path):
    """Samples of the demo pair: `x.jsonl` byte for byte the same, whatever drafts, and how many."""
    command = ["--num-samples", str(count // int(options[1])), "--max-new-tokens", "32", *options]
    runs = [["--speculate", str(k)] for k in (0, 1, 2, 4, 8, "auto")]
    runs += [["--speculate", "3", "--draft", "t"], ["--speculate", "3", "--draft", str(THETA), "--batch-size", "5"]]
    files = []
    for i, run in enumerate(runs):
        path = tmp_path / f"{i}" / "out.jsonl"
        assert main([*command, *run, "--output", str(path), "--save-diagnostics"]) == 0
        files.append(path)
    assert all(path.read_bytes() == files[0].read_bytes() for path in files)
    lines = [json.loads(line) for line in (tmp_path / "3" / "out.diagnostics.jsonl").read_text().splitlines()]
    assert len(lines) == count
    for line in lines:
        # the first token comes from the prompt's own pass
        assert line["verify_passes"] + sum(line["accepted"]) >= line["num_tokens"] - 1 >= line["verify_passes"]
    assert sum(line["num_tokens"] for line in lines) > 1.5 * sum(line["verify_passes"] for line in lines)


def test_random_models_of_different_size(unequal):
    """Drafts that are nearly always wrong: every pass forgets."""
    check_same(unequal, QUESTIONS[:25], samples_per_prompt=2, max_new_tokens=12)
    check_same(unequal, MIXED, speculate=(4,), max_new_tokens=12, temperature=0.0)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ess_balance"},
        {"method": "reverse_kl_symmetry"},
        {"method": "entropy"},
        {"method": "fixed", "alpha": 0.2},
        {"temperature": 1.4, "top_p": 0.9, "min_p": 0.02},
        {"target_top_k": 5, "top_k": 3},
        {"stop": ["eggs", " ="]},
        {"force_t_first_token": True, "force_t_special_tokens": True},
        {"prompts_t": [f"Answer briefly. {x}" for x in MIXED]},
        {"batch_size": 1},
    ],
)
def test_every_way_of_drawing(demo_pair, options):
    check_same(demo_pair, MIXED, speculate=(3,), max_new_tokens=30, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_architectures(name, tokenizer):
    """Rows that forget different numbers of tokens, in every kind of cache and position."""
    theta = random_model(copy.deepcopy(CONFIGS[name]), seed=3)
    t = copy.deepcopy(theta)
    for p in t.parameters():  # near enough that some drafts are right
        p.data.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    pair = Pair(theta, t, tokenizer, tokenizer)
    check_same(pair, MIXED, speculate=(3,), max_new_tokens=20, batch_size=4, temperature=0.3)
    accepted = [s.tally for s in pair.generate(MIXED, max_new_tokens=20, speculate=3, temperature=0.3).samples]
    assert 0.1 < sum(sum(x.accepted) for x in accepted) / sum(sum(x.drafted) for x in accepted) < 1


def test_a_third_model_drafts(demo_pair, unequal):
    check_same(demo_pair, MIXED, speculate=(1, 4, "auto"), drafts=(unequal.theta, demo_pair.t), max_new_tokens=16)


def test_one_model_with_two_prompts(demo_pair, monkeypatch):
    """One forward pass a token for both sides, and the tokens of two copies of the model in two passes."""
    theta, tokenizer = demo_pair.theta, demo_pair.tokenizer_theta
    twin, apart = Pair(theta, theta, tokenizer, tokenizer), Pair(theta, copy.deepcopy(theta), tokenizer, tokenizer)
    options = {"max_new_tokens": 30, "t_hints": ["Think of 12."] * len(MIXED), "format_t": PromptFormat()}
    expected = apart.generate(MIXED, **options)
    passes = []
    forward = theta.forward
    monkeypatch.setattr(theta, "forward", lambda **inputs: passes.append(len(inputs["input_ids"])) or forward(**inputs))
    out = twin.generate(MIXED, batch_size=16, **options)
    assert out.token_ids == expected.token_ids
    assert len(passes) == max(map(len, out.token_ids))
    assert passes[0] == 2 * len(MIXED)
    for draft in ("theta", "t", demo_pair.t):
        for k in (3, "auto"):
            assert with_draft(twin, draft).generate(MIXED, speculate=k, **options).token_ids == expected.token_ids


def test_the_end_of_the_context(tokenizer):
    """Drafts do not go where a model has no positions left."""
    config = GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=2, n_positions=48)
    theta, t = random_model(config, seed=1), random_model(copy.deepcopy(config), seed=2)
    check_same(Pair(theta, t, tokenizer, tokenizer), [QUESTIONS[0], "Hi."], speculate=(8,), max_new_tokens=100)


def coupled_acceptance(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Probability [B] that the two-level draw takes the same token from p and q, log-probabilities [B, V], with one
    noise (theory/speculative.md, «How often the drafts are right»)."""
    groups = -(-log_p.shape[1] // GROUP_SIZE)
    padding = (0, groups * GROUP_SIZE - log_p.shape[1])
    p, q = (
        torch.nn.functional.pad(x.double(), padding, value=-torch.inf).unflatten(1, (groups, GROUP_SIZE))
        for x in (log_p, log_q)
    )  # [B, groups, GROUP_SIZE]
    of_groups = same_winner(p.logsumexp(-1), q.logsumexp(-1))  # [B, groups]
    return (of_groups * same_winner(p, q).sum(-1)).sum(-1)


def same_winner(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Probability that i wins the Gumbel-max draw from p and from q, not normalised, with one noise: for each i.

    It is 1 / Σ_j max(p_j / p_i, q_j / q_i). With the j in order of p_j / q_j the first of the two is the greater from i
    on, so that sorting and two cumulative sums give all i at once.
    """
    p, q = log_p.softmax(-1).nan_to_num(), log_q.softmax(-1).nan_to_num()
    order = (log_p - log_q).nan_to_num(nan=0.0).argsort(-1)
    p, q = p.gather(-1, order), q.gather(-1, order)
    p_from = p.flip(-1).cumsum(-1).flip(-1)
    q_before = q.cumsum(-1) - q
    wins = 1 / (p_from / p + q_before / q)
    return torch.zeros_like(wins).scatter(-1, order, wins.nan_to_num())


def test_acceptance_is_what_the_rows_predict(demo_pair):
    """On the demo pair's own text. Counted over the first draft of each round, some 600 of them: a standard error below
    0.01, so that 0.05 is a false alarm for fewer than one seed in 100,000."""
    pair, counted, predicted, bound = demo_pair, Tally(), [], []
    out = pair.generate(QUESTIONS, max_new_tokens=40, speculate=1, seed=chosen_seed() >> 32)
    for sample in out.samples:
        tally = sample.tally
        if tally.drafted:
            counted.drafted.append(tally.drafted[0])
            counted.accepted.append(tally.accepted[0])
        with torch.inference_mode():
            rows = []
            for model, ids in ((pair.theta, sample.request.ids_theta), (pair.t, sample.request.ids_t)):
                logits = model(torch.tensor([ids + sample.token_ids])).logits[0]
                rows.append(logits[len(ids) : len(ids) + len(sample.token_ids) - 1])
        if len(rows[0]):
            log_q, _ = qstar_logprobs(*rows)
            log_p = rows[0].log_softmax(-1)
            predicted.append(coupled_acceptance(log_p, log_q))
            bound.append(overlap(log_p, log_q))
    reached = sum(counted.accepted) / sum(counted.drafted)
    prediction, best = torch.cat(predicted).mean().item(), torch.cat(bound).mean().item()
    print(f"accepted {reached:.3f} of {sum(counted.drafted)}, predicted {prediction:.3f}, 1 − TV {best:.3f}")
    assert abs(reached - prediction) < 0.05
    assert prediction <= best


@pytest.mark.parametrize("vocab_size", [1, 5, 1024, 2500])
def test_coupled_acceptance(vocab_size):
    """Its closed form against plain sums over all pairs of tokens, its bounds, and 4,000 draws (4 standard errors)."""
    theta, t = zipf_pair(3, vocab_size, 1.0, seed=1)
    theta[1, 1::3] = -torch.inf
    log_p, log_q = theta.double().log_softmax(-1), t.double().log_softmax(-1)
    got = coupled_acceptance(log_p, log_q)

    def plainly(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [1 / torch.maximum(p / p[i], q / q[i]).sum() if p[i] * q[i] > 0 else p[i] * 0 for i in range(len(p))]
        )

    for row in range(3):
        p, q = log_p[row].exp(), log_q[row].exp()
        parts = p.split(1024), q.split(1024)
        groups = plainly(*(torch.stack([part.sum() for part in side]) for side in parts))
        inside = torch.stack([plainly(x, y).sum() for x, y in zip(*parts, strict=True)])
        torch.testing.assert_close(got[row], (groups * inside).sum())
    best = overlap(log_p, log_q)
    assert (got <= best + 1e-12).all()
    if vocab_size <= 1024:  # one group: the bound of a single Gumbel-max draw
        assert (got >= best / (2 - best) - 1e-12).all()
    seeds = torch.arange(4000) + chosen_seed()
    for row in range(3):
        p, q = (x[row].float().expand(4000, -1) for x in (log_p, log_q))
        x, y = (qstar_sample(z, z, seeds=seeds, positions=seeds % 7, method="fixed").token for z in (p, q))
        rate, sigma = (x == y).double().mean(), (got[row] * (1 - got[row]) / 4000).sqrt()
        assert abs(rate - got[row]) <= 4 * sigma + 1e-9


class Machine:
    """Rounds of a draft length on a clock of its own: `seconds(rows, drafts)` each, drafts right at a rate."""

    def __init__(self, seconds, rate: float, models: tuple, seed: int):
        self.seconds, self.rate, self.rng, self.now = seconds, rate, random.Random(seed), 0.0
        self.length = DraftLength("auto", *models, clock=lambda: self.now)
        self.chosen = []

    def run(self, tokens: int, rows: int = 8) -> float:
        """Seconds until every row has so many tokens, without the noise that the clock shows."""
        tallies, took = [Tally() for _ in range(rows)], 0.0
        while live := [tally for tally in tallies if tally.tokens < tokens]:
            drafts = self.length.choose(live)
            self.chosen.append(drafts)
            noise = self.rng.lognormvariate(0, 0.1) * (5 if self.rng.random() < 0.02 else 1)
            took += self.seconds(len(live), drafts)
            self.now += self.seconds(len(live), drafts) * noise
            for tally in live:
                right = next((i for i in range(drafts) if self.rng.random() > self.rate), drafts)
                for counts in (tally, self.length.total):
                    counts.add(right, min(drafts, right + 1), right + 1)
            self.length.took(drafts)
        return took


@pytest.fixture(scope="module")
def models():
    """One to draft, one to verify; what their sizes say of their speed is wrong on every machine below."""
    verify = LlamaConfig(
        vocab_size=2048, hidden_size=32, num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=64,
    )  # fmt: skip
    return random_model(copy.deepcopy(CONFIGS["llama"]), seed=5), [random_model(verify, seed=1)]


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("draft", [0.02, 0.2, 1.0, 5.0])
@pytest.mark.parametrize("wide", [0.05, 1.0])
def test_auto_is_never_slower_and_drafts_where_that_pays(models, rate, draft, wide):
    """On machines whose drafting pass takes `draft` verifying ones, and every further token of a verifying pass `wide`:
    at most 6% slower than without drafts, with a clock that is off by 10%, and fivefold in a fiftieth of the rounds;
    where the best number of drafts is twice as quick, auto is at least 1.3 times as quick."""

    def seconds(rows: int, drafts: int) -> float:
        return (1 + 0.1 * rows) * ((1 + drafts) * draft + 1 + wide * drafts)

    seed = chosen_seed()
    machine = Machine(seconds, rate, models, seed)
    took = machine.run(400)
    plain = Machine(lambda rows, drafts: seconds(rows, 0), 0.0, models, seed)
    plain.length.speculate = 0
    without = plain.run(400)
    print(f"{took / without:.3f}, drafts {sorted(Counter(machine.chosen).items())}")
    assert took < 1.06 * without
    gains = [
        sum(rate**i for i in range(drafts + 1)) * seconds(8, 0) / seconds(8, drafts) for drafts in range(MAX_DRAFT + 1)
    ]
    if max(gains) > 2:
        assert took < without / 1.3
    if rate == 0:
        assert sum(map(bool, machine.chosen)) < 0.15 * len(machine.chosen)


def test_the_first_rounds_are_plain_and_drafts_grow_by_and_by(models):
    machine = Machine(lambda rows, drafts: 1 + 0.01 * drafts, 1.0, models, chosen_seed())
    machine.run(400)
    assert machine.chosen[:PLAIN_ROUNDS] == [0] * PLAIN_ROUNDS
    assert max(machine.chosen) > 8
    tried = 1
    for drafts in machine.chosen:
        assert drafts <= max(2, 2 * tried)
        tried = max(tried, drafts)
    assert DraftLength(3, *models).choose([Tally()]) == 3
    assert DraftLength("auto", None, []).choose([Tally()]) == 0
