"""The decoding loop against transformers, against plain forward passes in float64, and against itself."""

import copy
import json

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from qstar import Pair, PromptError, PromptFormat
from qstar.demo import PROMPTS, THETA, T
from qstar.pair import sample_seed
from qstar_kernels import qstar_sample, qstar_stats
from qstar_kernels.types import FIELDS

QUESTIONS = [json.loads(line)["question"] for line in PROMPTS.read_text().splitlines()]
MIXED = ["Hi.", *QUESTIONS[:9], "Tell me about " + "very " * 60 + "old books."]  # prompts of 7 to 75 tokens


def encode(tokenizer, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def greedy(model, tokenizer, prompts: list[str], max_new_tokens: int) -> list[list[int]]:
    """What transformers' own `generate` writes, prompt by prompt, without the prompt."""
    out = []
    for prompt in prompts:
        ids = torch.tensor([encode(tokenizer, prompt)])
        got = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens)
        out.append(got[0, ids.shape[1] :].tolist())
    return out


def random_model(config, seed: int, **changes):
    """A small random model whose logits vary enough for greedy text not to be constant."""
    torch.manual_seed(seed)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    for p in model.parameters():
        if p.ndim == 2:
            p.data.normal_(std=0.3)
    return model


SMALL = {"vocab_size": 2048, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=1, intermediate_size=64),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2, intermediate_size=48),
    "gpt2": GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=2),
    "opt": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32),
    "bloom": BloomConfig(vocab_size=2048, hidden_size=32, n_layer=2, n_head=2),
    "mistral-sliding": MistralConfig(**SMALL, num_key_value_heads=1, intermediate_size=64, sliding_window=8),
    "gemma3-mixed": Gemma3TextConfig(
        **SMALL, num_key_value_heads=1, intermediate_size=64, head_dim=16, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(THETA)


def test_equal_models_give_the_models_own_greedy_text(demo_pair):
    twin = Pair(demo_pair.theta, demo_pair.theta, demo_pair.tokenizer_theta, demo_pair.tokenizer_theta)
    out = twin.generate(MIXED, max_new_tokens=40, temperature=0.0, batch_size=4)
    assert out.token_ids == greedy(demo_pair.theta, demo_pair.tokenizer_theta, MIXED, 40)
    for sample in out.samples:
        np.testing.assert_allclose(sample.fields["alpha"], 0.5)
        np.testing.assert_allclose(sample.fields["kl_theta"], 0.0, atol=1e-6)
        np.testing.assert_allclose(sample.fields["ess_t"], 1.0, rtol=1e-5)


@pytest.mark.parametrize(("alpha", "side"), [(1.0, "theta"), (0.0, "t")])
def test_fixed_ends_give_one_models_greedy_text(demo_pair, alpha, side):
    out = demo_pair.generate(MIXED, max_new_tokens=40, temperature=0.0, method="fixed", alpha=alpha, batch_size=4)
    assert out.token_ids == greedy(getattr(demo_pair, side), demo_pair.tokenizer_theta, MIXED, 40)


@pytest.mark.parametrize("name", CONFIGS)
def test_architectures_with_a_kv_cache(name, tokenizer):
    """Prompts of different length, rows that leave and join, windows shorter than the text: greedy as transformers'."""
    model = random_model(copy.deepcopy(CONFIGS[name]), seed=3)
    other = random_model(copy.deepcopy(CONFIGS["llama"]), seed=4)
    out = Pair(model, other, tokenizer, tokenizer).generate(
        MIXED, max_new_tokens=20, temperature=0.0, method="fixed", alpha=1.0, batch_size=3
    )
    expected = greedy(model, tokenizer, MIXED, 20)
    # OPT takes its positions from the mask and GPT-2 from position ids: both must come out right under left padding
    assert out.token_ids == expected


def test_batch_and_order_do_not_change_a_sample(demo_pair):
    seeds = list(range(len(MIXED)))
    options = {"max_new_tokens": 40, "samples_per_prompt": 2}
    whole = demo_pair.generate(MIXED, seeds=seeds, batch_size=16, **options)
    alone = demo_pair.generate(MIXED, seeds=seeds, batch_size=1, **options)
    turned = demo_pair.generate(MIXED[::-1], seeds=seeds[::-1], batch_size=5, **options)
    assert whole.token_ids == alone.token_ids
    by_prompt = [turned.token_ids[i : i + 2] for i in range(0, len(turned.token_ids), 2)]
    assert whole.token_ids == [ids for pair in by_prompt[::-1] for ids in pair]
    assert len({tuple(ids) for ids in demo_pair.generate(MIXED[:1], samples_per_prompt=8).token_ids}) > 4


def test_diagnostics_recomputed_in_float64(demo_pair):
    """Every number from the token ids alone, by one plain forward pass a model in float64."""
    out = demo_pair.generate(QUESTIONS[:12], max_new_tokens=60, batch_size=5, seed=11)
    models = [copy.deepcopy(m).double() for m in (demo_pair.theta, demo_pair.t)]
    for sample in out.samples:
        prompts = sample.request.ids_theta, sample.request.ids_t
        rows = []
        for model, prompt in zip(models, prompts, strict=True):
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + sample.token_ids]), use_cache=False).logits[0]
            rows.append(logits[len(prompt) - 1 : -1])
        exact = qstar_stats(*rows, tokens=torch.tensor(sample.token_ids), impl="reference")
        got = {name: torch.tensor(sample.fields[name], dtype=torch.float64) for name in FIELDS}
        for name in ("logq", "logp_theta", "logp_t", "alpha"):
            torch.testing.assert_close(got[name], getattr(exact, name), rtol=0, atol=1e-3)
        for name in ("ess_theta", "ess_t"):
            torch.testing.assert_close(got[name], getattr(exact, name), rtol=1e-3, atol=1e-6)
        # the gap of the distribution really drawn from, at the α that was saved
        for alpha, theta, t in zip(sample.fields["alpha"], *rows, strict=True):
            at = qstar_stats(theta[None], t[None], method="fixed", alpha=alpha, impl="reference")
            assert abs(at.kl_theta - at.kl_t) <= 1e-4
        assert (got["kl_theta"] - got["kl_t"]).abs().max() <= 1e-4


