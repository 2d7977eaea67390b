"""`python -m qstar.generate` as users run it: outputs, resume, refusals, every schema."""

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
import torch
from runs import SHARED_DATA, lines, run_through_kills, write_lines
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qstar.decode
import qstar.pair
import qstar.run.checkpoints
import qstar.run.output
import qstar.sample
from qstar.data.prompts import Prompt
from qstar.demo import PROMPTS, THETA, T
from qstar.generate import main
from qstar.run.formats import Finished, sample_line
from qstar.run.output import Output, OutputError, check_settings
from qstar.score import main as score
from qstar_kernels.types import FIELDS

pytestmark = pytest.mark.usefixtures("loaded_once")
SHORT = ["--max-new-tokens", "24"]


def run(tmp_path: Path, *argv: str, name: str = "x.jsonl") -> int:
    return main(["--output", str(tmp_path / name), *SHORT, *argv])


def test_no_arguments_in_a_process_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qstar.generate"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for text in ("ESS ratio", "|ΔKL|", "0.2 to 0.8", "tokens/s", "q*: ", "128 samples in"):
        assert text in done.stdout
    (output,) = (tmp_path / "qstar-out").glob("*[0-9].jsonl")
    rows = lines(output)
    assert len(rows) == 128
    assert {row["prompt_index"] for row in rows} == set(range(128))
    row = rows[0]
    assert list(row) == ["id", "prompt_index", "sample_index", "messages", "finish_reason", "num_tokens", "metadata"]
    assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    assert set(row["metadata"]) == {"answer", "solution"}


def test_diagnostics_and_names_with_underscores(tmp_path):
    code = run(
        tmp_path, "--model_theta", str(THETA), "--model_t", str(T), f"--dataset={PROMPTS}", 
        "--alpha_method=kl_symmetry", "--num_samples", "6", "--samples-per-prompt", "2", "--save_diagnostics",
    )  # fmt: skip
    assert code == 0
    rows, diagnostics = lines(tmp_path / "x.jsonl"), lines(tmp_path / "x.diagnostics.jsonl")
    assert [r["id"] for r in rows] == [d["id"] for d in diagnostics]
    assert sorted(r["id"] for r in rows) == sorted(f"{i}-{j}" for i in range(6) for j in range(2))
    for row, d in zip(rows, diagnostics, strict=True):
        assert row["num_tokens"] == d["num_tokens"] == len(d["tokens"]["id"])
        assert all(len(values) == d["num_tokens"] for values in d["tokens"].values())
        assert d["logq_sum"] == pytest.approx(sum(d["tokens"]["logq"]), abs=1e-5)
        assert d["alpha_min"] <= d["alpha_mean"] <= d["alpha_max"]
        assert d["kl_gap_max"] < 1e-4
        assert d["ess_ratio_mean"] is not None
    assert set(diagnostics[0]["tokens"]) == {
        "id", "logq", "logp_theta", "logp_t", "alpha", "kl_theta", "kl_t", "ess_theta", "ess_t", "status",
    }  # fmt: skip


@pytest.mark.parametrize("output_format", ["parquet", "verl", "openai-batch"])
def test_formats(tmp_path, output_format):
    name = "x.jsonl" if output_format == "openai-batch" else "x.parquet"
    assert run(tmp_path, "--num-samples", "5", "--output-format", output_format, name=name) == 0
    run(tmp_path, "--num-samples", "5", name="plain.jsonl")
    plain = {row["id"]: row for row in lines(tmp_path / "plain.jsonl")}
    if output_format == "openai-batch":
        for line in lines(tmp_path / name):
            assert list(line) == ["id", "custom_id", "response", "error"]
            choice = line["response"]["body"]["choices"][0]
            assert choice["message"] == plain[line["custom_id"] + "-0"]["messages"][-1]
            content = choice["logprobs"]["content"]
            assert len(content) == line["response"]["body"]["usage"]["completion_tokens"]
            assert all(entry["logprob"] <= 0 for entry in content)
        return
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(rows) == 5
    for i, row in enumerate(rows):
        same = plain[f"{i}-0"]
        if output_format == "parquet":
            assert row | {"metadata": json.loads(row["metadata"])} == same
        else:
            assert row["prompt"] == same["messages"][:-1]
            assert row["response"] == same["messages"][-1]["content"]
            assert row["reward_model"] == {"style": "rule", "ground_truth": same["metadata"]["answer"]}
            assert row["extra_info"]["index"] == i
            assert row["data_source"] == "prompts"


