"""`python -m qstar.score`: generate's own numbers again, answers of every schema, long sequences, resume, refusals."""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SHARED_DATA, lines, run_through_kills, write_lines
from test_decode import CONFIGS, random_model
from transformers import GPT2Config

import qstar.cache
import qstar.forced
from qstar import Pair
from qstar.analyze import main as analyze
from qstar.demo import PROMPTS, THETA, T
from qstar.forced import Scorer
from qstar.generate import main as generate
from qstar.run.options import DIAGNOSTICS_FORMATS, FORMATS
from qstar.run.records import RunFiles
from qstar.sample import DecodeOptions, Request, Sample
from qstar.score import main as score
from qstar.weights import effective_sample_size, log_weights, top_share, weights
from qstar_kernels import qstar_stats
from qstar_kernels.types import FIELDS, Settings

pytestmark = pytest.mark.usefixtures("loaded_once")

WAYS = {
    "plain": [],
    "tempered and truncated": ["--temperature", "0.7", "--top-p", "0.9", "--top-k", "50", "--min-p", "0.01"],
    "within π_t's support": ["--target-top-k", "20", "--target-top-p", "0.95", "--alpha-method", "ess_balance"],
    "clamped": ["--alpha-method", "reverse_kl_symmetry", "--alpha-max", "0.5"],
    "forced": ["--force-t-first-token", "--force-t-special-tokens", "--stop", "has"],
    "greedy": ["--temperature", "0"],
    "a hint": ["--model-theta", str(THETA), "--model-t", str(THETA), "--t-hint-field", "solution"],
    "speculative": ["--speculate", "4"],
}


