"""A GPU looked at in one run of a few minutes: `python -m bench.gpu`.

First what must be right: hard rows against float64, near ties, equal bits wherever a row lies and whatever runs beside
it, nothing compiled while a batch shrinks. Then the time of what was right: a step beside its competitors, the options,
each kernel, the host, the decoding loop. A page `bench/results/gpu-<name>.md` and its numbers in a JSON beside it are
written anew after every item, so that neither an item that fails nor one that never ends takes the others with it.
"""

import argparse
import faulthandler
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import gpu_checks, gpu_times
from bench.gpu_checks import Item, compile_ahead

RESULTS = Path(__file__).with_name("results")


@dataclass
class Run:
    """What was found so far, and the time that is left for more."""

    device: torch.device
    quick: bool
    budget: float
    page: Path
    on_gpu: bool
    start: float = field(default_factory=time.monotonic)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    lost: bool = False  # the device answers nothing any more

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def take(self, part: "Part") -> None:
        """Go through the items of a part while its time lasts; one that fails is written down, and the next goes on."""
        found = self.results.setdefault(part.name, {})
        try:
            for name, item in part.items(self):
                if self.lost or self.elapsed() > part.until * self.budget:
                    self.left_out.append(f"{part.name}: {name}")
                    continue
                try:
                    found[name] = item()
                except Exception:
                    self.fail(f"{part.name}: {name}")
                print(f"{self.elapsed():6.1f} s  {part.name}: {name}", flush=True)
                self.save()
        except Exception:  # the part itself, between two items
            self.fail(part.name)
        if self.on_gpu and not self.lost:
            torch.cuda.empty_cache()

    def fail(self, name: str) -> None:
        self.failures[name] = traceback.format_exc()
        print(f"{self.failures[name]}{self.elapsed():6.1f} s  FAILED {name}", flush=True)
        if self.on_gpu:
            try:
                torch.cuda.synchronize()
            except Exception as error:  # a fault in a kernel stays: whatever follows would fail too
                self.lost = True
                self.failures["the device is lost"] = str(error)

    def save(self) -> None:
        self.page.parent.mkdir(parents=True, exist_ok=True)
        everything = {
            "machine": machine(self.on_gpu),
            "seconds": self.elapsed(),
            "parts": self.results,
            "failures": self.failures,
            "left out": self.left_out,
        }
        self.page.with_suffix(".json").write_text(json.dumps(everything, indent=1), encoding="utf-8")
        self.page.write_text("\n".join(page(self)), encoding="utf-8")


def us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}" if seconds < 1e-5 else f"{1e6 * seconds:,.0f}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))]


def held(found: dict[str, Any]) -> list[str]:
    """What was right, and how much of what is promised the largest deviations take."""
    lines = ["", f"Held: {'; '.join(found)}."]
    shares = [x for x in found.values() if isinstance(x, dict) and "alpha" in x]
    if shares:
        names = list(dict.fromkeys(name for x in shares for name in x))
        largest = {name: max(x.get(name, 0.0) for x in shares) for name in names}
        worst = ", ".join(f"{name} {100 * x:.2g}%" for name, x in largest.items())
        lines += ["", f"Largest deviations from float64, of what is promised: {worst}."]
    return lines


def compiled(found: dict[str, Any]) -> list[str]:
    return [
        "",
        *(f"{x['kernels']} of {x['of']} kernels compiled ahead in {x['seconds']:.0f} s." for x in found.values()),
    ]


def microseconds(found: dict[str, dict[str, float]], first: str) -> list[str]:
    names = list(next(iter(found.values())))
    return table([first, *names], [[name, *map(us, x.values())] for name, x in found.items()])


def of_steps(found: dict[str, dict[str, float]]) -> list[str]:
    note = (
        "«one model» is `multinomial(softmax)` of π_θ alone, «log_softmax» that of both, «research» 20 bisections; "
        "«warm» is `qstar_sample` right after itself."
    )
    return ["", note, *microseconds(found, "[B, V]")]


def of_kernels(found: dict[str, list[tuple[str, float]]]) -> list[str]:
    """A table for each sequence of kernels."""
    lines = []
    for names in dict.fromkeys(tuple(name for name, _ in x) for x in found.values()):
        same = {rows: x for rows, x in found.items() if tuple(name for name, _ in x) == names}
        lines += table(["B", *names], [[rows, *(us(s) for _, s in x)] for rows, x in same.items()])
    return lines


def of_loop(found: dict[str, Any]) -> list[str]:
    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:.1f}"

    whole = {name: x for name, x in found.items() if isinstance(x, dict)}
    rows = [
        [name, *(ms(value) if i > 1 else f"{value:.0f}" for i, value in enumerate(x.values()))]
        for name, x in whole.items()
    ]
    note = (
        "Tokens and steps of the better of two runs, prompts included, and tokens of two more in which nothing is "
        "recorded as a CUDA graph; passes of one token a row and q* steps, medians, of another of those, which waits "
        "for the device after each."
    )
    rates = ["tokens/s", "tokens/s, nothing recorded"]
    header = ["pair", "B", *rates, "a step, ms", "both forward passes, ms", "the q* step, ms"]
    lines = ["", note, *table(header, rows)]
    passes = [[name, ms(x)] for name, x in found.items() if name not in whole]
    return [*lines, *(table(["", "B", "ms"], passes) if passes else [])]


