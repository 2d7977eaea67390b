"""`--engine ray`: the samples of one process, whatever the number of workers, their deaths, and those of the run."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from runs import lines, write_lines

from qstar import cluster
from qstar.demo import THETA, T
from qstar.generate import main as generate
from qstar.merge import main as merge
from qstar.output import OutputError
from qstar.parts import Parts
from qstar.plan import main as plan

ROOT = Path(__file__).parents[1]
# Ray's workers are nice by default, and would starve beside whatever else runs
ENVIRONMENT = os.environ | {"RAY_worker_niceness": "0", "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("RAY_ADDRESS", None)
JOB = ["--num-samples", "100", "--samples-per-prompt", "2", "--max-new-tokens", "24", "--batch-size", "2"]


def command(output: Path, *argv: str) -> list[str]:
    return [sys.executable, "-m", "qstar.generate", "--engine", "ray", "--output", str(output), *argv]


def on_ray(output: Path, *argv: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(output, *argv), env=ENVIRONMENT, capture_output=True, text=True, timeout=600, **options
    )


def one_line(done: subprocess.CompletedProcess) -> str:
    """What a failed run says, which is one line and no more."""
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def by_one_process(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("one") / "x.jsonl"
    assert generate([*JOB, "--save-diagnostics", "--output", str(path)]) == 0
    return path


def check_equal(folder: Path, expected: Path) -> None:
    """Merged, the folder is the single process's files, byte for byte."""
    merged = folder.with_name(f"{folder.name}-merged.jsonl")
    assert merge([str(folder), "--output", str(merged)]) == 0
    for suffix in (".jsonl", ".diagnostics.jsonl"):
        assert merged.with_suffix(suffix).read_bytes() == expected.with_suffix(suffix).read_bytes()
    assert not merged.with_suffix(".errors.jsonl").exists()


