"""What the kernels become on a GPU that need not be here: `python -m qstar_kernels.inspect`.

Compiles every kernel of a sampling step with the arguments a real call has, reads registers, spills and instructions
off the machine code, and estimates a step's time against the time that reading both rows from memory takes. The
estimate counts issue slots and bytes; it knows nothing of latency and was not measured.
"""

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qstar_kernels.kernels import CHUNK, Launch, plan
from qstar_kernels.kernels_truncate import truncate_kernel
from qstar_kernels.types import Settings

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
VOCAB_SIZE = 50257  # a multiple of nothing
PITCH = 50304  # its rows padded to a multiple of 64, as they are in a model's output
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}


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
    "gfx942": Gpu("MI300X", 304, 2.1, 4000, 4, 64),
}


@dataclass(frozen=True)
class Report:
    """One kernel on one architecture. Counts of instructions are of its code; `loop` counts those of its main loop."""

    kernel: str
    architecture: str
    registers: int
    spilled: int  # registers that live in memory (AMD), instructions that move some there and back (NVIDIA)
    shared: int  # bytes
    code: Counter
    loop: Counter  # empty where the kernel loops over no logits
    tokens: float  # pairs of logits a thread takes in one turn of the main loop

    def count(self, pattern: str, loop: bool = False) -> int:
        return sum(n for op, n in (self.loop if loop else self.code).items() if re.match(pattern, op))

    def wide_loads(self, loop: bool = True) -> int:
        return self.count(WIDE_LOAD, loop)

    def loads(self, loop: bool = True) -> int:
        return self.count(LOAD, loop)

    def special(self, loop: bool = True) -> int:
        return self.count(SPECIAL, loop)


# NVIDIA | AMD
WIDE_LOAD = r"LDG\S*\.128|(global|buffer)_load_dwordx4"
LOAD = r"LDG|(global|buffer)_load"
SPECIAL = r"MUFU|v_(exp|log|rcp|rsq|sqrt)_f32"


def sampling_step(
    dtype: torch.dtype, rows: int = 4, vocab_size: int = VOCAB_SIZE, pitch: int = PITCH, **settings
) -> list[Launch]:
    """The launches of `qstar_sample` on logits of this type, with their arguments, on no device."""

    def logits() -> Tensor:
        return torch.empty(rows, pitch, dtype=dtype, device="meta")[:, :vocab_size]

    index = torch.empty(rows, dtype=torch.int64, device="meta")
    return plan(logits(), logits(), Settings(**settings), seeds=index, positions=index, want_log_q=True)[0]


def source(launch: Launch) -> ASTSource:
    """The kernel specialised as a call with these arguments would."""
    signature, constants, divisible = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                divisible[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, divisible)