class Part(NamedTuple):
    """One heading of the page."""

    name: str
    items: Callable[[Run], Iterator[Item]]
    until: float  # the share of the budget after which none of its items begins
    lines: Callable[[dict[str, Any]], list[str]]


PARTS = (
    Part("Compilation", gpu_checks.compilation, 0.3, compiled),
    Part("Correctness", gpu_checks.correctness, 0.45, held),
    Part("Near ties", gpu_checks.ties, 0.52, held),
    Part("Equal bits", gpu_checks.bits, 0.6, held),
    Part("Nothing compiled while a batch shrinks and options change", gpu_checks.steadiness, 0.65, held),
    Part("A step of q*, µs", gpu_times.steps, 0.8, of_steps),
    Part("The kernels of a step, µs, caches warm", gpu_times.kernels, 0.85, of_kernels),
    Part("Host time of a step, µs", gpu_times.host, 0.87, lambda found: microseconds(found, "B")),
    Part(
        "Options, µs",
        gpu_times.other_settings,
        0.92,
        lambda found: table(["B", "", "µs"], [[name, us(x)] for name, x in found.items()]),
    ),
    Part("The decoding loop", gpu_times.loop, 1.0, of_loop),
)


@cache
def machine(on_gpu: bool) -> dict[str, str]:
    """What the figures depend on."""

    def said(*command: str) -> str:
        try:
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
            return done.stdout.strip().split("\n")[0] or "unknown"
        except (OSError, subprocess.TimeoutExpired):
            return "unknown"

    found = {"device": "a CPU", "commit": said("git", "describe", "--always", "--dirty")}
    if on_gpu:
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        runtime = str(torch.version.cuda or torch.version.hip)
        found |= {"device": torch.cuda.get_device_name(), "driver": driver, "CUDA or HIP": runtime}
    found["Python"] = ".".join(map(str, sys.version_info[:3]))
    for name in ("torch", "triton", "transformers", "numpy"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def page(run: Run) -> list[str]:
    about = machine(run.on_gpu)
    versions = ", ".join(f"{name} {value}" for name, value in about.items() if name != "device")
    lines = [f"# The kernels on {about['device']}", "", f"`python -m bench.gpu`, {run.elapsed():.0f} s. {versions}."]
    if run.on_gpu:
        lines.append(
            "Times are of bfloat16 logits, medians of CUDA events, functions in turns, the L2 cache emptied before "
            "each unless it says warm. What was not right was not timed."
        )
    else:
        lines.append("**Not a GPU**: this shows that the benchmark works, and no figure says anything about one.")
    failed = {name: text.strip().split("\n")[-1] for name, text in run.failures.items()}
    lines += ["", f"{len(failed)} failed, {len(run.left_out)} left out for want of time."]
    for part in PARTS:
        if found := run.results.get(part.name):
            lines += ["", f"## {part.name}", *part.lines(found)]
    if failed:
        lines += ["", "## Failed", "", *(f"- {name}: `{text}`" for name, text in failed.items())]
    if run.left_out:
        lines += ["", "## Left out", "", *(f"- {name}" for name in run.left_out)]
    return [*lines, ""]


def free_page(folder: Path, device: str) -> Path:
    """A page named by the device that is not there yet: no earlier one is written over."""
    stem = "gpu-" + re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")
    number, path = 1, folder / f"{stem}.md"
    while path.exists() or path.with_suffix(".json").exists():
        number += 1
        path = folder / f"{stem}-{number}.md"
    return path


def main(argv: list[str] | None = None) -> int:
    """Look at everything; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", help="`cpu` runs what needs no GPU, to show that it works")
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--budget", type=float, default=270, help="seconds; what does not fit is left out and named")
    parser.add_argument("--output", type=Path, help="folder of the page (a temporary one for a CPU: no GPU, no page)")
    parser.add_argument(
        "--precompile", metavar="sm_90", help="compile all of it for a GPU that is not here, run nothing"
    )
    options = parser.parse_args(argv)
    device, on_gpu = torch.device(options.device), options.device.startswith("cuda")
    if on_gpu and not options.precompile and not torch.cuda.is_available():
        parser.error("there is no GPU here; `--device cpu` runs what needs none")
    folder = options.output or (RESULTS if on_gpu else Path(tempfile.mkdtemp(prefix="bench-gpu-")))
    run = Run(device, options.quick, options.budget, Path(), on_gpu)
    if options.precompile:
        print("{kernels} of {of} kernels in {seconds:.0f} s".format(**compile_ahead(run, options.precompile)))
        return 0
    run.page = free_page(folder, machine(on_gpu)["device"] if on_gpu else "none")
    if on_gpu:  # where a kernel never ends, or a compiler at the exit
        faulthandler.dump_traceback_later(options.budget + 60, exit=True)
    for part in PARTS:
        run.take(part)
    run.save()
    for kind, names in (("failed", run.failures), ("left out", run.left_out)):
        print("".join(f"{kind}: {name}\n" for name in names), end="")
    print(f"{len(run.failures)} failed, {len(run.left_out)} left out, {run.elapsed():.0f} s: {run.page}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
