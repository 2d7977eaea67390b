"""Frequencies that depend on a row's length: every row has the numbers of plain forward passes over it alone."""

import copy

import pytest
import torch
import zoo
from test_decode import CONFIGS, encode, random_model
from test_zoo import PROMPTS, greedily, plainly
from transformers import AutoTokenizer

import qstar.cache
from qstar import Pair
from qstar.demo import THETA
from qstar.drop_in import QStarLogitsProcessor, qstar_generate
from qstar.forced import Scorer
from qstar.rope import Ropes
from qstar.sample import DecodeOptions, Sample

OPTIONS = {
    "max_new_tokens": 24,
    "seed": 5,
}  # prompts of 7 to 64 tokens: some rows go over the switch at 40, some do not


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(THETA)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    """Of prompts, so that the first ones end before the switch."""
    monkeypatch.setattr(qstar.cache, "PREFILL_COLUMNS", 16)


@pytest.fixture(scope="module")
def phi(tokenizer) -> Pair:
    theta, t = (zoo.model("phi3", seed, torch.float32, **zoo.LONG) for seed in (3, 4))
    return Pair(theta, t, tokenizer, tokenizer)


def check_plain(pair: Pair, samples: list[Sample]) -> None:
    """Log-probabilities of both models by forward passes over prompt and answer so far."""
    assert {len(s.request.ids_theta) > 40 for s in samples} == {False, True}
    assert any(len(s.request.ids_theta) < 40 < len(s.request.ids_theta + s.token_ids) - 1 for s in samples)
    for sample in samples:
        for name, model in (("theta", pair.theta), ("t", pair.t)):
            prompt = getattr(sample.request, f"ids_{name}")
            log_p = plainly(model, prompt, sample.token_ids).double().log_softmax(-1)
            got = torch.tensor(sample.fields[f"logp_{name}"], dtype=torch.float64)
            wanted = log_p.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4)


OTHER_PROMPTS = [f"Answer briefly and to the point: {prompt}" for prompt in PROMPTS]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"batch_size": 4}, id="batch"),
        pytest.param({"batch_size": 6, "speculate": 1}, id="one draft"),
        pytest.param({"batch_size": 3, "speculate": 5}, id="five drafts"),
        pytest.param({"batch_size": 4, "prompts_t": OTHER_PROMPTS}, id="another prompt for each model"),
    ],
)
def test_rows_have_the_frequencies_of_their_length(phi, options):
    out = phi.generate(PROMPTS, **OPTIONS, **options)
    check_plain(phi, out.samples)
    if "prompts_t" not in options:
        assert out.token_ids == phi.generate(PROMPTS, batch_size=2, **OPTIONS).token_ids


def test_one_model_with_two_prompts(phi, tokenizer):
    twin = Pair(phi.theta, phi.theta, tokenizer, tokenizer)
    check_plain(twin, twin.generate(PROMPTS, prompts_t=PROMPTS[::-1], batch_size=4, **OPTIONS).samples)


def test_drafts_of_such_a_model(phi, tokenizer):
    """It drafts for models without a switch, as one of them and as a third."""
    plain = random_model(copy.deepcopy(CONFIGS["llama"]), 1), random_model(copy.deepcopy(CONFIGS["qwen2"]), 2)
    wanted = Pair(*plain, tokenizer, tokenizer).generate(PROMPTS, **OPTIONS).token_ids
    drafted = Pair(*plain, tokenizer, tokenizer, phi.theta, tokenizer)
    assert drafted.generate(PROMPTS, speculate=3, **OPTIONS).token_ids == wanted


def test_greedy_text_is_that_of_generate(phi):
    """Phi-3's own computes its cache again at the switch."""
    out = phi.generate(PROMPTS, method="fixed", alpha=1.0, temperature=0.0, batch_size=4, **OPTIONS)
    prompts = [encode(phi.tokenizer_theta, prompt) for prompt in PROMPTS]
    assert out.token_ids == [greedily(phi.theta, p, OPTIONS["max_new_tokens"], plain=False) for p in prompts]


def test_scores(phi):
    """Chunks that begin before the switch and end behind it, for rows that do and rows that do not go over it."""
    out = phi.generate(PROMPTS, batch_size=4, **OPTIONS)
    samples = [Sample(s.request, list(s.token_ids)) for s in out.samples]
    check_plain(phi, list(Scorer(phi.decoder(DecodeOptions(batch_size=3))).run(samples)))


def test_the_module_switches_at_another_scale(tokenizer):
    """Phi-3.5-MoE multiplies by another factor on either side, in its own rotary embedding."""
    theta = zoo.model("phimoe", 3, torch.float32, **zoo.VARIANTS["phimoe with LongRoPE"][1])
    pair = Pair(theta, random_model(copy.deepcopy(CONFIGS["llama"]), 1), tokenizer, tokenizer)
    check_plain(pair, pair.generate(PROMPTS, batch_size=4, **OPTIONS).samples)


def test_inside_generate(phi, tokenizer):
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    width = inputs["input_ids"].shape[1]
    theta = random_model(copy.deepcopy(CONFIGS["llama"]), 1)
    for model in (phi.theta, theta):
        own = Pair(model, phi.t, tokenizer, tokenizer).generate(PROMPTS, temperature=0.0, max_new_tokens=24).token_ids
        options = {"custom_generate": qstar_generate, "model_t": phi.t, "do_sample": False, "max_new_tokens": 24}
        out = model.generate(**inputs, **options)[:, width:].tolist()
        assert [row[: len(ids)] for row, ids in zip(out, own, strict=True)] == own
    processor = QStarLogitsProcessor(phi.t, attention_mask=inputs["attention_mask"])
    options = processor.arguments() | {"do_sample": False, "max_new_tokens": 24}
    out = theta.generate(**inputs, **options)[:, width:].tolist()
    assert [row[: len(ids)] for row, ids in zip(out, own, strict=True)] == own


def test_dynamic_ntk_ends_where_its_plain_frequencies_do(tokenizer):
    model = zoo.model("llama", 3, torch.float32, rope_parameters=zoo.NTK, max_position_embeddings=48)
    pair = Pair(model, model, tokenizer, tokenizer)
    out = pair.generate(["Hi."], max_new_tokens=100)
    assert len(out.samples[0].request.ids_theta) + out.samples[0].request.max_new_tokens == 48
    ids = torch.arange(5, 45)[None]
    options = {"custom_generate": qstar_generate, "model_t": model, "attention_mask": torch.ones_like(ids)}
    assert model.generate(ids, max_new_tokens=8, **options).shape[1] <= 48
    with pytest.raises(ValueError, match=r"a row has 49 tokens; with dynamic NTK RoPE a model is defined for up to 48"):
        model.generate(ids, max_new_tokens=12, **options)


def test_a_longrope_of_another_kind_is_refused(tokenizer, demo_pair):
    """A checkpoint's own code, whose rotary embedding cannot be told which rows are long."""
    model = random_model(copy.deepcopy(CONFIGS["gpt2"]), 1)
    model.config.rope_scaling = {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}
    with pytest.raises(
        ValueError, match=r"theta \(gpt2\).*its own LongRoPE does not let rows of unlike length be told apart"
    ):
        Pair(model, demo_pair.t, tokenizer, tokenizer)
    assert Ropes(demo_pair.t).switch is None
