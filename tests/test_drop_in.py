"""q* inside transformers' own `generate`."""

import json

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
    TopKLogitsWarper,
)

from qstar.demo import PROMPTS
from qstar.drop_in import QStarLogitsProcessor, qstar_generate
from qstar_kernels import qstar_logprobs

QUESTIONS = ["Hi.", *(json.loads(line)["question"] for line in PROMPTS.read_text().splitlines()[:6])]


@pytest.fixture(scope="module")
def inputs(demo_pair):
    tokenizer = demo_pair.tokenizer_theta
    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )


def continuations(demo_pair, inputs, out: torch.Tensor) -> list[list[int]]:
    """What follows the prompts, up to EOS."""
    eos, rows = demo_pair.tokenizer_theta.eos_token_id, out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def test_the_processor_is_greedy_as_our_own_loop(demo_pair, inputs):
    processor = QStarLogitsProcessor(demo_pair.t, attention_mask=inputs["attention_mask"])
    out = demo_pair.theta.generate(**inputs, **processor.arguments(), do_sample=False, max_new_tokens=30)
    own = demo_pair.generate(QUESTIONS, temperature=0.0, max_new_tokens=30)
    assert continuations(demo_pair, inputs, out) == own.token_ids


def test_the_processor_draws_from_q(demo_pair, inputs):
    """χ² of the first token of 10,000 sequences; false alarm: 1 in 1000 for a new seed, none for this one."""
    torch.manual_seed(0)
    row = inputs["input_ids"][:1, -12:]
    with torch.inference_mode():
        logits = [m(row).logits[:, -1].double() for m in (demo_pair.theta, demo_pair.t)]
    expected = qstar_logprobs(*logits)[0][0].exp() * 10_000
    counts = torch.zeros(demo_pair.vocab_size)
    many = row.expand(1000, -1)
    for _ in range(10):
        out = demo_pair.theta.generate(
            many, attention_mask=torch.ones_like(many),
            **QStarLogitsProcessor(demo_pair.t, torch.ones_like(many)).arguments(),
            do_sample=True, max_new_tokens=1,
        )  # fmt: skip
        counts += torch.bincount(out[:, -1], minlength=demo_pair.vocab_size)
    common = expected >= 5
    observed = [*counts[common].tolist(), counts[~common].sum().item()]
    assert chisquare(observed, [*expected[common].tolist(), expected[~common].sum().item()]).pvalue > 0.001


def test_custom_generate_is_our_own_loop(demo_pair, inputs):
    seeds = [11 * i - 3 for i in range(len(QUESTIONS))]
    options = {"custom_generate": qstar_generate, "model_t": demo_pair.t, "max_new_tokens": 30}
    out = demo_pair.theta.generate(**inputs, **options, do_sample=True, seeds=seeds)
    one = {name: value[2:3] for name, value in inputs.items()}
    alone = demo_pair.theta.generate(**one, **options, do_sample=True, seeds=seeds[2:3])
    assert continuations(demo_pair, inputs, out)[2] == continuations(demo_pair, inputs, alone)[0]
    greedy = demo_pair.theta.generate(**inputs, **options, do_sample=False, return_dict_in_generate=True).sequences
    own = demo_pair.generate(QUESTIONS, temperature=0.0, max_new_tokens=30)
    assert continuations(demo_pair, inputs, greedy) == own.token_ids


AS_QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


@pytest.fixture
def checkpoint(demo_pair, monkeypatch):
    """π_θ with a generation config that has what is given."""

    def checkpoint(**fields):
        config = GenerationConfig(**demo_pair.theta.generation_config.to_dict() | fields)
        monkeypatch.setattr(demo_pair.theta, "generation_config", config)
        return demo_pair.theta

    return checkpoint


