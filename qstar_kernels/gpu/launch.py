"""q* from one sweep over the logits, in Triton (theory/computation.md, «One sweep» and «The draw»).

The same launches for one row and for thousands, without a host synchronisation or an allocation that changes with the
data, so that a step can be captured in a CUDA graph:

1. `sweep_kernel`, a warp some groups of 1024 ids: sums about α = ½ (about the α given, for the rule `fixed`).
2. `settle_kernel`, a program a row: α, the diagnostics and the groups' masses by Taylor's formula, and a bound on what
   that leaves out, which says whether they are accepted.
3. Both again about the α found, for rows that were not accepted; all others pass.
4. `finish_kernel`, a program a row: solves in float64 what is still not accepted, draws, and reads the winning group
   again. With truncation it comes twice, and `truncation` between the two.

A row is always cut into the same groups whatever the batch is, and they are merged in one fixed order: this is what
makes a row's bits independent of its neighbours.
"""

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from types import MappingProxyType

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


def halves(name: str, value: float) -> dict[str, float]:
    """A setting as two arguments of a kernel, where Python's numbers become float32 (`as_double`)."""
    high = ctypes.c_float(value).value
    return {name: high, f"{name}_low": value - high}


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
    tempering = settings.temperature if settings.temperature > 0 else 1.0
    groups = triton.cdiv(vocab_size, GROUP_SIZE)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=theta.device)

    out = empty(len(FIELDS), rows)  # [8, B]
    status = empty(rows, dtype=torch.int64)  # [B]
    filled = {"out": out, "statuses": status}
    if want_log_q:
        filled["log_q"] = empty(rows, vocab_size)
    draw = scratch.NO_TOKEN
    if seeds is not None:
        draw = scratch.SAMPLED if settings.temperature > 0 else scratch.GREEDY
        tokens = torch.empty_like(status)  # [B]
        filled["tokens"] = tokens
    elif tokens is not None:
        draw = scratch.GIVEN
    # what asks only for the groups' masses need not be compiled twice
    drawing = draw if draw is scratch.SAMPLED else scratch.NO_TOKEN

    first, second = (tile(8 * max(theta.element_size(), t.element_size()), again) for again in (False, True))
    most = second["GROUPS"] * second["TIMES"]
    partial = empty(rows, triton.cdiv(groups, most) * most, scratch.GROUP_COLUMNS.value)  # [B, groups, 32]
    masses = empty(rows, 2, groups, dtype=torch.float64)  # [B, 2, groups], logarithms and what they may be off by
    row = empty(rows, scratch.ROW_COLUMNS.value, dtype=torch.float64)  # [B, 17]
    # a budget that is one α for all rows is no budget
    given = settings.known_alpha if own is None else None
    method = settings.method if given is None else "fixed"
    logits = {
        "theta": theta,
        "t": t,
        "vocab_size": vocab_size,
        "s_theta": theta.stride(0),
        "s_t": t.stride(0),
    } | halves("inv_temperature", 1 / tempering)
    alpha = 0.5 if given is None else given
    low, high = (settings.alpha_min, settings.alpha_max) if given is None else (alpha, alpha)
    rule = halves("alpha_min", low) | halves("alpha_max", high) | halves("kl_budget", settings.kl_budget)
    rule |= {"own": own, "tol": settings.tol, "METHOD": method}
    center = halves("center", alpha)["center"]
    sums = {"row": row, "partial": partial, "s_partial": partial.stride(0), "center": center}
    sweep = {k: v for k, v in logits.items() if k != "inv_temperature_low"} | sums
    sweep |= {
        "EXTRA": method if method in ("entropy", "reverse_kl_symmetry") else "",
        "own": own if method in ("fixed", *BUDGETS) else None,
        "METHOD": method if own is not None and method in ("fixed", *BUDGETS) else "",
        "TEMPERED": tempering != 1,
    }
    settle = rule | halves("inv_temperature", 1 / tempering) | halves("fixed_alpha", alpha) | sums
    settle |= {
        "masses": masses,
        "out": out,
        "rows": rows,
        "groups": groups,
        "TEMPERED": tempering != 1,
        "GROUPS": triton.next_power_of_2(groups),
    }
    finish = (
        logits
        | rule
        | {
            "row": row,
            "partial": partial,
            "masses": masses,
            "seeds": seeds,
            "positions": positions,
            "tokens": tokens,
            "out": out,
            "statuses": status,
            "rows": rows,
            "groups": groups,
            "s_partial": partial.stride(0),
            "DRAW": draw.value,
            "REFINE": True,
            "CHOOSE": True,
            "GROUPS": triton.next_power_of_2(groups),
            "TILE_GROUPS": groups_of_a_row_program(),
        }
    )
    # A program that has a row to itself has a thread a group, or as many as leave it the registers for float64.
    width = min(max(triton.next_power_of_2(groups), 32), 128)
    launches = []
    for again, shape in enumerate((first,) if method == "fixed" else (first, second)):
        blocks = triton.cdiv(groups, shape["GROUPS"] * shape["TIMES"])
        launches += [
            Launch(sweep_kernel, (rows, blocks), WARP, sweep | shape | {"SECOND": bool(again)}),
            Launch(settle_kernel, (rows,), width, settle | {"SECOND": bool(again)}),
        ]
    if settings.truncates:
        # each half is told of the other's choices nothing that would have it compiled once more
        refine = {"CHOOSE": False, "DRAW": drawing.value, "GROUPS": 1, "seeds": None, "positions": None, "tokens": None}
        choose = {"REFINE": False, "METHOD": "fixed", "own": None}
        launches += [
            Launch(finish_kernel, (rows,), 256, finish | refine),
            *truncation(settings, logits, row, partial, masses),
            Launch(finish_kernel, (rows,), 256, finish | choose),
        ]
    else:
        launches.append(Launch(finish_kernel, (rows,), 256, finish))
    if want_log_q:
        whole = logits | {"row": row, "log_q": filled["log_q"], "s_log_q": vocab_size, "BLOCK": GROUP_SIZE}
        launches.append(Launch(log_q_kernel, (rows, groups), 128, whole))
    return launches, filled


