"""Random rows, types, layouts and settings: every implementation against the reference, until time is up.

    python -m tests.fuzz --impl cpu --minutes 60 --seed 5
    python -m tests.fuzz --impl triton                  # in Triton's interpreter
    python -m tests.fuzz --impl triton --device cuda --copies 256
    python -m tests.fuzz --case '{"vocab_size": …}'     # one case again

A case (`cases`) is a dict of kinds, sizes and seeds that `rows_of` makes logits from; `disagreements` runs it and says
what is wrong. What goes wrong is shrunk by Hypothesis, printed as code that needs nothing of this file, and appended to
`fixtures/fuzz.jsonl`, which `test_fuzz.py` replays.

Cases run in a process of their own that leaves the case at hand on disk: one that never returns, or kills the process,
is a disagreement like any other.
"""

import argparse
import faulthandler
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz_cases import cases, of_one_row, reproduction
from tests.fuzz_compare import Disagreement, disagreements
from tests.interpreter import interpret_quickly

ROOT = Path(__file__).parents[1]
EXAMPLES = Path(__file__).with_name("fixtures") / "fuzz.jsonl"
CHUNK = 300  # cases that one run of Hypothesis makes
SHRINKING = 20.0  # seconds for each disagreement
OUR_FAULT = 3  # a worker's exit code; 1 is the watch's


