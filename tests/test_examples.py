"""The worked examples for trainers, run on the demo pair's samples."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from chats import ASKED, CALLED, TEXT, TEXT_CALL, TOOLS, assistant, tool
from datasets import load_dataset
from runs import lines, write_lines
from transformers import AutoModelForCausalLM

from qstar.demo import THETA
from qstar.generate import main as generate
from qstar.run.options import FORMATS
from qstar.run.records import RunFiles

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    argv = ["--num-samples", "32", "--samples-per-prompt", "4", "--max-new-tokens", "60", "--save-diagnostics"]
    assert generate([*argv, "--output", str(path)]) == 0
    return path


@pytest.fixture
def example(monkeypatch):
    """An example's `main`, imported as when the script is run from anywhere."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def load(name: str):
        sys.modules.pop(name, None)
        return __import__(name)

    return load


def moved(folder: Path) -> float:
    """How far a trained model is from π_θ, relative."""
    before, after = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (THETA, folder))
    x, y = (torch.nn.utils.parameters_to_vector(model.parameters()) for model in (before, after))
    return ((x - y).norm() / x.norm()).item()


def test_datasets_reads_what_was_written(samples):
    data = load_dataset("json", data_files=str(samples), split="train")
    assert len(data) == 128
    assert data[5]["messages"] == lines(samples)[5]["messages"]
    numbers = load_dataset("json", data_files=str(samples.with_suffix(".diagnostics.jsonl")), split="train")
    assert numbers[5]["tokens"]["alpha"] == lines(samples.with_suffix(".diagnostics.jsonl"))[5]["tokens"]["alpha"]


