"""The vLLM backend against the transformers backend: tokens, numbers, draws, the command line."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip(
    "vllm", reason="vLLM is not installed (pip install 'qstar[vllm]'); .ci/run tests it in its own environment"
)

from runs import lines, write_lines
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    Qwen2Config,
)
from vllm import SamplingParams, TokensPrompt
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.scheduler import Scheduler

import qstar.vllm.engine
from qstar import Pair
from qstar.demo import PROMPTS, THETA, T
from qstar.experiments.pairs import moved
from qstar.generate import main
from qstar.pair import sample_seed
from qstar.sample import DecodeOptions, Request
from qstar.serve import main as serve
from qstar.vllm.engine import EnginePair
from qstar.vllm.params import ELSEWHERE, UNSUPPORTED, PairParams, numbers_key, place, rule
from qstar.vllm.worker import FORGOTTEN, PairSampler
from qstar_kernels import METHODS, qstar_logprobs
from qstar_kernels.types import FIELDS, Settings

SEED = int(os.environ.get("QSTAR_TEST_SEED", "0"))
QUESTIONS = [json.loads(line)["question"] for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "head_dim": 32}
LARGE = {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
LARGE |= {"num_key_value_heads": 2, "head_dim": 64}
MIXED = SMALL | {"num_hidden_layers": 4, "sliding_window": 32}
MIXED |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
MAMBA = {"num_hidden_layers": 1, "hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8}
PAIRS = {
    "other depth, width and head_dim": ((LlamaConfig, SMALL, 2048), (LlamaConfig, LARGE, 2048)),
    "Llama and Qwen2": ((LlamaConfig, SMALL, 2048), (Qwen2Config, SMALL | {"num_hidden_layers": 4}, 2048)),
    "a sliding window in one": ((MistralConfig, SMALL | {"sliding_window": 32}, 2048), (LlamaConfig, LARGE, 2048)),
    "layers of both kinds": ((LlamaConfig, SMALL, 2048), (Gemma3TextConfig, MIXED, 2048)),
    "vocabularies padded differently": ((LlamaConfig, LARGE, 2112), (LlamaConfig, SMALL, 2304)),
}


def write_model(folder, config_class, sizes, vocab_size, seed):
    """A random model with the demo pair's tokenizer, sharp enough that greedy tokens do not hang on rounding."""
    torch.manual_seed(seed)
    config = config_class(
        **sizes, vocab_size=vocab_size, initializer_range=0.2, max_position_embeddings=512, eos_token_id=0,
        bos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    # the class that is taken for Qwen2 would add an unknown token of its own
    AutoTokenizer.from_pretrained(THETA, unk_token="<|end|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engines():
    """Starts engines, one at a time: another is stopped first, the same one again goes on."""
    running: dict[str, EnginePair] = {}

    def stop() -> None:
        for pair in running.values():
            pair.stop()
        running.clear()

    def start(theta, t, **options) -> EnginePair:
        what = repr((theta, t, options))
        if what not in running:
            stop()
            running[what] = EnginePair(theta, t, options={"kv_cache_memory_bytes": 256 << 20} | options)
            running[what].start()
        return running[what]

    yield start
    stop()


@pytest.fixture
def demo_engine(engines):
    return engines(THETA, T)


def requests(count: int, new_tokens: int, seed: int = SEED) -> list[Request]:
    """Prompts of the most various lengths, some with a long common start."""
    rng = random.Random(seed)
    print(f"seed {seed}")
    start = [rng.randrange(1, 2048) for _ in range(150)]
    made = []
    for i in range(count):
        own = [rng.randrange(1, 2048) for _ in range(rng.choice((1, 2, 7, 31, 90)))]
        made.append(Request(i, start + own if i % 2 else own, [], rng.getrandbits(63), new_tokens))
    return [Request(r.key, r.ids_theta, r.ids_theta, r.seed, r.max_new_tokens) for r in made]


def draw(pair: Pair, todo: list[Request], batch_size: int = 64, **options) -> dict:
    """Finished samples by key."""
    names = ("stop", "stop_token_ids", "keep_special_tokens", "force_t_first_token", "force_t_special_tokens")
    decoding = {name: options.pop(name) for name in names if name in options}
    decoder = pair.decoder(DecodeOptions(Settings(**options), batch_size, **decoding))
    return {sample.request.key: sample for sample in decoder.run(todo)}


def check_equal(got: dict, expected: dict) -> None:
    """Tokens, text, end and all numbers of the samples."""
    assert got.keys() == expected.keys()
    for key, sample in got.items():
        other = expected[key]
        assert (sample.token_ids, sample.text, sample.error) == (other.token_ids, other.text, other.error)
        assert (sample.finish_reason, sample.status) == (other.finish_reason, other.status)
        for name in FIELDS:
            torch.testing.assert_close(
                torch.tensor(sample.fields[name]), torch.tensor(other.fields[name]), rtol=1e-4, atol=1e-4
            )


def check_greedy_and_drawn(engine: Pair, reference: Pair, todo: list[Request]) -> None:
    for temperature in (0.0, 1.0):
        check_equal(draw(engine, todo, temperature=temperature), draw(reference, todo, temperature=temperature))


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_unlike_models(tmp_path, engines, name):
    folders = [write_model(tmp_path / str(i), *what, seed=i) for i, what in enumerate(PAIRS[name])]
    check_greedy_and_drawn(engines(*folders), Pair.from_pretrained(*folders, device="cpu"), requests(10, 12))


class Counter:
    """How often a method of vLLM's was called."""

    def __init__(self, monkeypatch, owner: type, name: str):
        self.calls, method = 0, getattr(owner, name)

        def counted(*args, **kwargs):
            self.calls += 1
            return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)


def test_chunked_prefill_and_prefix_cache(tmp_path, engines, demo_pair):
    """Prompts longer than a step's tokens, a common start of many, and everything a second time."""
    engine = engines(THETA, T, max_num_batched_tokens=64, max_num_seqs=32)
    todo, cached = requests(16, 12), []
    step = engine.engine.step
    engine.engine.step = lambda: [cached.append(o.num_cached_tokens) or o for o in step()]
    check_greedy_and_drawn(engine, demo_pair, todo)
    assert max(len(r.ids_theta) for r in todo) > 2 * 64
    assert sum(n > 100 for n in cached) > len(todo) // 2


def test_preemption_under_a_small_cache(tmp_path, engines, monkeypatch):
    """Eleven blocks of 32 tokens for twelve sequences of three blocks each."""
    preempted = Counter(monkeypatch, Scheduler, "_preempt_request")
    folders = [write_model(tmp_path / str(i), LlamaConfig, SMALL, 2048, seed=i) for i in range(2)]
    engine = engines(*folders, num_gpu_blocks_override=12, block_size=32, max_model_len=256)
    todo = [Request(i, [i + 1] * 20, [i + 1] * 20, i, 60) for i in range(12)]
    check_greedy_and_drawn(engine, Pair.from_pretrained(*folders, device="cpu"), todo)
    print(f"{preempted.calls} preemptions")
    assert preempted.calls > 0


def test_tensor_parallel(engines, demo_pair, monkeypatch):
    """Both models cut over two ranks, which draw the same."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    check_greedy_and_drawn(engines(THETA, T, tensor_parallel_size=2), demo_pair, requests(8, 8))


@pytest.mark.parametrize("method", METHODS)
def test_every_rule_for_alpha(demo_engine, demo_pair, method):
    todo = requests(8, 12)
    for temperature in (0.0, 0.8):
        settings = {"method": method, "alpha": 0.3, "temperature": temperature}
        check_equal(draw(demo_engine, todo, **settings), draw(demo_pair, todo, **settings))


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5, "temperature": 0.0},
        {"top_p": 0.8, "min_p": 0.05, "temperature": 1.3},
        {"target_top_k": 20, "target_top_p": 0.9},
        {"alpha_min": 0.6, "alpha_max": 0.7},
        {"force_t_first_token": True},
        {"force_t_special_tokens": True},
        {"stop": ("####", " how", "e")},
    ],
    ids=lambda options: " ".join(options),
)
def test_every_other_option(demo_engine, demo_pair, options):
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS[:8]]
    ids = [demo_pair.tokenizer_theta.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts]
    todo = [Request(i, x, x, sample_seed(SEED, i, 0), 24) for i, x in enumerate(ids)]
    got, expected = draw(demo_engine, todo, **options), draw(demo_pair, todo, **options)
    check_equal(got, expected)
    if "stop" in options:
        assert {"stop"} <= {sample.finish_reason for sample in got.values()}
        assert not any("####" in sample.text for sample in got.values())


@pytest.mark.parametrize(
    "options",
    [
        {"stop": ("<|end|>",)},
        {"stop": ("<|end|>", "####"), "keep_special_tokens": True},
        {"stop_token_ids": (0, 5)},
        {"stop": ("e",), "keep_special_tokens": True},
    ],
    ids=lambda options: " ".join(options),
)
def test_special_tokens_that_are_not_the_eos(demo_engine, demo_pair, options):
    engine, reference = copy.copy(demo_engine), copy.copy(demo_pair)
    engine.eos_ids = reference.eos_ids = {1}
    ids = demo_pair.tokenizer_theta("<|user|>\nHi.<|end|>\n<|assistant|>\n")["input_ids"]
    todo = [Request(i, ids, ids, sample_seed(SEED, i, 0), 24) for i in range(12)]
    got = draw(engine, todo, **options)
    check_equal(got, draw(reference, todo, **options))
    assert "stop" in {sample.finish_reason for sample in got.values()}


def test_a_sample_does_not_depend_on_its_neighbours(demo_engine):
    todo = requests(40, 16)
    crowd = draw(demo_engine, todo)
    for request in todo[:4]:
        check_equal(draw(demo_engine, [request], batch_size=1), {request.key: crowd[request.key]})
    mixed = draw(demo_engine, random.Random(SEED).sample(todo, 30), batch_size=7, temperature=1.0)
    check_equal(mixed, {key: crowd[key] for key in mixed})


@pytest.mark.parametrize("sides", [("theta",), ("t",), ("theta", "t")])
def test_new_weights_reach_the_side_they_are_for(tmp_path, engines, sides):
    folders = {}
    for side, (kind, sizes) in {"theta": (LlamaConfig, LARGE), "t": (Qwen2Config, SMALL)}.items():
        folders[side] = [write_model(tmp_path / f"{side}{i}", kind, sizes, 2048, 10 * i + len(side)) for i in (0, 1)]
    engine, todo = engines(*(old for old, _ in folders.values())), requests(6, 8)
    before = draw(engine, todo)
    assert engine.update_weights(**{side: folders[side][1] for side in sides}, version="next") == "next"
    now = [folders[side][side in sides] for side in folders]
    check_equal(draw(engine, todo), draw(Pair.from_pretrained(*now), todo))
    assert engine.update_weights(**{side: folders[side][0] for side in sides}) == "2"
    check_equal(draw(engine, todo), before)


def test_new_weights_of_tied_embeddings(tmp_path, engines):
    theta, t = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32) for name in (THETA, T))
    moved(theta, t, 0.4).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(THETA).save_pretrained(tmp_path)
    engine, todo = engines(THETA, T), requests(6, 8)
    engine.update_weights(theta=tmp_path)
    check_equal(draw(engine, todo), draw(Pair.from_pretrained(tmp_path, T), todo))
    engine.update_weights(theta=THETA)


def test_after_an_update_that_failed_nothing_is_drawn(tmp_path, engines, monkeypatch):
    engine, todo = engines(THETA, T), requests(2, 8)
    before = draw(engine, todo)
    with pytest.raises(ValueError, match="is not for t"):
        engine.update_weights(t=write_model(tmp_path / "other", LlamaConfig, SMALL, 2048, 1))
    check_equal(draw(engine, todo), before)
    monkeypatch.setattr("qstar.vllm.worker.reload_weights", lambda *_, **__: 1 / 0)
    with pytest.raises(RuntimeError, match="nothing is drawn until one does: division by zero"):
        engine.update_weights(theta=THETA)
    with pytest.raises(ValueError, match="nothing is drawn until one does"):
        draw(engine, todo)
    monkeypatch.undo()
    engine.update_weights(theta=THETA)
    check_equal(draw(engine, todo), before)


def test_what_nobody_fetches_is_forgotten():
    """Numbers of aborted requests, what they had asked for, and their rules; those of requests in flight are kept."""
    pair = {"rule": {}, "vocab_size": 8, "special_ids": [0], "eos_ids": [0]}
    alive = SimpleNamespace(output_token_ids=[])
    sampler = PairSampler(SimpleNamespace(requests={}), pair)
    kept = torch.zeros(2 + len(FIELDS))
    for i in range(10_000):
        params = SamplingParams(extra_args={"qstar_temperature": 1 + i / 10_000, "numbers_key": str(i)})
        sampler.runner.requests = {"first": alive, str(i): alive}
        for request in sampler.runner.requests.values():
            request.sampling_params = params
        sampler.row("first" if i == 0 else str(i))
        sampler.numbers[numbers_key(str(i))] = [(kept, sampler.version)]
    assert len(sampler.asked) < 10
    assert len(sampler.rules) < 10
    assert len(sampler.numbers) < 2 * FORGOTTEN
    assert sampler.pop([numbers_key("0"), numbers_key("9999"), numbers_key("1")]).keys() == {"0/0/0", "9999/0/0"}


def test_distribution_of_a_token(demo_engine, demo_pair):
    """χ² of 20,000 first tokens against q* of the models' own logits; false alarms: 1 in 10,000."""
    from scipy.stats import chisquare

    prompt, count, rng = requests(2, 1)[1].ids_theta, 20_000, random.Random(SEED)
    with torch.inference_mode():
        logits = [m(torch.tensor([prompt])).logits[:, -1] for m in (demo_pair.theta, demo_pair.t)]
    expected = qstar_logprobs(*(x.double() for x in logits))[0][0].exp() * count
    todo = [Request(i, prompt, prompt, rng.getrandbits(63), 1) for i in range(count)]
    found = draw(demo_engine, todo, batch_size=2048)
    tokens = torch.tensor([sample.token_ids[0] for sample in found.values()])
    seen = torch.bincount(tokens, minlength=len(expected)).double()
    often = expected >= 10
    seen, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (seen, expected))
    p = chisquare(seen.numpy(), expected.numpy()).pvalue
    print(f"{len(seen)} classes, p = {p:.4f}")
    assert len(seen) > 20
    assert p > 1e-4


