"""`python -m qstar.generate --engine ray`: the same samples by many workers, as one Ray Data job.

One task reads the prompts, on the machine that has them, and cuts them into parts; a pool of actors, each with a pair
of its own, makes them. Noise belongs to the sample, and a part is a block of the single-process run, so neither the
number of workers nor their deaths change anything. A worker that dies is replaced and its part begun again. A part that
has killed its worker several times goes on prompt by prompt, and the prompt that does it is set aside.
"""

import json
import logging
import os
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from rich.console import Console

from qstar.arguments import Job
from qstar.data import PromptSource
from qstar.generate import Generate, todo
from qstar.output import Output, OutputError
from qstar.parts import Parts
from qstar.run import BLOCK_BATCHES, Summary, blocks, load_pair, progress_bar, tell

STARTS = 3  # times a part is begun as a whole before its prompts go one by one
DEATHS = 2  # workers that a prompt may kill on its own before it is set aside
READER_CPUS = 0.1  # what the reading task holds; the workers leave that much on every node
MANIFEST_SECONDS = 2.0


class ClusterError(RuntimeError):
    """The cluster is not there, or has not what the run needs; the message is one line."""


class PartSource(Datasource):
    """The parts that are still to be made, each a row of its number and its pickled samples to draw."""

    supports_distributed_reads = False  # the file is on this machine, maybe on no other

    def __init__(self, prompts: PromptSource, samples_per_prompt: int, size: int, done: set[int]):
        self.prompts, self.samples_per_prompt, self.size, self.done = prompts, samples_per_prompt, size, done

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit=None, data_context=None) -> list[ReadTask]:
        def read() -> Iterator[pa.Table]:
            for part, items in enumerate(blocks(todo(self.prompts, self.samples_per_prompt), self.size)):
                if part not in self.done:
                    yield pa.table({"part": [part], "items": [pickle.dumps(items)]})

        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, unknown)]


class Worker:
    """An actor with a pair; what is wrong with it is told with every part, and not as a death that would be retried."""

    def __init__(self, job: Job, threads: int):
        self.job, self.parts, self.error = job, job.output, None
        torch.set_num_threads(threads)
        try:
            self.pair = load_pair(job.args, job.args.draft)
        except Exception as error:  # whatever loading can raise: the driver stops the run with it
            self.error = f"a worker on {ray.util.get_node_ip_address()} cannot load the pair: {error}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        part, items = int(batch["part"][0]), pickle.loads(batch["items"][0])
        start, result = time.time(), {"part": part, "error": self.error}
        if self.error is None:
            try:
                result |= self.make(part, items)
            except torch.OutOfMemoryError:
                result["error"] = "out of memory on a worker; start again with a smaller --batch-size on a new --output"
            except (OutputError, OSError, MemoryError) as error:
                result["error"] = str(error)
        result["seconds"] = time.time() - start
        return {"result": [json.dumps(result)]}

    def make(self, part: int, items: list[Any]) -> dict[str, Any]:
        """Make a part and put it in its place: its summary, and how many of its prompts failed."""
        attempts = self.parts.attempts(part)
        attempts["starts"] += 1
        self.parts.write_attempts(part, attempts)
        one_by_one = attempts["starts"] > STARTS
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"x{Path(self.parts.path('samples', 0)).suffix}"
            with Output(path, self.parts.format, self.parts.save_diagnostics, {"part": part}) as output:
                run = Generate(replace(self.job, output=output), self.pair, Console(quiet=True))
                groups = groupby(items, key=lambda item: item.prompt.index) if one_by_one else [(None, items)]
                for index, group in groups:
                    if one_by_one and not self.survives(part, attempts, str(index)):
                        run.fail(next(group).prompt, None, f"killed its worker {DEATHS} times")
                        continue
                    for done in run.in_order(list(group)):
                        output.write(done, run.line(done))
                        run.summary.add(done)
                    if one_by_one:
                        attempts["prompts"][str(index)] = 0
                output.finish(Path(self.job.args.dataset or "prompts").stem)
            self.parts.put_part(part, Path(folder))
        self.parts.write_attempts(part, None)
        return {"summary": asdict(run.summary), "failed": len(output.errors)}

    def survives(self, part: int, attempts: dict[str, Any], index: str) -> bool:
        """Note that a prompt is begun on its own; False if it has killed too many workers that way."""
        deaths = attempts["prompts"].get(index, 0)
        if deaths >= DEATHS:
            return False
        attempts["prompts"][index] = deaths + 1
        self.parts.write_attempts(part, attempts)
        return True


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Join the cluster at `address` (or of RAY_ADDRESS), or make one of this machine.

    Raises:
        ClusterError: it cannot be reached.
    """
    if ray.is_initialized():  # the caller's own
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    try:
        if address is None:
            ray.init(include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        where = f"the Ray cluster at {address} cannot be reached" if address else "Ray cannot be started"
        raise ClusterError(f"{where}: {str(error).strip().splitlines()[0]}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def only_python_on_stderr() -> Iterator[None]:
    """Keep what Ray's C++ side writes to file descriptor 2 (advice to Ray's developers) off the terminal."""
    saved, stderr = os.dup(2), sys.stderr
    with os.fdopen(saved, "w") as sys.stderr, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr = stderr
            os.dup2(saved, 2)


def cpus_a_worker(cpus_of_nodes: list[float], workers: int) -> float:
    """CPUs that a worker declares: the most, up to 1, with which all workers find a place on the nodes and every node
    keeps something for reading. A pool that held every CPU would starve the reader, and the run would hang."""
    free = [max(0.0, cpus - READER_CPUS) for cpus in cpus_of_nodes]
    share = 1.0
    while sum(int(cpus / share + 1e-9) for cpus in free) < workers:
        share *= 0.9
    return round(share, 4)


def pool(args, console: Console) -> tuple[int, dict[str, float]]:
    """How many workers, and what each of them declares.

    Raises:
        ClusterError: that many can never run at once.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = ([node.get(kind, 0.0) for node in nodes] for kind in ("CPU", "GPU"))
    if sum(cpus) <= READER_CPUS:
        raise ClusterError("the Ray cluster declares no CPU; one is needed to read the prompts")
    per_gpu = args.gpus_per_worker if args.gpus_per_worker is not None else float(sum(gpus) > 0)
    if per_gpu > 1 and per_gpu != int(per_gpu):
        raise ClusterError(f"--gpus-per-worker {per_gpu:g}: Ray takes fractions below 1 and whole numbers")
    fit = int(sum(cpus)) or 1
    if per_gpu > 0:
        fit = sum(int(gpus_here / per_gpu + 1e-9) for gpus_here in gpus)
    workers = args.num_workers or fit
    if per_gpu > 0 and not fit:
        raise ClusterError(f"no node of the cluster has {per_gpu:g} GPUs; lower --gpus-per-worker")
    if per_gpu > 0 and workers > fit:
        raise ClusterError(
            f"{workers} workers with {per_gpu:g} GPUs each would be waited for without end: the cluster has "
            f"{sum(gpus):g} GPUs, for {fit} of them; lower --num-workers or --gpus-per-worker"
        )
    share = cpus_a_worker(cpus, workers)
    if share < 1:
        console.print(
            f"{workers} workers on {sum(cpus):g} CPUs: each declares {share:g}, so that the reader is not starved"
        )
    return workers, {"num_cpus": share, "num_gpus": per_gpu}