def test_token_frequencies_at_one_position(demo_pair):
    """χ² of 100,000 seeds against float64 q*; false alarm: 1 in 1000 for a new choice of seeds, none for these."""
    prompt = torch.tensor([encode(demo_pair.tokenizer_theta, QUESTIONS[2])])
    with torch.inference_mode():
        theta, t = (m(prompt).logits[:, -1] for m in (demo_pair.theta, demo_pair.t))
        seeds = torch.tensor([sample_seed(5, 0, j) for j in range(100_000)])
        counts = torch.zeros(demo_pair.vocab_size)
        for chunk in seeds.split(1000):
            rows = theta.expand(len(chunk), -1), t.expand(len(chunk), -1)
            step = qstar_sample(*rows, seeds=chunk, positions=torch.zeros_like(chunk))
            counts += torch.bincount(step.token, minlength=demo_pair.vocab_size)
    a, b = theta[0].double().log_softmax(-1), t[0].double().log_softmax(-1)
    expected = (b + step.alpha[0].double() * (a - b)).softmax(-1) * len(seeds)
    common = expected >= 5
    observed = [*counts[common].tolist(), counts[~common].sum().item()]
    wanted = [*expected[common].tolist(), expected[~common].sum().item()]
    assert len(wanted) > 20
    assert chisquare(observed, wanted).pvalue > 0.001