def test_a_model_that_gives_nan_fails_its_own_samples_only(tmp_path, engines):
    """Rows without a distribution end at once and say why; the others go on."""
    folders = [write_model(tmp_path / str(i), LlamaConfig, SMALL, 2048, seed=i) for i in range(2)]
    broken = AutoModelForCausalLM.from_pretrained(folders[1])
    broken.model.embed_tokens.weight.data[7] = torch.nan
    broken.save_pretrained(folders[1])
    good, bad = [5, 6, 8], [5, 7, 8]
    todo = [Request(i, ids, ids, i, 6) for i, ids in enumerate((good, bad, good))]
    got = draw(engines(*folders, enable_prefix_caching=False), todo)
    expected = draw(Pair.from_pretrained(*folders, device="cpu"), todo, batch_size=1)
    check_equal({i: got[i] for i in (0, 2)}, {i: expected[i] for i in (0, 2)})
    assert got[1].error == expected[1].error
    assert "has no distribution: nan" in got[1].error


class TestCommand:
    """`python -m qstar.generate --backend vllm`, with one engine for all of it."""

    @pytest.fixture(autouse=True)
    def _one_engine(self, demo_engine, monkeypatch, tmp_path):
        monkeypatch.setattr(qstar.vllm.engine, "EnginePair", lambda *args, **options: demo_engine)
        monkeypatch.chdir(tmp_path)

    @staticmethod
    def run(*argv: str, backend: str = "vllm") -> int:
        return main(["--backend", backend, "--max-new-tokens", "24", "--save-diagnostics", *argv])

    @pytest.mark.parametrize("output_format", ["jsonl", "openai-batch", "verl"])
    def test_writes_what_the_other_backend_writes(self, tmp_path, output_format):
        argv = ["--num-samples", "12", "--samples-per-prompt", "2", "--output-format", output_format]
        for backend in ("vllm", "transformers"):
            assert self.run("--output", f"{backend}/x", *argv, backend=backend) == 0
        journal = "x.journal.jsonl" if output_format == "verl" else "x"
        for name in (journal, "x.diagnostics.jsonl"):
            ours, others = (lines(tmp_path / backend / name) for backend in ("vllm", "transformers"))
            assert len(ours) == len(others) == 24
            for our, other in zip(ours, others, strict=True):
                assert our == approximately(other)

    def test_requests_are_sampled_as_they_ask(self, tmp_path):
        asked = ({}, {"temperature": 0}, {"n": 2, "seed": 7}, {"stop": " is"}, {"max_tokens": 3, "top_p": 0.5})
        rows = [
            {"custom_id": str(i), "body": {"messages": [{"role": "user", "content": "What is 2 + 3?"}], **body}}
            for i, body in enumerate(asked)
        ]
        write_lines(tmp_path / "requests.jsonl", rows)
        for backend in ("vllm", "transformers"):
            argv = ["--dataset", "requests.jsonl", "--use-request-parameters", "--output", f"{backend}/x.jsonl"]
            assert self.run(*argv, backend=backend) == 0
        for name in ("x.jsonl", "x.diagnostics.jsonl"):
            ours, others = (lines(tmp_path / backend / name) for backend in ("vllm", "transformers"))
            assert len(ours) == len(others) == 6
            for our, other in zip(ours, others, strict=True):
                assert our == approximately(other)

    def test_resume_and_later_turns(self, tmp_path):
        data = [{"turns": ["Hi.", "And now?"]}, {"prompt": 1}, *({"turns": [q, "Why?"]} for q in QUESTIONS[:8])]
        write_lines(tmp_path / "turns.jsonl", data)
        argv = ["--dataset", "turns.jsonl", "--batch-size", "2", "--output", "x.jsonl"]
        assert self.run(*argv) == 1  # the row without turns fails, the others do not
        whole = [(tmp_path / name).read_bytes() for name in ("x.jsonl", "x.diagnostics.jsonl")]
        assert [line["prompt_index"] for line in lines(tmp_path / "x.errors.jsonl")] == [1]
        (tmp_path / "x.jsonl").write_bytes(whole[0][: len(whole[0]) // 2])
        assert self.run(*argv) == 1
        assert (tmp_path / "x.jsonl").read_bytes() == whole[0]
        assert json.loads(whole[0].splitlines()[0])["messages"][2]["content"] == "And now?"

    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            (["--speculate", "4"], "--speculate is of --backend transformers"),
            (["--t-hint-field", "solution"], "use --backend transformers"),
            (["--t-system-prompt", "Be exact."], "use --backend transformers"),
            (["--t-template-kwargs", '{"effort": "low"}'], "use --backend transformers"),
            (["--device-map", "auto"], "--device-map is of --backend transformers"),
            (["--load-in-4bit"], "--load-in-4bit is of --backend transformers"),
            (["--vllm-options", "[1]"], "must be a JSON object"),
        ],
    )
    def test_refuses_in_one_line(self, argv, said, capsys):
        with pytest.raises(SystemExit) as stopped:
            self.run(*argv)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1

    def test_refuses_prompts_that_differ(self, capsys, tmp_path):
        (tmp_path / "other.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        assert self.run("--t-chat-template", "other.jinja", "--output", "x.jsonl") == 1
        error = capsys.readouterr().err
        assert "use --backend transformers for prompts that differ" in error
        assert error.count("\n") == 1


def test_killed_runs_go_on(tmp_path):
    """kill -9 twice, once with samples on disk: in the end every sample is there once, with its own noise."""
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": question} for question in QUESTIONS[:40]])
    command = ["--dataset", str(prompts), "--max-new-tokens", "12", "--samples-per-prompt", "4", "--batch-size", "1"]
    argv = [sys.executable, "-m", "qstar.generate", "--backend", "vllm", *command, "--save-diagnostics"]
    output, whole = tmp_path / "x.jsonl", tmp_path / "whole.jsonl"
    for wanted in (0, 30):
        process = subprocess.Popen([*argv, "--output", str(output)])
        while process.poll() is None and (len(output.read_bytes().splitlines()) if output.exists() else 0) < wanted:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert len(output.read_bytes().splitlines()) >= 30
    subprocess.run([*argv, "--output", str(output)], check=True)
    assert main([*command, "--save-diagnostics", "--output", str(whole)]) == 0
    for name in ("x.jsonl", "x.diagnostics.jsonl"):
        got, expected = lines(tmp_path / name), lines(tmp_path / name.replace("x.", "whole."))
        assert got == [approximately(line) for line in expected]


def approximately(value):
    """The value with its floats within 1e-4."""
    if isinstance(value, dict):
        return {key: approximately(v) for key, v in value.items()}
    if isinstance(value, list):
        return [approximately(v) for v in value]
    return pytest.approx(value, rel=1e-4, abs=1e-4) if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"no_such_option": 1}, "no_such_option"),
        ({"worker_cls": "auto"}, "worker_cls"),
        ({"max_model_len": 100_000}, "max_model_len"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "draws without drafts"),
        ({"data_parallel_size": 2}, "data_parallel_size must be 1"),
    ],
)
def test_what_vllm_refuses_is_said_in_one_line(options, said):
    pair = EnginePair(THETA, T, options=options)
    with pytest.raises(ValueError, match=said):
        pair.start()


