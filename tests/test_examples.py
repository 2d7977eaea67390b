"""The worked examples for trainers, run on the demo pair's samples."""

import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from runs import lines
from transformers import AutoModelForCausalLM

from qstar.demo import THETA
from qstar.generate import main as generate
from qstar.records import RunFiles

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
