"""q* from one sweep over the logits, in Triton (theory/computation.md, «One sweep» and «The draw»).

The same launches for one row and for thousands, without a host synchronisation or an allocation that changes with the
data, so that a step can be captured in a CUDA graph:

1. `sweep_kernel`, a warp some groups of 1024 ids: sums about α = ½.
2. `settle_kernel`, a program a row: α, the diagnostics and the groups' masses by Taylor's formula, and a bound on what
   that leaves out, which says whether they are accepted.
3. `sweep_kernel` about the α found, for rows that were not accepted; all others pass.
4. `finish_kernel`, a program a row: does for those what `settle_kernel` does, solves in float64 what is still not
   accepted, draws, and reads the winning group again. With truncation it comes twice, and `truncation` between the two.

The rule `fixed` has its α: one sweep about that, and `finish_kernel`.

A row is always cut into the same groups whatever the batch is, and they are merged in one fixed order: this is what
makes a row's bits independent of its neighbours.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.finish import finish_kernel, log_q_kernel
from qstar_kernels.gpu.settle import settle_kernel
from qstar_kernels.gpu.sweep import sweep_kernel
from qstar_kernels.gpu.truncate import (
    BRACKET_COLUMNS,
    OF_Q,
    OF_T,
    PARTS,
    PASSES,
    divide_kernel,
    masses_kernel,
    top_kernel,
)
from qstar_kernels.noise import GROUP_SIZE
from qstar_kernels.types import BUDGETS, FIELDS, PER_ROW, QStarStep, Settings

WARP = 64 if torch.version.hip else 32
ENOUGH_PROGRAMS = 1024  # of truncation, a warp each; all of them add up what the last pass left
BOUNDARY = 512  # bytes: where torch's allocator of a GPU begins, and no kernel asks for more
THREADS = 16  # of a group in the sweep: with two groups a warp, no reduction leaves it


def tile(bits: int, second: bool) -> dict[str, int]:
    """The constants of a sweep over logits of so many bits: a load of 128 bits brings a thread its tokens of one row.

    The second sweep passes most rows by, and programs that do nothing are not free: it has fewer of them.
    """
    sub = 128 // bits
    # 8 tokens at once leave the registers for the sums; more where only maxima are taken
    groups, pieces, ahead, times = WARP // THREADS, 8 // sub, 16 // sub, 2 if second else 1
    if triton.knobs.runtime.interpret:  # its time goes by operations, not by elements
        groups, pieces, ahead, times = 8, *2 * [GROUP_SIZE // (THREADS * sub)], 1
    return {"TIMES": times, "GROUPS": groups, "AHEAD": ahead, "PIECES": pieces, "THREADS": THREADS, "SUB": sub}


def groups_of_a_row_program() -> int:
    """Groups of ids in a tile where one program sweeps a row: in float64, 8 tokens a thread still fit the registers."""
    return 16 if triton.knobs.runtime.interpret else 2


@dataclass(frozen=True)
class Launch:
    """One kernel with its arguments by name, `tl.constexpr` ones included."""

    kernel: triton.runtime.KernelInterface
    grid: tuple[int, ...]
    threads: int
    arguments: dict

    @classmethod
    def of(cls, kernel: triton.runtime.KernelInterface, grid: tuple[int, ...], threads: int, step: dict, **own: Any):
        """With those of a step's arguments that the kernel asks for, and some of its `own`."""
        step = step | own
        return cls(kernel, grid, threads, {name: step[name] for name in kernel.arg_names})

    def options(self) -> dict:
        """What Triton is told beside the arguments. Newer versions would not fuse products and sums unasked."""
        return {"num_warps": max(1, self.threads // WARP), "enable_fp_fusion": True}

    def __call__(self) -> CompiledKernel | None:
        """What was launched; None in the interpreter."""
        return self.kernel[self.grid](**self.arguments, **self.options())


class Kept:
    """What is left of a step's launches when it comes again: its compiled kernels, and the numbers they are given.

    Triton compares all arguments, and every global that a kernel uses, with those of earlier launches, which takes ten
    times what a launch itself does. Here nothing but addresses is new. It asks more of Triton than `Launch` does: where
    a version has it otherwise, and where someone listens to launches, they are made in the ordinary way.
    """

    def __init__(self):
        self.launches = []  # until the step was launched; in the interpreter always
        self.refused = False

    def keep(self, launches: list[Launch], compiled: list, given: dict[str, Tensor], filled: dict[str, Tensor]) -> None:
        """Remember launches that were made, and what came of each."""
        if self.refused or not all(isinstance(kernel, CompiledKernel) for kernel in compiled):
            return
        made = {k: x for one in launches for k, x in one.arguments.items() if isinstance(x, Tensor) and k not in given}
        places, size = {}, 0
        for name, x in made.items():
            if name not in filled:
                places[name] = size
                size += triton.cdiv(x.nbytes, BOUNDARY) * BOUNDARY
        index = {name: i for i, name in enumerate(("stream", *given, *filled, *places))}
        numbers, kept = [], []
        for launch, kernel in zip(launches, compiled, strict=True):
            head = *(*launch.grid, 1, 1)[:3], None, kernel.function, kernel.packed_metadata, None, None, None
            arguments = [launch.arguments[name] for name in launch.kernel.arg_names]
            where = list(range(len(index) + len(numbers), len(index) + len(numbers) + len(head) + len(arguments)))
            where[3] = index["stream"]
            for i, (name, value) in enumerate(zip(launch.kernel.arg_names, arguments, strict=True)):
                if isinstance(value, Tensor):
                    where[len(head) + i], arguments[i] = index[name], None
            numbers += [*head, *arguments]
            kept.append((kernel.run, itemgetter(*where)))
        self.filled = {name: (x.shape, x.dtype) for name, x in filled.items()}
        self.places, self.size, self.numbers, self.launches = tuple(places.values()), size // 4, numbers, kept

    def __call__(self, given: dict[str, Tensor], device: torch.device) -> dict[str, Tensor] | None:
        """Launch again: what is filled, by the names of the kernels' arguments. None where nothing is kept."""
        if not self.launches:
            return None
        try:
            for hook in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
                if hook is not None and hook.calls:
                    return None
            filled = {k: torch.empty(shape, dtype=dtype, device=device) for k, (shape, dtype) in self.filled.items()}
            scratch = torch.empty(self.size, device=device)
            first = scratch.data_ptr()
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            values = (
                stream,
                *[x.data_ptr() for x in given.values()],
                *[x.data_ptr() for x in filled.values()],
                *[first + place for place in self.places],
                *self.numbers,
            )
            for run, arguments in self.launches:
                run(*arguments(values))
        except (AttributeError, TypeError):
            self.launches, self.refused = [], True
            return None
        return filled


@lru_cache(maxsize=1024)
def kept(*step) -> Kept:
    """One for all steps whose launches differ in addresses alone."""
    return Kept()


def aligned(logits: Tensor) -> Tensor:
    """The same rows [B, V] where the kernels can read them 128 bits at a time: a copy where they do not lie so.

    Triton lays out a program's threads by what it knows of the addresses, and with it the order of all sums. A row's
    bits would depend on where it lies in memory, and the sweeps on unaligned rows hold eight times the sums a thread.
    """
    rows, vocab_size = logits.shape
    if rows == 1:
        logits = logits.as_strided((1, vocab_size), (0, logits.stride(1)))
    lie_so = (logits.stride(1) == 1 or vocab_size == 1) and logits.stride(0) % 16 == 0 and logits.data_ptr() % 16 == 0
    return logits if lie_so else logits.new_empty(rows, triton.cdiv(vocab_size, 16) * 16)[:, :vocab_size].copy_(logits)


def own_of(settings: Settings, per_row: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """The settings `PER_ROW` of each row as they are given, for the kernels to look at: float64 [B, 4]."""
    own = torch.empty(len(rows), len(PER_ROW), dtype=torch.float64, device=rows.device)
    for column, name in zip(own.unbind(1), PER_ROW, strict=True):
        column.copy_(per_row[name]) if name in per_row else column.fill_(getattr(settings, name))
    return own


def plan(
    theta: Tensor,
    t: Tensor,
    settings: Settings,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    tokens: Tensor | None = None,
    want_log_q: bool = False,
    own: Tensor | None = None,
) -> tuple[list[Launch], dict[str, Tensor]]:
    """The launches for at least one row, and what they fill; all sizes depend on B, V and the settings only.

    The logits are `aligned`, the rest is contiguous; `own`: what `own_of` makes of settings of the rows.
    """
    rows, vocab_size = theta.shape
    groups = triton.cdiv(vocab_size, GROUP_SIZE)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=theta.device)

    filled = {"out": empty(len(FIELDS), rows), "statuses": empty(rows, dtype=torch.int64)}
    if want_log_q:
        filled["log_q"] = empty(rows, vocab_size)
    draw = scratch.NO_TOKEN if tokens is None else scratch.GIVEN
    if seeds is not None:
        draw = scratch.SAMPLED if settings.temperature > 0 else scratch.GREEDY
        filled["tokens"] = empty(rows, dtype=torch.int64)
    first, second = (tile(8 * max(theta.element_size(), t.element_size()), again) for again in (False, True))
    most = second["GROUPS"] * second["TIMES"]
    partial = empty(rows, triton.cdiv(groups, most) * most, scratch.GROUP_COLUMNS.value)
    # a budget that is one α for all rows is no budget
    given = settings.known_alpha if own is None else None
    method = settings.method if given is None else "fixed"
    alpha = 0.5 if given is None else given
    low, high = (settings.alpha_min, settings.alpha_max) if given is None else (alpha, alpha)
    temperature = settings.temperature or 1.0
    step = {
        "theta": theta,
        "t": t,
        "s_theta": theta.stride(0),
        "s_t": t.stride(0),
        "rows": rows,
        "vocab_size": vocab_size,
        "groups": groups,
        "inv_temperature": 1 / temperature,
        "TEMPERED": temperature != 1,
        "own": own,
        "METHOD": method,
        "alpha": alpha,
        "alpha_min": low,
        "alpha_max": high,
        "kl_budget": settings.kl_budget,
        "tol": settings.tol,
        "partial": partial,
        "s_partial": partial.stride(0),
        "masses": empty(rows, 2, groups, dtype=torch.float64),  # logarithms, and what they may be off by
        "known": empty(rows, scratch.ROW_COLUMNS.value, dtype=torch.float64),
        "seeds": seeds,
        "positions": positions,
        "tokens": tokens,
        "DRAW": draw.value,
        "GROUPS": triton.next_power_of_2(groups),
    } | filled
    shapes = (first,) if method == "fixed" else (first, second)
    launches = [*sweeps(step, shapes), *finish(step, settings, len(shapes) > 1)]
    if want_log_q:
        launches.append(Launch.of(log_q_kernel, (rows, groups), 128, step, s_log_q=vocab_size, BLOCK=GROUP_SIZE))
    return launches, filled


def sweeps(step: dict, shapes: tuple[dict[str, int], ...]) -> list[Launch]:
    """Those of a step, and what looks at the first of two."""
    method = step["METHOD"]
    about = step["own"] is not None and method in ("fixed", *BUDGETS)  # whether rows have centres of their own
    constants = {"own": step["own"] if about else None, "METHOD": method if about else ""}
    constants["EXTRA"] = method if method in ("entropy", "reverse_kl_symmetry") else ""
    launches = []
    for again, shape in enumerate(shapes):
        if again:
            # a thread a group, or as many as leave it the registers for float64
            width = min(max(step["GROUPS"], 32), 128)
            launches.append(Launch.of(settle_kernel, (step["rows"],), width, step))
        grid = step["rows"], triton.cdiv(step["groups"], shape["GROUPS"] * shape["TIMES"])
        launches.append(Launch.of(sweep_kernel, grid, WARP, step, **shape, **constants, SECOND=bool(again)))
    return launches


def finish(step: dict, settings: Settings, second: bool) -> list[Launch]:
    """From the last sweep, the `second` or the only one, to the token."""
    grid = (step["rows"],)
    step = step | {"SOLVE": True, "SECOND": second, "CHOOSE": True, "TILE_GROUPS": groups_of_a_row_program()}
    if not settings.truncates:
        return [Launch.of(finish_kernel, grid, 256, step)]
    # each half is told of the other's choices nothing that would have it compiled once more
    drawing = step["DRAW"] if step["DRAW"] == scratch.SAMPLED.value else scratch.NO_TOKEN.value
    solve = {"CHOOSE": False, "DRAW": drawing, "seeds": None, "positions": None, "tokens": None}
    choose = {"SOLVE": False, "SECOND": False, "METHOD": "fixed", "own": None, "TEMPERED": False}
    return [
        Launch.of(finish_kernel, grid, 256, step, **solve),
        *truncation(step, settings),
        Launch.of(finish_kernel, grid, 256, step, **choose),
    ]


def truncation(step: dict, settings: Settings) -> list[Launch]:
    """What comes between the solve and the draw: floors that say what is kept, and the groups' masses among it."""
    rows, groups = step["rows"], step["groups"]
    times = groups if triton.knobs.runtime.interpret else max(1, rows * groups // ENOUGH_PROGRAMS)
    grid = rows, triton.cdiv(groups, times)
    # a pass reads what the last one wrote
    brackets = step["known"].new_empty(2, rows, BRACKET_COLUMNS.value)
    sums = step["partial"].new_empty(2, rows, groups, PARTS.value)
    log_min_p = math.log(settings.min_p) if settings.min_p > 0 else 0.0
    step = step | {"brackets": brackets, "sums": sums, "times": times, "log_min_p": log_min_p}

    def passes(which: tl.constexpr, k: int, p: float) -> list[Launch]:
        amounts = [(True, float(k))] if 0 < k < step["vocab_size"] else []
        if p < 1:
            amounts.append((False, 1 - p))
        return [
            Launch.of(
                divide_kernel,
                grid if i < PASSES.value else (rows, 1),
                WARP,
                step,
                amount=amount,
                COUNT=count,
                WHICH=which.value,
                i_pass=i,
            )
            for count, amount in amounts
            for i in range(PASSES.value + 1)
        ]

    return [
        *passes(OF_T, settings.target_top_k, settings.target_top_p),
        Launch.of(top_kernel, (rows,), 128, step),
        *passes(OF_Q, settings.top_k, settings.top_p),
        Launch.of(masses_kernel, grid, WARP, step, HAS_MIN_P=settings.min_p > 0),
    ]


def qstar_triton(
    theta: Tensor,
    t: Tensor,
    settings: Settings,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    tokens: Tensor | None = None,
    want_log_q: bool = False,
    per_row: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[QStarStep, Tensor | None]:
    """`qstar_reference` by the kernels; float32 fields. Logits are float32, bfloat16 or float16.

    Raises:
        ValueError: float64 logits.
    """
    for name, logits in (("logits_theta", theta), ("logits_t", t)):
        if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {logits.dtype}; the kernels take float32, bfloat16 or float16")
    given = {"theta": aligned(theta), "t": aligned(t)}
    if seeds is not None:
        given |= {"seeds": seeds.contiguous(), "positions": positions.contiguous()}
    elif tokens is not None:
        given["tokens"] = tokens.contiguous()
    if per_row:
        given["own"] = own_of(settings, per_row, theta)
    device, (theta, t) = theta.device, (given["theta"], given["t"])
    layout = theta.shape, theta.stride(0), theta.dtype, t.stride(0), t.dtype
    again = kept(settings, want_log_q, seeds is None, tokens is None, bool(per_row), device, *layout)
    with torch.cuda.device_of(theta):
        filled = again(given, device)
        if filled is None:
            launches, filled = plan(**given, settings=settings, want_log_q=want_log_q)
            if len(theta):
                again.keep(launches, [launch() for launch in launches], given, filled)
    step = QStarStep.of(filled["out"].unbind(), filled["statuses"], filled.get("tokens", tokens))
    return step, filled.get("log_q")