@pytest.mark.parametrize("temperature", [0.05, 0.01, 0.003])
def test_low_temperature(demo_pair, temperature):
    """The two models' modes are hundreds of nats apart then."""
    out = demo_pair.generate(QUESTIONS[:12], max_new_tokens=40, temperature=temperature, batch_size=12, seed=3)
    fields = {name: np.concatenate([s.fields[name] for s in out.samples]) for name in ("logq", "kl_theta", "kl_t")}
    assert fields["logq"].max() <= 0
    np.testing.assert_allclose(fields["kl_theta"], fields["kl_t"], rtol=1e-4, atol=1e-5)


def test_ends(demo_pair):
    out = demo_pair.generate(QUESTIONS[:20], max_new_tokens=60, stop=["####", " has"])
    assert {"eos", "stop"} >= set(out.finish_reasons)
    assert "stop" in out.finish_reasons
    for sample in out.samples:
        whole = demo_pair.tokenizer_theta.decode(sample.token_ids, skip_special_tokens=True)
        if sample.finish_reason == "stop":
            assert whole.startswith(sample.text)
            assert any(whole[len(sample.text) :].startswith(stop) for stop in ("####", " has"))
        assert "####" not in sample.text
        assert " has" not in sample.text
    short = demo_pair.generate(QUESTIONS[:3], max_new_tokens=3)
    assert short.finish_reasons == ["length"] * 3
    assert [len(ids) for ids in short.token_ids] == [3] * 3


def test_either_models_eos_ends_a_sample(demo_pair):
    other = copy.deepcopy(demo_pair.t)
    dot = demo_pair.tokenizer_theta.encode(".", add_special_tokens=False)[0]
    other.generation_config.eos_token_id = [0, dot]
    pair = Pair(demo_pair.theta, other, demo_pair.tokenizer_theta, demo_pair.tokenizer_t)
    out = pair.generate(QUESTIONS[:20], max_new_tokens=60)
    assert dot in {ids[-1] for ids in out.token_ids}
    assert all(dot not in ids[:-1] for ids in out.token_ids)


def test_one_model_with_a_hint(demo_pair):
    """π_t sees the solution: one copy of the weights, another distribution, and it shows."""
    twin = Pair(demo_pair.theta, demo_pair.theta, demo_pair.tokenizer_theta, demo_pair.tokenizer_theta)
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()[:20]]
    out = twin.generate([r["question"] for r in rows], t_hints=[r["solution"] for r in rows], max_new_tokens=60)
    assert np.mean(np.concatenate(out.kl_t)) > 0.01
    assert all(s.request.ids_t != s.request.ids_theta for s in out.samples)
    assert all(
        r["solution"] in twin.tokenizer_t.decode(s.request.ids_t) for r, s in zip(rows, out.samples, strict=True)
    )
    other = twin.generate(QUESTIONS[:1], prompts_t=["Something else?"], max_new_tokens=5)
    assert "Something else?" in twin.tokenizer_t.decode(other.samples[0].request.ids_t)


def test_forced_tokens(demo_pair):
    """The first token, and the special ones, follow π_t: log q is log π_t there."""
    first = demo_pair.generate(QUESTIONS[:20], max_new_tokens=4, force_t_first_token=True)
    for sample in first.samples:
        assert sample.fields["alpha"][0] == 0
        assert sample.fields["logq"][0] == pytest.approx(sample.fields["logp_t"][0], abs=1e-5)
        assert all(alpha > 0 for alpha in sample.fields["alpha"][1:])
    special = demo_pair.generate(QUESTIONS[:20], max_new_tokens=60, force_t_special_tokens=True)
    plain = demo_pair.generate(QUESTIONS[:20], max_new_tokens=60)
    ended = [s for s in special.samples if s.finish_reason == "eos"]
    assert ended
    for sample in ended:
        assert sample.fields["logq"][-1] == pytest.approx(sample.fields["logp_t"][-1], abs=1e-4)
    assert special.alpha[0][0] == pytest.approx(plain.alpha[0][0], abs=1e-6)


