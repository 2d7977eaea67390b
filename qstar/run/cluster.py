"""`python -m qstar.generate --engine ray`: the same samples by many workers, as one Ray Data job.

One task reads the prompts, on the machine that has them, and cuts them into parts; a pool of actors, each with a pair
of its own, makes them. Noise belongs to the sample, and a part is a block of the single-process run, so neither the
number of workers nor their deaths change anything. A worker that dies is replaced and its part begun again. In a part
that goes on killing workers every prompt is tried alone, and those that do it are set aside.
"""

import json
import logging
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, replace
from itertools import count, groupby
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
from rich.markup import escape

from qstar.backends import BACKENDS, load_pair
from qstar.data.prompts import PromptSource
from qstar.run.checkpoints import fingerprint, revision
from qstar.run.formats import Finished, verl_row
from qstar.run.generating import Generate, Todo, todo, total_samples
from qstar.run.job import Job, data_source, parts_of
from qstar.run.options import BLOCK_BATCHES
from qstar.run.output import Output, OutputError
from qstar.run.parts import Parts
from qstar.run.run import blocks, say_resuming
from qstar.run.summary import Summary, draft_table, progress_bar, tell
from qstar.speculate import Tally

STARTS = 3  # times a part is begun before its prompts are tried alone, and again after that
DEATHS = 2  # workers that a prompt may kill on its own before it is set aside
MANIFEST_SECONDS = 2.0
CONNECT_SECONDS, ANSWER_SECONDS = 5, 60


class ClusterError(ValueError):
    """The cluster is not there, or has not what the run needs; the message is one line."""


class PartSource(Datasource):
    """The parts that are still to be made, each a row of its number and its pickled samples to draw."""

    supports_distributed_reads = False  # the file is on this machine, maybe on no other

    def __init__(
        self, prompts: PromptSource, samples_per_prompt: int, size: int, done: set[int], regular: bool = False
    ):
        self.prompts, self.samples_per_prompt, self.size, self.done = prompts, samples_per_prompt, size, done
        self.regular = regular  # no row asks for samples of its own

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit=None, data_context=None) -> list[ReadTask]:
        def read() -> Iterator[pa.Table]:
            first = next(part for part in count() if part not in self.done) if self.regular else 0
            items_left = todo(self.prompts, self.samples_per_prompt, first * self.size)
            for part, items in enumerate(blocks(items_left, self.size), first):
                if part not in self.done:
                    yield pa.table({"part": [part], "items": [pickle.dumps(items)]})

        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(read, unknown)]


class OfPart(Generate):
    """The samples of a part, whose lines are rows already where the run writes for verl."""

    def line(self, done: Finished) -> dict[str, Any]:
        line, args = super().line(done), self.job.args
        return verl_row(line, data_source(args)) if args.output_format == "verl" else line