@pytest.mark.parametrize("way", WAYS)
def test_generate_scored_gives_its_own_numbers(way, tmp_path):
    """With the run's options as the defaults, whatever they were."""
    options = ["--num-samples", "12", "--samples-per-prompt", "2", "--max-new-tokens", "40"]
    made, scored = tmp_path / "made.jsonl", tmp_path / "scored.jsonl"
    assert generate([*options, "--save-diagnostics", "--output", str(made), *WAYS[way]]) == 0
    assert score(["--dataset", str(made), "--batch-size", "7", "--output", str(scored)]) == 0
    assert scored.read_text() == made.read_text()
    before, after = (lines(path.with_suffix(".diagnostics.jsonl")) for path in (made, scored))
    for x, y in zip(before, after, strict=True):
        assert x["tokens"]["id"] == y["tokens"]["id"]
        assert x["prompt_ids_t"] == y["prompt_ids_t"]
        for name in FIELDS:
            a, b = (np.array([-math.inf if v is None else v for v in z["tokens"][name]]) for z in (x, y))
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("numbers", DIAGNOSTICS_FORMATS)
@pytest.mark.parametrize("form", list(FORMATS))
def test_every_format_is_scored_and_analyzed(form, numbers, tmp_path, capsys):
    """As the plain one, with later turns, a column that is in verl's way, and a prompt that was tried again; also
    without the journal, which may be deleted."""
    rows = [{"prompt": row["question"], "n": i} for i, row in enumerate(lines(PROMPTS)[:6])]
    rows[2] |= {"extra_info": {"id": "own", "sample_index": [3]}}
    rows[4]["prompt"] = ""
    data, made = write_lines(tmp_path / "data.jsonl", rows), {}
    for name, own in (("plain", ["jsonl", "jsonl"]), ("made", [form, numbers])):
        output = tmp_path / f"{name}{FORMATS[own[0]]}"
        argv = ["--dataset", str(data), "--max-new-tokens", "8", "--samples-per-prompt", "2", "--save-diagnostics"]
        argv += ["--output-format", own[0], "--diagnostics-format", own[1], "--output", str(output)]
        assert generate(argv) == 1
        made[name] = output
    (tmp_path / "made.journal.jsonl").unlink(missing_ok=True)
    plain, read = (list(RunFiles(path)) for path in made.values())
    for record in [*plain, *read]:
        for name in FIELDS:
            del record.diagnostics["tokens"][name]
    assert [record.diagnostics for record in read] == [record.diagnostics for record in plain]
    for one, other in zip(plain, read, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(one.arrays[name], other.arrays[name])
        if form == "openai-batch":
            assert one.line["messages"][-1:] == other.line["messages"]
        else:
            assert {k: v for k, v in one.line.items() if k != "metadata"} == {
                k: v for k, v in other.line.items() if k != "metadata"
            }
            if form == "parquet":
                assert one.line["metadata"] == other.line["metadata"]
    outputs = [tmp_path / f"{name}-scored.jsonl" for name in made]
    for path, output in zip(made.values(), outputs, strict=True):
        assert score(["--dataset", str(path), "--output", str(output)]) == 0
        assert RunFiles(output).drawn
    texts = [[line["messages"][-1] for line in lines(output)] for output in outputs]
    assert texts[0] == texts[1]
    weights = [output.with_suffix(".weights.jsonl").read_text() for output in outputs]
    assert weights[0] == weights[1]
    capsys.readouterr()
    assert analyze([str(made["made"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["samples"] == 10


@pytest.mark.parametrize("form", ["parquet", "verl"])
def test_a_table_that_is_not_there_yet_is_scored_by_its_journal(form, tmp_path):
    """As analyze and report read it; where there is no run of that name the file is missing."""
    output = tmp_path / "x.parquet"
    argv = ["--num-samples", "4", "--max-new-tokens", "8", "--save-diagnostics", "--output-format", form]
    assert generate([*argv, "--output", str(output)]) == 0
    output.unlink()
    assert score(["--dataset", str(output), "--output", str(tmp_path / "scored.jsonl")]) == 0
    assert len(lines(tmp_path / "scored.weights.jsonl")) == 4
    with pytest.raises(SystemExit):
        score(["--dataset", str(tmp_path / "y.parquet"), "--output", str(tmp_path / "z.jsonl")])


def test_answers_of_others_have_no_weights(tmp_path, capsys):
    """Those of a dataset, and those that another q* drew."""
    data = write_lines(tmp_path / "data.jsonl", lines(PROMPTS)[:6])
    made, cooler, others = (tmp_path / f"{name}.jsonl" for name in ("made", "cooler", "others"))
    assert generate(["--num-samples", "6", "--save-diagnostics", "--output", str(made)]) == 0
    assert RunFiles(made).drawn
    for argv in (["--dataset", str(made), "--temperature", "0.5"], ["--dataset", str(data)]):
        output = cooler if "0.5" in argv else others
        capsys.readouterr()
        assert score([*argv, "--output", str(output)]) == 0
        said = capsys.readouterr().out
        assert "q* did not draw these 6 answers" in said
        assert "effective" not in said
        assert "q*: " not in said
        assert not RunFiles(output).drawn
        assert analyze([str(output)]) == 0
        said = capsys.readouterr().out
        assert "q* did not draw these answers" in said
        assert "effective samples" not in said


def test_weights_of_a_file(tmp_path):
    made, scored = tmp_path / "made.jsonl", tmp_path / "scored.jsonl"
    generate(["--num-samples", "30", "--save-diagnostics", "--output", str(made)])
    assert score(["--dataset", str(made), "--clip", "2", "--output", str(scored)]) == 0
    found, numbers = lines(tmp_path / "scored.weights.jsonl"), lines(tmp_path / "scored.diagnostics.jsonl")
    assert [w["id"] for w in found] == [n["id"] for n in numbers]
    for side in ("theta", "t"):
        log_w = np.array([n[f"logp_{side}_sum"] - n["logq_sum"] for n in numbers])
        np.testing.assert_allclose([w[f"log_weight_{side}"] for w in found], log_w)
        np.testing.assert_allclose([w[f"clipped_weight_{side}"] for w in found], np.minimum(np.exp(log_w), 2))
        normal = np.exp(log_w) / np.exp(log_w).mean()
        np.testing.assert_allclose([w[f"normalised_weight_{side}"] for w in found], normal)
    assert max(w["clipped_weight_theta"] for w in found) == 2


def test_other_weights_than_those_that_drew(tmp_path, capsys):
    """A folder that was trained meanwhile: the numbers are the new weights', and it is said."""
    theta, made = tmp_path / "theta", tmp_path / "made.jsonl"
    shutil.copytree(THETA, theta)
    models = ["--model-theta", str(theta), "--model-t", str(T)]
    generate([*models, "--num-samples", "2", "--save-diagnostics", "--output", str(made)])
    assert score(["--dataset", str(made), "--output", str(tmp_path / "a.jsonl")]) == 0
    assert "Warning" not in capsys.readouterr().out
    path = theta / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert score(["--dataset", str(made), "--output", str(tmp_path / "b.jsonl")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the weights of theta are not those that the samples were drawn with" in said


def test_outside_the_support(tmp_path, capsys):
    """Scored under a narrower q* than the one that drew them, some samples are impossible: null, and said."""
    made, scored = tmp_path / "made.jsonl", tmp_path / "scored.jsonl"
    generate(["--num-samples", "30", "--save-diagnostics", "--temperature", "1.5", "--output", str(made)])
    capsys.readouterr()
    assert score(["--dataset", str(made), "--top-k", "2", "--temperature", "1", "--output", str(scored)]) == 0
    numbers = lines(tmp_path / "scored.diagnostics.jsonl")
    outside = sum(n["logq_sum"] is None for n in numbers)
    assert 0 < outside < len(numbers)
    assert all((n["logq_sum"] is None) == (None in n["tokens"]["logq"]) for n in numbers)
    assert sum(w["log_weight_theta"] is None for w in lines(tmp_path / "scored.weights.jsonl")) == outside
    assert f"{outside} samples have a token outside q*'s support" in capsys.readouterr().out


DATASETS = {
    "messages": {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "5"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "5"}]},
    "prompt and completion": {"prompt": "Hi.", "completion": "5"},
    "conversational": {
        "prompt": [{"role": "user", "content": "Hi."}], "completion": [{"role": "assistant", "content": "5"}],
    },
    "preference": {
        "prompt": [{"role": "user", "content": "Hi."}],
        "chosen": [{"role": "assistant", "content": "5"}], "rejected": [{"role": "assistant", "content": "6"}],
    },
    "alpaca": {"instruction": "Hi.", "input": "", "output": "5"},
    "question": {"question": "Hi.", "answer": "5"},
    "a number": {"problem": "Hi.", "answer": 5},
    "several answers": {"problem": "Hi.", "responses": ["5"]},
    "named": {"prompt": "Hi.", "body": {"text": "5"}},
}  # fmt: skip


def test_answers_of_every_schema(tmp_path, capsys):
    """The same prompt and answer from every schema: the same numbers."""
    sums = set()
    for schema, row in DATASETS.items():
        data = write_lines(tmp_path / "data.jsonl", [row])
        output = tmp_path / schema / "x.jsonl"
        extra = ["--response-field", "body.text"] if schema == "named" else []
        assert score(["--dataset", str(data), *extra, "--output", str(output)]) == 0, schema
        assert "the answer is" in capsys.readouterr().out
        (line,), (numbers,) = lines(output), lines(output.with_suffix(".diagnostics.jsonl"))
        assert line["messages"] == [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "5"}], schema
        assert line["finish_reason"] == "eos"
        assert numbers["num_tokens"] == 2
        sums.add(numbers["logq_sum"])
    assert len(sums) == 1


def test_several_answers_and_no_eos(tmp_path):
    rows = [{"prompt": "Hi.", "responses": ["5", "6", "7"]}]
    rows += [{"prompt": "Yes?", "responses": ["8"], "finish_reason": "length"}]
    data = str(write_lines(tmp_path / "data.jsonl", rows))
    assert score(["--dataset", data, "--output", str(tmp_path / "x.jsonl")]) == 0
    assert [line["id"] for line in lines(tmp_path / "x.jsonl")] == ["0-0", "0-1", "0-2", "1-0"]
    assert [n["num_tokens"] for n in lines(tmp_path / "x.diagnostics.jsonl")] == [2, 2, 2, 1]
    assert score(["--dataset", data, "--no-eos", "--output", str(tmp_path / "y.jsonl")]) == 0
    assert [n["num_tokens"] for n in lines(tmp_path / "y.diagnostics.jsonl")] == [1, 1, 1, 1]


NO_ANSWERS = {
    f"{name}.jsonl"
    for name in ("ifeval_input_data", "mt_bench_question", "trl_prompt_only", "trl_prompt_only_conversational")
}
NAMED = {"HumanEval.jsonl.gz": "canonical_solution", "torchtune_stack_exchange_paired_tiny.json": "response_j"}


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"{SHARED_DATA} is not there")
def test_every_real_file(tmp_path, capsys):
    """Every prompt file with answers; those without say so in one line."""
    scored = 0
    for path in sorted(p for p in SHARED_DATA.iterdir() if ".json" in p.name):
        extra = ["--response-field", NAMED[path.name]] if path.name in NAMED else []
        output = tmp_path / path.name.split(".")[0] / "x.jsonl"
        capsys.readouterr()
        argv = ["--dataset", str(path), *extra, "--num-samples", "3", "--output", str(output)]
        if path.name in NO_ANSWERS:
            with pytest.raises(SystemExit) as exit:
                score(argv)
            error = capsys.readouterr().err
            assert exit.value.code == 2
            assert "no answer recognised in the columns beside the prompt" in error
            assert error.count("\n") == 1
            continue
        code, errors = score(argv), output.with_suffix(".errors.jsonl")
        reasons = {line["error"] for line in lines(errors)} if errors.exists() else set()
        assert code == bool(reasons)
        assert all("the smaller context of the pair is" in r for r in reasons), (path.name, reasons)
        scored += 1
    print(f"{scored} files scored")
    assert scored >= 14


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_give_the_numbers_of_one_pass(name, monkeypatch, demo_pair):
    """Against a plain float64 pass without cache over the whole sequence, for every architecture, with chunks so short
    that prompts and answers take many, rows of different lengths, and one pair of equal models."""
    monkeypatch.setattr(qstar.forced, "CHUNK_TOKENS", 12)
    monkeypatch.setattr(qstar.cache, "PREFILL_COLUMNS", 5)
    theta = random_model(copy.deepcopy(CONFIGS[name]), seed=3)
    t = random_model(copy.deepcopy(CONFIGS[name]), seed=4)
    tokenizer, generator = demo_pair.tokenizer_theta, torch.Generator().manual_seed(5)

    def ids(count: int) -> list[int]:
        return torch.randint(2048, (count,), generator=generator).tolist()

    for other in (t, theta):
        pair = Pair(theta, other, tokenizer, tokenizer)
        sizes = [(3, 4, 1), (17, 2, 9), (5, 12, 30), (1, 1, 2), (9, 9, 17)]
        samples = [Sample(Request(i, ids(a), ids(b), 0, n), ids(n)) for i, (a, b, n) in enumerate(sizes)]
        settings = Settings(temperature=0.8)
        scored = list(Scorer(pair.decoder(DecodeOptions(settings, batch_size=3))).run(samples))
        assert {s.request.key for s in scored} == set(range(len(sizes)))
        for sample in scored:
            rows = []
            for model, prompt in ((theta, sample.request.ids_theta), (other, sample.request.ids_t)):
                with torch.inference_mode():
                    logits = copy.deepcopy(model).double()(torch.tensor([prompt + sample.token_ids])).logits[0]
                rows.append(logits[len(prompt) - 1 : -1, : pair.vocab_size])
            step = qstar_stats(*rows, tokens=torch.tensor(sample.token_ids), impl="reference", **vars(settings))
            for field in FIELDS:
                np.testing.assert_allclose(
                    sample.fields[field], getattr(step, field), atol=2e-4, rtol=1e-3, err_msg=field
                )


def test_a_short_answer_at_the_end_of_the_context(demo_pair):
    """It waits beside a longer one, for which there is no position behind the context to be read."""
    config = GPT2Config(vocab_size=2048, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model, tokenizer = random_model(config, seed=1), demo_pair.tokenizer_theta
    pair = Pair(model, model, tokenizer, tokenizer)
    requests = [Request(0, [5] * 60, [5] * 60, 0, 4), Request(1, [6] * 4, [6] * 4, 0, 60)]
    samples = [Sample(r, [7] * r.max_new_tokens) for r in requests]
    alone = [copy.deepcopy(s) for s in samples]
    list(Scorer(pair.decoder(DecodeOptions(batch_size=1))).run(alone))
    list(Scorer(pair.decoder(DecodeOptions(batch_size=2))).run(samples))
    for together, single in zip(samples, alone, strict=True):
        np.testing.assert_allclose(together.fields["logp_theta"], single.fields["logp_theta"], atol=1e-4)


@pytest.mark.slow
def test_memory_does_not_follow_the_length(tmp_path):
    """4 times the tokens take hardly more memory, for their keys and values: far less than their logits would. In
    processes of their own, for their peaks."""
    peaks = {n: peak_memory(n) for n in (1024, 4096)}
    print({n: f"{peak / 2**20:.0f} MiB" for n, peak in peaks.items()})
    logits = 2 * 4096 * 32000 * 4
    assert peaks[4096] - peaks[1024] < 0.1 * logits


def peak_memory(tokens: int) -> int:
    """Bytes that scoring one answer of so many tokens takes at its peak, beyond the models."""
    root = Path(__file__).parents[1]
    code = f"from bench.memory import score_peak; print(score_peak({tokens}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def test_kill_at_any_moment(tmp_path):
    argv = ["--dataset", str(PROMPTS), "--response-field", "solution", "--batch-size", "2"]
    assert score([*argv, "--output", str(tmp_path / "whole.jsonl")]) == 0
    written = [tmp_path / "x.jsonl", tmp_path / "x.diagnostics.jsonl"]
    run_through_kills(lambda: score([*argv, "--output", str(written[0])]), written, kills=8)
    for name in ("jsonl", "diagnostics.jsonl", "weights.jsonl"):
        assert (tmp_path / f"x.{name}").read_bytes() == (tmp_path / f"whole.{name}").read_bytes()


def test_a_template_sees_the_moment_of_the_first_start(tmp_path):
    template, data = tmp_path / "dated.jinja", tmp_path / "data.jsonl"
    template.write_text("{{ strftime_now('%H:%M:%S.%f') }} {{ messages[-1].content }}")
    write_lines(data, lines(PROMPTS)[:6])
    argv = ["--dataset", str(data), "--theta-chat-template", str(template), "--t-chat-template", str(template)]
    argv += ["--output", str(tmp_path / "x.jsonl")]
    assert score(argv) == 0
    files = [tmp_path / "x.jsonl", tmp_path / "x.diagnostics.jsonl"]
    whole = [path.read_bytes() for path in files]
    for path in files:
        path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert score(argv) == 0
    assert [path.read_bytes() for path in files] == whole


def test_failures_are_recorded_and_the_others_scored(tmp_path, capsys):
    answers = ["5", True, None, "", "long " * 600]
    rows = [{"prompt": "Hi.", "answer": answer} for answer in answers] + [{"prompt": "", "answer": "5"}]
    data = str(write_lines(tmp_path / "data.jsonl", rows))
    wanted = ("of type bool", "missing", "is empty", "the smaller context", "is empty")
    for _ in range(2):  # they fail again at the next start, and nothing is doubled
        assert score(["--dataset", data, "--output", str(tmp_path / "x.jsonl")]) == 1
        assert [line["id"] for line in lines(tmp_path / "x.jsonl")] == ["0-0"]
        errors = sorted(lines(tmp_path / "x.errors.jsonl"), key=lambda line: line["prompt_index"])
        assert all(part in line["error"] for part, line in zip(wanted, errors, strict=True)), errors


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "--dataset is missing"),
        (["--dataset", "nowhere.jsonl"], "no such file"),
        (["--dataset", "rows.jsonl"], "no answer recognised in the columns beside the prompt: `score`"),
        (["--dataset", "rows.jsonl", "--response-field", "x"], "--response-field 'x' is none of the columns"),
        (["--dataset", "made.jsonl", "--response-field", "x"], "are its own tokens"),
        (["--dataset", "made.jsonl", "--clip", "-1"], "--clip"),
    ],
)
def test_wrong_arguments_get_one_line(argv, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "Hi.", "score": 1}\n')
    generate(["--num-samples", "1", "--save-diagnostics", "--output", "made.jsonl"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        score(argv)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_tokens_of_another_vocabulary(tmp_path, capsys):
    generate(["--num-samples", "2", "--save-diagnostics", "--output", str(tmp_path / "made.jsonl")])
    path = tmp_path / "made.diagnostics.jsonl"
    changed = lines(path)
    changed[1]["tokens"]["id"][0] = 99999
    write_lines(path, changed)
    assert score(["--dataset", str(tmp_path / "made.jsonl"), "--output", str(tmp_path / "x.jsonl")]) == 1
    (error,) = lines(tmp_path / "x.errors.jsonl")
    assert "beyond the pair's vocabulary of 2048" in error["error"]
    path.write_text(path.read_text() + "{}\n")
    Path(tmp_path / "made.jsonl").write_text((tmp_path / "made.jsonl").read_text() + "{}\n")
    assert score(["--dataset", str(tmp_path / "made.jsonl"), "--output", str(tmp_path / "y.jsonl")]) == 1
    assert "is not what qstar.generate or qstar.score writes" in capsys.readouterr().err


def test_a_run_that_is_not_whole(tmp_path, capsys):
    """What is left out is said, and no sample takes another's place."""
    made, numbers = tmp_path / "made.jsonl", tmp_path / "made.diagnostics.jsonl"
    generate(["--num-samples", "2", "--save-diagnostics", "--output", str(made)])
    samples, diagnostics = lines(made), lines(numbers)
    write_lines(made, samples[:1])
    assert score(["--dataset", str(made), "--output", str(tmp_path / "x.jsonl")]) == 0
    assert f"note: 1 samples of {numbers} are left out" in capsys.readouterr().out
    write_lines(made, [*samples, samples[0]])
    write_lines(numbers, [*diagnostics, diagnostics[0]])
    assert score(["--dataset", str(made), "--output", str(tmp_path / "y.jsonl")]) == 1
    assert "has sample '0-0' twice" in capsys.readouterr().err
    write_lines(made, samples)
    for change, said in (
        ({"prompt_ids_t": []}, "the prompt has 0 tokens"),
        ({"prompt_ids_theta": [-1]}, "is not what qstar.generate or qstar.score writes"),
        ({"prompt_ids_theta": None}, "is not what qstar.generate or qstar.score writes"),
    ):
        write_lines(numbers, [diagnostics[0], diagnostics[1] | change])
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        assert score(["--dataset", str(made), "--output", str(output)]) == 1
        errors = output.with_suffix(".errors.jsonl")
        assert said in capsys.readouterr().err + (errors.read_text() if errors.exists() else "")


def test_log_weights():
    logp, logq = (
        torch.tensor([[-1.0, -2.0, -9.0], [-0.5, 0.0, 0.0]]),
        torch.tensor([[-2.0, -1.0, 0.0], [-1.0, 5.0, 5.0]]),
    )
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert log_weights(logp, logq, mask).tolist() == [0.0, 0.5]
    assert log_weights(logp, logq, mask, "geometric").tolist() == [0.0, 0.5]
    assert log_weights(logp, logq, mask, "token").tolist() == [[1.0, -1.0, 0.0], [0.5, 0.0, 0.0]]
    assert log_weights(logp, logq).tolist() == [-9.0, -9.5]
    with pytest.raises(ValueError, match="level is 'word'"):
        log_weights(logp, logq, level="word")
    with pytest.raises(ValueError, match="must be equal"):
        log_weights(logp, logq[:1])


def test_truncated_and_normalised_weights():
    log_w = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64).log()
    assert weights(log_w).tolist() == pytest.approx([1, 3, 0])
    assert weights(log_w, high=2.0).tolist() == pytest.approx([1, 2, 0])
    assert weights(log_w, low=0.8, high=1.2).tolist() == pytest.approx([1, 1.2, 0.8])
    assert weights(log_w, normalise=True).tolist() == pytest.approx([0.75, 2.25, 0])
    assert weights(log_w + 800, normalise=True).tolist() == pytest.approx([0.75, 2.25, 0])  # e^800 is no number
    assert effective_sample_size(log_w) == pytest.approx(16 / 10)
    assert effective_sample_size(torch.zeros(50) - 900) == pytest.approx(50)
    assert top_share(log_w, 0.01) == pytest.approx(0.75)
    assert top_share(torch.zeros(100), 0.1) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="0 ≤ low ≤ high"):
        weights(log_w, low=2.0, high=1.0)
