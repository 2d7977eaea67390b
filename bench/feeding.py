"""`python -m bench.feeding`: how many workers one run on Ray can feed: parts a second of reader, driver and store.

The workers are stubs that answer at a stated rate (`bench.stub`), on this machine; the reader, the driver's loop and
the manifest are those of `qstar.generate --engine ray`. First the reader and the store are timed by themselves, in this
process; then whole runs, by workers that could take more and more parts a second together, until no more are made, with
what a part took of a core in each of Ray's processes: their rate alone, on a machine with cores enough.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import numpy as np
import psutil
import pytest
from rich.console import Console

from bench.big_run import random_sample
from bench.stub import Stub
from qstar.generate import prepare
from qstar.run import cluster
from qstar.run.formats import Finished, diagnostics_line, sample_line
from qstar.run.job import Job
from qstar.run.output import json_line
from qstar.run.parts import Parts
from qstar.run.summary import Summary

PART = 256  # samples: batches of 16


def prompts(folder: Path, parts: int) -> Path:
    """Rows of about the length of GSM8K's."""
    path = folder / "prompts.jsonl"
    question = "Leo has 9 jars with 8 eggs in each and finds 5 more eggs every day of the week but Sunday. " * 3
    with path.open("w") as file:
        for i in range(parts * PART):
            file.write(json.dumps({"question": f"{question}How many are {i}?", "answer": f"#### {i}"}) + "\n")
    return path


def job_of(folder: Path, data: Path, name: str) -> Job:
    """That of a run on Ray."""
    return prepare(["--engine", "ray", "--dataset", str(data), "--save-diagnostics", "--output", str(folder / name)])


def content_of(job: Job) -> dict[str, bytes]:
    """The files of a part of 100 tokens a sample."""
    prompt, rng = next(iter(job.prompts)), np.random.default_rng(0)
    samples = [Finished(prompt, i, prompt.messages, random_sample(rng, 100)) for i in range(PART)]
    lines = {"diagnostics": diagnostics_line, "samples": sample_line}
    return {kind: b"".join(json_line(line(sample)) for sample in samples) for kind, line in lines.items()}


def reader_rate(job: Job, parts: int) -> float:
    """Parts that the reading task cuts in a second of one core."""
    (task,) = cluster.PartSource(job.prompts, 1, PART, set()).get_read_tasks(1)
    start = time.process_time()
    assert sum(1 for _ in task()) == parts
    return parts / (time.process_time() - start)


def store_rate(folder: Path, content: dict[str, bytes], parts: int = 50) -> float:
    """Parts a second that one process puts into a folder of this machine, synced."""
    with tempfile.TemporaryDirectory(dir=folder) as made, Parts(str(folder / "store"), "jsonl", True, {}) as store:
        for kind, data in content.items():
            (Path(made) / ("x.jsonl" if kind == "samples" else f"x.{kind}.jsonl")).write_bytes(data)
        start = time.perf_counter()
        for part in range(parts):
            store.put_part(part, Path(made))
        return parts / (time.perf_counter() - start)


def used() -> dict[str, float]:
    """Seconds of a core that the driver's process and those of Ray have taken, by name."""
    seconds = {"driver": time.process_time()}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            name = process.name() if process.name() in ("raylet", "gcs_server") else "workers and others"
            times = process.cpu_times()
            seconds[name] = seconds.get(name, 0.0) + times.user + times.system
    return seconds


def run_rate(
    job: Job, workers: int, seconds: float, content: dict[str, bytes] | None
) -> tuple[float, float, dict[str, float]]:
    """Parts a second of a run once its workers are there, the part of the time that they slept, and what a part took of
    a core, by process."""
    job.args.num_workers, told, taken = workers, [], []
    folder = str(Path(job.args.output).resolve()) if content else None
    skipped = 2 * workers  # while workers start

    def add(self: Parts, part: int) -> None:
        self.done.add(part)
        told.append(time.time())
        if len(told) == skipped:
            taken.append(used())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "Worker", Stub)
        patch.setattr(cluster, "for_workers", lambda _: (seconds, folder, content or {}, asdict(Summary(samples=PART))))
        patch.setattr(Parts, "add", add)
        with cluster.only_our_lines(), job.output as parts, cluster.cluster("local"):
            cluster.run(job, parts, Console(file=StringIO()), time.time())
            taken.append(used())
    count = len(told) - skipped
    rate = count / (told[-1] - told[skipped - 1])
    before, after = taken
    return rate, rate * seconds / workers, {name: (after[name] - before.get(name, 0)) / count for name in after}


def main(argv: list[str] | None = None) -> int:
    """Print the rates."""
    parser = argparse.ArgumentParser("python -m bench.feeding", description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--parts", type=int, default=600)
    parser.add_argument("--seconds", type=float, nargs="+", default=[16.0, 4.0, 1.0], help="that a part takes")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prompts(folder, args.parts)
        job = job_of(folder, data, "out")
        content = content_of(job)
        print(f"reader: {reader_rate(job, args.parts):.1f} parts/s of {PART} samples on one core", flush=True)
        print(f"store: {store_rate(folder, content):.1f} parts/s by one process, synced", flush=True)
        for number, seconds in enumerate(args.seconds):
            offered = args.workers / seconds
            for what, of_part in (("nothing stored", None), ("stored", content)):
                job = job_of(folder, data, f"out{number}{bool(of_part)}")
                rate, asleep, cores = run_rate(job, args.workers, seconds, of_part)
                of = f"{args.workers} workers of {seconds:g} s a part ({offered:.1f} parts/s), {what}"
                took = ", ".join(f"{name} {1e3 * x:.1f} ms" for name, x in cores.items())
                print(f"{of}: {rate:.1f} parts/s, at work {asleep:.0%} of the time; a part took {took}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
