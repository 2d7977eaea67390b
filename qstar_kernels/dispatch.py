"""One step by whichever implementation: what all calls go through, eager or under torch's tracers.

A call through torch's dispatcher costs some 30 µs of host time, so the operator is taken only while tracing; with it
`torch.compile(fullgraph=True)` and `torch.export` pass through the sampler.
"""

import warnings
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from numbers import Integral
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qstar_kernels.cpu import launch as cpu
from qstar_kernels.reference import qstar_reference
from qstar_kernels.types import FIELDS, OF_ROW, PER_ROW, QStarStep, Settings, output_dtype

INDEX_TYPES, SETTING_TYPES = (torch.int64,), (torch.float32, torch.float64)
IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")
KINDS = {str: "str", float: "float", int: "SymInt"}
SCHEMA = (
    "(Tensor theta, Tensor t, Tensor? seeds, Tensor? positions, Tensor? tokens, bool want_log_q, str impl, "
    f"{', '.join(f'Tensor? {name}_of_rows' for name in PER_ROW)}, "
    f"{', '.join(f'{KINDS[f.type]} {f.name}' for f in fields(Settings))}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def step(
    impl: str,
    theta: Tensor,
    t: Tensor,
    settings: Settings,
    vocab_size: int | None = None,
    want_log_q: bool = False,
    per_row: Mapping[str, Tensor] = MappingProxyType({}),
    **index: Tensor,
) -> tuple[QStarStep, Tensor | None]:
    """Check the arguments, then do by `impl` what is asked for; the public functions are its faces.

    Args:
        impl, theta, t, vocab_size: as in `qstar_kernels.api.qstar_sample`.
        settings: the rule for α, temperature and truncation.
        want_log_q: return log q of the truncated distribution too.
        per_row: settings of each row, float32 or float64 [B], by their names (`PER_ROW`); they count for `settings`.
        **index: `seeds` and `positions` to draw, `tokens` to look up, int64 [B] each; without any, the diagnostics.

    Returns:
        the fields, and log q [B, V] or None; float64 for float64 logits, else float32.

    Raises:
        ValueError: shapes or vocabularies that do not fit; the message says what would.
    """
    theta, t = checked_rows(theta, t, vocab_size)
    for name, x in index.items():
        check(name, x, theta, INDEX_TYPES)
    for name, x in per_row.items():
        check(name, x, theta, SETTING_TYPES)
    if torch.compiler.is_compiling():
        return traced_step(impl, theta, t, settings, want_log_q, per_row, index)
    step, log_q = implementation(impl, theta, t)(theta, t, settings, want_log_q=want_log_q, per_row=per_row, **index)
    dtype = output_dtype(theta, t)
    return step.to(dtype), log_q if log_q is None else log_q.to(dtype)