def test_a_model_that_vllm_would_load_in_part_is_refused(tmp_path):
    """vLLM's Qwen2 takes the width of its heads from the hidden size, and the rows that fit from the checkpoint."""
    whole = write_model(tmp_path / "whole", LlamaConfig, SMALL, 2048, 1)
    part = write_model(tmp_path / "part", Qwen2Config, SMALL | {"head_dim": 64}, 2048, 1)
    with pytest.raises(ValueError, match=r"vLLM's Qwen2ForCausalLM holds [0-9]+ of the [0-9]+ parameters of .*part"):
        EnginePair(whole, part, options={"kv_cache_memory_bytes": 256 << 20}).start()


@pytest.mark.parametrize("side", ["theta", "t"])
def test_recurrent_layers_are_refused_in_one_line(side, tmp_path, capsys):
    """By the command line and by the server."""
    write_model(tmp_path / "recurrent", Mamba2Config, MAMBA, 2048, 1)
    models = {"theta": THETA, "t": T} | {side: tmp_path / "recurrent"}
    argv = [x for name, folder in models.items() for x in (f"--model-{name}", str(folder))]
    assert main([*argv, "--backend", "vllm", "--output", str(tmp_path / "x.jsonl")]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    said = f"{side} (mamba2) has recurrent layers, whose states a vLLM engine does not hold for two models; the transf"
    assert said in line
    with pytest.raises(SystemExit):
        serve(argv)
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {3: 1.0}}, "logit_bias"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"extra_args": {"qstar_method": "best"}}, "method is 'best'"),
        ({"watermarking": True}, "watermarking"),
        ({"logprob_token_ids": [5]}, "logprob_token_ids"),
        ({"temperature": 0.005}, "temperature is 0.01; a pair of models has it as qstar_temperature in extra_args"),
        ({"top_p": 0.9}, "top_p is 0.9; a pair of models has it as qstar_top_p"),
        ({"extra_args": {"qstar_temperature": 1e-7}}, r"temperature is 1e-07; it must be 0 \(greedy\), or in"),
        ({"extra_args": {"qstar_alpha": "0.5"}}, r"alpha is '0.5'; it must be in \[-100, 100\]"),
        ({"extra_args": {"qstar_alpha": [0.5]}}, "alpha is a list; it must be a single value"),
        ({"extra_args": {"qstar_top_k": 2.5}}, "top_k is 2.5; it must be an integer"),
        ({"extra_args": {"qstar_force_t_first_token": "no"}}, "force_t_first_token is 'no'; it must be true or false"),
        ({"extra_args": {"qstar_beta": 1}}, "qstar_beta is unknown"),
        ({"extra_args": {"qstar_seed": 1}, "n": 2}, "qstar_seed is that of one sample"),
        ({"extra_args": {"qstar_seed": "x"}}, "qstar_seed is 'x'"),
        (
            {"extra_args": {"qstar_seed": 2**63}},
            "qstar_seed is 9223372036854775808; it must be a whole number of 64 bits",
        ),
    ],
)
def test_requests_that_would_be_misunderstood_are_refused(demo_engine, params, said):
    params = SamplingParams(detokenize=False, **params)
    with pytest.raises(VLLMValidationError, match=said):
        demo_engine.engine.add_request("x", TokensPrompt(prompt_token_ids=[5]), params)