def truncation(settings: Settings, logits: dict, row: Tensor, partial: Tensor, masses: Tensor) -> list[Launch]:
    """What comes between the solve and the draw: floors that say what is kept, and the groups' masses among it."""
    rows, groups, vocab_size = len(row), masses.shape[2], logits["vocab_size"]
    times = groups if triton.knobs.runtime.interpret else max(1, rows * groups // ENOUGH_PROGRAMS)
    grid = rows, triton.cdiv(groups, times)
    common = logits | {"row": row, "groups": groups}
    # [2, B, 4] and [2, B, groups, 16]: a pass reads what the last one wrote
    brackets = row.new_empty(2, rows, BRACKET_COLUMNS.value)
    divide = common | {"brackets": brackets, "sums": partial.new_empty(2, rows, groups, PARTS.value)}
    divide |= {"rows": rows, "times": times}

    def passes(which: tl.constexpr, k: int, p: float) -> list[Launch]:
        # exact; an integer would be compiled apart when it is 1, and when it is a multiple of 16
        amounts = [(True, halves("amount", float(k)))] if 0 < k < vocab_size else []
        if p < 1:
            amounts.append((False, halves("amount", 1 - p)))
        return [
            Launch(
                divide_kernel,
                grid if i < PASSES.value else (rows, 1),
                WARP,
                divide | amount | {"COUNT": count, "WHICH": which.value, "i_pass": i},
            )
            for count, amount in amounts
            for i in range(PASSES.value + 1)
        ]

    top = common | {"partial": partial, "s_partial": partial.stride(0), "GROUPS": triton.next_power_of_2(groups)}
    log_min_p = math.log(settings.min_p) if settings.min_p > 0 else 0.0
    sum_up = common | {"masses": masses, "times": times, "log_min_p": log_min_p, "HAS_MIN_P": settings.min_p > 0}
    return [
        *passes(OF_T, settings.target_top_k, settings.target_top_p),
        Launch(top_kernel, (rows,), 128, top),
        *passes(OF_Q, settings.top_k, settings.top_p),
        Launch(masses_kernel, grid, WARP, sum_up),
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