def for_workers(job: Job) -> Job:
    """The job without what stays here, and folders of models by their whole path."""
    args, parts = copy(job.args), job.output
    for name in ("model_theta", "model_t", "draft"):
        if (folder := Path(getattr(args, name)).expanduser()).is_dir():
            setattr(args, name, str(folder.resolve()))
    url = str(Path(parts.url).resolve()) if parts.is_local else parts.url
    return replace(job, args=args, prompts=None, output=Parts(url, parts.format, parts.save_diagnostics, {}))


def generate_on_ray(job: Job) -> int:
    """Run `qstar.generate` on a cluster; 0 if every sample is there, 1 with one line on stderr if something failed."""

    def failed(message: str) -> int:
        print(f"python -m qstar.generate: error: {' '.join(message.split())}", file=sys.stderr)
        return 1

    console = Console(soft_wrap=True)
    try:
        with only_python_on_stderr(), job.output as parts, cluster(job.args.ray_address):
            console.print(f"prompts: {job.prompts.description}", markup=False, highlight=False)
            return 1 if run(job, parts, console) else 0
    except (ClusterError, OutputError, ValueError, OSError) as error:
        return failed(str(error))
    except ray.exceptions.RayError as error:
        return failed(f"Ray gave up: {str(error).strip().splitlines()[-1]}; what is complete is kept")
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        return 130


def run(job: Job, parts: Parts, console: Console) -> int:
    """Make all parts that are missing; how many prompts failed.

    Raises:
        OutputError: a worker cannot go on; the message is its reason.
    """
    args, start = job.args, time.time()
    if parts.done:
        console.print(f"resuming: {len(parts.done)} parts are complete")
    workers, declared = pool(args, console)
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # every part a block of its own, and so a task
    context.issue_detectors_config.detectors = []  # what it would advise on is settled here
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    source = PartSource(job.prompts, args.samples_per_prompt, BLOCK_BATCHES * args.batch_size, set(parts.done))
    made = ray.data.read_datasource(source, override_num_blocks=1, num_cpus=READER_CPUS).map_batches(
        Worker,
        fn_constructor_args=(for_workers(job), max(1, int(declared["num_cpus"]))),
        batch_size=1,
        batch_format="numpy",
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        **declared,
    )
    total = args.num_samples or job.prompts.count()
    total = total and total * args.samples_per_prompt
    summary, failures, busy, noted = Summary(), 0, 0.0, time.time()
    with progress_bar(console) as progress:
        skipped = min(total or 0, len(parts.done) * BLOCK_BATCHES * args.batch_size)
        task = progress.add_task("", total=total, completed=skipped, figures="")
        for row in made.iter_rows():
            result = json.loads(row["result"])
            if result["error"] is not None:
                raise OutputError(result["error"])
            parts.done.add(result["part"])
            busy += result["seconds"]
            failures += result["failed"]
            summary.merge(Summary(**result["summary"]))
            progress.update(task, advance=result["summary"]["samples"], figures=summary.figures(time.time() - start))
            if time.time() - noted > MANIFEST_SECONDS:
                parts.write_manifest(complete=False)
                noted = time.time()
    parts.write_manifest(complete=True)
    tell(console, summary)
    seconds = time.time() - start
    console.print(
        f"\n{summary.samples} samples in {seconds:.1f} s by {workers} workers, which were at work for {busy:.1f} s: "
        f"{len(parts.done)} parts in {parts.url}"
    )
    if failures:
        console.print(f"[bold]{failures} failed[/]; reasons in {parts.url}/errors, tried again at the next start")
    return failures
