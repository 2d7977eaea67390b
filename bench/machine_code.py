"""What the kernels become on a GPU that need not be here: `python -m bench.machine_code`.

Compiles every kernel of a sampling step with the arguments a real call has, reads registers, spills and instructions
off the machine code, and estimates a step's time against the time that reading both rows from memory takes. The
estimate counts issue slots and bytes; it knows nothing of latency and was not measured.

With `--cover` or `--all`, compiles what any call can launch instead (`bench.calls`), and says what does not
compile and what spills.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from threading import local

import torch
import triton

from bench.calls import TRUNCATIONS, Call, Distinct, Side, compiled, covering, distinct, every_call, pretended
from qstar_kernels.gpu.launch import THREADS, Launch
from qstar_kernels.noise import GROUP_SIZE
from qstar_kernels.types import Settings

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
TOKENS_OF_A_THREAD = GROUP_SIZE // THREADS  # in the sweep
VOCAB_SIZE = 50257  # a multiple of nothing; its rows are padded to a multiple of 64, as they are in a model's output


@dataclass(frozen=True)
class Gpu:
    """Vendors' numbers, except the bandwidth: what large copies are known to reach of it."""

    name: str
    multiprocessors: int
    gigahertz: float
    gigabytes_per_second: float
    issues_per_clock: int  # instructions of a whole warp, per multiprocessor
    warp: int


GPUS = {
    "sm_80": Gpu("A100 80GB", 108, 1.41, 1750, 4, 32),
    "sm_90": Gpu("H100 SXM", 132, 1.755, 3000, 4, 32),
    "sm_100": Gpu("B200", 148, 1.85, 7000, 4, 32),
    "sm_120": Gpu("RTX 5090", 170, 2.41, 1600, 4, 32),
    "gfx942": Gpu("MI300X", 304, 2.1, 4000, 4, 64),
}


@dataclass(frozen=True)
class Report:
    """One kernel on one architecture. Counts of instructions are of its code; `loop` counts those of its main loop."""

    kernel: str
    architecture: str
    registers: int
    spilled: int  # registers that live in memory (AMD), instructions of inner loops that move some (NVIDIA)
    shared: int  # bytes
    code: Counter
    loop: Counter  # empty where the kernel is no sweep
    tokens: int  # pairs of logits a thread takes in one turn of the main loop
    straight: int  # instructions outside all inner loops
    threads: int

    def count(self, pattern: str, loop: bool = False) -> int:
        return sum(n for op, n in (self.loop if loop else self.code).items() if re.match(pattern, op))

    def wide_loads(self, loop: bool = True) -> int:
        return self.count(WIDE_LOAD, loop)

    def loads(self, loop: bool = True) -> int:
        return self.count(LOAD, loop)

    def special(self, loop: bool = True) -> int:
        return self.count(SPECIAL, loop)

    def a_token(self) -> float:
        """Instructions of a sweep a pair of logits: the loop's, and a share of those before and after it.

        Half of what stands outside the loops is for logits that mean −inf, which other threads of a program take.
        """
        return self.loop.total() / self.tokens + self.straight / 2 / TOKENS_OF_A_THREAD


SPILL = r"LDL|STL"  # NVIDIA's; AMD's assembly states a number
# NVIDIA | AMD
WIDE_LOAD = r"LDG\S*\.128|(global|buffer)_load_dwordx4"
LOAD = r"LDG|(global|buffer)_load"
SPECIAL = r"MUFU|v_(exp|log|rcp|rsq|sqrt)_f32"


def sampling_step(dtype: torch.dtype, **settings) -> list[Launch]:
    """The launches of `qstar_sample` on padded logits of this type, with their arguments, on no device."""
    side, settings = Side(dtype, "padded"), Settings(**settings)
    return Call("sample" if settings.temperature else "greedy", settings, side, side, vocab_size=VOCAB_SIZE).launches()


def report(launch: Launch, architecture: str) -> Report:
    """Compile one launch for one architecture and count."""
    amd, binary = architecture.startswith("gfx"), compiled(launch, architecture)
    if amd:
        text = binary.asm["amdgcn"]
        body = text[: text.index(".amdhsa_kernel")]

        def stated(what: str) -> int:
            return int(re.search(rf"\.{what}:\s+(\d+)", text)[1])

        registers = stated("vgpr_count")
        # scalar registers spill into lanes of vector registers, not into memory
        spilled = stated("vgpr_spill_count")
        label, branch, operation = r"^(\.LBB\d+_\d+):", r"\bs_c?branch\S*\s+(\.LBB\d+_\d+)", r"^\s+([a-z]+_\w+)"
    else:
        body, resources = disassembled(binary.asm["cubin"])
        registers = int(re.search(r"REG:(\d+)", resources)[1])
        label, branch = r"^(\.L_x_\d+):", r"\bBRA\b.*?`\((\.L_x_\d+)\)"
        operation = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
    in_loops = [operations(part, operation) for part in loops(body, label, branch)]
    if not amd:
        spilled = max((sum(n for op, n in loop.items() if re.match(SPILL, op)) for loop in in_loops), default=0)
    loop, tokens = main_loop(launch, in_loops)
    code = operations(body, operation)
    straight = code.total() - sum(map(Counter.total, in_loops))
    name, shared = launch.kernel.__name__, binary.metadata.shared
    return Report(name, architecture, registers, spilled, shared, code, loop, tokens, straight, launch.threads)