def test_a_row_of_nan_fails_alone(demo_pair):
    broken = copy.deepcopy(demo_pair.t)
    word = demo_pair.tokenizer_theta.encode(" shells", add_special_tokens=False)[0]
    broken.set_output_embeddings(torch.nn.Linear(128, 2048, bias=False).eval())
    broken.get_output_embeddings().weight.data = demo_pair.t.get_output_embeddings().weight.data
    broken.get_input_embeddings().weight = torch.nn.Parameter(broken.get_input_embeddings().weight.detach().clone())
    broken.get_input_embeddings().weight.data[word] = torch.nan
    pair = Pair(demo_pair.theta, broken, demo_pair.tokenizer_theta, demo_pair.tokenizer_t)
    prompts = [QUESTIONS[0], "How many shells are there? There are 3 shells.", QUESTIONS[1]]
    out = pair.generate(prompts, max_new_tokens=30)
    good = demo_pair.generate(prompts, max_new_tokens=30)
    assert out.finish_reasons[1] == "error"
    assert out.samples[1].error == "token 0 has no distribution: nan (status 1)"
    assert [out.token_ids[i] for i in (0, 2)] == [good.token_ids[i] for i in (0, 2)]


def test_padded_vocabularies_are_cut_and_others_refused(demo_pair, tokenizer):
    padded = random_model(copy.deepcopy(CONFIGS["llama"]), seed=1, vocab_size=2112)
    pair = Pair(padded, demo_pair.t, tokenizer, tokenizer)
    assert pair.vocab_size == 2048
    assert all(i < 2048 for ids in pair.generate(MIXED[:3], max_new_tokens=10).token_ids for i in ids)
    small = random_model(copy.deepcopy(CONFIGS["llama"]), seed=1, vocab_size=2000)
    with pytest.raises(ValueError, match="model theta has 2000 output rows, fewer than the tokenizer's 2048"):
        Pair(small, demo_pair.t, tokenizer, tokenizer)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<extra>"])
    with pytest.raises(ValueError, match=r"tokenizers differ in 1 entries \(id: theta / t\): 2048: None / '<extra>'"):
        Pair(demo_pair.theta, demo_pair.t, tokenizer, other)


def with_pad(tokenizer, name: str = "[PAD]"):
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"pad_token": name})
    return other


def test_a_pad_token_of_one_tokenizer_is_left_out(demo_pair, tokenizer):
    """With the very samples of the pair without it, whether the models have a row for it or not."""
    padded, plain = with_pad(tokenizer), demo_pair.generate(MIXED[:3], max_new_tokens=10).token_ids
    of_t = "the pad token '[PAD]' of t (2048) is left out of the vocabulary: it is never drawn"
    of_theta = of_t.replace("of t (", "of theta (")
    for tokenizers, notes in (
        ((tokenizer, padded), [of_t]),
        ((padded, tokenizer), [of_theta]),
        ((padded, padded), [of_theta, of_t]),
        ((with_pad(tokenizer, "<pad>"), padded), [of_theta.replace("[PAD]", "<pad>"), of_t]),
        ((tokenizer, tokenizer), []),
    ):
        pair = Pair(demo_pair.theta, demo_pair.t, *tokenizers)
        assert (pair.vocab_size, pair.notes) == (2048, notes)
        assert pair.generate(MIXED[:3], max_new_tokens=10).token_ids == plain
        assert all(i < 2048 for i in pair.special_ids)
    wider = random_model(copy.deepcopy(CONFIGS["llama"]), seed=1, vocab_size=2112)
    assert Pair(wider, demo_pair.t, padded, tokenizer).vocab_size == 2048
    # one that both have, and rows for, is a token like any other
    pair = Pair(wider, wider, padded, padded)
    assert (pair.vocab_size, pair.notes) == (2049, [])
    with pytest.raises(ValueError, match=r"model draft lacks a token that both models have: the pad token '\[PAD\]'"):
        Pair(wider, wider, padded, padded, demo_pair.theta, tokenizer)
    drafted = Pair(demo_pair.theta, demo_pair.t, tokenizer, tokenizer, demo_pair.theta, padded)
    assert drafted.generate(MIXED[:3], max_new_tokens=10, speculate=3).token_ids == plain