def test_several_files_are_one_dataset(tmp_path, capsys):
    """What the files' rows in one file give, byte for byte; and no other order of them goes on with it."""
    (tmp_path / "data").mkdir()
    rows = [{"prompt": f"What is 2 + {i}?", "answer": str(2 + i)} for i in range(6)]
    whole = write_lines(tmp_path / "whole.jsonl", rows)
    write_lines(tmp_path / "data" / "b.jsonl", rows[2:4])
    with pyarrow.CompressedOutputStream(str(tmp_path / "data" / "a.jsonl.zst"), "zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows[:2]).encode())
    datasets.Dataset.from_list(rows[4:]).save_to_disk(str(tmp_path / "saved"))
    several = [str(tmp_path / name) for name in ("data", "saved")]
    assert run(tmp_path, "--dataset", str(whole), "--save-diagnostics", name="whole/x.jsonl") == 0
    argv = ["--save-diagnostics", "--dataset", *several]
    assert run(tmp_path, *argv, name="several/x.jsonl") == 0
    for name in ("x.jsonl", "x.diagnostics.jsonl"):
        assert (tmp_path / "several" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name, data in (("s", several), ("w", [str(whole)])):
        assert score(["--dataset", *data, "--output", str(tmp_path / f"{name}.jsonl")]) == 0
    assert (tmp_path / "s.jsonl").read_bytes() == (tmp_path / "w.jsonl").read_bytes()
    capsys.readouterr()
    assert run(tmp_path, "--save-diagnostics", "--dataset", *several[::-1], name="several/x.jsonl") == 1
    assert "was started with --dataset = [" in capsys.readouterr().err
    write_lines(tmp_path / "data" / "c.jsonl", rows[:1])
    assert run(tmp_path, *argv, name="several/x.jsonl") == 1
    assert "was started with dataset content = " in capsys.readouterr().err
    assert score(["--dataset", str(tmp_path / "several" / "x.jsonl"), "--output", str(tmp_path / "again.jsonl")]) == 0


def test_data_that_break_off(tmp_path, capsys):
    """A broken row is an error; where a file ends too soon the run ends in one line, and keeps what it has."""
    noise = random.Random(0)
    rows = [json.dumps({"prompt": f"What is {i} + 1?", "x": noise.randbytes(1024).hex()}) for i in range(200)]
    rows[0] = rows[0][:-2]
    data = tmp_path / "data.jsonl.gz"
    data.write_bytes(gzip.compress("\n".join(rows).encode())[:-5000])
    assert run(tmp_path, "--dataset", str(data), name="whole.jsonl") == 1
    assert "breaks off after" in capsys.readouterr().err
    assert not (tmp_path / "whole.jsonl").exists()  # so few rows are gone through at the start
    argv = ["--dataset", str(data), "--batch-size", "8", "--num-samples", "199"]
    assert run(tmp_path, *argv) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(r"data.jsonl.gz' breaks off after \d+ rows: EOFError", said)
    samples = lines(tmp_path / "x.jsonl")
    assert [line["prompt_index"] for line in samples] == list(range(1, len(samples) + 1))
    assert len(samples) > 30
    (error,) = lines(tmp_path / "x.errors.jsonl")
    assert error["metadata"] == {"row": rows[0]}
    assert run(tmp_path, *argv) == 1
    assert lines(tmp_path / "x.jsonl") == samples


@pytest.mark.parametrize("kills", [8, pytest.param(24, marks=pytest.mark.slow)])
def test_kill_at_any_moment(kills, tmp_path):
    """Kills -9 at random moments; then the files are byte for byte those of an uninterrupted run."""
    argv = [
        "--num-samples",
        "40",
        "--samples-per-prompt",
        str(kills // 4),
        "--save-diagnostics",
        "--batch-size",
        "2",
        "--seed",
        "3",
    ]
    assert run(tmp_path, *argv, name="whole/x.jsonl") == 0
    written = [tmp_path / "killed" / name for name in ("x.jsonl", "x.diagnostics.jsonl")]
    run_through_kills(lambda: run(tmp_path, *argv, name="killed/x.jsonl"), written, kills)
    for name in ("x.jsonl", "x.diagnostics.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_torn_line_is_repaired(tmp_path):
    argv = ["--num-samples", "8", "--save-diagnostics"]
    assert run(tmp_path, *argv) == 0
    files = tmp_path / "x.jsonl", tmp_path / "x.diagnostics.jsonl"
    whole = [f.read_bytes() for f in files]
    for cut_main, cut_diagnostics in ((5, 0), (0, 7), (3000, 10_000), (len(whole[0]), 0), (1, len(whole[1]))):
        for file, data, cut in zip(files, whole, (cut_main, cut_diagnostics), strict=True):
            file.write_bytes(data[: len(data) - cut])
        assert run(tmp_path, *argv) == 0
        assert [f.read_bytes() for f in files] == whole
    assert run(tmp_path, *argv) == 0  # complete: nothing to do
    assert [f.read_bytes() for f in files] == whole


def test_diagnostics_as_parquet(tmp_path, capsys):
    """The numbers of the lines, whenever it was cut, also between the table and its lines; a quarter of the space."""
    argv = ["--num-samples", "8", "--save-diagnostics", "--max-new-tokens", "20"]
    assert run(tmp_path, *argv, name="lines/x.jsonl") == 0
    argv += ["--diagnostics-format", "parquet"]
    assert run(tmp_path, *argv) == 0
    assert not (tmp_path / "x.diagnostics.jsonl").exists()
    table, of_lines = tmp_path / "x.diagnostics.parquet", tmp_path / "lines" / "x.diagnostics.jsonl"
    whole = pq.read_table(table)
    assert whole.column("logq_sum").to_pylist() == [line["logq_sum"] for line in lines(of_lines)]
    for row, line in zip(whole.to_pylist(), lines(of_lines), strict=True):
        for name in FIELDS:
            assert row["tokens"][name] == np.array(line["tokens"][name], dtype=np.float32).tolist()
    kept = of_lines.read_bytes().splitlines(keepends=True)
    samples = (tmp_path / "lines" / "x.jsonl").read_bytes().splitlines(keepends=True)
    for rows, of_run in ((8, kept), (5, kept[:5]), (5, kept[5:7]), (0, kept[:3])):
        pq.write_table(whole.slice(0, rows), table) if rows else table.unlink()
        (tmp_path / "x.diagnostics.jsonl").write_bytes(b"".join(of_run))
        (tmp_path / "x.jsonl").write_bytes(b"".join(samples[: max(rows, 7)]))
        assert run(tmp_path, *argv) == 0
        assert pq.read_table(table).equals(whole)
        assert (tmp_path / "x.jsonl").read_bytes() == b"".join(samples)
        assert not (tmp_path / "x.diagnostics.jsonl").exists()
    (tmp_path / "x.jsonl").write_bytes(b"".join(samples[1:]))
    capsys.readouterr()
    assert run(tmp_path, *argv) == 1
    assert "the files were changed" in capsys.readouterr().err


def test_samples_are_synced_together_and_in_time(tmp_path, monkeypatch):
    """One sync a file for what finished within a tenth of a second, and none counts before it."""
    synced, real = [], os.fsync
    sample = Finished(Prompt(0, "0", [], [], {}, None), 0, [], SimpleNamespace(finish_reason="eos", token_ids=[1]))
    with Output(tmp_path / "x.jsonl", "jsonl", False, {}) as output:
        monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(time.monotonic()), real(descriptor)))
        begun = time.monotonic()
        for i in range(20):
            done = replace(sample, sample_index=i)
            output.write(done, sample_line(done))
        assert len(output.done) == 0
        while len(output.done) < 20:
            assert time.monotonic() < begun + 10
            time.sleep(0.01)
        assert len(synced) == 1
        done = replace(sample, sample_index=20)
        output.write(done, sample_line(done))
        output.sync()
        assert len(synced) == 2
        for i in range(21, 21 + qstar.run.output.MOST):  # a long group does not wait
            done = replace(sample, sample_index=i)
            output.write(done, sample_line(done))
        assert len(output.done) >= qstar.run.output.MOST
    assert len(lines(tmp_path / "x.jsonl")) == 21 + qstar.run.output.MOST


def test_a_line_that_a_loss_of_power_left_is_made_again(tmp_path, capsys):
    argv = ["--num-samples", "8", "--save-diagnostics"]
    assert run(tmp_path, *argv) == 0
    files = tmp_path / "x.jsonl", tmp_path / "x.diagnostics.jsonl"
    whole = [f.read_bytes() for f in files]
    rows = [data.splitlines(keepends=True) for data in whole]
    for of_file in (0, 1):
        holed = list(rows[of_file])
        holed[5] = holed[5][:30] + b"\0" * 50 + holed[5][80:]
        files[of_file].write_bytes(b"".join(holed))
        if of_file == 1:
            files[0].write_bytes(b"".join(rows[0][:5]))
        assert run(tmp_path, *argv) == 0
        assert [f.read_bytes() for f in files] == whole
    files[0].write_bytes(b"".join([*rows[0][:3], b"{}\n", *rows[0][4:]]))
    capsys.readouterr()
    assert run(tmp_path, *argv) == 1
    assert "line 4 of" in capsys.readouterr().err


def test_other_settings_are_refused(tmp_path, capsys):
    assert run(tmp_path, "--num-samples", "4") == 0
    before = (tmp_path / "x.jsonl").read_bytes()
    for argv, named in (
        (["--num-samples", "5"], "--num-samples = 4 and this run has 5"),
        (["--num-samples", "4", "--temperature", "0.5"], "--temperature = 1.0 and this run has 0.5"),
        (["--num-samples", "4", "--model-theta", str(T), "--model-t", str(T)], "--model-theta"),
        (["--num-samples", "4", "--save-diagnostics"], "--save-diagnostics = False and this run has True"),
    ):
        capsys.readouterr()
        assert run(tmp_path, *argv) == 1
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
    (tmp_path / "x.run.json").unlink()
    assert run(tmp_path, "--num-samples", "4") == 1
    assert "cannot be resumed" in capsys.readouterr().err
    assert (tmp_path / "x.jsonl").read_bytes() == before


def test_changed_data_is_refused(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Hi."}\n')
    assert run(tmp_path, "--dataset", str(data)) == 0
    data.write_text('{"prompt": "Ho."}\n')
    assert run(tmp_path, "--dataset", str(data)) == 1
    assert "dataset content" in capsys.readouterr().err


def test_the_second_writer_is_refused(tmp_path, capsys):
    with Output(tmp_path / "x.jsonl", "jsonl", False, {}):
        ready = subprocess.run(
            [sys.executable, "-m", "qstar.generate", "--output", str(tmp_path / "x.jsonl")],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ready.returncode == 1
    assert "another process is writing" in ready.stderr
    assert ready.stderr.count("\n") == 1


def test_failures_are_recorded_and_tried_again(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "Hi."}], "n": 1},
        {"messages": [{"role": "assistant", "content": "Hello."}], "n": 2},
        {"messages": [{"role": "user", "content": "word " * 600}], "n": 3},
        {"messages": [{"role": "user", "content": "Ho."}], "n": 4},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        assert run(tmp_path, "--dataset", str(data), "--samples-per-prompt", "2") == 1
        assert "2 failed" in capsys.readouterr().out
        errors = lines(tmp_path / "x.errors.jsonl")
        assert [e["prompt_index"] for e in errors] == [1, 2]
        assert "user" in errors[0]["error"]
        assert "context of the pair is 512" in errors[1]["error"]
        assert sorted(row["id"] for row in lines(tmp_path / "x.jsonl")) == ["0-0", "0-1", "3-0", "3-1"]
        assert errors[1]["metadata"]["n"] == 3


def test_a_full_disk(tmp_path, monkeypatch, capsys):
    """The write fails half way: one clear line, whole lines on disk, and the same command finishes the run."""
    assert run(tmp_path, "--num-samples", "6", name="whole/x.jsonl") == 0
    real, written = os.fsync, []

    def fsync(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(qstar.run.output, "MOST", 1)  # a sample a group
    monkeypatch.setattr(os, "fsync", fsync)
    assert run(tmp_path, "--num-samples", "6") == 1
    error = capsys.readouterr().err
    assert "the disk is full; 3 samples are safe; start the same command again to go on" in error
    assert len(lines(tmp_path / "x.jsonl")) == 3
    monkeypatch.setattr(os, "fsync", real)
    assert run(tmp_path, "--num-samples", "6") == 0
    assert (tmp_path / "x.jsonl").read_bytes() == (tmp_path / "whole" / "x.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--alpha-method", "bisect"], "--alpha-method"),
        (["--alpha", "101"], "alpha is 101.0; it must be in [-100, 100]"),
        (["--top-p", "0"], "top_p is 0.0; it must be in (0, 1]"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--model-theta", "x"], "--model-t is missing"),
        (["--dataset", "missing.jsonl"], "missing.jsonl"),
        (["--num-samples", "0"], "must be a whole number of at least 1"),
        (["--t-chat-template", "missing.jinja"], "auto, none or a Jinja file"),
        (["--t-hint-field", "hints"], "the columns are"),
        (["--model-theta", ".", "--model-t", "."], "has no config.json"),
        (["--model-theta", "./nowhere", "--model-t", "."], "nowhere does not exist"),
        (["--device", "cpu", "--device-map", "auto"], "exclude each other"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_wrong_arguments_get_one_line(tmp_path, monkeypatch, capsys, argv, named):
    monkeypatch.setattr(qstar.pair.Pair, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert named in error
    assert error.count("\n") == 1


def test_hints_system_prompts_and_later_turns(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"turns": ["Hi.", "And now?"], "note": "3 + 4 = 7"}) + "\n")
    argv = ["--dataset", str(data), "--t-hint-field", "note", "--t-system-prompt", "Be short.", "--save-diagnostics"]
    assert run(tmp_path, *argv) == 0
    (row,) = lines(tmp_path / "x.jsonl")
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "user", "assistant"]
    assert row["messages"][2]["content"] == "And now?"
    (d,) = lines(tmp_path / "x.diagnostics.jsonl")
    from transformers import AutoTokenizer

    seen = AutoTokenizer.from_pretrained(T).decode(d["prompt_ids_t"])
    assert seen.startswith("<|system|>\nBe short.<|end|>")
    assert "And now?\n\nHint: 3 + 4 = 7" in seen
    assert "Hint" not in AutoTokenizer.from_pretrained(T).decode(d["prompt_ids_theta"])


def test_a_changed_line_is_refused(tmp_path):
    path = tmp_path / "x.jsonl"
    assert run(tmp_path, "--num-samples", "4") == 0
    data = path.read_bytes().splitlines(keepends=True)
    for broken in ([data[0], b"{}\n", *data[2:]], [data[0], data[0]]):
        path.write_bytes(b"".join(broken))
        assert run(tmp_path, "--num-samples", "4") == 1
        assert path.read_bytes() == b"".join(broken)
    (tmp_path / "x.run.json").write_text("{")
    with pytest.raises(OutputError, match="is not JSON"):
        Output(path, "jsonl", False, {}).__enter__()


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the folder of real prompt files is not beside this checkout")
def test_every_real_prompt_file(tmp_path, capsys):
    """Two samples of two prompts from each file; what is left over is recorded with a reason."""
    files = [p for p in sorted(SHARED_DATA.iterdir()) if p.suffix != ".md"]
    assert len(files) > 15
    for file in files:
        name = f"{file.name}/x.jsonl"
        code = run(tmp_path, "--dataset", str(file), "--num-samples", "2", "--samples-per-prompt", "2", name=name)
        written = lines(tmp_path / name) if (tmp_path / name).exists() else []
        errors_file = tmp_path / file.name / "x.errors.jsonl"
        errors = lines(errors_file) if errors_file.exists() else []
        with capsys.disabled():
            print(f"{file.name}: {len(written)} samples, {len(errors)} errors {[e['error'] for e in errors]}")
        assert written or errors
        assert code == bool(errors)


def test_a_prompt_that_fails_again_does_not_repeat_the_others(tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Hi."}\n' + json.dumps({"prompt": "word " * 600}) + "\n")
    assert run(tmp_path, "--dataset", str(data)) == 1
    monkeypatch.setattr(qstar.decode.Decoder, "run", lambda *_: pytest.fail("decoded again"))
    assert run(tmp_path, "--dataset", str(data), "--batch-size", "3") == 1
    assert len(lines(tmp_path / "x.jsonl")) == len(lines(tmp_path / "x.errors.jsonl")) == 1


def test_errors_survive_a_start_that_fails(tmp_path, monkeypatch):
    """A record is kept until its prompt has been tried again, and goes when that succeeds."""
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "Hi."}\n' + json.dumps({"prompt": "word " * 600}) + "\n")
    assert run(tmp_path, "--dataset", str(data)) == 1
    (recorded,) = lines(tmp_path / "x.errors.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(qstar.pair.Pair, "from_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("no model")))
        assert run(tmp_path, "--dataset", str(data)) == 1
    assert lines(tmp_path / "x.errors.jsonl") == [recorded]
    with (tmp_path / "x.errors.jsonl").open("a") as file:
        file.write('{"torn')
    with monkeypatch.context() as patch:
        patch.setattr(
            qstar.pair.Pair,
            "request",
            lambda self, key, messages, *rest, **more: qstar.sample.Request(key, [2], [2], 0, 3),
        )
        assert run(tmp_path, "--dataset", str(data)) == 0
    assert not (tmp_path / "x.errors.jsonl").exists()
    assert len(lines(tmp_path / "x.jsonl")) == 2


DATED = "{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }} {% for m in messages %}{{ m.content }}{% endfor %}"
MOMENT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}"