def report(launch: Launch, architecture: str) -> Report:
    """Compile one launch for one architecture and count."""
    amd = architecture.startswith("gfx")
    target = GPUTarget("hip", architecture, 64) if amd else GPUTarget("cuda", int(architecture[3:]), 32)
    warps = max(1, launch.threads // target.warp_size)
    compiled = triton.compile(source(launch), target=target, options={"num_warps": warps})
    if amd:
        text = compiled.asm["amdgcn"]
        body = text[: text.index(".amdhsa_kernel")]

        def stated(what: str) -> int:
            return int(re.search(rf"\.{what}:\s+(\d+)", text)[1])

        registers = stated("vgpr_count")
        # scalar registers spill into lanes of vector registers, not into memory
        spilled = stated("vgpr_spill_count")
        label, branch, operation = r"^(\.LBB\d+_\d+):", r"\bs_c?branch\S*\s+(\.LBB\d+_\d+)", r"^\s+([a-z]+_\w+)"
    else:
        body, resources = disassembled(compiled.asm["cubin"])
        registers = int(re.search(r"REG:(\d+)", resources)[1])
        spilled = 0
        label, branch = r"^(\.L_x_\d+):", r"\bBRA\b.*?`\((\.L_x_\d+)\)"
        operation = r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
    code = operations(body, operation)
    if not amd:
        spilled = sum(n for op, n in code.items() if re.match(r"LDL|STL", op))
    loop, tokens = main_loop(launch, [operations(part, operation) for part in loops(body, label, branch)])
    return Report(
        launch.kernel.__name__, architecture, registers, spilled, compiled.metadata.shared, code, loop, tokens
    )


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
    """The bodies of the backward branches."""
    lines, seen = text.splitlines(), {}
    for i, line in enumerate(lines):
        if found := re.match(label, line):
            seen[found[1]] = i
        if (found := re.search(branch, line)) and found[1] in seen:
            yield "\n".join(lines[seen[found[1]] : i + 1])


def main_loop(launch: Launch, bodies: list[Counter]) -> tuple[Counter, float]:
    """The loop over whole tiles in the two sweeps, and the pairs of logits that a thread takes in a turn of it.

    That loop has the widest loads, and the fewest instructions of those that have (it nests no other).
    """
    arguments = launch.arguments
    if "CHUNK" not in arguments:
        return Counter(), 0.0
    tile = arguments["LANES"] * arguments["SUB"] if "LANES" in arguments else arguments["TILE_GROUPS"] * 1024
    with_loads = [body for body in bodies if any(re.match(LOAD, op) for op in body)]
    return min(with_loads, key=Counter.total), tile / launch.threads


@cache
def reports(architecture: str) -> list[Report]:
    """Every kernel once, for bfloat16: those of a step with the default settings, and truncation of every kind."""
    truncated = sampling_step(torch.bfloat16, top_k=50, top_p=0.9, min_p=0.01, target_top_k=50, target_top_p=0.9)
    launches = {launch.kernel: launch for launch in sampling_step(torch.bfloat16)}
    launches |= {launch.kernel: launch for launch in truncated if launch.kernel is truncate_kernel}
    return [report(launch, architecture) for launch in launches.values()]


def estimate(architecture: str, rows: int, vocab_size: int) -> tuple[float, float]:
    """Microseconds of both sweeps, and of reading both rows from memory once; bfloat16."""
    gpu, pairs = GPUS[architecture], rows * vocab_size
    floor = pairs * 4 / gpu.gigabytes_per_second / 1e3
    busy = min(gpu.multiprocessors, rows * -(-vocab_size // CHUNK))
    slots = busy * gpu.issues_per_clock * gpu.warp * gpu.gigahertz * 1e3  # a microsecond, a thread each
    sweeps = [r.loop.total() / r.tokens * pairs / slots for r in reports(architecture) if r.tokens]
    return sum(max(sweep, floor) for sweep in sweeps), floor


def print_table(header: tuple[str, ...], rows: list[tuple]) -> None:
    lines = [tuple(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qstar_kernels.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    chosen = parser.parse_args().architectures
    print(f"Triton {triton.__version__}, bfloat16 logits, V = {VOCAB_SIZE}, rows {PITCH} apart\n")
    header = ("kernel", "for", "registers", "spilled", "shared", "128-bit", "code", "a token", "special")
    rows = []
    for architecture in chosen:
        for r in reports(architecture):
            looped = (f"{r.loop.total() / r.tokens:.0f}", f"{r.special() / r.tokens:.1f}") if r.tokens else ("", "")
            wide = r.wide_loads(loop=bool(r.tokens))
            rows.append((r.kernel, architecture, r.registers, r.spilled, r.shared, wide, r.code.total(), *looped))
    print_table(header, rows)
    print(
        "\n128-bit: loads in the loop over whole tiles where there is one; a token: instructions of that loop a pair\n"
        "of logits, its rare branches included; special: those of them for the exponential unit.\n"
    )
    print("Estimate, not measured: both sweeps, by issue slots and bytes, against reading both rows once\n")
    rows = []
    for architecture in chosen:
        for batch in (1, 64, 1024):
            sweeps, floor = estimate(architecture, batch, 128256)
            rows.append(
                (GPUS[architecture].name, batch, f"{sweeps:.1f} µs", f"{floor:.1f} µs", f"{sweeps / floor:.1f}")
            )
    print_table(("GPU", "rows of 128256", "two sweeps", "one read", "ratio"), rows)


if __name__ == "__main__":
    main()
