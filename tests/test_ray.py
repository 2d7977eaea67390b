"""`--engine ray`: the samples of one process, whatever the number of workers, their deaths, and those of the run.

What a worker does is tested in this process, and with real workers once; nodes, kills and errors in the midst of a run
take minutes, and are `slow`.
"""

import argparse
import gzip
import json
import math
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import datasets
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from runs import lines, write_lines
from transformers import AutoModelForCausalLM

from qstar.analyze import main as analyze
from qstar.demo import PROMPTS, THETA, T
from qstar.generate import main as generate
from qstar.generate import prepare
from qstar.merge import main as merge
from qstar.run import cluster
from qstar.run.options import BLOCK_BATCHES, FORMATS
from qstar.run.output import OutputError
from qstar.run.parts import Parts

ROOT, INF = Path(__file__).parents[1], math.inf
# Ray's workers are nice by default, and would starve beside whatever else runs
ENVIRONMENT = os.environ | {"RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""}
# a cluster of this test's own, and nobody else's
ENVIRONMENT |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
JOB = ["--max-new-tokens", "16", "--batch-size", "2", "--save-diagnostics"]  # parts of 32 samples


def command(output: Path, *argv: str) -> list[str]:
    return [sys.executable, "-m", "qstar.generate", "--engine", "ray", "--output", str(output), *argv]


def on_ray(output: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(output, *argv), env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=600
    )


def one_line(done: subprocess.CompletedProcess) -> str:
    """What a failed run says, which is one line and no more."""
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def kill_all(pids: list[int]) -> None:
    """Kill -9 processes and all that they have started."""
    processes = [psutil.Process(pid) for pid in pids]
    processes += [child for process in processes for child in process.children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """200 prompts."""
    return write_lines(tmp_path_factory.mktemp("data") / "prompts.jsonl", (lines(PROMPTS) * 2)[:200])


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory, prompts) -> Path:
    path = tmp_path_factory.mktemp("one") / "x.jsonl"
    assert generate([*JOB, "--dataset", str(prompts), "--output", str(path)]) == 0
    return path


def check_equal(folder: Path, expected: Path) -> Path:
    """Merged, the folder is the single process's files, byte for byte; the merged file."""
    merged = folder.with_name(f"{folder.name}-merged{expected.suffix}")
    assert merge([str(folder), "--output", str(merged)]) == 0
    for suffix in (expected.suffix, ".diagnostics.jsonl", ".errors.jsonl"):
        ours, theirs = merged.with_suffix(suffix), expected.with_suffix(suffix)
        assert ours.exists() == theirs.exists()
        if suffix == ".parquet":
            assert pq.read_table(ours).equals(pq.read_table(theirs))
        elif ours.exists():
            assert ours.read_bytes() == theirs.read_bytes()
    return merged


def test_two_workers(by_one_process, prompts, tmp_path):
    folder = tmp_path / "out"
    done = on_ray(folder, *JOB, "--dataset", str(prompts), "--num-workers", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    print("\n".join(done.stdout.splitlines()[-2:]))
    for text in ("200 samples in", "by 2 workers", "s to start", "tokens/s", "|ΔKL|", "q*: "):
        assert text in done.stdout
    assert not re.search("INFO|WARNING|pid=|ray::", done.stdout), "Ray's own lines"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["parts"] == list(range(7))
    assert not any((folder / "attempts").iterdir())
    merged = check_equal(folder, by_one_process)
    read = datasets.load_dataset(
        "json", data_files=str(folder / "samples" / "*.jsonl"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert list(read) == list(lines(merged))


def in_this_process(folder: Path, *argv: str, attempts: dict[int, dict] | None = None) -> list[dict]:
    """What the reader and one worker do without Ray between them; what they tell of every part."""
    job = prepare([*argv, "--engine", "ray", "--output", str(folder)])
    size, told = BLOCK_BATCHES * job.args.batch_size, []
    with job.output as parts:
        for part, before in (attempts or {}).items():
            parts.write_attempts(part, before)
        worker = cluster.Worker(*cluster.for_workers(job))
        (task,) = cluster.PartSource(job.prompts, job.args.samples_per_prompt, size, parts.done).get_read_tasks(1)
        for table in task():
            told.append(json.loads(*worker({name: table[name].to_numpy() for name in table.column_names})["result"]))
            assert told[-1]["error"] is None
            parts.add(told[-1]["part"])
        parts.write_manifest(complete=True)
    return told


def rows_with_failures(path: Path) -> Path:
    """In one part and in the other, verl's own columns are of kinds that have one type together, or none."""
    kinds = [[1], {"a": 1}, 2, {"b": "c"}, [0.5], {}, "d", 2**53 + 1]
    rows = [{"prompt": row["question"], "n": i} for i, row in enumerate(lines(PROMPTS)[:20])]
    for i, row in enumerate(rows):
        row["extra_info"] = {"x": kinds[i % 8], "y": kinds[i // 8 * 2], "z": kinds[i // 8 * 2 + 1]}
    rows[1] = {"prompt": 5, "n": 1}
    rows[17] = {"prompt": "far too long " * 600, "n": 17}
    return write_lines(path, rows)


@pytest.mark.parametrize("form", list(FORMATS))
def test_parts_are_the_single_process_cut(form, tmp_path, monkeypatch, capsys):
    """With prompts that fail, drafts, two samples of each, and folders of models that are named from here. A single
    process can go on with the merged file."""
    monkeypatch.chdir(THETA.parent)
    expected = tmp_path / f"x{FORMATS[form]}"
    argv = ["--dataset", str(rows_with_failures(tmp_path / "data.jsonl")), "--samples-per-prompt", "2"]
    argv += ["--batch-size", "1", "--max-new-tokens", "4", "--speculate", "2", "--save-diagnostics"]
    argv += ["--output-format", form, "--model-theta", "./theta", "--model-t", "./t"]
    assert generate([*argv, "--output", str(expected)]) == 1
    told = in_this_process(tmp_path / "out", *argv)
    assert [result["failed"] for result in told] == [1, 0, 1]
    merged = check_equal(tmp_path / "out", expected)
    again = in_this_process(tmp_path / "out", *argv)  # those with failures, and no others
    assert [result["part"] for result in again] == [0, 2]
    check_equal(tmp_path / "out", expected)
    capsys.readouterr()
    if FORMATS[form] == ".jsonl":
        assert generate([*argv, "--output", str(merged)]) == 1
        assert "resuming: 36 samples are on disk" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_part_that_is_damaged_is_said_and_made_again(form, tmp_path, capsys):
    argv = ["--num-samples", "20", "--batch-size", "1", "--max-new-tokens", "4", "--save-diagnostics"]
    argv += ["--output-format", form, "--diagnostics-format", form]
    folder, merged = tmp_path / "out", tmp_path / f"x.{form}"
    in_this_process(folder, *argv)
    assert merge([str(folder), "--output", str(merged)]) == 0
    whole, good = merged.read_bytes(), tmp_path / "good"
    merged.unlink()
    assert merge([str(folder), "--output", str(folder / "samples" / f"part-000001.{form}")]) == 1
    assert "is among the parts" in capsys.readouterr().err
    for kind in ("samples", "diagnostics"):
        (folder / kind / f"part-000001 (copy).{form}").write_text("nothing of the run's")
    shutil.copytree(folder, good)
    samples, diagnostics = (folder / kind / f"part-000001.{form}" for kind in ("samples", "diagnostics"))

    def shorten(path: Path) -> None:
        if form == "parquet":
            pq.write_table(pq.read_table(path).slice(0, 1), path)
        else:
            write_lines(path, lines(path)[:1])

    for damage, said, of_reader in (
        (samples.unlink, "is not complete: 1 parts are there", "is not complete: 1 parts are there"),
        (diagnostics.unlink, f"{diagnostics} is not there, or not whole; remove {samples}", "cannot be read"),
        (lambda: shorten(samples), "does not belong to its diagnostics", f"3 samples of {diagnostics} are left out"),
        (lambda: shorten(diagnostics), "does not belong to its diagnostics", f"3 samples of {samples} are left out"),
        (
            lambda: os.truncate(samples, samples.stat().st_size - 1),
            f"{samples} is not there, or not whole",
            str(samples),
        ),
        (
            lambda: [shutil.copy(path.with_stem("part-000000"), path) for path in (samples, diagnostics)],
            "or to the other parts",
            "has sample '0-0', which is not of this part",
        ),
    ):
        damage()
        assert merge([str(folder), "--output", str(merged)]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not merged.exists()
        status = analyze([str(folder)])
        out, error = capsys.readouterr()
        assert of_reader in (error if status else out)
        samples.unlink(missing_ok=True)
        assert [result["part"] for result in in_this_process(folder, *argv)] == [1]
        assert merge([str(folder), "--output", str(merged)]) == 0
        assert merged.read_bytes() == whole
        merged.unlink()
        shutil.rmtree(folder)
        shutil.copytree(good, folder)


def test_workers_see_the_moment_of_the_first_start(tmp_path, loaded_once, demo_pair):
    """In their templates, at every start, and so does a single process that goes on with the merged file."""
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%Y-%m-%dT%H:%M:%S.%f') }} {{ messages[-1].content }}")
    argv = ["--num-samples", "40", "--batch-size", "1", "--max-new-tokens", "2", "--save-diagnostics"]
    argv += ["--theta-chat-template", str(template), "--t-chat-template", str(template)]
    folder, merged = tmp_path / "out", tmp_path / "x.jsonl"
    in_this_process(folder, *argv)
    moment = json.loads((folder / "manifest.json").read_text())["settings"]["first start"]
    for kind in ("samples", "diagnostics"):
        (folder / kind / "part-000001.jsonl").unlink()
    assert [result["part"] for result in in_this_process(folder, *argv)] == [1]
    assert merge([str(folder), "--output", str(merged)]) == 0
    for path in (merged, merged.with_suffix(".diagnostics.jsonl")):
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:30]))
    assert generate([*argv, "--output", str(merged)]) == 0
    seen = [demo_pair.tokenizer_t.decode(d["prompt_ids_t"]) for d in lines(merged.with_suffix(".diagnostics.jsonl"))]
    assert {text.split(" ")[0] for text in seen} == {moment}
    assert len(seen) == 40


def test_a_worker_that_finds_another_model_does_not_begin(tmp_path):
    """It came later, when the folder had been written again, or its node has a folder of its own."""
    policy = tmp_path / "policy"
    shutil.copytree(THETA, policy)
    job = prepare(
        ["--engine", "ray", "--output", str(tmp_path / "out"), "--model-theta", str(policy), "--model-t", str(T)]
    )
    with job.output:
        arguments = cluster.for_workers(job)
        assert cluster.Worker(*arguments).error is None
        shutil.copy(T / "model.safetensors", policy)
        assert f"{policy} on " in (error := cluster.Worker(*arguments).error)
    assert error.endswith("is not the model that the run was started with")


def test_a_worker_has_the_adapter_that_the_run_was_started_with(tmp_path, monkeypatch):
    """Named from where the command runs; another in its place is found out."""
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(THETA, dtype=torch.float32),
        LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    peft.save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    job = prepare(
        ["--engine", "ray", "--output", str(tmp_path / "out"), "--model-theta", "./adapter", "--model-t", str(THETA)]
    )
    with job.output:
        arguments = cluster.for_workers(job)
        monkeypatch.chdir("/")
        worker = cluster.Worker(*arguments)
        assert worker.error is None
        assert worker.pair.in_one_pass is not None
        (tmp_path / "adapter" / "README.txt").write_text("other")
        assert f"{tmp_path / 'adapter'} on " in (cluster.Worker(*arguments).error or "")


def test_a_part_with_errors_is_tried_again_until_it_has_none(tmp_path):
    (made := tmp_path / "made").mkdir()
    for name in ("x.jsonl", "x.errors.jsonl"):
        (made / name).write_text("{}\n")
    url = str(tmp_path / "out")
    with Parts(url, "jsonl", False, {}) as parts:
        parts.put_part(0, made)
    with Parts(url, "jsonl", False, {}) as parts:
        assert parts.done == set()
        (made / "x.errors.jsonl").unlink()
        parts.put_part(0, made)
    with Parts(url, "jsonl", False, {}) as parts:
        assert parts.done == {0}
        assert parts.numbers("errors") == set()


@pytest.mark.parametrize(
    ("attempts", "reasons"),
    [
        ({"starts": 3, "alone": {"0": 0, "1": 2, "2": 1}}, {1: "killed its worker 2 times"}),
        ({"starts": 5, "alone": {"0": 0}}, {}),
        (
            {"starts": 6, "alone": {"0": 0, "1": 0, "2": 0}},
            dict.fromkeys(range(3), "its part killed its worker 6 times, though this prompt does not do it alone"),
        ),
    ],
)
def test_prompts_that_kill_are_set_aside_and_the_others_as_ever(attempts, reasons, tmp_path, loaded_once):
    rows = [{"prompt": row["question"]} for row in lines(PROMPTS)[:3]]
    data = write_lines(tmp_path / "data.jsonl", rows)
    (told,) = in_this_process(tmp_path / "out", *JOB, "--dataset", str(data), attempts={0: attempts})
    assert told["failed"] == len(reasons)
    if reasons:
        errors = lines(tmp_path / "out" / "errors" / "part-000000.jsonl")
        assert {error["prompt_index"]: error["error"] for error in errors} == reasons
    assert not any((tmp_path / "out" / "attempts").iterdir())
    kept = [{"prompt": 5} if i in reasons else row for i, row in enumerate(rows)]
    data = write_lines(tmp_path / "kept.jsonl", kept)
    argv = [*JOB, "--dataset", str(data), "--prompt-field", "prompt", "--output", str(tmp_path / "x.jsonl")]
    assert generate(argv) == bool(reasons)
    samples = (tmp_path / "out" / "samples" / "part-000000.jsonl").read_bytes()
    assert samples == ((tmp_path / "x.jsonl").read_bytes() if len(reasons) < 3 else b"")


@pytest.mark.slow
def test_kills(by_one_process, prompts, tmp_path):
    """At least 10 workers killed and twice the whole run, at random moments: the same files, nothing doubled."""
    seed = int(os.environ.get("QSTAR_TEST_SEED", "0"))
    rng = random.Random(seed)
    print(f"seed {seed}")
    folder, killed, runs = tmp_path / "out", 0, 0
    while True:
        run = subprocess.Popen(
            command(folder, *JOB, "--dataset", str(prompts), "--num-workers", "2"), env=ENVIRONMENT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        wanted = (4, 8, 11)[runs] if runs < 3 else killed  # kills of workers by the end of this run
        while run.poll() is None and killed < wanted:
            time.sleep(rng.uniform(0.05, 0.3))
            # while a part is in the works
            if any((folder / "attempts").glob("*.json")):
                with suppress(psutil.NoSuchProcess):  # it ended between the look and the kill
                    workers = [p for p in psutil.Process(run.pid).children(recursive=True) if "MapWorker" in p.name()]
                    if workers:
                        rng.choice(workers).kill()
                        killed += 1
        if runs < 2 and run.poll() is None:
            time.sleep(rng.uniform(0, 3))
            kill_all([run.pid])
        error = run.communicate()[1]
        runs += 1
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, error
    print(f"{killed} workers killed, {runs - 1} whole runs")
    assert killed >= 10
    assert runs == 3
    check_equal(folder, by_one_process)


@pytest.mark.slow
def test_ctrl_c(by_one_process, prompts, tmp_path):
    """Ctrl-C reaches the whole group: one line, status 130, nobody is left, and the run goes on afterwards."""
    folder = tmp_path / "out"
    argv = command(folder, *JOB, "--dataset", str(prompts), "--num-workers", "2")
    with subprocess.Popen(
        argv, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # which a shell's background ignores
    ) as run:  # fmt: skip
        while run.poll() is None and not any((folder / "samples").glob("*.jsonl")):
            time.sleep(0.1)
        family = psutil.Process(run.pid).children(recursive=True)
        os.killpg(run.pid, signal.SIGINT)
        error = run.communicate(timeout=60)[1]
    assert run.returncode == 130, error
    assert error == "interrupted; start the same command again to go on\n"
    assert family
    assert psutil.wait_procs(family, timeout=20)[1] == []
    done = on_ray(folder, *JOB, "--dataset", str(prompts), "--num-workers", "2")
    assert done.returncode == 0, done.stderr
    assert "parts are complete" in done.stdout
    check_equal(folder, by_one_process)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """Two nodes with one CPU and one hub cache each, started with `ray start`; the cluster's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, address = [], f"127.0.0.1:{port}"
    hubs = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    ray = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--block",
        "--num-cpus=1",
        "--node-ip-address=127.0.0.1",
    ]
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # paths of sockets are short
        head = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}"]
        try:
            for hub, argv in zip(hubs, (head, [f"--address={address}"]), strict=True):
                environment = ENVIRONMENT | {"HF_HUB_CACHE": str(hub)}
                node = subprocess.Popen([*ray, *argv], env=environment, stdout=subprocess.PIPE, text=True)
                started.append(node)
                assert any("Ray runtime started" in line for line in node.stdout)
            yield address, *hubs
        finally:
            kill_all([node.pid for node in started])


@pytest.mark.slow
def test_two_nodes(nodes, by_one_process, prompts, tmp_path):
    """A model that the second node lacks ends the run with its reason; when it is there, the run goes on."""
    address, first, second = nodes
    snapshot = first / "models--some--policy" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for path in THETA.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    (first / "models--some--policy" / "refs").mkdir()
    (first / "models--some--policy" / "refs" / "main").write_text("0" * 40)
    argv = [*JOB, "--dataset", str(prompts), "--model-theta", "some/policy", "--model-t", str(T)]
    argv += ["--num-workers", "2", "--ray-address", address]
    said = one_line(on_ray(tmp_path / "out", *argv, HF_HUB_CACHE=str(first)))
    assert re.search(r"a worker on \S+ cannot load some/policy", said)
    (second / "models--some--policy").symlink_to(first / "models--some--policy")
    done = on_ray(tmp_path / "out", *argv, HF_HUB_CACHE=str(first))
    assert done.returncode == 0, done.stderr
    assert "by 2 workers" in done.stdout
    check_equal(tmp_path / "out", by_one_process)


MODELING = '''
import os, signal
from transformers import LlamaForCausalLM
class Fragile(LlamaForCausalLM):
    """Dies of one token, as others do of a kernel's bug."""
    def forward(self, input_ids=None, **kwargs):
        if (input_ids == POISON).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(input_ids=input_ids, **kwargs)
'''


@pytest.mark.slow
def test_a_prompt_that_kills_its_worker_is_set_aside(nodes, tmp_path, demo_pair):
    poison = demo_pair.tokenizer_theta("Freya")["input_ids"][0]
    model = tmp_path / "fragile"
    demo_pair.theta.save_pretrained(model)
    demo_pair.tokenizer_theta.save_pretrained(model)
    (model / "modeling_fragile.py").write_text(MODELING.replace("POISON", str(poison)))
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_fragile.Fragile"}
    (model / "config.json").write_text(json.dumps(config))
    prompts = ["Hi.", "Two and two?", "Freya has 2 jars.", "Ten less one?"]
    data = write_lines(tmp_path / "data.jsonl", [{"prompt": p} for p in prompts])
    argv = ["--model-theta", str(model), "--model-t", str(T), "--trust-remote-code", "--dataset", str(data)]
    done = on_ray(tmp_path / "out", *argv, "--max-new-tokens", "4", "--ray-address", nodes[0])
    assert done.returncode == 1
    assert done.stderr == ""
    assert "1 failed" in done.stdout
    (error,) = lines(tmp_path / "out" / "errors" / "part-000000.jsonl")
    assert error["prompt_index"] == 2
    assert error["error"] == "killed its worker 2 times"
    assert [line["prompt_index"] for line in lines(tmp_path / "out" / "samples" / "part-000000.jsonl")] == [0, 1, 3]


@pytest.mark.slow
def test_data_that_break_off(tmp_path):
    """What the reader says is told as it says it, and nothing of Ray's."""
    data = tmp_path / "data.jsonl.gz"
    data.write_bytes(gzip.compress(PROMPTS.read_bytes())[:-2000])
    argv = ["--dataset", str(data), "--num-samples", "100", *JOB, "--num-workers", "1"]
    error = one_line(on_ray(tmp_path / "out", *argv))
    assert re.search(r"error: --dataset '\S+data.jsonl.gz' breaks off after \d+ rows", error)
    assert "Traceback" not in error
    assert "ray::" not in error
    assert len(error) < 500


# as a full disk is found out: when what was written is to be kept
FULL_DISK = """
import errno, os
fsync = os.fsync
def full(descriptor):
    if "/samples/part-000001" in os.readlink(f"/proc/self/fd/{descriptor}"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync(descriptor)
os.fsync = full
"""


@pytest.mark.slow
def test_a_full_disk(nodes, by_one_process, prompts, tmp_path):
    """At the second part; then the same settings, to the end, and other settings, which are refused."""
    folder, own = tmp_path / "out", [*JOB, "--dataset", str(prompts), "--num-workers", "1"]
    (tmp_path / "sitecustomize.py").write_text(FULL_DISK)
    full = f"{tmp_path}{os.pathsep}{ROOT}"
    error = one_line(on_ray(folder, *own, PYTHONPATH=full))
    assert "the disk is full; the parts that are complete are safe" in error
    argv = [*own, "--ray-address", nodes[0]]
    kept = {path.name for path in (folder / "samples").glob("*.jsonl")}
    assert "part-000000.jsonl" in kept
    assert "part-000001.jsonl" not in kept
    before = (folder / "samples" / "part-000000.jsonl").stat().st_mtime_ns
    done = on_ray(folder, *argv)
    assert done.returncode == 0, done.stderr
    assert f"resuming: {len(kept)} parts are complete" in done.stdout
    assert (folder / "samples" / "part-000000.jsonl").stat().st_mtime_ns == before
    check_equal(folder, by_one_process)
    assert "--seed = 0 and this run has 5" in one_line(on_ray(folder, *argv, "--seed", "5"))
    assert "no node of the cluster has 1 GPUs" in one_line(on_ray(tmp_path / "b", *argv, "--gpus-per-worker", "1"))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--ray-address", "127.0.0.1:9"], "the Ray cluster at 127.0.0.1:9 cannot be reached"),
        (["--ray-address", "ray://127.0.0.1:9"], "Ray Client does not see this machine's files"),
        (["--ray-address", "nonsense"], "an address is HOST:PORT, or auto"),
        (["--output", "/proc/none"], "cannot write /proc/none"),
    ],
)
def test_what_cannot_start(argv, named, tmp_path, capfd):
    code = generate(["--engine", "ray", "--output", str(tmp_path / "out"), *argv])
    error = capfd.readouterr().err
    assert code == 1
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--num-workers", "2"], "--num-workers goes with --engine ray"),
        (["--engine", "ray", "--num-workers", "0"], "must be a whole number of at least 1"),
        (["--engine", "ray", "--output", __file__], "--engine ray writes parts into a folder"),
        (["--output", str(ROOT)], "or write parts with --engine ray"),
    ],
)
def test_wrong_arguments_get_one_line(argv, named, capsys):
    with pytest.raises(SystemExit) as exit:
        generate(argv)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("cpus", "places", "workers", "expected"),
    [
        ([2], [INF], 2, 1),
        ([2], [INF], 4, 0.5),
        ([1, 1], [INF, INF], 3, 0.5),
        ([64, 8], [INF, INF], 60, 1),
        ([0.5], [INF], 1, 0.5),
        ([8, 2], [0, 8], 8, 0.25),  # the CPUs of a node without GPUs are of no use
        ([0, 4], [8, 8], 16, 0),
    ],
)
def test_all_workers_find_a_place(cpus, places, workers, expected):
    share = cluster.cpus_a_worker([float(n) for n in cpus], places, workers)
    assert 0.88 * expected <= share <= expected
    if share:
        assert sum(min(room, int(n / share + 1e-9)) for n, room in zip(cpus, places, strict=True)) >= workers


def test_gpus_that_are_not_there_are_not_waited_for(monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}}, {"Alive": False, "Resources": {"GPU": 8.0}}]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)

    def pool(left=None, **options):
        args = argparse.Namespace(**({"num_workers": None, "gpus_per_worker": None} | options))
        return cluster.pool(args, left, Console(quiet=True))

    assert pool() == (4, {"num_cpus": 1.0, "num_gpus": 1.0})
    assert pool(left=3) == (3, {"num_cpus": 1.0, "num_gpus": 1.0})
    assert pool(left=0)[0] == 1
    assert pool(gpus_per_worker=0.0) == (8, {"num_cpus": 1.0, "num_gpus": 0.0})
    assert pool(gpus_per_worker=0.5) == (8, {"num_cpus": 1.0, "num_gpus": 0.5})
    assert pool(gpus_per_worker=0.3)[0] == 12  # three on each, and none on what is left of two
    assert pool(gpus_per_worker=2.0, num_workers=1)[0] == 1
    with pytest.raises(cluster.ClusterError, match="has 4 GPUs, for 2 of them"):
        pool(gpus_per_worker=2.0, num_workers=3)
    with pytest.raises(cluster.ClusterError, match="fractions below 1 and whole numbers"):
        pool(gpus_per_worker=1.5)
    with pytest.raises(cluster.ClusterError, match="no node of the cluster has 8 GPUs"):
        pool(gpus_per_worker=8.0)


def test_a_folder_that_the_nodes_do_not_share(tmp_path):
    with Parts(str(tmp_path / "out"), "jsonl", False, {}) as parts:
        with pytest.raises(OutputError, match="the nodes do not share that folder"):
            parts.add(0)
        assert parts.done == set()


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_parts_on_an_object_store(form, tmp_path, capsys):
    """Through fsspec's file system in memory, as on S3 or GCS: whole files only, and merged from there."""
    url = f"memory://bucket-{form}/run"
    suffix = {"jsonl": ".jsonl", "parquet": ".parquet"}[form]
    argv = ["--num-samples", "6", "--max-new-tokens", "8", "--output-format", form, "--save-diagnostics"]
    assert generate([*argv, "--output", str(tmp_path / f"x{suffix}")]) == 0
    with Parts(url, form, True, {"--seed": 0}) as parts:
        parts.put_part(0, tmp_path)
        parts.put_part(1, tmp_path / "nothing")  # all its prompts failed
        parts.write_attempts(2, {"starts": 1, "alone": {}})
        parts.done |= {0, 1}
        assert merge([url, "--output", str(tmp_path / "early")]) == 1
        assert "is not complete" in capsys.readouterr().err
        parts.write_manifest(complete=True)
    with Parts(url, form, True, {"--seed": 0}) as parts:
        assert parts.done == {0, 1}
        assert parts.attempts(2) == {"starts": 0, "alone": {}}  # of an earlier run: forgotten
        parts.write_manifest(complete=True)
    with pytest.raises(OutputError, match="--seed = 0 and this run has 1"), Parts(url, form, True, {"--seed": 1}):
        pass
    (tmp_path / "merged.errors.jsonl").write_text("of an earlier merge")
    assert merge([url, "--output", str(tmp_path / f"merged{suffix}")]) == 0
    assert not (tmp_path / "merged.errors.jsonl").exists()
    if form == "jsonl":
        assert (tmp_path / "merged.jsonl").read_bytes() == (tmp_path / "x.jsonl").read_bytes()
    else:
        assert pq.read_table(tmp_path / "merged.parquet").equals(pq.read_table(tmp_path / "x.parquet"))
    diagnostics = [(tmp_path / f"{name}.diagnostics.jsonl").read_bytes() for name in ("x", "merged")]
    assert diagnostics[0] == diagnostics[1]


def test_merge_of_what_is_no_run(tmp_path, capsys):
    assert merge([str(tmp_path), "--output", str(tmp_path / "x.jsonl")]) == 1
    assert "has no manifest.json" in capsys.readouterr().err
    good = {"complete": True, "format": "jsonl", "parts": [], "settings": {}}
    for other in ({"format": "csv"}, {"parts": ["0"]}, {"parts": 1}, {"settings": []}):
        (tmp_path / "manifest.json").write_text(json.dumps(good | other))
        assert merge([str(tmp_path), "--output", str(tmp_path / "x.jsonl")]) == 1
        assert "manifest.json is not a manifest" in capsys.readouterr().err