def cut(tmp_path: Path, name: str, count: int) -> None:
    """Leave the first `count` samples of a run."""
    for path in (tmp_path / name, (tmp_path / name).with_suffix(".diagnostics.jsonl")):
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:count]))


def test_a_template_sees_the_moment_of_the_first_start(tmp_path, demo_pair):
    """As long as the run takes, and however often it is resumed."""
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)
    argv = ["--num-samples", "6", "--save-diagnostics"]
    for side in ("theta", "t"):
        argv += [f"--{side}-chat-template", str(template)]
    assert run(tmp_path, *argv) == 0
    files = [tmp_path / "x.jsonl", tmp_path / "x.diagnostics.jsonl", tmp_path / "x.run.json"]
    whole = [file.read_bytes() for file in files]
    (moment,) = {
        re.match(MOMENT, demo_pair.tokenizer_theta.decode(d[f"prompt_ids_{side}"])).group()
        for d in lines(files[1])
        for side in ("theta", "t")
    }
    assert json.loads(whole[2])["first start"] == moment.replace(" ", "T")
    cut(tmp_path, "x.jsonl", 2)
    assert run(tmp_path, *argv) == 0
    assert [file.read_bytes() for file in files] == whole
    # an output that an earlier version began does not have it: templates see the time, as they did
    settings = json.loads(whole[2])
    del settings["first start"]
    files[2].write_text(json.dumps(settings))
    cut(tmp_path, "x.jsonl", 2)
    assert run(tmp_path, *argv) == 0
    assert files[1].read_bytes() != whole[1]
    assert len(lines(files[0])) == 6


