"""q* inside transformers' own `generate`."""

import json

import pytest
import torch
from scipy.stats import chisquare

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
    out = demo_pair.theta.generate(**inputs, logits_processor=[processor], do_sample=False, max_new_tokens=30)
    own = demo_pair.generate(QUESTIONS, temperature=0.0, max_new_tokens=30)
    assert continuations(demo_pair, inputs, out) == own.token_ids


def test_the_processor_draws_from_q(demo_pair, inputs):
    """χ² of the first token of 20,000 sequences; false alarm: 1 in 1000 for a new seed, none for this one."""
    torch.manual_seed(0)
    row = inputs["input_ids"][:1, inputs["attention_mask"][0].argmax() :]
    with torch.inference_mode():
        logits = [m(row).logits[:, -1].double() for m in (demo_pair.theta, demo_pair.t)]
    expected = qstar_logprobs(*logits)[0][0].exp() * 20_000
    counts = torch.zeros(demo_pair.vocab_size)
    many = row.expand(1000, -1)
    for _ in range(20):
        out = demo_pair.theta.generate(
            many, attention_mask=torch.ones_like(many), logits_processor=[QStarLogitsProcessor(demo_pair.t)],
            do_sample=True, top_k=0, max_new_tokens=1,
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


def test_misuse_is_refused(demo_pair, inputs):
    processor = QStarLogitsProcessor(demo_pair.t, attention_mask=inputs["attention_mask"])
    demo_pair.theta.generate(**inputs, logits_processor=[processor], max_new_tokens=2)
    with pytest.raises(ValueError, match="for every call of generate"):
        demo_pair.theta.generate(**inputs, logits_processor=[processor], max_new_tokens=2)
    with pytest.raises(ValueError, match="top_p is 0"):
        QStarLogitsProcessor(demo_pair.t, top_p=0)
    for options, message in (
        ({}, "model_t is missing"),
        ({"model_t": demo_pair.t, "seeds": [1]}, "seeds has 1 entries for 7 rows"),
        ({"model_t": demo_pair.t, "max_time": 5.0}, "MaxTimeCriteria"),
    ):
        with pytest.raises(ValueError, match=message):
            demo_pair.theta.generate(**inputs, custom_generate=qstar_generate, max_new_tokens=2, **options)
