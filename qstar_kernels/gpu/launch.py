"""q* from one sweep over the logits, in Triton (theory/computation.md, «One sweep» and «The draw»).

The same launches for one row and for thousands, without a host synchronisation or an allocation that changes with the
data, so that a step can be captured in a CUDA graph:

1. `sweep_kernel`, a warp some groups of 1024 ids: sums about α = ½ (about the α given, for the rule `fixed`).
2. `settle_kernel`, a program a row: α, the diagnostics and the groups' masses by Taylor's formula, and a bound on what
   that leaves out, which says whether they are accepted.
3. Both again about the α found, for rows that were not accepted; all others pass.
4. `finish_kernel`, a program a row: solves in float64 what is still not accepted, draws, and reads the winning group
   again. With truncation `truncate_kernel` comes between the two.

A row is always cut into the same groups whatever the batch is, and they are merged in one fixed order: this is what
makes a row's bits independent of its neighbours.
"""

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import triton
from torch import Tensor

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.finish import finish_kernel, log_q_kernel
from qstar_kernels.gpu.settle import settle_kernel
from qstar_kernels.gpu.sweep import sweep_kernel
from qstar_kernels.gpu.truncate import truncate_kernel
from qstar_kernels.noise import GROUP_SIZE
from qstar_kernels.types import BUDGETS, FIELDS, PER_ROW, QStarStep, Settings

WARP = 64 if torch.version.hip else 32
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

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments, num_warps=max(1, self.threads // WARP))


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


def plan(
    theta: Tensor,
    t: Tensor,
    settings: Settings,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    tokens: Tensor | None = None,
    want_log_q: bool = False,
    per_row: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[list[Launch], tuple[QStarStep, Tensor | None]]:
    """The launches for at least one row, and what they fill; all sizes depend on B, V and the settings only.

    The logits are `aligned`.
    """
    rows, vocab_size = theta.shape
    tempering = settings.temperature if settings.temperature > 0 else 1.0
    groups = triton.cdiv(vocab_size, GROUP_SIZE)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=theta.device)

    def count(k: int) -> float:
        """Exact; as an integer it would be compiled apart when it is 1, and when it is a multiple of 16."""
        return float(min(k, vocab_size))

    out = empty(len(FIELDS), rows)  # [8, B]
    status = empty(rows, dtype=torch.int64)  # [B]
    log_q = empty(rows, vocab_size) if want_log_q else None  # [B, V]
    draw = scratch.NO_TOKEN
    if seeds is not None:
        draw = scratch.SAMPLED if settings.temperature > 0 else scratch.GREEDY
        seeds, positions, tokens = seeds.contiguous(), positions.contiguous(), torch.empty_like(status)  # [B] each
    elif tokens is not None:
        draw, tokens = scratch.GIVEN, tokens.contiguous()
    step = QStarStep.of(out, status, tokens)
    # what asks only for the groups' masses need not be compiled twice
    drawing = draw if draw is scratch.SAMPLED else scratch.NO_TOKEN

    first, second = (tile(8 * max(theta.element_size(), t.element_size()), again) for again in (False, True))
    most = second["GROUPS"] * second["TIMES"]
    partial = empty(rows, triton.cdiv(groups, most) * most, scratch.GROUP_COLUMNS.value)  # [B, groups, 32]
    masses = empty(rows, 2, groups, dtype=torch.float64)  # [B, 2, groups], logarithms and what they may be off by
    row = empty(rows, scratch.ROW_COLUMNS.value, dtype=torch.float64)  # [B, 21]
    for i, name in enumerate(PER_ROW if per_row else ()):
        column = row[:, scratch.OWN.value + i]
        column.copy_(per_row[name]) if name in per_row else column.fill_(getattr(settings, name))
    # a budget that is one α for all rows is no budget
    given = None if per_row else settings.known_alpha
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
    rule |= {"tol": settings.tol, "METHOD": method, "OWN": bool(per_row)}
    center = halves("center", alpha)["center"]
    sums = {"row": row, "partial": partial, "s_partial": partial.stride(0), "center": center}
    sweep = {k: v for k, v in logits.items() if k != "inv_temperature_low"} | sums
    sweep |= {
        "EXTRA": method if method in ("entropy", "reverse_kl_symmetry") else "",
        "OWN": method if per_row and method in ("fixed", *BUDGETS) else "",
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
        truncate = (
            logits
            | halves("top_p", settings.top_p)
            | halves("target_top_p", settings.target_top_p)
            | {
                "row": row,
                "masses": masses,
                "groups": groups,
                "target_top_k": count(settings.target_top_k),
                "top_k": count(settings.top_k),
                "log_min_p": math.log(settings.min_p) if settings.min_p > 0 else 0.0,
                "HAS_TARGET_TOP_K": 0 < settings.target_top_k < vocab_size,
                "HAS_TARGET_TOP_P": settings.target_top_p < 1,
                "HAS_TOP_K": 0 < settings.top_k < vocab_size,
                "HAS_TOP_P": settings.top_p < 1,
                "HAS_MIN_P": settings.min_p > 0,
                "DRAW": drawing.value,
                "BLOCK_GROUPS": groups_of_a_row_program(),
            }
        )
        # each half is told of the other's choices nothing that would have it compiled once more
        refine = {"CHOOSE": False, "DRAW": drawing.value, "GROUPS": 1, "seeds": None, "positions": None, "tokens": None}
        choose = {"REFINE": False, "METHOD": "fixed", "OWN": False}
        launches += [
            Launch(finish_kernel, (rows,), 256, finish | refine),
            Launch(truncate_kernel, (rows,), 512, truncate),
            Launch(finish_kernel, (rows,), 256, finish | choose),
        ]
    else:
        launches.append(Launch(finish_kernel, (rows,), 256, finish))
    if log_q is not None:
        whole = logits | {"row": row, "log_q": log_q, "s_log_q": vocab_size, "BLOCK": GROUP_SIZE}
        launches.append(Launch(log_q_kernel, (rows, groups), 128, whole))
    return launches, (step, log_q)


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
    launches, filled = plan(aligned(theta), aligned(t), settings, seeds, positions, tokens, want_log_q, per_row)
    if len(theta):
        with torch.cuda.device_of(theta):
            for launch in launches:
                launch()
    return filled