@pytest.fixture
def policy(tmp_path) -> Path:
    """π_θ in float32, which has 4 MB."""
    folder = tmp_path / "policy"
    AutoModelForCausalLM.from_pretrained(THETA, dtype=torch.float32).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(THETA / file, folder)
    return folder


def train(policy: Path) -> None:
    """Overwrite the weights that are farther than 1 MB from both ends of their file, as a merged adapter may do."""
    path = policy / "model.safetensors"
    size, tensors = path.stat().st_size, load_file(path)
    data = path.read_bytes()
    first = 8 + int.from_bytes(data[:8], "little")
    places = {name: t["data_offsets"] for name, t in json.loads(data[8:first]).items() if name != "__metadata__"}
    inside = [n for n, (start, end) in places.items() if first + start > 1 << 20 and first + end < size - (1 << 20)]
    assert inside
    for name in inside:
        tensors[name] *= 1.5
    save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == size


def test_a_policy_that_was_trained_meanwhile_is_refused(tmp_path, policy, capsys):
    argv = ["--num-samples", "4", "--save-diagnostics", "--model-theta", str(policy), "--model-t", str(T)]
    assert run(tmp_path, *argv) == 0
    whole = (tmp_path / "x.jsonl").read_bytes()
    cut(tmp_path, "x.jsonl", 2)
    moved = shutil.copytree(policy, tmp_path / "copy")
    shutil.rmtree(policy)
    shutil.copytree(moved, policy)
    assert run(tmp_path, *argv) == 0
    assert (tmp_path / "x.jsonl").read_bytes() == whole
    train(policy)
    capsys.readouterr()
    assert run(tmp_path, *argv) == 1
    error = capsys.readouterr().err
    assert "was started with weights of theta = 'sha256:" in error
    assert error.count("\n") == 1
    assert (tmp_path / "x.jsonl").read_bytes() == whole