class Worker:
    """An actor with a pair; what is wrong with it is told with every part, and not as a death that would be retried."""

    def __init__(self, job: Job, models: Namespace):
        self.job, self.parts, self.error = job, job.output, None
        torch.set_num_threads(1)  # there is a worker for every core
        node = ray.util.get_node_ip_address()
        try:
            self.pair = load_pair(models)
            for name, known in models.fingerprints.items():
                if fingerprint(name) != known:
                    self.error = f"{name} on {node} is not the model that the run was started with"
        except Exception as error:  # whatever loading can raise: the driver stops the run with it
            self.error = f"a worker on {node} cannot load {job.args.model_theta} and {job.args.model_t}: {error}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        part, items = int(batch["part"][0]), pickle.loads(batch["items"][0])
        result = {"part": part, "error": self.error, "begun": time.time()}
        if self.error is None:
            try:
                result |= self.make(part, items)
            except torch.OutOfMemoryError:
                result["error"] = "out of memory on a worker; start again with a smaller --batch-size on a new --output"
            except (OutputError, OSError) as error:
                result["error"] = str(error)
            except Exception as error:  # whatever a model can raise; Ray would not pass on what it says
                result["error"] = f"{type(error).__name__}: {error}; the parts that are complete are kept"
        result["ended"] = time.time()
        return {"result": [json.dumps(result)]}

    def make(self, part: int, items: list[Todo]) -> dict[str, Any]:
        """Make a part and put it in its place: its summary, its drafts, and how many of its prompts failed."""
        attempts = self.parts.attempts(part)
        if attempts["starts"] >= STARTS:
            self.try_alone(part, items, attempts)
        aside = {item.prompt.index for item in items if attempts["alone"].get(str(item.prompt.index), 0) >= DEATHS}
        reason = f"killed its worker {DEATHS} times"
        if attempts["starts"] >= 2 * STARTS:
            aside = {item.prompt.index for item in items}
            reason = f"its part killed its worker {2 * STARTS} times, though this prompt does not do it alone"
        attempts["starts"] += 1
        self.parts.write_attempts(part, attempts)
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"x{self.parts.suffix('samples')}"
            form = "jsonl" if path.suffix == ".jsonl" else self.parts.format
            with Output(path, form, self.parts.save_diagnostics, {}, self.parts.diagnostics_format) as output:
                run = self.run(output)
                for item in items:
                    if item.prompt.index in aside:
                        run.fail(item.prompt, None, reason)
                for _ in run.write([item for item in items if item.prompt.index not in aside]):
                    pass
                output.finish(data_source(self.job.args))
            self.parts.put_part(part, Path(folder))
        self.parts.write_attempts(part, None)
        return {"summary": asdict(run.summary), "drafts": asdict(run.tally), "failed": len(output.errors)}

    def try_alone(self, part: int, items: list[Todo], attempts: dict[str, Any]) -> None:
        """Draw the samples of every prompt by themselves, and for nothing but to see which prompts the worker survives.

        `attempts["alone"]` has the deaths of each prompt that was begun: 0 once it has been survived.
        """
        alone = attempts["alone"]
        with TemporaryDirectory() as folder, Output(Path(folder) / "x.jsonl", "jsonl", False, {}) as output:
            run = self.run(output)
            for index, group in groupby(items, key=lambda item: str(item.prompt.index)):
                deaths = alone.get(index)
                if deaths == 0 or deaths == DEATHS:
                    continue
                alone[index] = (deaths or 0) + 1
                self.parts.write_attempts(part, attempts)
                for _ in run.finished(list(group)):
                    pass
                alone[index] = 0

    def run(self, output: Output) -> Generate:
        return OfPart(replace(self.job, output=output), self.pair, Console(quiet=True))


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Join the cluster at `address` (or of RAY_ADDRESS), or make one of this machine.

    Raises:
        ClusterError: it cannot be reached.
    """
    if ray.is_initialized():  # the caller's own
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        if address != "local":
            probe(address)
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        where = "Ray cannot be started" if address == "local" else f"the Ray cluster at {address} cannot be reached"
        raise ClusterError(f"{where}: {str(error).strip().split('. ')[0]}") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; Ray's own handler ends in an abort
    try:
        yield
    finally:
        ray.shutdown()


def probe(address: str) -> None:
    """See that a cluster answers: `ray.init` would wait for many minutes, and cannot be told not to.

    Raises:
        ConnectionError, OSError: none does.
        ValueError: it is no address, or one for Ray Client, whose reading tasks do not see this machine's files.
    """
    if address.startswith("ray://"):
        raise ValueError("Ray Client does not see this machine's files; run the command on a node of the cluster")
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError("an address is HOST:PORT, or auto")
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    join = [sys.executable, "-c", "import sys, ray; ray.init(sys.argv[1], log_to_driver=False)", address]
    try:
        done = subprocess.run(join, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    except subprocess.TimeoutExpired:
        raise ConnectionError(
            f"no answer in {ANSWER_SECONDS} s; if it wants a token, set RAY_AUTH_MODE=token"
        ) from None
    if done.returncode:
        raise ConnectionError(done.stderr.strip().splitlines()[-1])


@contextmanager
def only_our_lines() -> Iterator[None]:
    """Keep two things off the terminal: what Ray's C++ side writes to file descriptor 2 for Ray's developers, and Ray
    Data's warning that some workers have nothing to do."""
    saved, stderr = os.dup(2), sys.stderr
    with (
        os.fdopen(saved, "w") as sys.stderr,
        open(os.devnull, "w") as nowhere,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "The minimum number of concurrent actors")
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr = stderr
            os.dup2(saved, 2)