def implementation(impl: str, theta: Tensor, t: Tensor):
    """The function behind `impl`."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
    device = theta.device.type
    if impl == "auto" and device == "cpu" and cpu.library() is None:
        warn_of_slowness()
    elif impl == "auto" and device == "cpu":
        impl = "cpu"
    elif impl == "auto" and device == "cuda" and output_dtype(theta, t) == torch.float32:
        impl = "triton"
    if impl == "triton":
        return kernels()
    return cpu.qstar_cpu if impl == "cpu" else qstar_reference


@cache
def kernels():
    """The path through the kernels. A machine without a GPU may lack Triton."""
    from qstar_kernels.gpu.launch import qstar_triton

    return qstar_triton


@cache
def warn_of_slowness() -> None:
    """Say once that the compiled CPU path is missing."""
    warnings.warn(
        "qstar_kernels was installed without its CPU kernel and falls back on the reference, which is exact but slow; "
        "install a C compiler, then the package again",
        stacklevel=4,
    )


def checked_rows(theta: Tensor, t: Tensor, vocab_size: int | None) -> tuple[Tensor, Tensor]:
    """Both rows as [B, V] over one vocabulary."""
    for name, logits in (("logits_theta", theta), ("logits_t", t)):
        if logits.ndim != 2 or not logits.is_floating_point() or logits.shape[1] == 0:
            raise ValueError(f"{name} is {logits.dtype} {list(logits.shape)}; it must be floating point [B, V], V > 0")
    if theta.shape[0] != t.shape[0] or theta.device != t.device:
        raise ValueError(
            f"logits_theta is {list(theta.shape)} on {theta.device} and logits_t {list(t.shape)} on {t.device}; "
            "both need the same rows on the same device"
        )
    if vocab_size is not None:
        smaller = min(theta.shape[1], t.shape[1])
        whole = isinstance(vocab_size, Integral) and not isinstance(vocab_size, bool)
        if not whole or not 0 < vocab_size <= smaller:
            raise ValueError(
                f"vocab_size is {vocab_size!r}; it must be an integer from 1 to {smaller}, the smaller row's length"
            )
        return theta[:, :vocab_size], t[:, :vocab_size]
    if theta.shape[1] != t.shape[1]:
        raise ValueError(
            f"logits_theta has {theta.shape[1]} columns and logits_t {t.shape[1]}; for one tokenizer padded "
            "differently pass vocab_size=, the tokenizer's length"
        )
    return theta, t


def parted(settings: dict[str, Any]) -> tuple[Settings, dict[str, Tensor]]:
    """The settings of a call, and those of them that are one number a row."""
    per_row = {name: x for name, x in settings.items() if isinstance(x, Tensor) and name in PER_ROW}
    if per_row:
        settings = {name: x for name, x in settings.items() if name not in per_row}
    return Settings(**settings), per_row


def check(name: str, x: Tensor, rows: Tensor, types: tuple[torch.dtype, ...]) -> None:
    """Refuse what is not [B] beside the rows, of one of the types."""
    if x.shape != rows.shape[:1] or x.dtype not in types or x.device != rows.device:
        accepted = " or ".join(str(dtype).removeprefix("torch.") for dtype in types)
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)} on {x.device}; "
            f"it must be {accepted} [{rows.shape[0]}] on {rows.device}"
        )


@torch.library.custom_op("qstar_kernels::step", mutates_args=(), schema=SCHEMA)
def step_op(theta, t, seeds, positions, tokens, want_log_q, impl, *rest):
    """Numbers [8, B] (`FIELDS`; [5, B] without a token), status [B], the drawn token [B], log q [B, V].

    What was not asked for has no elements.
    """
    own, settings = rest[: len(PER_ROW)], Settings(*rest[len(PER_ROW) :])
    per_row = {name: x for name, x in zip(PER_ROW, own, strict=True) if x is not None}
    run = implementation(impl, theta, t)
    step, log_q = run(theta, t, settings, seeds, positions, tokens, want_log_q, per_row)
    dtype = output_dtype(theta, t)
    return (
        torch.stack(step.numbers()).to(dtype),
        step.status,
        step.token if seeds is not None else step.status.new_empty(0),
        log_q.to(dtype) if want_log_q else theta.new_empty(0, dtype=dtype),
    )


@step_op.register_fake
def _(theta, t, seeds, positions, tokens, want_log_q, *rest):
    rows, dtype = theta.shape[0], output_dtype(theta, t)
    drawn = theta.new_empty(rows if seeds is not None else 0, dtype=torch.int64)
    count = len(OF_ROW if seeds is None and tokens is None else FIELDS)
    return (
        theta.new_empty(count, rows, dtype=dtype),
        theta.new_empty(rows, dtype=torch.int64),
        drawn,
        theta.new_empty(theta.shape if want_log_q else 0, dtype=dtype),
    )


def traced_step(
    impl: str,
    theta: Tensor,
    t: Tensor,
    settings: Settings,
    want_log_q: bool,
    per_row: dict[str, Tensor],
    index: dict[str, Tensor],
):
    """What `step` returns, through the operator."""
    seeds, positions, tokens = [index.get(name) for name in ("seeds", "positions", "tokens")]
    rest = (*(per_row.get(name) for name in PER_ROW), *settings.values())
    numbers, status, drawn, log_q = step_op(theta, t, seeds, positions, tokens, want_log_q, impl, *rest)
    return QStarStep.of(numbers, status, tokens if seeds is None else drawn), log_q if want_log_q else None