def disassembled(cubin: bytes) -> tuple[str, str]:
    """SASS and resource usage, by the tools in Triton's wheel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def run(tool: str, *options: str) -> str:
            return subprocess.run([tools / tool, *options, path], capture_output=True, text=True, check=True).stdout

        return run("nvdisasm", "-c"), run("cuobjdump", "--dump-resource-usage")


def operations(text: str, pattern: str) -> Counter:
    return Counter(re.findall(pattern, text, re.M))


def loops(text: str, label: str, branch: str) -> Iterator[str]:
    """The bodies of the backward branches that nest no other."""
    lines, seen, last = text.splitlines(), {}, -1
    for i, line in enumerate(lines):
        if found := re.match(label, line):
            seen[found[1]] = i
        if (found := re.search(branch, line)) and seen.get(found[1], -1) > last:
            last = seen[found[1]]
            yield "\n".join(lines[last : i + 1])


def main_loop(launch: Launch, bodies: list[Counter]) -> tuple[Counter, int]:
    """The sweep's loop over whole groups, and the pairs of logits that a thread takes in a turn of it.

    That loop has the widest loads, and the fewest instructions of those that use the exponential unit.
    """
    arguments = launch.arguments
    if "PIECES" not in arguments:
        return Counter(), 0
    with_loads = [body for body in bodies if any(re.match(LOAD, op) for op in body)]
    with_both = [body for body in with_loads if any(re.match(SPECIAL, op) for op in body)]
    return min(with_both, key=Counter.total, default=Counter()), arguments["PIECES"] * arguments["SUB"]


class Workers:
    """Processes, one a core. What ends one of them, as LLVM does where it gives up, ends no other.

    The threads and their processes last as long as the program.
    """

    def __init__(self):
        self.cores, self.own = len(os.sched_getaffinity(0)), local()
        self.threads = ThreadPoolExecutor(self.cores)

    def call(self, function, *arguments):
        """The result of a function in this thread's process, or text if the process did not survive it."""
        if not hasattr(self.own, "process"):
            self.own.process = ProcessPoolExecutor(1, get_context("spawn"))
        try:
            return self.own.process.submit(function, *arguments).result()
        except BrokenProcessPool:
            del self.own.process
            return "the compiler ended its process"

    def map(self, function, items: Iterable[tuple], timeout: float | None = None) -> Iterator:
        """The results in order; a TimeoutError instead of one that is not there so many seconds from now."""
        return self.threads.map(lambda item: self.call(function, *item), items, timeout=timeout)


@cache
def workers() -> Workers:
    return Workers()


def attempt(call: Call, i: int, architecture: str) -> Report | str:
    """What launch `i` of a call compiles to, or why it does not."""
    try:
        with pretended(architecture):
            launch = call.launches()[i]
        return report(launch, architecture)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def failure(call: Call, i: int, architecture: str) -> str:
    """Why launch `i` of a call does not compile; empty where it does, and then it is in Triton's cache."""
    try:
        with pretended(architecture):
            launch = call.launches()[i]
        compiled(launch, architecture)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def attempts(launches: Iterable[tuple[Call, int]], architecture: str) -> Iterator[Report | str]:
    """`attempt` at each, on all cores and through Triton's cache."""
    return workers().map(attempt, [(*launch, architecture) for launch in launches])


@cache
def reports(architecture: str) -> list[Report]:
    """Every kernel once, for bfloat16: those of a step with the default settings, and truncation of every kind."""
    side = Side(torch.bfloat16, "padded")
    calls = [Call("sample", Settings(**TRUNCATIONS), side, side), Call("log q", Settings(), side, side)]
    calls.append(Call("sample", Settings(), side, side))
    # the first of each kernel in a call: the second sweep has nothing to do but for some rows
    launches = {launch.kernel: (call, i) for call in calls for i, launch in reversed(list(enumerate(call.launches())))}
    found = list(attempts(launches.values(), architecture))
    if failures := [result for result in found if isinstance(result, str)]:
        raise RuntimeError(failures[0])
    return found


def part(first: int, step: int, architecture: str) -> Distinct:
    return distinct(islice(every_call(), first, None, step), architecture)


@cache
def whole(architecture: str) -> Distinct:
    """The specialisations of all calls, which are the same for all GPUs of one vendor."""
    cores = workers().cores
    parts = list(workers().map(part, [(i, cores, architecture) for i in range(cores)]))
    of = {key: launch for one in parts for key, launch in one.of.items()}
    return Distinct(sum(one.calls for one in parts), sum(one.launches for one in parts), of)