def gpu_places(gpus: float, per_worker: float) -> float:
    """Workers that the GPUs of a node have room for: those that share one GPU are on one whole, and not on two."""
    if per_worker == 0:
        return math.inf
    return int(gpus) * int(1 / per_worker + 1e-9) if per_worker < 1 else int(gpus / per_worker)


def cpus_a_worker(cpus: list[float], places: list[float], workers: int) -> float:
    """CPUs that a worker declares: the most, up to 1, with which all find a place on nodes with so many CPUs each, and
    places by their GPUs; 0 where that takes nodes without CPUs."""
    share = 1.0
    while sum(min(room, int(count / share + 1e-9)) for count, room in zip(cpus, places, strict=True)) < workers:
        share *= 0.9
        if share < 1e-4:  # what Ray rounds to
            return 0.0
    return math.floor(share * 1e4) / 1e4


def pool(args: Namespace, left: int | None, console: Console) -> tuple[int, dict[str, float]]:
    """How many workers for the parts that are left (None: not known), and what each of them declares.

    Raises:
        ClusterError: that many can never run at once.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = ([node.get(kind, 0.0) for node in nodes] for kind in ("CPU", "GPU"))
    per_gpu = args.gpus_per_worker if args.gpus_per_worker is not None else float(sum(gpus) > 0)
    if per_gpu > 1 and per_gpu != int(per_gpu):
        raise ClusterError(f"--gpus-per-worker {per_gpu:g}: Ray takes fractions below 1 and whole numbers")
    places = [gpu_places(count, per_gpu) for count in gpus]
    fit = sum(places) if per_gpu > 0 else max(1, int(sum(cpus)))
    workers = args.num_workers or fit
    if not fit:
        raise ClusterError(f"no node of the cluster has {per_gpu:g} GPUs; lower --gpus-per-worker")
    if per_gpu > 0 and workers > fit:
        raise ClusterError(
            f"{workers} workers with {per_gpu:g} GPUs each would be waited for without end: the cluster has "
            f"{sum(gpus):g} GPUs, for {fit} of them; lower --num-workers or --gpus-per-worker"
        )
    if left is not None:
        workers = min(workers, max(1, left))
    share = cpus_a_worker(cpus, places, workers)
    if share < 1:
        console.print(f"{workers} workers on {sum(cpus):g} CPUs: each declares {share:g}, so that all find a place")
    return workers, {"num_cpus": share, "num_gpus": per_gpu}


def for_workers(job: Job) -> tuple[Job, Namespace]:
    """The job, of an open output, without what stays here, and its arguments for loading the pair, with folders by
    their whole path."""
    models, parts = copy(job.args), job.output
    for name in ("model_theta", "model_t", "adapter_theta", "adapter_t", "draft"):
        folder = Path(getattr(models, name) or "no folder").expanduser()
        if folder.is_dir() and (name != "draft" or job.args.draft not in ("theta", "t")):
            setattr(models, name, str(folder.resolve()))
    models.fingerprints = {}
    for part, name in parts_of(models).items():
        known = parts.settings.get(f"weights of {part}", "")
        # of a model on the hub transformers loads the commit that is known
        if ":" in known and not (BACKENDS[models.backend].pins and revision(known)):
            models.fingerprints[name] = known
    url = str(Path(parts.place[1]).resolve()) if parts.is_local else parts.url
    of_worker = Parts(url, parts.format, parts.save_diagnostics, {}, parts.diagnostics_format)
    return replace(job.of_run(), prompts=None, output=of_worker), models


def generate_on_ray(job: Job) -> int:
    """Run `qstar.generate` on a cluster; 0 if every sample is there, 1 if a prompt failed.

    Raises:
        ClusterError: the cluster is not there, or has not what the run needs.
        OutputError: the run cannot go on; the message is one line.
    """
    console, start = Console(soft_wrap=True, quiet=job.args.quiet), time.time()
    try:
        with only_our_lines(), job.output as parts, cluster(job.args.ray_address):
            console.print(f"prompts: {job.prompts.description}", markup=False, highlight=False)
            return 1 if run(job, parts, console, start) else 0
    except ray.exceptions.RayError as error:
        # the first line of its `cause` is what the reader raised, the others are Ray's advice; the error itself can
        # be of the cause's kind, too, with a traceback as text
        if (cause := getattr(error, "cause", None)) is not None:
            reason = str(cause).splitlines()[0]
        else:
            reason = f"Ray gave up: {str(error).strip().splitlines()[-1]}"
        raise OutputError(f"{reason}; what is complete is kept") from error


def run(job: Job, parts: Parts, console: Console, start: float) -> int:
    """Make all parts that are missing; how many prompts failed. `start` is when the command was started.

    Raises:
        ClusterError: the cluster has no room for the workers.
        OutputError: a worker cannot go on; the message is its reason.
    """
    args, size = job.args, BLOCK_BATCHES * job.args.batch_size
    if parts.done:
        say_resuming(console, job, f"{len(parts.done)} parts are complete")
    total = total_samples(job)
    workers, declared = pool(args, total and math.ceil(total / size) - len(parts.done), console)
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = 1  # every part a block of its own, and so a task
    context.issue_detectors_config.detectors = []  # what it would advise on is settled here
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    regular = not args.use_request_parameters
    source = PartSource(job.prompts, args.samples_per_prompt, size, set(parts.done), regular)
    # The reader declares no CPU: it would wait for one that the workers hold, and they for it, without a word.
    made = ray.data.read_datasource(source, override_num_blocks=1, num_cpus=0).map_batches(
        Worker,
        fn_constructor_args=for_workers(job),
        batch_size=1,
        batch_format="numpy",
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        **declared,
    )
    summary, drafts, failures, noted = Summary(), Tally(), 0, time.time()
    at_work: list[tuple[float, float]] = []
    with progress_bar(console) as progress:
        task = progress.add_task("", total=total, completed=min(total or 0, len(parts.done) * size), figures="")
        for row in made.iter_rows():
            result = json.loads(row["result"])
            if result["error"] is not None:
                raise OutputError(result["error"])
            parts.add(result["part"])
            at_work.append((result["begun"], result["ended"]))
            failures += result["failed"]
            summary.merge(Summary(**result["summary"]))
            drafts.merge(Tally(**result["drafts"]))
            progress.update(task, advance=result["summary"]["samples"], figures=summary.figures(time.time() - start))
            if time.time() - noted > MANIFEST_SECONDS:
                parts.write_manifest(complete=False)
                noted = time.time()
    parts.write_manifest(complete=True)
    tell(console, summary, [draft_table(drafts, args.draft)] if drafts.drafted else [])
    by = f"{workers} worker{'s' if workers > 1 else ''}"
    console.print(f"\n{summary.samples} samples in {time.time() - start:.1f} s by {by}, in {escape(parts.url)}")
    if at_work:
        begun, ended = min(at_work)[0], max(end for _, end in at_work)
        share = sum(end - begin for begin, end in at_work) / workers / (ended - begun)
        console.print(
            f"{begun - start:.1f} s to start, and {ended - begun:.1f} s in which the workers were at work for "
            f"{share:.0%} of the time: {summary.samples / (ended - begun):.1f} samples/s"
        )
    if failures:
        reasons = escape(f"{parts.url}/errors")
        console.print(f"[bold]{failures} failed[/]; reasons in {reasons}, tried again at the next start")
    return failures
