"""Every causal architecture of transformers, small and random: exact in every way of decoding, or refused in one line.

The guide lists them; `pytest -m slow tests/test_zoo.py` finds each where the guide has it.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
import zoo
from test_decode import CONFIGS, encode, random_model
from test_graphs import play
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import qstar.cache
from qstar import Pair
from qstar.cache import kept
from qstar.demo import THETA
from qstar.drop_in import QStarLogitsProcessor, qstar_generate
from qstar.forced import Scorer
from qstar.generate import main
from qstar.graphs import why_not
from qstar.probe import check_model
from qstar.rope import Ropes
from qstar.sample import DecodeOptions, Sample

ROOT = Path(__file__).parents[1]
GUIDE, README = ROOT / "docs" / "guide.md", ROOT / "README.md"
REASONS = {
    "states elsewhere": "keeps states in (itself|a form of its own)",
    "more than keys and values": "keeps more than keys, values and states by row|cannot be decoded with a plain cache",
    "padding": "logits of a left-padded row",
    "not causal": "lets a token see those behind it",
    "cache": "logits through a cache that differ",
}
PROMPTS = ["Hi.", "How many eggs are 9 times 8 eggs?", "Tell me about " + "very " * 50 + "old books.", "Hello there.",
           "A farmer has 17 hens, and each of them lays 3 eggs a day. How many eggs are that?", "Why?"]  # fmt: skip
MANY_ENDS = list(range(0, zoo.VOCAB_SIZE, 16))  # so that rows leave, and others join, all the time
# whose `generate` differs from their own plain forward pass
GENERATE_DIFFERS = {
    "moshi", "minimax with a linear layer first", "nemotron_h", "zamba2", "llama with LongRoPE", "phimoe with LongRoPE",
}  # fmt: skip
# bring a tensor along in every pass, which no CUDA graph may
FROM_THE_HOST = {"falcon", "falcon with ALiBi", "gemma3", "gemma3n_text"}


def lists() -> list[tuple[str, int, list[str]]]:
    """What the guide lists: `exact`, a reason or `not tried`, how many architectures, and which."""
    section = GUIDE.read_text(encoding="utf-8").split("### Architectures")[1].split("\n## ")[0]
    found = re.findall(r"^- \*\*(.+?)\*\*.*?\((\d+)\):((?:\s+`[^`]+`[,.])+)", section, re.M)
    return [(kind, int(count), re.findall("`(.+?)`", names)) for kind, count, names in found]


LISTED = {name: kind for kind, _, names in lists() for name in names}


def models(name: str):
    """The architecture in float64 and, for those that cannot be that, in float32."""
    model_type, changes = zoo.VARIANTS.get(name, (name, {}))
    for dtype in (torch.float64, torch.float32):
        model = zoo.model(model_type, 3, dtype, **changes)
        model.generation_config.eos_token_id = MANY_ENDS
        yield model


@torch.inference_mode()
def plainly(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits [T, V] of the answer's tokens by forward passes of this row alone, each over the tokens before one."""
    row, switch = prompt + answer, Ropes(model).switch or 0
    logits = model(torch.tensor([row]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    if len(prompt) <= switch < len(row):  # a pass over all of the row has long frequencies at every token
        short = model(torch.tensor([row[:switch]]), use_cache=False).logits[0, len(prompt) - 1 :]
        logits = torch.cat([short, logits[len(short) :]])
    return logits


def greedily(model, prompt: list[int], count: int, plain: bool) -> list[int]:
    if not plain:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
        return out[0, len(prompt) :].tolist()
    answer: list[int] = []
    while len(answer) < count and (not answer or answer[-1] not in MANY_ENDS):
        answer.append(plainly(model, prompt, [*answer, 0])[-1].argmax().item())
    return answer


def check(name: str, model, pair: Pair, tokenizer, tolerance: float) -> None:
    # without kernels of their own recurrent layers take many times as long, and are asked more below
    each, tokens = (1, 8) if "states" in kept(model) else (2, 16)
    options = {"max_new_tokens": tokens, "batch_size": 3, "seed": 5}
    out = pair.generate(PROMPTS, samples_per_prompt=each, **options)
    varied = 0.0
    for sample in out.samples:
        log_p = plainly(model, sample.request.ids_theta, sample.token_ids).double().log_softmax(-1)
        varied = max(varied, log_p.std(0).mean().item() if len(log_p) > 1 else 0.0)
        wanted = log_p.gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        got = torch.tensor(sample.fields["logp_theta"], dtype=torch.float64)
        torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
    assert varied > 0.01  # the logits say something
    if why_not(pair.decoder(DecodeOptions()).sides()) is None:  # as a GPU would play the steps
        with pytest.MonkeyPatch.context() as patched:
            played = play(patched)
            recorded = pair.generate(PROMPTS, samples_per_prompt=each, **options)
        assert bool(played) == (name not in FROM_THE_HOST)
        assert recorded.token_ids == out.token_ids
        for mine, theirs in zip(recorded.samples, out.samples, strict=True):
            for field in ("logp_theta", "logp_t"):
                found, wanted = (torch.tensor(x.fields[field]) for x in (mine, theirs))
                torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    assert pair.generate(PROMPTS, samples_per_prompt=each, speculate=3, **options).token_ids == out.token_ids
    again = [Sample(s.request, list(s.token_ids)) for s in out.samples]
    for sample in Scorer(pair.decoder(DecodeOptions(batch_size=4))).run(again):
        before = next(s for s in out.samples if s.request.key == sample.request.key)
        torch.testing.assert_close(
            torch.tensor(sample.fields["logp_theta"]), torch.tensor(before.fields["logp_theta"]), rtol=0, atol=tolerance
        )
    if "states" in kept(model):
        few, options = PROMPTS[:3], options | {"max_new_tokens": 6}
        alone = pair.generate(few, **options | {"batch_size": 1}).token_ids
        assert pair.generate(few, **options).token_ids == alone
        # where it verifies, and where it stands for both sides, the states of rows are put back one by one
        verifying = Pair(model, pair.t, tokenizer, tokenizer, "t")
        assert verifying.generate(few, speculate=3, **options).token_ids == alone
        both = Pair(model, model, tokenizer, tokenizer, pair.t, tokenizer)
        twice = [both.generate(few, prompts_t=few[::-1], speculate=k, **options).token_ids for k in (0, 2)]
        assert twice[0] == twice[1]
    options = options | {"max_new_tokens": tokens}
    greedy = pair.generate(PROMPTS, temperature=0.0, method="fixed", alpha=1.0, **options)
    prompts = [encode(tokenizer, prompt) for prompt in PROMPTS]
    assert greedy.token_ids == [greedily(model, p, tokens, name in GENERATE_DIFFERS) for p in prompts]


def kind_of(name: str, tokenizer) -> str:
    """`exact`, after every check of it, or the reason for which it is refused."""
    refused = None
    for model in models(name):
        other = random_model(copy.deepcopy(CONFIGS["llama"]), seed=4).to(model.dtype)
        try:
            with torch.inference_mode():
                logits = model(torch.tensor([[5, 6, 7]]), use_cache=False).logits
        except RuntimeError:  # what has no float64
            if model.dtype == torch.float32:
                raise
            continue
        if model.dtype == torch.float64 != logits.dtype:
            continue
        try:
            pair = Pair(model, other, tokenizer, tokenizer)
        except ValueError as error:
            refused = str(error)
            continue
        # state spaces and linear attention compute in float32, whatever the model's type
        tolerance = {torch.float64: 1e-4 if "states" in kept(model) else 1e-5, torch.float32: 1e-3}[model.dtype]
        check(name, model, pair, tokenizer, tolerance)
        return "exact"
    assert "\n" not in refused
    assert refused.startswith("theta (")
    return next(kind for kind, pattern in REASONS.items() if re.search(pattern, refused))


HANDFUL = (
    "bert with is_decoder", "deepseek_v3", "falcon with ALiBi", "gemma3n_text", "gpt_oss", "llama4_text",
    "bart", "bert", "deepseek_v32", "jamba", "lfm2", "nemotron_h", "recurrent_gemma",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(THETA)


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(qstar.cache, "PREFILL_COLUMNS", 16)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(
    "name",
    [
        *HANDFUL,
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name, kind in LISTED.items()
            if kind != "not tried" and name not in HANDFUL
        ),
    ],
)
def test_architecture(name, tokenizer):
    """As the guide says: exact, however it is decoded, or refused, and why."""
    assert kind_of(name, tokenizer) == LISTED[name]


def test_the_guide_lists_every_architecture():
    names = [name for _, _, names in lists() for name in names]
    assert sorted(names) == sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *zoo.VARIANTS])
    assert {kind for kind, _, _ in lists()} == {"exact", "not tried", *REASONS}
    assert all(len(names) == count for _, count, names in lists())
    assert f"{list(LISTED.values()).count('exact')} architectures that are exact" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    """Their rounding, in 24 layers and with experts to choose from, refuses no sound model, and hides no other."""
    deep = {"num_hidden_layers": 24, "layer_types": None}
    for name in ("llama", "mixtral", "qwen3_moe", "mamba2"):  # the last has logits in 32 bits
        model = zoo.model(name, 3, dtype, **deep)
        for p in model.parameters():
            p.data.mul_(0.5)
        check_model(model, "theta")
    for name in ("bart", "bert", "opt"):
        model = zoo.model(name, 3, dtype)
        if name == "opt":
            check_model(model, "theta")
            continue
        with pytest.raises(ValueError, match=REASONS[LISTED[name]]):
            check_model(model, "theta")