@pytest.mark.parametrize("before", ["4b118121a9b7a2b597f8d2842c127e65d6602b88bd0eee5851703b0cb06b67e0", "some/model"])
def test_an_earlier_version_looked_at_less(tmp_path, capsys, before):
    """Its fingerprints, the digest of a file's ends and a hub model's name, do not say what is asked."""
    assert run(tmp_path, "--num-samples", "2") == 0
    settings = json.loads((tmp_path / "x.run.json").read_text())
    (tmp_path / "x.run.json").write_text(json.dumps(settings | {"weights of theta": before}))
    capsys.readouterr()
    assert run(tmp_path, "--num-samples", "2") == 1
    error = capsys.readouterr().err
    assert "not every tensor" in error
    assert error.count("\n") == 1


def test_large_weights_written_meanwhile_are_pointed_out(tmp_path, policy, capsys, monkeypatch):
    """Of a large model a sample is compared; a copy may not be refused, nor taken for granted."""
    monkeypatch.setattr(qstar.run.checkpoints, "WHOLE", 1 << 20)
    argv = ["--num-samples", "2", "--model-theta", str(policy), "--model-t", str(policy)]
    assert run(tmp_path, *argv) == 0
    assert run(tmp_path, *argv) == 0
    assert "written after the first start" not in capsys.readouterr().out
    os.utime(policy / "model.safetensors")
    assert run(tmp_path, *argv) == 0
    assert "the weights of theta were written after the first start" in capsys.readouterr().out


