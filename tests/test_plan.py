"""`python -m qstar.plan`: its arithmetic against numbers made by hand."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qstar.cache import Side, places_of
from qstar.demo import THETA, T
from qstar.plan import main as plan
from qstar.plan import model_needs
from qstar.slots import IDS
from tests import zoo


def test_plan(capsys):
    """By hand: the demo pair (a vocabulary of 2,048, a width of 128, so 262,144 parameters of 1,000,576 in the tied
    embedding) on a GPU of 1 GB that reads 1 GB and computes 10^12 operations a second."""
    argv = ["--model-theta", str(THETA), "--model-t", str(T), "--prompt-tokens", "100", "--new-tokens", "100"]
    argv += ["--gpu-memory", "1", "--bandwidth", "1", "--tflops", "1", "--batch-size", "50"]
    assert plan([*argv, "--gpus", "3"]) == 0
    out = capsys.readouterr().out
    for line in (
        "weights: (1,000,576 + 1,000,576) parameters · 2 bytes = 0.004002 GB",
        "keys and values of a token, π_t: 2 · 4 layers · 2 heads · 32 · 2 bytes = 1,024 bytes",
        "logits of a row: (2,048 + 2,048) · 2 bytes = 8,192 bytes",
        "a row: 2,048 bytes · (100 + 100) tokens + 8,192 bytes = 0.0004178 GB",
        "rows that fit: (1 · 0.9 GB − weights) / a row = 2,144",
        "read in a step: weights + 50 · (2,048 · 150 + 8,192) bytes = 0.01977 GB",
        "time to read that: it / (1 · 1 GB/s) = 19.77 ms",
        "operations for a token: 2 · (738,432 + 738,432) parameters in layers = 2,953,728",
        "time to compute a step: 2,953,728 · 50 rows / (1 · 1 TFLOP/s) = 0.1477 ms",
        "a prompt: at least 2,953,728 · 100 tokens / (1 · 1 TFLOP/s) = 0.2954 ms",
        "a sample: a step · 100 / 50 + a prompt = 39.84 ms",
        "│     3 │       3 │      75.3 │     7,530 │               3.689 │",
        "│ 1,000 │   1,000 │    25,101 │ 2,510,092 │             0.01107 │",
        "one run feeds 1,155 workers: min(70 parts/s of the driver · 16 batches · 50 rows = 56,000, 29,000 of the",
        "An estimate from a data sheet, and a bound",
    ):
        assert line in out, line
    assert plan([*argv, "--tflops", "0.001"]) == 0  # now computing is what takes longer
    assert "a step: at least the longer of the two = 147.7 ms" in capsys.readouterr().out
    assert plan([*argv, "--step-ms", "10"]) == 0
    out = capsys.readouterr().out
    assert "a sample: a step · 100 / 50 = 20 ms" in out
    assert "│     8 │       8 │       400 │    40,000 │              0.6944 │" in out
    assert "data sheet" not in out


def test_plan_of_one_model_and_of_too_little_memory(capsys):
    """One model with two prompts holds its weights once, and two KV caches; 2,001,152 bytes do not fit into
    a GPU of 2 MB."""
    argv = ["--model-theta", str(THETA), "--model-t", str(THETA), "--prompt-tokens", "10", "--new-tokens", "10"]
    assert plan([*argv, "--gpu-memory", "0.002"]) == 0
    out = capsys.readouterr().out
    assert "weights: (1,000,576) parameters · 2 bytes = 0.002001 GB" in out
    assert "a row: 2,048 bytes · (10 + 10) tokens + 8,192 bytes = 4.915e-05 GB" in out
    assert "GPUs of a worker: the fewest whose 90% of 0.002 GB hold weights and a row = 2" in out
    assert "rows that fit: (2 · 0.0018 GB − weights) / a row = 32" in out
    assert re.search(r"│ +1 │ +0 │ +0 │ +0 │ +too few GPUs │", out)
    assert "uses one of them at a time, and takes 2 times as long" in out
    assert plan([*argv, "--batch-size", "100000000"]) == 1
    assert "100000000 rows do not fit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plan(["--model-theta", "/nowhere/x", "--model-t", str(T)])
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        plan([*argv, "--step-ms", "10"])
    assert "give --batch-size, too" in capsys.readouterr().err


# dense, multi-query, latent attention with experts, shared keys, experts, and layers with states in place of keys or
# beside them
KINDS = (
    "gpt2",
    "gpt_bigcode",
    "deepseek_v3",
    "gemma3n_text",
    "mixtral",
    "lfm2",
    "qwen3_5_text",
    "mamba",
    "zamba",
    "bamba",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_without_weights_is_what_decoding_keeps(kind, tmp_path):
    config = zoo.config(kind)
    config.save_pretrained(tmp_path)
    needs = model_needs(str(tmp_path), None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    side = Side(model, 0, ("theta",))
    side.prefill([[3, 4, 5, 6]])
    kept = [x.shape[1] * x.shape[3] for name, x in side.slots.memory.items() if name != IDS]
    assert needs.kv(4) == 4 * sum(kept)
    assert needs.of_row(4) == 4 * sum(holder[key].numel() for holder, key in places_of(side.cache))
    assert needs.parameters == sum(p.numel() for p in model.parameters())


def test_plan_of_a_hybrid_and_of_an_adapter(tmp_path, capsys):
    """By hand: of four layers two have 2 heads of 8 for keys and values, and the others a convolution of 32 channels
    over 3 tokens. A LoRA of rank 4 on the query and value projections of the demo pair's 4 layers (128 to 128, and 128
    to 64) has 4 · (4 · (128 + 128) + 4 · (128 + 64)) = 7,168 parameters."""
    zoo.config("lfm2").save_pretrained(tmp_path / "hybrid")
    hybrid = str(tmp_path / "hybrid")
    assert plan(["--model-theta", hybrid, "--model-t", hybrid]) == 0
    out = capsys.readouterr().out
    assert "keys and values of a token, π_θ: 2 · 2 layers · 2 heads · 8 · 2 bytes = 128 bytes" in out
    assert "states of a row, π_t: 192 · 2 bytes = 384 bytes" in out
    assert "a row: 256 bytes · (512 + 512) tokens + 8,960 bytes" in out
    model = AutoModelForCausalLM.from_pretrained(str(THETA))
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "lora")
    assert plan(["--model-theta", str(tmp_path / "lora"), "--model-t", str(THETA)]) == 0
    out = capsys.readouterr().out
    assert "weights: (1,000,576 + 7,168) parameters · 2 bytes" in out
    assert "operations for a token: 2 · (745,600 + 738,432) parameters in layers" in out
