"""q* in two sweeps over the logits, in Triton (theory/computation.md, «Two sweeps» and «The draw»).

The same launches for one row and for thousands, without a host synchronisation or an allocation that changes with the
data, so that a step can be captured in a CUDA graph:

1. `curve_kernel`, a program a chunk of a row: Σw, Σwd, Σwd² at seven equally spaced α, two exponentials a token. A
   token's weights at the nodes are a geometric sequence; starting from the larger end its ratio is at most 1, so
   nothing overflows whatever the logits are.
2. `solve_kernel`, a program a row: merges the chunks in float64 and reads α off the polynomial that matches F' and F''
   at all nodes.
3. `evaluate_kernel`, a program a chunk: F, F', F'', F(2 − α) and F(−α) at that α, and the masses of the groups of ids.
   Its exponents are taken relative to bounds on F that convexity gives from the nodes, so it carries no maxima.
4. `correct_kernel` and `evaluate_kernel` again: a Newton step and a sweep for rows whose residual is too large, which
   are rare under the KL rule; all others pass.
5. `finish_kernel`, a program a row: sweeps in float64 until the residual is small where float32 is not enough, draws,
   and reads the winning group again. With truncation `truncate_kernel` comes between the two.

A row is always cut into the same chunks whatever the batch is, and chunks are merged in one fixed order: this is what
makes a row's bits independent of its neighbours.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from qstar_kernels.gpu import scratch
from qstar_kernels.gpu.finish import finish_kernel, log_q_kernel
from qstar_kernels.gpu.sweep import correct_kernel, curve_kernel, evaluate_kernel, solve_kernel
from qstar_kernels.gpu.truncate import truncate_kernel
from qstar_kernels.noise import GROUP_SIZE
from qstar_kernels.types import FIELDS, METHODS, QStarStep, Settings

# Tokens of a program in the sweeps. Small enough for 16 programs on a row of 128k at batch 1, large enough that the
# reductions over the program's threads, some 20 instructions each, stay below a tenth of the work.
CHUNK = 8192

# Newton steps followed by a sweep of all programs before a row is left to one program. Rows that need none skip them at
# the price of a launch. The curve holds the root of the KL rule, but only a guess at that of the ESS rule.
CORRECTIONS = {"kl_symmetry": 1, "ess_balance": 3}

TILE_GROUPS = 4  # groups of ids in a tile of the second sweep: their four reductions over threads share a barrier


@lru_cache(maxsize=8)
def quadrature(device: torch.device) -> Tensor:
    """Weights that give F' − s at the nodes from F'' there: float64 [2, 8, 8], through all nodes and every second one.

    s is the mean of F' over [0, 1], so F'(x) − s = ∫ F''(y) (y − [y > x]) dy.
    """
    # whatever the default device is
    nodes = torch.arange(7, dtype=torch.float64, device="cpu") / 6
    weights = torch.zeros(2, 8, 8, dtype=torch.float64, device="cpu")
    for which, used in enumerate((range(7), range(0, 7, 2))):
        used = list(used)
        powers = torch.arange(len(used), device="cpu")
        # column j: coefficients of the polynomial that is 1 at node j and 0 at the others
        lagrange = torch.linalg.inv(nodes[used][:, None] ** powers)
        for k, x in enumerate(nodes):
            # ∫₀¹ y^(p+1) dy − ∫ₓ¹ y^p dy
            moments = 1 / (powers + 2.0) - (1 - x ** (powers + 1)) / (powers + 1.0)
            weights[which, k, used] = moments.double() @ lagrange
    return weights.to(device)


def lanes() -> int:
    """Sums a node that a program keeps: one a thread. The interpreter's time goes by operations, not by elements."""
    return 1024 if triton.knobs.runtime.interpret else 128


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
        warp = 64 if torch.version.hip else 32
        self.kernel[self.grid](**self.arguments, num_warps=max(1, self.threads // warp))


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
) -> tuple[list[Launch], tuple[QStarStep, Tensor | None]]:
    """The launches for at least one row, and what they fill; all sizes depend on B, V and the settings only.

    The logits are `aligned`.
    """
    rows, vocab_size = theta.shape
    method = METHODS.index(settings.method)
    tempering = settings.temperature if settings.temperature > 0 else 1.0
    chunks, groups = triton.cdiv(vocab_size, CHUNK), triton.cdiv(vocab_size, GROUP_SIZE)
    padded_chunks = triton.next_power_of_2(chunks)

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
    drawing = draw if draw in (scratch.SAMPLED, scratch.GREEDY) else scratch.NO_TOKEN

    partial = empty(rows, chunks, scratch.CURVE_COLUMNS.value)  # [B, C, 40]
    evaluated = empty(rows, chunks, scratch.EVALUATED_COLUMNS.value)  # [B, C, 8]
    masses = empty(rows, groups, dtype=torch.float64)  # [B, groups]
    row = empty(rows, scratch.ROW_COLUMNS.value, dtype=torch.float64)  # [B, 27]
    logits = {
        "theta": theta,
        "t": t,
        "vocab_size": vocab_size,
        "s_theta": theta.stride(0),
        "s_t": t.stride(0),
    } | halves("inv_temperature", 1 / tempering)
    # a load of 128 bits brings a thread its tokens of one row
    sub = 16 // max(theta.element_size(), t.element_size())
    alpha_range = halves("alpha_min", settings.alpha_min) | halves("alpha_max", settings.alpha_max)
    curve = {k: v for k, v in logits.items() if k != "inv_temperature_low"} | {
        "partial": partial,
        "s_partial": partial.stride(0),
        "TEMPERED": tempering != 1,
        "ENTROPIES": method == scratch.BY_ENTROPY.value,
        "CHUNK": CHUNK,
        "LANES": lanes(),
        "SUB": sub,
    }
    solve = alpha_range | halves("inv_temperature", 1 / tempering) | halves("fixed_alpha", settings.alpha)
    solve |= {
        "partial": partial,
        "row": row,
        "quadrature": quadrature(theta.device),
        "chunks": chunks,
        "TEMPERED": tempering != 1,
        "METHOD": method,
        "CHUNKS": padded_chunks,
    }
    evaluate = logits | {
        "row": row,
        "partial": evaluated,
        "masses": masses,
        "chunks": chunks,
        "groups": groups,
        "SLOPES": method == scratch.ESS_BALANCE.value,
        "DRAW": drawing.value,
        "CHUNK": CHUNK,
        "TILE_GROUPS": TILE_GROUPS,
        "SUB": sub,
    }
    correct = (
        alpha_range
        | {
            "row": row,
            "partial": evaluated,
            "chunks": chunks,
            "tol": settings.tol,
            "METHOD": method,
            "CHUNKS": padded_chunks,
        }
        | halves("inv_temperature", 1 / tempering)
    )
    finish = (
        logits
        | alpha_range
        | {
            "row": row,
            "partial": evaluated,
            "masses": masses,
            "seeds": seeds,
            "positions": positions,
            "tokens": tokens,
            "out": out,
            "statuses": status,
            "rows": rows,
            "chunks": chunks,
            "groups": groups,
            "tol": settings.tol,
            "METHOD": method,
            "DRAW": draw.value,
            "REFINE": True,
            "CHOOSE": True,
            "CHUNKS": padded_chunks,
            "GROUPS": triton.next_power_of_2(groups),
            "TILE_GROUPS": groups_of_a_row_program(),
        }
    )
    # 128 threads: a tile of the first sweep is then one 128-bit load a thread and row. A program that has a row to
    # itself has as many threads as leave it the registers for a float64 sweep.
    launches = [
        Launch(curve_kernel, (rows, chunks), 128, curve),
        Launch(solve_kernel, (rows,), 32, solve),
        Launch(evaluate_kernel, (rows, chunks), 128, evaluate),
    ]
    for _ in range(CORRECTIONS.get(settings.method, 0)):
        launches += [
            Launch(correct_kernel, (rows,), 32, correct),
            Launch(evaluate_kernel, (rows, chunks), 128, evaluate),
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
        choose = {"REFINE": False, "METHOD": scratch.FIXED.value, "CHUNKS": 1}
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
) -> tuple[QStarStep, Tensor | None]:
    """`qstar_reference` by the kernels; float32 fields. Logits are float32, bfloat16 or float16.

    Raises:
        ValueError: float64 logits.
    """
    for name, logits in (("logits_theta", theta), ("logits_t", t)):
        if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {logits.dtype}; the kernels take float32, bfloat16 or float16")
    launches, filled = plan(aligned(theta), aligned(t), settings, seeds, positions, tokens, want_log_q)
    if len(theta):
        with torch.cuda.device_of(theta):
            for launch in launches:
                launch()
    return filled
