"""Recurrent and convolutional states: joined, kept, put back, and refused where they are out of reach.

The architectures are in `test_zoo.py`, one by one.
"""

import json

import pytest
import torch
import zoo
from runs import lines
from transformers import AutoModelForImageTextToText, AutoTokenizer

import qstar.cache
from qstar import Pair
from qstar.cache import Side, continues, kept
from qstar.demo import PROMPTS, THETA
from qstar.drop_in import QStarLogitsProcessor, qstar_generate
from qstar.generate import main as generate
from qstar.probe import check_model
from qstar.score import main as score
from qstar.speculate import DraftLength, ModelCosts, Tally

HYBRID = "qwen3_5_text"  # gated delta rule with a convolution, and attention
ROW = [7 * i % 2000 + 5 for i in range(40)]


@pytest.fixture(scope="module")
def hybrid():
    return zoo.model(HYBRID, 3, torch.float64)


@torch.inference_mode()
def side_of(model, rows: list[list[int]]) -> tuple[Side, torch.Tensor]:
    side = Side(model, 0, ("theta",))
    (logits,) = side.prefill(rows)
    return side, logits[:, 0]


def check_states(side: Side, rows: list[list[int]]) -> None:
    """The side goes on as one that has read these rows, each alone, and nothing else."""
    for row, got in zip(rows, zip(*side._states(), strict=True), strict=True):
        alone, _ = side_of(side.model, [row])
        for x, y in zip(got, alone._states(), strict=True):
            torch.testing.assert_close(x, y[0], rtol=1e-4, atol=1e-4)
    plain = torch.stack([side.model(torch.tensor([[*row, 9]]), use_cache=False).logits[0, -1] for row in rows])
    torch.testing.assert_close(side.advance(torch.full((len(rows), 1), 9))[0][:, 0], plain, rtol=1e-4, atol=1e-3)


@torch.inference_mode()
def test_rows_join_and_leave(hybrid, monkeypatch):
    monkeypatch.setattr(qstar.cache, "PREFILL_COLUMNS", 7)  # rows that are nothing but padding in a piece
    side, _ = side_of(hybrid, [ROW[:36], ROW[3:5]])
    side.prefill([ROW[10:30], ROW[:1], ROW[5:40]])
    side.keep([3, 1, 4])
    check_states(side, [ROW[:1], ROW[3:5], ROW[5:40]])
    side.keep([])
    side.prefill([ROW[:3]])
    check_states(side, [ROW[:3]])


@pytest.mark.parametrize("name", [HYBRID, "mamba", "minimax", "lfm2"])  # several tokens at once, and one at a time
@torch.inference_mode()
def test_wrong_tokens_are_forgotten(name):
    """Of one block, of tokens one by one, and of both."""
    model, rows = zoo.model(name, 3, torch.float32), [ROW[:20], ROW[4:9], ROW[30:31], ROW[2:7]]
    block = torch.tensor([[11, 12, 13, 14, 15]] * 4)
    for cuts in ([5], [1] * 5, [1, 3, 1]):
        side, _ = side_of(model, rows)
        side.forgets = True
        for tokens in block.split(cuts, 1):
            side.advance(tokens)
        side.forget([0, 4, 1, 4])
        assert side.noted == []
        read = [row + block[0, :n].tolist() for row, n in zip(rows, (5, 1, 4, 1), strict=True)]
        check_states(side, read)


def test_models_that_begin_anew_are_read_token_by_token():
    found = {name: continues(zoo.model(name, 3, torch.float32)) for name in ("mamba", "jamba", "mamba2", "lfm2")}
    assert found == {"mamba": False, "jamba": False, "mamba2": True, "lfm2": True}
    assert continues(zoo.model("llama", 3, torch.float32))


def test_what_drafts_cost(hybrid):
    """`auto` knows that states are put back by reading once more, and that Mamba verifies no faster than it decodes."""
    plain, mamba = zoo.model("llama", 3, torch.float32), zoo.model("mamba", 3, torch.float32)
    of_plain, of_hybrid, of_mamba = (ModelCosts(model) for model in (plain, hybrid, mamba))
    assert of_plain.verify(4, 3) == of_plain.forward(4, 3)
    assert of_hybrid.verify(4, 1) == of_hybrid.forward(4, 1)
    assert of_hybrid.verify(4, 3) > of_hybrid.forward(4, 3) + 2 * of_hybrid.fixed
    assert of_mamba.verify(4, 3) == 3 * of_mamba.forward(4, 1)
    assert DraftLength("auto", plain, [mamba]).choose([Tally()]) == 0


def test_time_steps_keep_to_their_limits():
    """One token at a time as in one pass over all; transformers alone is off by a hundredth of the logits' size."""
    model = zoo.model("nemotron_h", 3, torch.float32)
    with torch.inference_mode():
        plain = model(torch.tensor([ROW]), use_cache=False).logits[0]
        for limited in (True, False):
            side, _ = side_of(model, [ROW[:20]])
            side.time_steps.layers = side.time_steps.layers if limited else []
            logits = torch.cat([side.advance(torch.tensor([[token]]))[0][0] for token in ROW[20:]])
            assert ((logits - plain[20:]).abs().max() < 1e-3) == limited