class Watch:
    """Leaves the case at hand on disk and ends the process if its call does not return."""

    file: Path | None = None
    seconds = 30.0

    @classmethod
    @contextmanager
    def over(cls, case: dict):
        if cls.file is None:
            yield
            return
        cls.file.write_text(json.dumps(case))
        faulthandler.dump_traceback_later(cls.seconds, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


@cache
def wrong_as(kind: str) -> type[AssertionError]:
    """An exception for each kind of disagreement: Hypothesis shrinks within a type."""
    return type("Wrong", (AssertionError,), {"kind": kind})


def in_a_child(compare, case: dict, seconds: float) -> list[tuple[str, str]]:
    """`compare(case)` in a process of its own, whose end is a finding too."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        with os.fdopen(writer, "w") as pipe:
            json.dump(compare(case), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return [tuple(x) for x in json.loads(answer)]
    return [(fate(os.waitstatus_to_exitcode(status)), "")]


def fate(code: int) -> str:
    return "never returns" if code in (1, -signal.SIGALRM) else f"ends the process ({code})"


class Worker:
    """Runs chunks of cases, each a Hypothesis test of its own, and writes down what it finds."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder = options, options.worker
        self.known: set[str] = set(json.loads((self.folder / "known.json").read_text()))
        self.counts, self.kinds, self.proved = Counter(), Counter(), Counter()
        self.deadline = time.monotonic() + options.seconds

    def save(self) -> None:
        numbers = {"counts": self.counts, "kinds": self.kinds}
        temporary = self.folder / "counts.tmp"
        temporary.write_text(json.dumps(numbers))
        temporary.replace(self.folder / "counts.json")

    def chunk(self, number: int) -> None:
        """The cases of one Hypothesis run, until one disagrees in a way not seen yet, which is shrunk."""
        options, smallest, seen = self.options, {}, {}
        interpreted = options.impl == "triton" and options.device == "cpu"
        stop = math.inf

        def run(case: dict) -> list[tuple[str, str]]:
            return in_a_child(self.compare, case, options.patience) if options.isolated else self.compare(case)

        def compare(case: dict) -> list[tuple[str, str]]:
            key = json.dumps(case)
            if key not in seen:
                if time.monotonic() > stop:  # small enough; Hypothesis still wants to see the smallest case fail again
                    return []
                found = run(case)
                if not smallest:
                    if not options.isolated:  # these were counted before
                        self.count(case, found)
                    return found
                seen[key] = found
            return seen[key]

        @seed(options.seed * 1_000_003 + number)
        @settings(
            max_examples=CHUNK,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        @given(cases(options.impl, interpreted, options.copies))
        def test(case: dict) -> None:
            nonlocal stop
            if not smallest and time.monotonic() > self.deadline:
                return
            for kind, detail in (found := compare(case)):
                if kind not in self.known:
                    if not smallest:
                        stop = time.monotonic() + SHRINKING
                        seen[json.dumps(case)] = found
                    smallest[kind] = case, detail
                    raise wrong_as(kind)(kind)

        try:
            test()
        except AssertionError as error:
            if not hasattr(error, "kind"):
                raise
        for kind, (case, detail) in smallest.items():
            self.known.add(kind)
            self.write(kind, detail, alone_if_still_wrong(case, kind, run))

    def run(self, number: int) -> None:
        """Chunks from `number` on, one only if cases are isolated."""
        while time.monotonic() < self.deadline:
            (self.folder / "chunk").write_text(str(number))
            self.save()
            self.chunk(number)
            number += 1
            if self.options.isolated:
                break
        self.save()

    def replay(self, number: int) -> None:
        """The cases of the supervisor's list from `number` on."""
        for i, case in enumerate(json.loads((self.folder / "cases.json").read_text())[number:], number):
            (self.folder / "chunk").write_text(str(i))
            for kind, detail in self.compare(case):
                self.write(kind, detail, case)

    def write(self, kind: str, detail: str, case: dict) -> None:
        with (self.folder / "found.jsonl").open("a") as file:
            file.write(json.dumps({"impl": self.options.impl, "kind": kind, "detail": detail, "case": case}) + "\n")

    def compare(self, case: dict) -> list[tuple[str, str]]:
        """Kind and details of what is wrong."""
        self.proved = Counter()
        try:
            found = disagreements(case, self.options.impl, self.options.device, self.proved, partial(Watch.over, case))
        except Exception as error:  # what an implementation raises on a case that is right is a finding like any other
            found = [Disagreement(f"{type(error).__name__}: {str(error)[:60]}", 0, repr(error))]
        return [(x.kind, f"row {x.row}: {x.detail}") for x in found]

    def count(self, case: dict, found: list[tuple[str, str]]) -> None:
        self.counts.update(self.proved)
        self.counts["cases"] += 1
        self.counts["rows"] += len(case["rows"]) * case.get("copies", 1)
        self.counts["cases that disagree"] += bool(found)
        self.kinds.update(kind for kind, _ in found)
        if self.counts["cases"] % 50 == 0:
            self.save()


def alone_if_still_wrong(case: dict, kind: str, compare) -> dict:
    """The case with one row only, if that is wrong in the same way."""
    rows = len(case["rows"]) * case.get("copies", 1)
    for i in range(rows if rows > 1 and "only" not in case else 0):
        single = of_one_row(case, i)
        if any(found == kind for found, _ in compare(single)):
            return single
    return case


@dataclass
class Report:
    counts: Counter
    kinds: Counter
    found: list[dict]
    seconds: float

    def __str__(self) -> str:
        counts, minutes = self.counts, self.seconds / 60
        lines = [
            f"{counts['cases']} cases ({counts['rows']} rows) in {self.seconds:.0f} s: "
            f"{counts['cases'] / self.seconds:.0f} cases and {counts['rows'] / self.seconds:.0f} rows a second; "
            f"{counts['cases that disagree']} cases disagree; proved: {counts['ties']} tokens are ties, "
            f"{counts['tokens at a boundary']} rows have a token at a boundary of truncation; "
            f"{counts['rows refused as inexact']} rows refused as inexact, "
            f"{counts['rows all but refused']} by one side only, for want of digits"
        ]
        lines += [f"{n:6d} ({n / minutes:.1f} a minute)  {kind}" for kind, n in self.kinds.most_common()]
        return "\n".join(lines)


def environment_of(impl: str, device: str) -> dict[str, str]:
    more = {"TRITON_INTERPRET": "1"} if impl == "triton" and device == "cpu" else {}
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | more


def work(folder: Path, impl: str, device: str, *flags) -> subprocess.CompletedProcess:
    """One worker, until it ends or is ended."""
    command = [sys.executable, "-m", "tests.fuzz", "--worker", folder, "--impl", impl, "--device", device, *flags]
    return subprocess.run(
        [str(x) for x in command],
        cwd=ROOT,
        env=environment_of(impl, device),
        capture_output=True,
        text=True,
    )


def taken(file: Path) -> list[dict]:
    """The lines of a worker's file, which is removed."""
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    return lines


def fuzz(impl: str, seconds: float, seed: int, device: str = "cpu", copies: int | None = None) -> Report:
    """Workers, one after another, until time is up."""
    start, number, found = time.monotonic(), 0, []
    counts, kinds, known = Counter(), Counter(), set()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        isolated = False
        while (left := seconds - (time.monotonic() - start)) > 1 or isolated:
            (folder / "known.json").write_text(json.dumps(sorted(known)))
            flags = ["--seed", seed, "--first", number, *(["--copies", copies] if copies else [])]
            flags += ["--isolated", "--seconds", 60] if isolated else ["--seconds", left]
            run = work(folder, impl, device, *flags)
            for numbers in taken(folder / "counts.json"):
                counts.update(numbers["counts"])
                kinds.update(numbers["kinds"])
            news = taken(folder / "found.jsonl")
            if run.returncode == OUR_FAULT or (run.returncode != 0 and not (folder / "now.json").exists()):
                raise RuntimeError(f"the worker failed: {run.stderr[-3000:]}")
            number = int((folder / "chunk").read_text()) + 1
            isolated = False
            if run.returncode != 0:
                kind = fate(run.returncode)
                counts.update({"cases": 1, "cases that disagree": 1})
                kinds[kind] += 1
                if kind not in known and device == "cpu":  # the chunk again, to shrink it
                    isolated, number = True, number - 1
                elif kind not in known:
                    fatal = json.loads((folder / "now.json").read_text())
                    news.append({"impl": impl, "kind": kind, "detail": "", "case": fatal})
            for x in news:
                print(f"\n# {impl}: {x['kind']}\n# {x['detail']}\n{reproduction(x['case'], impl)}", flush=True)
            found += news
            known.update(x["kind"] for x in news)
    return Report(counts, kinds, found, time.monotonic() - start)


def replay(cases: list[dict], impl: str, device: str = "cpu") -> list[dict]:
    """What is wrong with the cases, run one after another."""
    found, number = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "known.json").write_text("[]")
        (folder / "cases.json").write_text(json.dumps(cases))
        while number < len(cases):
            run = work(folder, impl, device, "--first", number)
            found += taken(folder / "found.jsonl")
            if run.returncode == 0:
                break
            if run.returncode == OUR_FAULT or not (folder / "now.json").exists():
                raise RuntimeError(f"the worker failed: {run.stderr[-3000:]}")
            number = int((folder / "chunk").read_text())
            found.append({"impl": impl, "kind": fate(run.returncode), "detail": "", "case": cases[number]})
            number += 1
    return found


def keep(found: list[dict]) -> None:
    """Append to the examples that `test_fuzz.py` replays."""
    lines = EXAMPLES.read_text().splitlines() if EXAMPLES.exists() else []
    lines += [line for x in found if (line := json.dumps(x)) not in lines]
    EXAMPLES.write_text("".join(line + "\n" for line in lines))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--impl", choices=("cpu", "triton", "reference"), default="cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="triton on the CPU is interpreted")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--copies", type=int, help="rows made from each kind of row (4; interpreted 1; on a GPU 64)")
    parser.add_argument("--keep", action="store_true", help="append what is found to the examples of test_fuzz.py")
    parser.add_argument("--case", type=json.loads, help="run this case only")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--isolated", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.copies is None:
        options.copies = 64 if options.device == "cuda" else 4 if options.impl == "cpu" else 1
    options.patience = 2.0 if options.impl == "cpu" else 60.0
    torch.set_num_threads(1)
    if (options.worker or options.case) and options.impl == "triton" and options.device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            command = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]]
            return subprocess.run(command, env=environment_of("triton", "cpu")).returncode
        interpret_quickly()
    if options.case:
        found = disagreements(options.case, options.impl, options.device)
        print(*found or ["no disagreement"], sep="\n")
        return bool(found)
    if options.worker:
        worker = Worker(options)
        Watch.seconds = 3 * options.patience
        Watch.file = None if options.isolated else worker.folder / "now.json"
        try:
            (worker.replay if (worker.folder / "cases.json").exists() else worker.run)(options.first)
        except Exception:
            traceback.print_exc()
            return OUR_FAULT
        return 0
    report = fuzz(options.impl, 60 * options.minutes, options.seed, options.device, options.copies)
    print(f"\nseed {options.seed}: {report}")
    if options.keep:
        keep(report.found)
    return bool(report.kinds)


if __name__ == "__main__":
    sys.exit(main())