@pytest.mark.parametrize(
    "fields",
    [
        AS_QWEN,
        {"min_p": 0.2, "typical_p": 0.5, "epsilon_cutoff": 0.05, "eta_cutoff": 0.05, "top_h": 0.5},
        {"no_repeat_ngram_size": 1, "suppress_tokens": [5, 6, 7], "min_new_tokens": 1, "renormalize_logits": True},
        {"bad_words_ids": [[5], [6]], "sequence_bias": [[[7], -4.0]], "forced_eos_token_id": 0},
        {"watermarking_config": {"bias": 5.0}, "exponential_decay_length_penalty": (0, 3.0)},
    ],
)
def test_the_processor_is_alone_whatever_the_checkpoint_says(demo_pair, inputs, checkpoint, fields):
    theta = checkpoint(**fields)
    with torch.inference_mode():
        logits = [m(**inputs).logits[:, -1] for m in (theta, demo_pair.t)]
    expected = qstar_logprobs(*logits)[0]
    processor = QStarLogitsProcessor(demo_pair.t, attention_mask=inputs["attention_mask"])
    out = theta.generate(
        **inputs, **processor.arguments(), do_sample=True, max_new_tokens=1, output_scores=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    torch.testing.assert_close(out.scores[0], expected, atol=1e-4, rtol=1e-4)


def test_the_processor_says_what_it_cannot_see(demo_pair, inputs, checkpoint):
    """Without its arguments something else might be drawn from, and none of them can be given another value."""
    theta = checkpoint(**AS_QWEN)
    processor = QStarLogitsProcessor(demo_pair.t, attention_mask=inputs["attention_mask"])
    with pytest.raises(ValueError, match=r"processor\.arguments\(\)"):
        theta.generate(**inputs, logits_processor=[processor], do_sample=True, top_k=0, max_new_tokens=1)
    others = {"generation_config": GenerationConfig(top_p=0.8), "num_beams": 2, "assistant_model": demo_pair.t}
    for name, value in ({"temperature": 0.7, "repetition_penalty": 1.05, "logits_processor": []} | others).items():
        with pytest.raises(TypeError, match=f"'{name}'"):
            theta.generate(**inputs, **processor.arguments(), **{name: value})


NOT_DONE = {
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.5,
    "repetition_penalty": 1.05,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[5]],
    "min_new_tokens": 4,
    "suppress_tokens": [5],
    "num_beams": 2,
    "output_scores": True,
    "use_cache": False,
    "renormalize_logits": True,
    "guidance_scale": 1.5,
    "cache_implementation": "static",
}


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("name", NOT_DONE)
def test_what_is_not_done_is_refused_by_name(demo_pair, inputs, checkpoint, name, do_sample):
    options = {"custom_generate": qstar_generate, "model_t": demo_pair.t, "max_new_tokens": 4, "do_sample": do_sample}
    with pytest.raises(ValueError, match=rf"asks for {name} = .*; give {name}=") as by_the_call:
        demo_pair.theta.generate(**inputs, **options, **{name: NOT_DONE[name]})
    assert "\n" not in str(by_the_call.value)
    theta = checkpoint(**{name: NOT_DONE[name]})
    with pytest.raises(ValueError, match=f"asks for {name} = "):
        theta.generate(**inputs, **options)


def test_a_checkpoint_with_a_generation_config_takes_the_neutral_call(demo_pair, inputs, checkpoint):
    options = {"custom_generate": qstar_generate, "model_t": demo_pair.t, "max_new_tokens": 12, "do_sample": True}
    plain = demo_pair.theta.generate(**inputs, **options)
    theta = checkpoint(**AS_QWEN, num_assistant_tokens=20, min_new_tokens=0, a_field_of_tomorrow=3)
    with pytest.raises(ValueError, match=r"temperature = 0\.7") as refused:
        theta.generate(**inputs, **options)
    for name in ("top_p", "top_k", "repetition_penalty", "a_field_of_tomorrow"):
        assert f"{name} = " in str(refused.value)
    neutral = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "a_field_of_tomorrow": None}
    for top_k in (0, None):
        assert torch.equal(theta.generate(**inputs, **options, **neutral, top_k=top_k), plain)