def test_two_workers(by_one_process, tmp_path):
    """200 samples by two workers; then nothing is left to do, other settings are refused, and a single process goes on
    with the merged file."""
    folder = tmp_path / "out"
    done = on_ray(folder, *JOB, "--save-diagnostics", "--num-workers", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    print(done.stdout.splitlines()[-1])
    for text in ("2 workers on", "200 samples in", "by 2 workers", "7 parts in", "tokens/s", "|ΔKL|"):
        assert text in done.stdout
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["parts"] == list(range(7))
    assert not (folder / "attempts").exists() or not any((folder / "attempts").iterdir())
    check_equal(folder, by_one_process)
    done = on_ray(folder, *JOB, "--save-diagnostics", "--num-workers", "1")
    assert done.returncode == 0, done.stderr
    assert "0 samples in" in done.stdout
    assert "--seed = 0 and this run has 5" in one_line(on_ray(folder, *JOB, "--save-diagnostics", "--seed", "5"))
    argv = [*JOB, "--save-diagnostics", "--output", str(tmp_path / "out-merged.jsonl")]
    assert generate(argv) == 0
    check_equal(folder, by_one_process)


@pytest.mark.slow
def test_kills(by_one_process, tmp_path):
    """At least 10 workers killed and twice the whole run, at random moments: the same files, nothing doubled."""
    seed = int(os.environ.get("QSTAR_TEST_SEED", "0"))
    rng = random.Random(seed)
    print(f"seed {seed}")
    folder, killed, runs = tmp_path / "out", 0, 0
    while True:
        run = subprocess.Popen(
            command(folder, *JOB, "--save-diagnostics", "--num-workers", "2"), env=ENVIRONMENT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        wanted = (4, 8, 11)[runs] if runs < 3 else killed  # kills of workers by the end of this run
        while run.poll() is None and killed < wanted:
            time.sleep(rng.uniform(0.1, 0.6))
            ours = [p for p in psutil.Process(run.pid).children(recursive=True) if "MapWorker" in p.name()]
            started = [p for p in ours if any((folder / "attempts").glob("*.json"))]
            if started and rng.random() < 0.5:
                rng.choice(started).kill()
                killed += 1
                time.sleep(0.5)
        if runs < 2 and run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
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
def test_two_nodes(by_one_process, tmp_path):
    """Two `ray start` on this machine, a worker on each."""
    ray = [str(Path(sys.executable).with_name("ray"))]
    port, quiet = "26379", {"env": ENVIRONMENT, "check": True, "capture_output": True}
    subprocess.run([*ray, "start", "--head", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"], **quiet)
    try:
        subprocess.run([*ray, "start", f"--address=127.0.0.1:{port}", "--num-cpus=1"], **quiet)
        argv = [*JOB, "--save-diagnostics", "--num-workers", "2", "--ray-address", f"127.0.0.1:{port}"]
        done = on_ray(tmp_path / "out", *argv)
        assert done.returncode == 0, done.stderr
        assert "by 2 workers" in done.stdout
    finally:
        subprocess.run([*ray, "stop", "--force"], **quiet)
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
def test_a_prompt_that_kills_its_worker_is_set_aside(tmp_path, demo_pair):
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
    done = on_ray(tmp_path / "out", *argv, "--max-new-tokens", "4", "--num-workers", "1")
    assert done.returncode == 1
    assert "1 failed" in done.stdout
    (error,) = lines(tmp_path / "out" / "errors" / "part-000000.jsonl")
    assert error["prompt_index"] == 2
    assert error["error"] == "killed its worker 2 times"
    assert [line["prompt_index"] for line in lines(tmp_path / "out" / "samples" / "part-000000.jsonl")] == [0, 1, 3]


def test_errors_are_one_line_and_lose_nothing(tmp_path):
    """A model that no worker can load; a full disk at the second part; then the rest of the run."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in THETA.iterdir():
        if path.suffix != ".safetensors":
            (broken / path.name).write_bytes(path.read_bytes())
    done = on_ray(tmp_path / "a", "--model-theta", str(broken), "--model-t", str(T))
    assert "cannot load the pair" in one_line(done)
    folder = tmp_path / "b"
    (folder / "samples").mkdir(parents=True)
    (folder / "samples" / "part-000001.jsonl.tmp").symlink_to("/dev/full")
    argv = ["--num-samples", "48", "--batch-size", "1", "--max-new-tokens", "8", "--num-workers", "1"]
    assert "the disk is full; the parts that are complete are safe" in one_line(on_ray(folder, *argv))
    assert [path.name for path in (folder / "samples").glob("*.jsonl")] == ["part-000000.jsonl"]
    before = (folder / "samples" / "part-000000.jsonl").stat().st_mtime_ns
    (folder / "samples" / "part-000001.jsonl.tmp").unlink()
    done = on_ray(folder, *argv)
    assert done.returncode == 0, done.stderr
    assert "resuming: 1 parts are complete" in done.stdout
    assert (folder / "samples" / "part-000000.jsonl").stat().st_mtime_ns == before
    assert generate([*argv[:-2], "--output", str(tmp_path / "c.jsonl")]) == 0
    assert merge([str(folder), "--output", str(tmp_path / "d.jsonl")]) == 0
    assert (tmp_path / "d.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--ray-address", "127.0.0.1:9"], "the Ray cluster at 127.0.0.1:9 cannot be reached"),
        (["--output", "/proc/none"], "cannot write /proc/none"),
        (["--gpus-per-worker", "1"], "no node of the cluster has 1 GPUs"),
    ],
)
def test_what_cannot_start(argv, named, tmp_path):
    assert named in one_line(on_ray(tmp_path / "out", *argv))


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
    ("nodes", "workers"),
    [([2], 2), ([2], 7), ([1], 1), ([1, 1], 2), ([1, 1], 3), ([64, 8], 60), ([0.5], 3), ([4, 0], 4)],
)
def test_the_pool_leaves_room_for_the_reader(nodes, workers):
    share = cluster.cpus_a_worker([float(n) for n in nodes], workers)
    placed = [int((n - cluster.READER_CPUS) / share + 1e-6) if n > cluster.READER_CPUS else 0 for n in nodes]
    assert sum(placed) >= workers
    assert 0 < share <= 1


def test_gpus_that_are_not_there_are_not_waited_for(monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 4.0}}, {"Alive": False, "Resources": {"GPU": 8.0}}]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: nodes)

    def pool(**options):
        args = argparse.Namespace(**({"num_workers": None, "gpus_per_worker": None} | options))
        return cluster.pool(args, Console(quiet=True))

    assert pool() == (4, {"num_cpus": 1.0, "num_gpus": 1.0})
    assert pool(gpus_per_worker=0.5) == (8, {"num_cpus": pytest.approx(0.9, abs=0.1), "num_gpus": 0.5})
    assert pool(gpus_per_worker=2.0, num_workers=1)[0] == 1
    with pytest.raises(cluster.ClusterError, match="has 4 GPUs, for 2 of them"):
        pool(gpus_per_worker=2.0, num_workers=3)
    with pytest.raises(cluster.ClusterError, match="fractions below 1 and whole numbers"):
        pool(gpus_per_worker=1.5)


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
        parts.write_attempts(2, {"starts": 1, "prompts": {}})
        parts.done |= {0, 1}
        assert merge([url, "--output", str(tmp_path / "early")]) == 1
        assert "is not complete" in capsys.readouterr().err
        parts.write_manifest(complete=True)
    with Parts(url, form, True, {"--seed": 0}) as parts:
        assert parts.done == {0, 1}
        assert parts.attempts(2) == {"starts": 0, "prompts": {}}  # of an earlier run: forgotten
        parts.write_manifest(complete=True)
    with pytest.raises(OutputError, match="--seed = 0 and this run has 1"), Parts(url, form, True, {"--seed": 1}):
        pass
    assert merge([url, "--output", str(tmp_path / f"merged{suffix}")]) == 0
    if form == "jsonl":
        assert (tmp_path / "merged.jsonl").read_bytes() == (tmp_path / "x.jsonl").read_bytes()
    else:
        import pyarrow.parquet as pq

        assert pq.read_table(tmp_path / "merged.parquet").equals(pq.read_table(tmp_path / "x.parquet"))
    diagnostics = [(tmp_path / f"{name}.diagnostics.jsonl").read_bytes() for name in ("x", "merged")]
    assert diagnostics[0] == diagnostics[1]


def test_merge_of_what_is_no_run(tmp_path, capsys):
    assert merge([str(tmp_path), "--output", str(tmp_path / "x.jsonl")]) == 1
    assert "has no manifest.json" in capsys.readouterr().err


def test_plan(demo_pair, capsys):
    """By hand: the demo pair on a GPU of 1 GiB that reads 1 GB/s."""
    argv = ["--model-theta", str(THETA), "--model-t", str(T), "--gpu-memory", "1", "--bandwidth", "1"]
    assert plan([*argv, "--prompt-tokens", "100", "--new-tokens", "100", "--batch-size", "50", "--gpus", "3"]) == 0
    out = capsys.readouterr().out
    parameters = sum(p.numel() for p in demo_pair.theta.parameters())
    kv = 2 * 4 * 2 * 32 * 2 * 2  # both models: keys and values, layers, heads, size, bytes
    step = (2 * 2 * parameters + 50 * (kv * 150 + 2 * 2048 * 2)) / 1e9
    assert f"{step * 1e3:.2f} ms" in out
    assert f"{3 * 50 / step / 100:,.3g}" in out
    assert "A bound, not a measurement" in out
    assert plan([*argv, "--step-ms", "10", "--batch-size", "50", "--new-tokens", "100"]) == 0
    out = capsys.readouterr().out
    assert f"{50 / 0.01 / 100:,.3g} │" in out
    assert "measured, as you say" in out
    assert plan([*argv, "--batch-size", "100000000"]) == 1
    assert "rows do not fit" in capsys.readouterr().err
    assert plan(["--model-theta", "/nowhere/x", "--model-t", str(T)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