def estimate(architecture: str, rows: int, vocab_size: int) -> tuple[float, float]:
    """Microseconds of the sweep of ordinary rows, and of reading both rows from memory once; bfloat16."""
    gpu, pairs = GPUS[architecture], rows * vocab_size
    floor = pairs * 4 / gpu.gigabytes_per_second / 1e3
    (sweep,) = (r for r in reports(architecture) if r.tokens)
    warps = rows * -(-vocab_size // (GROUP_SIZE * gpu.warp // THREADS))
    busy = min(gpu.multiprocessors * gpu.issues_per_clock, warps)
    slots = busy * gpu.warp * gpu.gigahertz * 1e3  # a microsecond, a thread each
    return max(sweep.a_token() * pairs / slots, floor), floor


def settling(architecture: str) -> float:
    """Microseconds that `settle_kernel` takes at least: its instructions one after the other, its loops once."""
    (settle,) = (r for r in reports(architecture) if r.kernel == "settle_kernel")
    return settle.code.total() / GPUS[architecture].gigahertz / 1e3


def print_table(header: tuple[str, ...], rows: list[tuple]) -> None:
    lines = [tuple(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_survey(architectures: list[str], strength: int | None) -> bool:
    """Compile what any call can launch, or what `covering` leaves of it; whether it all compiled."""
    complete = True
    for architecture in architectures:
        found = whole("gfx942" if architecture.startswith("gfx") else "sm_90")
        print(
            f"{architecture}: {found.calls} calls, {found.launches} launches, {len(found.of)} specialisations",
            flush=True,
        )
        start = time.monotonic()
        chosen = list(found.of) if strength is None else covering(found.of, strength)
        results = {}
        for key, result in zip(chosen, attempts((found.of[key] for key in chosen), architecture), strict=True):
            results.setdefault(key.kernel, []).append(result)
            call, i = found.of[key]
            if isinstance(result, str):
                print(f"{key.kernel} does not compile, launch {i} of {call}\n{result}", flush=True)
            elif result.spilled:
                print(f"{key.kernel} spills {result.spilled}, launch {i} of {call}", flush=True)
        rows = []
        for kernel, of_kernel in results.items():
            done = [result for result in of_kernel if isinstance(result, Report)]
            failed, spilling = len(of_kernel) - len(done), sum(result.spilled > 0 for result in done)
            registers = max((result.registers for result in done), default="")
            rows.append(
                (kernel, sum(k.kernel == kernel for k in found.of), len(of_kernel), failed, spilling, registers)
            )
            complete &= failed == 0
        print_table(("kernel", "specialisations", "compiled", "failed", "spilling", "registers"), rows)
        print(f"{len(chosen)} compiled in {time.monotonic() - start:.0f} s on {workers().cores} cores\n", flush=True)
    return complete


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--all", action="store_true", help="compile every specialisation that any call can launch")
    some.add_argument(
        "--cover", type=int, metavar="N", help="only so many that any N arguments, and N + 1 constants, meet"
    )
    options = parser.parse_args()
    chosen = options.architectures
    if options.all or options.cover is not None:
        print(f"Triton {triton.__version__}")
        sys.exit(not print_survey(chosen, options.cover))
    print(f"Triton {triton.__version__}, bfloat16 logits, V = {VOCAB_SIZE}, rows padded\n")
    header = ("kernel", "for", "registers", "spilled", "shared", "128-bit", "code", "barriers", "a token", "special")
    rows = []
    for architecture in chosen:
        for r in reports(architecture):
            looped = (f"{r.a_token():.0f}", f"{r.special() / r.tokens:.1f}") if r.tokens else ("", "")
            wide = r.wide_loads(loop=bool(r.tokens))
            barriers, code = r.count("BAR|s_barrier"), r.code.total()
            rows.append((r.kernel, architecture, r.registers, r.spilled, r.shared, wide, code, barriers, *looped))
    print_table(header, rows)
    print(
        "\n128-bit: loads in the loop over whole tiles where there is one; a token: instructions of the sweep a pair\n"
        "of logits; special: those of its loop for the exponential unit.\n"
    )
    print("Estimate, not measured: the sweep, by issue slots and bytes, against reading both rows once\n")
    rows = []
    for architecture in chosen:
        for batch in (1, 64, 1024):
            sweep, floor = estimate(architecture, batch, 128256)
            rows.append((GPUS[architecture].name, batch, f"{sweep:.1f} µs", f"{floor:.1f} µs", f"{sweep / floor:.1f}"))
    print_table(("GPU", "rows of 128256", "sweep", "one read", "ratio"), rows)
    launches = len(sampling_step(torch.bfloat16))
    print()
    for architecture in chosen:
        (sweep,) = (r for r in reports(architecture) if r.tokens)
        time_of_64, _ = estimate(architecture, 64, 128256)
        print(
            f"total {architecture}: {sweep.a_token():.1f} instructions a token, {launches} launches, "
            f"{time_of_64:.1f} us for [64, 128256], settle {settling(architecture):.1f} us"
        )


if __name__ == "__main__":
    main()