def test_a_pad_token_that_would_be_drawn_or_read_is_refused(demo_pair, tokenizer):
    padded = with_pad(tokenizer)
    pair = Pair(demo_pair.theta, demo_pair.t, tokenizer, padded)
    with pytest.raises(PromptError, match="the prompt has token 2048; accepted: those of both models, up to 2047"):
        pair.generate(["a [PAD]"])
    not_last, ending = copy.deepcopy(padded), copy.deepcopy(padded)
    not_last.add_tokens(["<x>"])
    ending.eos_token = "[PAD]"
    for other in (not_last, ending):
        with pytest.raises(ValueError, match=r"the tokenizers differ in [12] entries"):
            Pair(demo_pair.theta, demo_pair.t, tokenizer, other)
    ends = copy.copy(demo_pair.t)
    ends.generation_config = copy.deepcopy(demo_pair.t.generation_config)
    ends.generation_config.eos_token_id = [0, 2048]
    with pytest.raises(ValueError, match="token 2048 would end a sequence, but the pad token"):
        Pair(demo_pair.theta, ends, tokenizer, padded)


def test_prompt_formats(demo_pair, tmp_path):
    template = tmp_path / "short.jinja"
    template.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    messages = [{"role": "user", "content": "Hi."}]
    decode = demo_pair.tokenizer_theta.decode

    def seen(*args, hint=None):
        return decode(PromptFormat(*args).encode(demo_pair.tokenizer_theta, messages, hint))

    assert seen() == "<|user|>\nHi.<|end|>\n<|assistant|>\n"
    assert seen("none", "Be short.") == "Be short.\n\nHi."
    assert seen(str(template), "Be short.") == "[system]Be short.[user]Hi."
    assert seen("none", hint="2") == "Hi.\n\nHint: 2"
    with pytest.raises(ValueError, match="give auto, none or a Jinja file"):
        PromptFormat("missing.jinja")
    with pytest.raises(ValueError, match="must contain"):
        PromptFormat(hint_template="Hint: {hint}")
    template.write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(PromptError, match="no system role"):
        seen(str(template))
    with pytest.raises(PromptError, match="smaller context of the pair is 512"):
        demo_pair.generate(["word " * 600])


def test_context_limits_the_sample(demo_pair):
    prompt = "word " * 420
    out = demo_pair.generate([prompt], max_new_tokens=10_000, temperature=2.0, top_k=0, seed=1)
    room = 512 - len(encode(demo_pair.tokenizer_theta, prompt))
    assert len(out.token_ids[0]) <= room
    assert out.samples[0].request.max_new_tokens == room


def test_an_encoder_decoder_model_is_refused(tokenizer, demo_pair):
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(vocab_size=2048, d_model=16, num_layers=1, num_heads=1, d_ff=16, d_kv=16))
    with pytest.raises(ValueError, match="encoder-decoder"):
        Pair(demo_pair.theta, t5, tokenizer, tokenizer)


def test_models_of_different_size(tokenizer):
    """Depth, width and heads differ between the sides; both caches stay right while rows come and go."""
    theta, t = (random_model(copy.deepcopy(CONFIGS[name]), seed) for seed, name in enumerate(("qwen2", "gemma3-mixed")))
    pair = Pair(theta, t, tokenizer, tokenizer)
    runs = [pair.generate(MIXED, max_new_tokens=15, batch_size=size, temperature=0.0).token_ids for size in (1, 4)]
    assert runs[0] == runs[1]


def test_half_precision_and_shared_weights():
    pair = Pair.from_pretrained(THETA, THETA, dtype="bfloat16", device="cpu")
    assert pair.theta is pair.t
    assert pair.theta.dtype == torch.bfloat16
    assert pair.generate(QUESTIONS[:2], max_new_tokens=5).finish_reasons
    assert Pair.from_pretrained(THETA, T, device="cpu").theta.dtype == torch.float32