def test_states_in_a_models_own_hands_are_refused(demo_pair, tokenizer):
    for name, reason in (("recurrent_gemma", "in itself, and in no cache"), ("rwkv", "in a form of its own")):
        with pytest.raises(ValueError, match=rf"^t \({name}\) keeps states {reason}; a causal language model with a"):
            Pair(demo_pair.theta, zoo.model(name, 3, torch.float32), tokenizer, tokenizer)


def test_plain_models_have_no_states(demo_pair):
    assert kept(demo_pair.theta) == {"columns"}
    side = Side(demo_pair.theta, 0, ("theta",))
    side.prefill([[5, 6, 7]])
    side.forgets = True
    side.advance(torch.tensor([[5]]))
    assert side.noted == side._states() == []


@pytest.mark.parametrize("name", [HYBRID, "mamba2"])
def test_inside_generate(name):
    """Both drop-ins, in a batch as for each row alone."""
    theta, t = (zoo.model(name, seed, torch.float32) for seed in (3, 4))
    ids, mask = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]]), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    ours = {"custom_generate": qstar_generate, "model_t": t, "max_new_tokens": 6, "do_sample": False}
    out = theta.generate(ids, attention_mask=mask, **ours)
    alone = [theta.generate(row[m.bool()][None], **ours)[0, -6:].tolist() for row, m in zip(ids, mask, strict=True)]
    assert out[:, 6:].tolist() == alone
    processor = QStarLogitsProcessor(t, attention_mask=mask)
    again = theta.generate(ids, attention_mask=mask, **processor.arguments(), do_sample=False, max_new_tokens=6)
    assert again.tolist() == out.tolist()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A dense π_θ and a mixture of experts for π_t, each inside a model that takes images too, as published."""
    folders = {}
    for seed, name in enumerate(("qwen3_5", "qwen3_5_moe")):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(zoo.config(name))
        for p in model.parameters():
            if p.ndim >= 2:
                p.data.normal_(std=0.2)
        model.generation_config.eos_token_id = list(range(0, zoo.VOCAB_SIZE, 16))
        folders[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folders[name])
        # the class that is taken for Qwen would add an unknown token of its own
        AutoTokenizer.from_pretrained(THETA, unk_token="<|end|>").save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3"])
def test_the_text_of_a_composite_model(name, checkpoints, tokenizer, tmp_path):
    """Loaded by its folder, and given as the object that takes images."""
    if name == "gemma3":
        zoo.model(name, 3, torch.float32).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    folder = checkpoints.get(name, tmp_path)
    pair = Pair.from_pretrained(folder, folder, device="cpu")
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    check_model(whole, "theta")
    prompts, options = ["Hi.", "How many eggs are 9 times 8 eggs?"], {"max_new_tokens": 4, "seed": 2}
    out = Pair(whole, whole, tokenizer, tokenizer).generate(prompts, **options)
    assert out.token_ids == pair.generate(prompts, batch_size=1, **options).token_ids


def test_the_command_line(checkpoints, tmp_path):
    """A pair of hybrids, dense and of experts: drafts change no token, a run that was cut short goes on to the same
    bytes, and scoring finds the same numbers."""
    models = ["--model-theta", str(checkpoints["qwen3_5"]), "--model-t", str(checkpoints["qwen3_5_moe"])]
    job = [*models, "--dataset", str(PROMPTS), "--max-new-tokens", "8", "--batch-size", "3", "--save-diagnostics"]

    def run(name: str, *argv: str):
        path = tmp_path / name / "x.jsonl"
        assert generate([*job, "--output", str(path), *argv]) == 0
        return path

    whole, drafted = run("whole", "--num-samples", "6"), run("drafted", "--num-samples", "6", "--speculate", "2")
    texts = [[line["messages"] for line in lines(path)] for path in (whole, drafted)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 6
    cut = tmp_path / "cut" / "x.jsonl"
    cut.parent.mkdir()
    for file in whole.parent.iterdir():
        content = file.read_bytes()
        # a run that died in the midst of a line
        (cut.parent / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".jsonl" else content)
    run("cut", "--num-samples", "6")
    assert [(cut.parent / f.name).read_bytes() == f.read_bytes() for f in whole.parent.glob("*.jsonl")] == [True, True]
    scored = tmp_path / "scored.jsonl"
    assert score([*models, "--dataset", str(whole), "--output", str(scored), "--batch-size", "4"]) == 0
    pairs = zip(*(lines(p.with_suffix(".diagnostics.jsonl")) for p in (whole, scored)), strict=True)
    for drawn, found in pairs:
        assert drawn["tokens"]["logq"] == pytest.approx(found["tokens"]["logq"], abs=1e-3)


@pytest.mark.slow
def test_on_ray(checkpoints, tmp_path):
    from test_ray import on_ray

    from qstar.merge import main as merge

    models = ["--model-theta", str(checkpoints["qwen3_5"]), "--model-t", str(checkpoints["qwen3_5_moe"])]
    job = [*models, "--dataset", str(PROMPTS), "--max-new-tokens", "4", "--batch-size", "2", "--num-samples", "40"]
    assert generate([*job, "--output", str(tmp_path / "alone.jsonl")]) == 0
    done = on_ray(tmp_path / "run", *job, "--num-workers", "2")
    assert done.returncode == 0, done.stderr
    assert merge([str(tmp_path / "run"), "--output", str(tmp_path / "merged.jsonl")]) == 0
    one, other = (lines(tmp_path / f"{name}.jsonl") for name in ("alone", "merged"))
    assert [json.dumps(line) for line in one] == [json.dumps(line) for line in other]