def test_a_refusal_is_one_line_everywhere(demo_pair, tokenizer, tmp_path, capsys):
    bart = zoo.model("bart", 3, torch.float32)
    message = r"\(bart\) has logits of a left-padded row that differ by \d+\.\d% from those of the row alone"
    with pytest.raises(ValueError, match="t " + message):
        Pair(demo_pair.theta, bart, tokenizer, tokenizer)
    with pytest.raises(ValueError, match="draft " + message):
        Pair(demo_pair.theta, demo_pair.t, tokenizer, tokenizer, bart, tokenizer)
    with pytest.raises(ValueError, match="t " + message):
        QStarLogitsProcessor(bart)
    ids = torch.tensor([[5, 6, 7]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "model_t": bart}
    with pytest.raises(ValueError, match="t " + message):
        demo_pair.theta.generate(ids, custom_generate=qstar_generate, **options)
    bart.save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    models = ["--model-theta", str(THETA), "--model-t", str(tmp_path / "bart")]
    assert main([*models, "--output", str(tmp_path / "out.jsonl")]) == 1
    assert re.search("t " + message, capsys.readouterr().err.strip().splitlines()[-1])


def test_a_model_that_drops_out_is_refused():
    """One that was sound before, or whose dropout is too little to show, too; and one of whose parts drops out."""
    model = random_model(copy.deepcopy(CONFIGS["gpt2"]), 1)
    check_model(model, "theta")
    for part in (model, model.transformer.h[0].attn):
        part.train()
        with pytest.raises(ValueError, match="theta is in training mode"):
            check_model(model, "theta")
        with pytest.raises(ValueError, match="the model of theta is in training mode"):
            qstar.cache.Side(model, 0, ("theta",))
        check_model(model.eval(), "theta")


def test_a_trainers_model_is_refused_at_each_call(demo_pair):
    theta = copy.deepcopy(demo_pair.theta)
    pair = Pair(theta, demo_pair.t, demo_pair.tokenizer_theta, demo_pair.tokenizer_t)
    pair.generate(["Hi."], max_new_tokens=2)
    theta.gradient_checkpointing_enable()
    theta.train()
    with pytest.raises(ValueError, match="training mode"):
        pair.generate(["Hi."], max_new_tokens=2)


def test_a_compiled_model_is_one(demo_pair):
    """torch.compile's module hides what its forward pass takes."""
    compiled = torch.compile(demo_pair.theta, backend="eager")
    assert qstar.cache.takes(compiled, "position_ids")


def test_a_subclass_that_hands_its_arguments_on():
    """What its forward pass calls `**kwargs` is what that of its base takes: left-padded rows need position ids."""

    class Subclass(LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            return super().forward(input_ids=input_ids, **kwargs)

    model = Subclass(zoo.model("llama", 3, torch.float32).config).eval()
    check_model(model, "theta")
    side = qstar.cache.Side(model, 0, ("theta",))
    assert side.takes_positions
    assert side.takes_logits_to_keep
    bloom = qstar.cache.Side(zoo.model("bloom", 3, torch.float32), 0, ("theta",))
    assert not bloom.takes_positions