# Parameters of vLLM's that hold for a pair as for any model, or say nothing about the tokens
HELD = set(
    "n seed stop stop_token_ids ignore_eos max_tokens logprobs flat_logprobs detokenize skip_special_tokens "
    "spaces_between_special_tokens include_stop_str_in_output output_kind stream_interval skip_clone "
    "output_text_buffer_length _eos_token_id _all_stop_token_ids _watermarking_skipped extra_args _bad_words_token_ids "
    "skip_reading_prefix_cache repetition_detection routed_experts_prompt_start".split()
)


def test_every_parameter_of_vllms_is_known():
    """One that a new vLLM brings is to be looked at: does it change logits?"""
    assert set(SamplingParams.__struct_fields__) == HELD | UNSUPPORTED.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"logit_bias": {}},
        {"logit_bias": {5: 0.0}},
        {"bad_words": [], "logprob_token_ids": [], "presence_penalty": -0.0, "repetition_penalty": 1},
        {"watermarking": False, "thinking_token_budget": -1},
        {"temperature": 1, "top_k": -1, "top_p": 1, "min_p": 0},
    ],
    ids=str,
)
def test_parameters_that_do_nothing_are_accepted(params):
    PairParams.validate_params(SamplingParams(**params))


def test_a_request_that_says_nothing_has_what_the_engine_is_told():
    pair = {"rule": {"temperature": 0.005, "top_k": 7}, "vocab_size": 8, "special_ids": [0]}
    assert rule(SamplingParams(), pair).settings == Settings(temperature=0.005, top_k=7)
    own = SamplingParams(extra_args={"qstar_temperature": 1e6})
    assert rule(own, pair).settings == Settings(temperature=1e6, top_k=7)


@pytest.mark.parametrize(
    ("name", "batch", "expected"),
    [
        ("chatcmpl-a-1234abcd", False, (0, 0)),
        ("2_chatcmpl-a-1234abcd", False, (0, 2)),
        ("cmpl-a-3-1234abcd", False, (3, 0)),
        ("2_cmpl-a-3-1234abcd", False, (3, 2)),
        ("chatcmpl-a_3-1234abcd", True, (3, 0)),
        ("chatcmpl-a_3-1234abcd", False, (0, 0)),
        ("chatcmpl-a\n_5-b_3-1234abcd", True, (3, 0)),
        ("1_cmpl-a\nb-3-1234abcd", False, (3, 1)),
        ("anything\nat all", False, (0, 0)),
        ("anything", True, (0, 0)),
    ],
)
def test_a_name_says_which_prompt_and_sample_it_is(name, batch, expected):
    """Names are vLLM's around what a client has chosen."""
    assert place(name, batch) == expected