def test_what_goes_with_the_call_is_done_or_refused(demo_pair, inputs):
    options = {"custom_generate": qstar_generate, "model_t": demo_pair.t, "max_new_tokens": 12, "do_sample": True}
    for given, message in (
        ({"logits_processor": LogitsProcessorList([TopKLogitsWarper(3)])}, "TopKLogitsWarper"),
        ({"logits_processor": [TopKLogitsWarper(3)], "do_sample": False}, "TopKLogitsWarper"),
        ({"logits_processor": [MinLengthLogitsProcessor(90, 0)], "min_new_tokens": 0}, "MinLengthLogitsProcessor"),
        ({"logits_processor": [RepetitionPenaltyLogitsProcessor(1.5)]}, "RepetitionPenaltyLogitsProcessor"),
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [5]}, "PrefixConstrainedLogitsProcessor"),
        ({"position_ids": inputs["attention_mask"].cumsum(1) + 3}, "position_ids would be for one model"),
        ({"do_sample": False, "qstar_settings": {"temperature": 0.7}}, "do_sample is False, which is greedy"),
    ):
        with pytest.raises(ValueError, match=message):
            demo_pair.theta.generate(**inputs, **options | given)
    with torch.inference_mode():
        cache = demo_pair.theta(inputs["input_ids"][:, :-1]).past_key_values
    with pytest.raises(ValueError, match="past_key_values would be for one model"):
        demo_pair.theta.generate(**inputs, **options, past_key_values=cache)


def test_lengths_and_ends_are_those_of_generate(demo_pair, inputs):
    """At α = 1 and greedily, q* is π_θ: the sequences are those that `generate` makes of π_θ alone."""
    theta, length = demo_pair.theta, inputs["input_ids"].shape[1]
    own = {"custom_generate": qstar_generate, "model_t": demo_pair.t}
    own["qstar_settings"] = {"method": "fixed", "alpha": 1.0}
    tokenizer = demo_pair.tokenizer_theta
    for options in (
        {"max_new_tokens": 24},
        {"max_length": length + 9},
        {"max_new_tokens": 24, "stopping_criteria": [StopStringCriteria(tokenizer, ["=", "####"])]},
        {"max_new_tokens": 24, "stopping_criteria": [MaxLengthCriteria(length + 5)]},
        {"max_new_tokens": 24, "eos_token_id": tokenizer.encode("=")},
    ):
        expected = theta.generate(**inputs, **options, do_sample=False)
        assert torch.equal(theta.generate(**inputs, **options, **own, do_sample=False), expected)
    options = {"max_new_tokens": 24, "do_sample": True, **own, "qstar_settings": {}}
    thrice = theta.generate(**inputs, **options, num_return_sequences=3)
    rows = {name: value.repeat_interleave(3, 0) for name, value in inputs.items()}
    assert torch.equal(thrice, theta.generate(**rows, **options))


def test_misuse_is_refused(demo_pair, inputs):
    processor = QStarLogitsProcessor(demo_pair.t, attention_mask=inputs["attention_mask"])
    demo_pair.theta.generate(**inputs, **processor.arguments(), max_new_tokens=2)
    with pytest.raises(ValueError, match="for every call of generate"):
        demo_pair.theta.generate(**inputs, **processor.arguments(), max_new_tokens=2)
    with pytest.raises(ValueError, match="top_p is 0"):
        QStarLogitsProcessor(demo_pair.t, top_p=0)
    for options, message in (
        ({}, "model_t is missing"),
        ({"model_t": demo_pair.t, "seeds": [1]}, "seeds has 1 entries for 7 rows"),
        ({"model_t": demo_pair.t, "seeds": 1}, "seeds must be a sequence of integers"),
        ({"model_t": demo_pair.t, "seeds": [2**63] * 7}, "seeds must be a sequence of integers"),
        ({"model_t": demo_pair.t, "qstar_settings": {"foo": 1}}, "qstar_settings has foo; it may have method"),
        ({"model_t": demo_pair.t, "max_time": 5.0}, "MaxTimeCriteria"),
    ):
        with pytest.raises(ValueError, match=message):
            demo_pair.theta.generate(**inputs, custom_generate=qstar_generate, max_new_tokens=2, **options)


def test_the_processor_needs_the_mask_of_several_prompts(demo_pair, inputs):
    """Without it π_t would read the padding as text."""
    processor = QStarLogitsProcessor(demo_pair.t)
    with pytest.raises(ValueError, match="attention_mask is missing"):
        demo_pair.theta.generate(**inputs, **processor.arguments(), max_new_tokens=1)
    holes = inputs["attention_mask"].clone()
    holes[:, 0], holes[:, 1] = 1, 0
    processor = QStarLogitsProcessor(demo_pair.t, attention_mask=holes)
    with pytest.raises(ValueError, match="mark left padding only"):
        demo_pair.theta.generate(**inputs, **processor.arguments(), max_new_tokens=1)