def test_sft(samples, example, tmp_path):
    trainer = example("sft").main([str(samples), str(THETA), str(tmp_path), "--learning-rate", "1e-3", "--epochs", "3"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert moved(tmp_path) > 1e-3


FIND = {"name": "find", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}}
WRAPPED = {"type": "function", "function": FIND}
FOUND = assistant("", tool_calls=[{"type": "function", "function": {"name": "find", "arguments": {"q": "x"}}}])
# Rows with tools of their own, and the tools that their template is given.
WITH_TOOLS = {
    "columns": [
        ({"messages": [ASKED, CALLED, tool("5")], "tools": TOOLS}, TOOLS),
        (
            {"messages": [ASKED, FOUND, tool("6")], "tools": json.dumps([FIND])},
            [{"type": "function", "function": FIND}],
        ),
        ({"messages": [ASKED]}, None),
    ],
    "requests": [({"custom_id": "a", "body": {"messages": [ASKED, TEXT_CALL, tool("5")], "tools": TOOLS}}, TOOLS)],
}


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.usefixtures("loaded_once")
def test_every_format_is_read_back_by_datasets(tmp_path, output_format):
    """Conversations with calls of other arguments, and other columns, in one file."""
    rows = [row | {"n": i} for i, (row, _) in enumerate(WITH_TOOLS["columns"])]
    suffix = FORMATS[output_format]
    path, plain = tmp_path / f"x{suffix}", tmp_path / "plain.jsonl"
    argv = ["--dataset", str(write_lines(tmp_path / "data.jsonl", rows)), "--max-new-tokens", "4"]
    assert generate([*argv, "--output", str(path), "--output-format", output_format]) == 0
    assert generate([*argv, "--output", str(plain)]) == 0
    kind = {".jsonl": "json", ".parquet": "parquet"}[suffix]
    read = load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    for found, line, expected in zip(read, lines(path) if kind == "json" else read, lines(plain), strict=True):
        if output_format == "jsonl":
            messages = found.pop("messages")
            assert messages == line.pop("messages")
            assert found["metadata"]["n"] == line["metadata"]["n"]
        elif output_format == "openai-batch":
            assert found == line
        elif output_format == "parquet":
            whole = json.loads(found["metadata"]).pop("messages", found["messages"])
            assert whole == expected["messages"]
        else:
            assert found["response"] == expected["messages"][-1]["content"]
            assert json.loads(found["extra_info"]["metadata"])["n"] == expected["metadata"]["n"]


@pytest.mark.parametrize("name", WITH_TOOLS)
@pytest.mark.usefixtures("loaded_once")
def test_sft_on_conversations_with_tools(example, tmp_path, tokenizer, name):
    """What trl trains on is what the template makes of every conversation and its own tools."""
    data, path = write_lines(tmp_path / "data.jsonl", [row for row, _ in WITH_TOOLS[name]]), tmp_path / "x.jsonl"
    (tmp_path / "x.jinja").write_text(TEXT)
    argv = ["--dataset", str(data), "--output", str(path), "--max-new-tokens", "4"]
    assert generate([*argv, *(f"--{side}-chat-template={tmp_path / 'x.jinja'}" for side in ("theta", "t"))]) == 0
    shutil.copytree(THETA, tmp_path / "policy")
    (tmp_path / "policy" / "chat_template.jinja").write_text(TEXT)
    trainer = example("sft").main([str(path), str(tmp_path / "policy"), str(tmp_path / "trained")])
    written = lines(path)
    for line, (_, tools), seen in zip(written, WITH_TOOLS[name], trainer.train_dataset, strict=True):
        messages = [CALLED if message == TEXT_CALL else message for message in line["messages"]]
        options = {"tools": tools, "chat_template": TEXT, "return_dict": False}
        assert seen["input_ids"] == tokenizer.apply_chat_template(messages, **options)


def test_dpo(samples, example, tmp_path):
    dpo = example("dpo")
    pairs = dpo.preference_pairs(str(samples))
    assert 5 < len(pairs) < 32
    assert set(pairs.column_names) == {"prompt", "chosen", "rejected"}
    trainer = dpo.main([str(samples), str(THETA), str(tmp_path), "--learning-rate", "1e-4", "--epochs", "6"])
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > 0
    assert moved(tmp_path) > 1e-4


def test_off_policy(samples, example, tmp_path, capsys):
    off_policy = example("off_policy")
    argv = [str(samples), str(THETA), str(tmp_path / "out"), "--batch-size", "32", "--learning-rate", "1e-4"]
    assert len(off_policy.main(argv)) == 4
    assert "reward under π_θ" in capsys.readouterr().out
    assert moved(tmp_path / "out") > 1e-5
    # before any step, log π_θ is what was written beside the tokens
    records = list(RunFiles(samples))[:8]
    model = AutoModelForCausalLM.from_pretrained(THETA, dtype=torch.float32)
    logp, logq, mask = off_policy.logprobs(model, records)
    written = torch.tensor([x for r in records for x in r.tokens["logp_theta"]])
    torch.testing.assert_close(logp[mask], written, atol=1e-4, rtol=1e-4)
    assert logq[mask].tolist() == pytest.approx([x for r in records for x in r.tokens["logq"]])


def run_live(example, name: str, output: Path, *argv: str) -> list[dict]:
    """What a training that draws its own samples has logged; it has changed the model."""
    trainer = example(name).main([str(output), *argv])
    assert moved(output) > 1e-5
    return [entry for entry in trainer.state.log_history if "qstar/alpha" in entry]


@pytest.mark.parametrize("name", ["grpo", "distill"])
def test_trainings_that_draw_themselves(example, tmp_path, name):
    found = run_live(example, name, tmp_path, "--steps", "2")
    assert [entry["qstar/alpha"] for entry in found] == [0.5, 1.0]


@pytest.mark.slow
def test_grpo_as_written(example, tmp_path):
    """On q*'s completions, whose α goes to 1 half way."""
    found = run_live(example, "grpo", tmp_path)
    assert [entry["qstar/alpha"] for entry in found] == pytest.approx([0.5 + 0.05 * min(i, 10) for i in range(20)])
    assert all(0 <= entry["reward"] <= 1 for entry in found)


@pytest.mark.slow
def test_distill_as_written(example, tmp_path):
    """The policy comes nearer to its teacher: KL on its own prefixes falls."""
    found = run_live(example, "distill", tmp_path)
    on_policy = [entry["qstar/kl_t"] for entry in found if entry["qstar/alpha"] == 1]
    assert len(on_policy) == 10
    assert sum(on_policy[5:]) < sum(on_policy[:5])
