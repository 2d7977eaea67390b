"""Runs as large as one likes without the models' time, and what reading them back takes.

    python -m bench.big_run make FOLDER --samples 200000 [--diagnostics-format parquet]
    python -m bench.big_run measure FOLDER

`make` writes what `qstar.generate` would have written with the demo pair: the same files, settings and fields, with
random numbers; diagnostics in Parquet are those of a run that came to its end. `measure` resumes the run to its first
new sample, with a run from the beginning beside it, analyzes it and makes its report, each in a process of its own, and
prints seconds and peak memory.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from qstar.generate import prepare
from qstar.run.formats import diagnostics_line, sample_line
from qstar.run.generating import Finished, Todo
from qstar.run.options import DIAGNOSTICS_FORMATS
from qstar.run.output import json_line
from qstar.sample import Request, Sample
from qstar_kernels.types import FIELDS

BLOCK = 256  # samples that a resumed run does together
DISTINCT = 2000  # samples with numbers of their own; the others repeat them under other ids


def arguments(folder: Path, samples: int, diagnostics_format: str | None = None) -> list[str]:
    """Those of the run, which has one block to go; the format where it has not begun."""
    data = ["--dataset", str(folder / "prompts.jsonl"), "--num-samples", str(samples + BLOCK)]
    if (started := folder / "x.run.json").exists():  # maybe from another checkout
        settings = json.loads(started.read_text())
        data += [part for name in ("--model-theta", "--model-t") for part in (name, settings[name])]
        diagnostics_format = settings["--diagnostics-format"]
    data += ["--diagnostics-format", diagnostics_format] if diagnostics_format else []
    return [*data, "--max-new-tokens", "100", "--save-diagnostics", "--output", str(folder / "x.jsonl")]


def random_sample(rng: np.random.Generator, tokens: int) -> Sample:
    """Numbers of about the shape and the digits that a real pair gives."""
    kl = rng.exponential(0.1, tokens)
    fields = {name: rng.exponential(0.3, tokens) for name in FIELDS}
    fields |= {name: -rng.exponential(1.5, tokens) for name in ("logq", "logp_theta", "logp_t")}
    fields |= {"alpha": rng.beta(8, 8, tokens), "kl_theta": kl, "kl_t": kl * (1 + 1e-6 * rng.normal(size=tokens))}
    fields |= {name: rng.uniform(0.5, 1, tokens) for name in ("ess_theta", "ess_t")}
    ids = rng.integers(3, 2000, tokens).tolist()
    request = Request(None, rng.integers(3, 2000, 40).tolist(), rng.integers(3, 2000, 40).tolist(), 0, tokens)
    fields = {name: values.astype(np.float32).tolist() for name, values in fields.items()}
    return Sample(
        request, ids, "an answer of some words " * (tokens // 5), "length", fields=fields, status=[0] * tokens
    )


def make(folder: Path, samples: int, tokens: int, diagnostics_format: str | None) -> None:
    """Write the run, without its last block."""
    folder.mkdir(parents=True)
    with (folder / "prompts.jsonl").open("w") as file:
        for i in range(samples + BLOCK):
            file.write(
                json.dumps({"prompt": f"How many eggs are {i} and {i % 7} eggs?", "answer": str(i + i % 7)}) + "\n"
            )
    job = prepare(arguments(folder, samples, diagnostics_format))
    with job.output:  # x.run.json
        pass
    rng, known = np.random.default_rng(0), []
    with job.output.path.open("wb") as lines, job.output.diagnostics_lines.open("wb") as diagnostics:
        for prompt in itertools.islice(job.prompts, samples):
            if len(known) < DISTINCT:
                sample = random_sample(rng, tokens)
                numbers = json_line(diagnostics_line(Finished(prompt, 0, [], sample)))
                known.append((sample, numbers[numbers.index(b', "num_tokens"') :]))
            sample, numbers = known[prompt.index % DISTINCT]
            messages = [*prompt.messages, {"role": "assistant", "content": sample.text}]
            done = Finished(prompt, Todo(prompt, 0).sample_index, messages, sample)
            lines.write(json_line(sample_line(done)))
            head = json.dumps({"id": done.id, "prompt_index": prompt.index, "sample_index": 0})
            diagnostics.write(head[:-1].encode() + numbers)
    job.output._finish_diagnostics()


def watched(argv: list[str], until=None) -> tuple[str, str]:
    """Run a module until it ends, or until `until()`: seconds and peak memory, and what it printed last."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start, peak = time.monotonic(), 0
    with subprocess.Popen([sys.executable, "-m", *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        watch = psutil.Process(process.pid)
        while process.poll() is None and not (until and until()):
            try:
                peak = max(peak, watch.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.01)
        seconds, ended = time.monotonic() - start, process.poll()
        process.kill() if until else process.wait()
        said = process.communicate()[0].decode().strip().splitlines()
    if ended or (until and ended is not None):
        raise RuntimeError(f"{argv[0]} ended with status {ended}: {said[-1:]}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return f"{seconds:.1f} s ({cpu:.1f} s of a CPU), {peak / 1e6:,.0f} MB", said[-1] if said else ""


def measure(folder: Path) -> None:
    """Seconds and peak memory of the three commands that read a run."""
    output = folder / "x.jsonl"
    samples = sum(1 for _ in output.open("rb"))
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:,.0f} MB" for path in sorted(folder.glob("x*")))
    print(f"{samples:,} samples: {sizes}")
    first = folder / "first.jsonl"
    argv = arguments(folder, samples)
    argv[argv.index("--output") + 1] = str(first)
    new = watched(["qstar.generate", *argv], lambda: first.exists() and first.stat().st_size)
    print(f"from the beginning, to the first sample: {new[0]}", flush=True)
    for path in folder.glob("first.*"):
        path.unlink()
    before = {path: path.stat().st_size for path in folder.glob("x*.jsonl")}
    new = watched(["qstar.generate", *arguments(folder, samples)], lambda: output.stat().st_size > before[output])
    for path in folder.glob("x*.jsonl"):
        os.truncate(path, before.get(path, 0))
    print(f"resume, to the first new sample: {new[0]}", flush=True)
    for command, *argv in (("analyze", "--json"), ("report", "--output", str(folder / "report.html"))):
        took, said = watched([f"qstar.{command}", str(output), *argv])
        print(f"{command}: {took}: {said[:100]}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Make a run, or measure what reads it."""
    parser = argparse.ArgumentParser("python -m bench.big_run", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("make", "measure"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
    commands.choices["make"].add_argument("--samples", type=int, default=20_000 // BLOCK * BLOCK)
    commands.choices["make"].add_argument("--tokens", type=int, default=100)
    commands.choices["make"].add_argument("--diagnostics-format", choices=DIAGNOSTICS_FORMATS)
    args = parser.parse_args(argv)
    if args.command == "make":
        make(args.folder, args.samples, args.tokens, args.diagnostics_format)
    else:
        measure(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
