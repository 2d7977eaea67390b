"""Adapters on one base: their pair is that of the merged models, with one set of weights, in a trainer's hands too."""

import copy
import json
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
import zoo
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from runs import lines
from transformers import AutoModelForCausalLM, AutoTokenizer

from qstar import Pair
from qstar.adapters import Adapted
from qstar.demo import THETA, T
from qstar.generate import main as generate
from qstar.run.records import RunFiles
from qstar.score import main as score

PROMPTS = ["What is 2 + 3?", "Hello.", "Tom has 3 pens and finds 4 more. How many pens does Tom have?"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(THETA, dtype=torch.float32).eval()


def adapted(model: torch.nn.Module, seed: int = 0, **config) -> PeftModel:
    """A model with a random adapter that changes its numbers."""
    peft = get_peft_model(model, LoraConfig(**LORA | config))
    trained(peft, seed)
    return peft.eval()


def trained(peft: PeftModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Two adapters of π_θ's, and both merged into it."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, name in enumerate(("a", "b")):
        peft = adapted(base(), seed)
        peft.save_pretrained(folder / name)
        peft.merge_and_unload().save_pretrained(folder / f"{name}-merged")
        AutoTokenizer.from_pretrained(THETA).save_pretrained(folder / f"{name}-merged")
        found |= {n: str(folder / n) for n in (name, f"{name}-merged")}
    return found


def near(found, wanted) -> None:
    """Two outputs are of the same tokens, with the same numbers up to rounding."""
    assert found.token_ids == wanted.token_ids
    for name in ("logq", "logp_theta", "logp_t", "alpha"):
        x, y = (torch.tensor(list(chain(*getattr(out, name)))) for out in (found, wanted))
        torch.testing.assert_close(x, y, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("theta", "t", "options"),
    [
        ({"adapter_theta": "a"}, None, {}),
        ({"adapter_theta": "a"}, None, {"speculate": 3}),
        ({"adapter_theta": "a"}, None, {"speculate": "auto", "batch_size": 2}),
        ({"adapter_theta": "a", "adapter_t": "b"}, "b-merged", {}),
        ({"theta": "a"}, None, {}),
    ],
)
def test_a_pair_is_that_of_the_merged_models(folders, theta, t, options):
    said = {"theta": str(THETA), "t": str(THETA)} | {name: folders[x] for name, x in theta.items()}
    pair = Pair.from_pretrained(**said, device="cpu")
    merged = Pair.from_pretrained(folders["a-merged"], folders[t] if t else str(THETA), device="cpu")
    draw = {"samples_per_prompt": 2, "max_new_tokens": 16, **options}
    near(pair.generate(PROMPTS, **draw), merged.generate(PROMPTS, **draw))
    assert pair.in_one_pass is not None


def test_one_set_of_weights(folders):
    pair = Pair.from_pretrained(THETA, THETA, adapter_theta=folders["a"], adapter_t=folders["b"], device="cpu")
    weights = {p for model in (pair.theta, pair.t) for p in model.parameters()}
    lora = sum(p.numel() for p in adapted(base()).parameters()) - sum(p.numel() for p in base().parameters())
    assert sum(p.numel() for p in weights) == sum(p.numel() for p in base().parameters()) + 2 * lora


def test_a_base_by_another_path_is_the_same(folders, tmp_path):
    (tmp_path / "base").symlink_to(THETA)
    pair = Pair.from_pretrained(folders["a"], tmp_path / "base", device="cpu")
    assert pair.theta.peft is pair.t.peft


def test_bases_that_differ_are_two_models(folders):
    pair = Pair.from_pretrained(THETA, T, adapter_theta=folders["a"], device="cpu")
    merged = Pair.from_pretrained(folders["a-merged"], T, device="cpu")
    near(pair.generate(PROMPTS, max_new_tokens=12), merged.generate(PROMPTS, max_new_tokens=12))


def test_the_same_adapter_on_both_sides_is_one_model_with_two_prompts(folders):
    pair = Pair.from_pretrained(folders["a"], folders["a"], device="cpu")
    merged = Pair.from_pretrained(folders["a-merged"], folders["a-merged"], device="cpu")
    hints = {"t_hints": ["It is 5.", "Hi.", "7"], "max_new_tokens": 12}
    near(pair.generate(PROMPTS, **hints), merged.generate(PROMPTS, **hints))


@pytest.mark.parametrize(("kind", "passes"), [("lora", 1), ("dora", 2), ("ia3", 2)])
def test_passes_a_step(kind, passes):
    """One for both sides where peft mixes adapters, else one each; the samples are the same."""
    model = base()
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    peft = get_peft_model(model, config) if kind == "ia3" else adapted(model, use_dora=kind == "dora")
    if kind == "ia3":
        with torch.no_grad():
            for name, parameter in peft.named_parameters():
                if "ia3" in name:
                    parameter.copy_(torch.linspace(0.5, 1.5, parameter.numel()).reshape(parameter.shape))
    before = [(p, p.requires_grad) for p in peft.parameters()], peft.active_adapter
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    tokenizer = AutoTokenizer.from_pretrained(THETA)
    pair = Pair.with_adapter(peft, tokenizer)
    calls.clear()
    found = pair.generate(PROMPTS[:1], max_new_tokens=6)
    handle.remove()
    assert len(calls) == passes * len(found.token_ids[0])
    assert before == ([(p, p.requires_grad) for p in peft.parameters()], peft.active_adapter)
    merged = copy.deepcopy(peft).merge_and_unload().eval()
    near(found, Pair(merged, base(), tokenizer, tokenizer).generate(PROMPTS[:1], max_new_tokens=6))


@pytest.mark.parametrize("name", ["llama with LongRoPE", "lfm2"])
def test_rows_that_are_read_again_have_their_own_adapter(name):
    """Rows of a LongRoPE model that outgrow the short frequencies, and states that drafts are taken back from."""
    model_type, changes = zoo.VARIANTS.get(name, (name, {}))
    model = zoo.model(model_type, 1, torch.float32, **changes)
    peft = adapted(copy.deepcopy(model), target_modules=["q_proj", "v_proj", "in_proj"])
    tokenizer = AutoTokenizer.from_pretrained(THETA)
    pair = Pair.with_adapter(peft, tokenizer)
    assert pair.in_one_pass is None
    merged = Pair(copy.deepcopy(peft).merge_and_unload().eval(), model, tokenizer, tokenizer)
    for options in ({}, {"speculate": 2}):
        draw = {"max_new_tokens": 30, **options}
        near(pair.generate(PROMPTS, **draw), merged.generate(PROMPTS, **draw))


def test_experts_are_switched():
    """Their layers get tokens and not rows, which may be as many."""
    model = zoo.model("mixtral", 1, torch.float32)
    peft = adapted(copy.deepcopy(model), target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    tokenizer = AutoTokenizer.from_pretrained(THETA)
    pair = Pair.with_adapter(peft, tokenizer)
    assert not pair.theta.mixes
    merged = Pair(copy.deepcopy(peft).merge_and_unload().eval(), model, tokenizer, tokenizer)
    near(pair.generate(PROMPTS, max_new_tokens=8), merged.generate(PROMPTS, max_new_tokens=8))


def test_a_pass_that_fails_leaves_the_model_as_it_was():
    peft, tokenizer = adapted(base()), AutoTokenizer.from_pretrained(THETA)
    pair = Pair.with_adapter(peft.train(), tokenizer)
    wanted = pair.generate(PROMPTS, max_new_tokens=4)

    def fails(*_):
        raise MemoryError("no room")

    handle = peft.get_base_model().model.layers[1].register_forward_hook(fails)
    with pytest.raises(MemoryError):
        pair.generate(PROMPTS, max_new_tokens=4)
    handle.remove()
    assert all(module.training for module in peft.modules())
    near(pair.generate(PROMPTS, max_new_tokens=4), wanted)
    assert not any(module._forward_pre_hooks for module in peft.modules())


def test_a_trainers_model_is_drawn_from_as_it_is():
    """In training mode, with dropout; and after a step of the optimizer with the new weights."""
    peft, tokenizer = adapted(base(), lora_dropout=0.5), AutoTokenizer.from_pretrained(THETA)
    peft.train()
    peft.base_model.model.model.layers[0].eval()  # a part that its trainer keeps still
    pair = Pair.with_adapter(peft, tokenizer)
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=5.0)
    ids, seen = torch.tensor([tokenizer("What is 2 + 3?")["input_ids"]]), []
    for _ in range(2):
        peft(input_ids=ids, labels=ids).loss.backward()
        state = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in peft.parameters()]
        modes = [module.training for module in peft.modules()]
        found = pair.generate(PROMPTS, max_new_tokens=12)
        assert modes == [module.training for module in peft.modules()]
        for parameter, (requires_grad, grad) in zip(peft.parameters(), state, strict=True):
            assert parameter.requires_grad == requires_grad
            assert (grad is None and parameter.grad is None) or torch.equal(grad, parameter.grad)
        merged = copy.deepcopy(peft).merge_and_unload().eval()
        near(found, Pair(merged, base(), tokenizer, tokenizer).generate(PROMPTS, max_new_tokens=12))
        seen.append(found.logp_theta)
        optimizer.step()
        optimizer.zero_grad()
    assert seen[0] != seen[1]


def test_a_stream_that_is_left_early_leaves_the_mode_as_it_was():
    peft, tokenizer = adapted(base()), AutoTokenizer.from_pretrained(THETA)
    pair = Pair.with_adapter(peft.train(), tokenizer)
    stream = pair.stream(PROMPTS, max_new_tokens=4)
    next(stream)
    assert not peft.training
    stream.close()
    assert peft.training


def test_what_is_one_model_without_saying_so_is_refused():
    peft, tokenizer = adapted(base()), AutoTokenizer.from_pretrained(THETA)
    pair = Pair.with_adapter(peft, tokenizer)
    for theta, t in (
        (peft, peft),
        (peft, peft.get_base_model()),
        (peft.get_base_model(), peft),
        (pair.theta, peft.get_base_model()),
        (Adapted(peft, "default"), Adapted(peft, "default")),
    ):
        with pytest.raises(ValueError, match="theta and t are one model"):
            Pair(theta, t, tokenizer, tokenizer)
    other = base()
    Pair(other, base(), tokenizer, tokenizer)
    Pair(other, other, tokenizer, tokenizer)


def test_what_has_no_base_beside_it_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(THETA)
    with pytest.raises(ValueError, match="LlamaForCausalLM is no peft model"):
        Pair.with_adapter(base(), tokenizer)
    peft = adapted(base())
    with pytest.raises(ValueError, match="no adapter 'other'; there are default"):
        Pair.with_adapter(peft, tokenizer, adapter_t="other")
    pair = Pair.with_adapter(peft, tokenizer)
    with peft.disable_adapter(), pytest.raises(ValueError, match="switched off"):
        pair.generate(PROMPTS, max_new_tokens=2)
    peft.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        pair.generate(PROMPTS, max_new_tokens=2)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        Pair.with_adapter(peft, tokenizer)
    with pytest.raises(ValueError, match="changes the biases"):
        Pair.with_adapter(adapted(base(), bias="lora_only"), tokenizer)
    prompts = get_peft_model(base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="puts tokens in front"):
        Pair.with_adapter(prompts, tokenizer)


def test_the_command(folders, tmp_path, capsys):
    """Files are those of the merged pair; the adapter is resumed and scored with, and another in its place refused."""
    adapter = tmp_path / "adapter"
    shutil.copytree(folders["a"], adapter)
    draw = ["--num-samples", "4", "--max-new-tokens", "8", "--save-diagnostics", "--output"]
    named = ["--model-theta", str(THETA), "--adapter-theta", str(adapter), "--model-t", str(THETA)]
    assert generate([*named, *draw, str(tmp_path / "x.jsonl")]) == 0
    assert (
        generate(["--model-theta", folders["a-merged"], "--model-t", str(THETA), *draw, str(tmp_path / "y.jsonl")]) == 0
    )
    assert (tmp_path / "x.jsonl").read_bytes() == (tmp_path / "y.jsonl").read_bytes()
    for x, y in zip(*(lines(tmp_path / f"{n}.diagnostics.jsonl") for n in "xy"), strict=True):
        assert x["tokens"]["logq"] == pytest.approx(y["tokens"]["logq"], abs=1e-4)
    assert score(["--dataset", str(tmp_path / "x.jsonl"), "--output", str(tmp_path / "s.jsonl")]) == 0
    for x, y in zip(*(lines(tmp_path / f"{n}.diagnostics.jsonl") for n in "xs"), strict=True):
        assert x["tokens"]["logq"] == pytest.approx(y["tokens"]["logq"], abs=1e-4)
    assert RunFiles(tmp_path / "s.jsonl").drawn
    other = ["--adapter-theta", folders["b"], "--output", str(tmp_path / "o.jsonl")]
    assert score(["--dataset", str(tmp_path / "x.jsonl"), *other]) == 0
    assert not RunFiles(tmp_path / "o.jsonl").drawn  # with another adapter it is another q*
    # the adapter's folder as the model is the same run, and is done
    same = ["--model-theta", str(adapter), "--model-t", str(THETA), *draw, str(tmp_path / "x.jsonl")]
    capsys.readouterr()
    assert generate(same) == 0
    assert "0 samples in" in capsys.readouterr().out
    shutil.copy(Path(folders["b"]) / "adapter_model.safetensors", adapter)
    assert generate(same) == 1
    assert "weights of adapter_theta" in capsys.readouterr().err
    plain = ["--model-theta", str(THETA), "--model-t", str(THETA), *draw, str(tmp_path / "x.jsonl")]
    assert generate(plain) == 1
    assert "--adapter-theta" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--adapter-theta", "a"], "--adapter-theta needs --model-theta and --model-t"),
        (["--model-theta", "a", "--adapter-theta", "b", "--model-t", "THETA"], "is an adapter itself"),
        (["--model-theta", "THETA", "--adapter-t", "THETA", "--model-t", "THETA"], "no adapter_config.json"),
        (["--model-theta", "THETA", "--adapter-t", "/nowhere", "--model-t", "THETA"], "/nowhere does not exist"),
    ],
)
def test_command_lines_that_are_refused(folders, argv, said, capsys):
    with pytest.raises(SystemExit):
        generate([folders.get(x, str(THETA) if x == "THETA" else x) for x in argv])
    assert said in capsys.readouterr().err


def test_vllm_names_the_backend_that_takes_adapters(folders, monkeypatch, capsys):
    monkeypatch.setattr("qstar.backends.check_installed", lambda name: None)
    with pytest.raises(SystemExit):
        generate(["--backend", "vllm", "--model-theta", folders["a"], "--model-t", str(THETA)])
    assert "use qstar.generate --backend transformers, or merge" in capsys.readouterr().err


def test_an_adapter_that_does_not_fit(folders, tmp_path):
    zoo.model("llama", 1, torch.float32).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(THETA).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be put on its base"):
        Pair.from_pretrained(tmp_path, tmp_path, adapter_theta=folders["a"], device="cpu")
    shutil.copytree(folders["a"], tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="does not name its base"):
        Pair.from_pretrained(tmp_path / "adapter", THETA, device="cpu")