def test_a_run_stays_with_the_commit_that_it_began_with(tmp_path, policy, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cache = tmp_path / "hub" / "models--some--policy"
    (cache / "refs").mkdir(parents=True)

    def publish(commit: str) -> None:
        shutil.copytree(policy, cache / "snapshots" / commit)
        (cache / "refs" / "main").write_text(commit)

    publish("a" * 40)
    argv = ["--num-samples", "6", "--save-diagnostics", "--model-theta", "some/policy", "--model-t", str(T)]
    assert run(tmp_path, *argv) == 0
    whole = (tmp_path / "x.jsonl").read_bytes()
    train(policy)
    publish("b" * 40)
    assert run(tmp_path, *argv, name="new/x.jsonl") == 0
    assert (tmp_path / "new" / "x.jsonl").read_bytes() != whole
    cut(tmp_path, "x.jsonl", 2)
    assert run(tmp_path, *argv) == 0
    assert (tmp_path / "x.jsonl").read_bytes() == whole
    assert json.loads((tmp_path / "x.run.json").read_text())["weights of theta"] == "commit:" + "a" * 40
    # its samples are scored by that commit, too
    scored = tmp_path / "scored.jsonl"
    assert score(["--dataset", str(tmp_path / "x.jsonl"), "--output", str(scored)]) == 0
    assert json.loads((tmp_path / "scored.run.json").read_text())["weights of theta"] == "commit:" + "a" * 40
    # a folder of that name is another model
    monkeypatch.chdir(tmp_path)
    shutil.copytree(policy, tmp_path / "some" / "policy")
    cut(tmp_path, "x.jsonl", 2)
    capsys.readouterr()
    assert run(tmp_path, *argv) == 1
    assert "was started with weights of theta = 'commit:aaaa" in capsys.readouterr().err


def test_an_unknown_commit_is_no_commit(tmp_path, capsys):
    """It equals itself whatever the model is by then."""
    assert run(tmp_path, "--num-samples", "2") == 0
    settings = json.loads((tmp_path / "x.run.json").read_text())
    unknown = {"weights of theta": "an unknown commit of some/model"}
    with pytest.raises(OutputError, match="its commit not known"):
        check_settings(tmp_path / "x.jsonl", settings | unknown, settings | unknown)
